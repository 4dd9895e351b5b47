"""A warm chain's answers over HTTP: who may ask, what is refused and how. What answers is made up, and nothing listens."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.torch
import torch
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException

from m2ray.batches import TOKEN_ROW
from m2ray.chain import http as module
from m2ray.chain.http import Front, Response, digest_of, required_token, start_http, stop_http
from m2ray.chain.requests import MAX_REQUEST_BYTES, Answer, Request
from m2ray.cli.serve import ServeConfig
from m2ray.errors import (
    BusyError,
    ClusterError,
    ConfigError,
    M2rayError,
    MissingPackageError,
    PromptsError,
    StageMemoryError,
    StoreError,
    TooLargeError,
)

SECRET = "0123456789abcdef"
ASKED = {"prompts": ["sea"], "sites": "residual:30"}
ROWS = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)


async def answering(request: Request) -> Answer:
    assert request.prompts == ["sea"]
    return Answer(np.array([(0, 0, 7), (0, 1, 8)], TOKEN_ROW), {"residual.30": ("bfloat16", ROWS.view(torch.uint8).numpy())})


def sent(
    front: Front, body: bytes | None = None, method: str = "POST", path: str = "/v1/activations", size: int = 7, **headers: str
) -> Response:
    """What goes back; the body comes in pieces."""
    whole = json.dumps(ASKED).encode() if body is None else body

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(whole), size):
            yield whole[start : start + size]

    return asyncio.run(front.respond(method, path, {"authorization": f"Bearer {SECRET}", **headers}, pieces()))


def front(ask: Any = answering) -> Front:
    return Front("chain", digest_of(SECRET), ask)


def test_rows_come_back_as_safetensors() -> None:
    response = sent(front())
    assert (response.status, response.headers["Content-Type"]) == (200, "application/vnd.safetensors")
    found = safetensors.torch.load(response.body)
    assert found["residual.30"].equal(ROWS)
    assert {name: found[name].tolist() for name in ("sequence", "position", "token_id")} == {
        "sequence": [0, 0],
        "position": [0, 1],
        "token_id": [7, 8],
    }


@pytest.mark.parametrize("given", ["", "Bearer", f"Bearer {SECRET}0", f"Basic {SECRET}", SECRET, "Bearer é\udcff"])
def test_who_has_no_token_learns_nothing(given: str) -> None:
    response = sent(front(), path="/elsewhere", authorization=given)
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert SECRET not in response.body.decode()


@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        ({"path": "/v1/other"}, 404, "/v1/other"),
        ({"method": "GET"}, 405, "GET"),
        ({"body": b"{"}, 422, "no JSON"),
        ({"body": b"[" * 20_000}, 422, "no JSON"),
        ({"body": b"\xff"}, 422, "no JSON"),
        ({"body": b"[]"}, 422, "not an object but list"),
        ({"body": b'{"input_ids": ' + b"[" * 600 + b"]" * 600 + b', "sites": "residual:0"}'}, 422, "100 deep"),
        ({"body": b'{"sites": "residual:0"}'}, 422, "has none"),
        ({"body": b'{"nonsense": 1}'}, 422, "3 problems"),
        ({"body": b" " * (MAX_REQUEST_BYTES + 1), "size": 1 << 20}, 413, "at most"),
    ],
)
def test_what_is_refused_says_what_to_do(asked: dict[str, Any], status: int, words: str) -> None:
    response = sent(front(), **asked)
    told = json.loads(response.body)
    assert response.status == status
    assert words in told["what"]
    assert set(told) == {"error", "what", "remedy"}


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    headers = {"authorization": f"Bearer {SECRET}", "content-length": str(MAX_REQUEST_BYTES + 1)}
    assert asyncio.run(front().respond("POST", "/v1/activations", headers, never())).status == 413


def test_a_body_that_does_not_come_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REQUESTS", 1)
    monkeypatch.setattr(module, "_READ_S", 0.1)

    async def stalls() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    one = front()
    late = asyncio.run(one.respond("POST", "/v1/activations", {"authorization": f"Bearer {SECRET}"}, stalls()))
    assert (late.status, sent(one).status) == (408, 200)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PromptsError("a"), 422),
        (ConfigError("a"), 422),
        (M2rayError("2 problems were found:"), 422),
        (TooLargeError("a"), 413),
        (StageMemoryError("a", "b", 1, 2), 413),
        (BusyError("a"), 429),
        (ClusterError("a"), 503),
        (StoreError("a"), 500),
    ],
)
def test_each_error_has_its_status(error: M2rayError, status: int) -> None:
    async def fails(_: Request) -> Answer:
        raise error

    response = sent(front(fails))
    assert response.status == status
    assert json.loads(response.body)["error"] == type(error).__name__
    assert ("Retry-After" in response.headers) == (status in (429, 503))


def test_as_many_as_may_be_are_at_work_and_the_next_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REQUESTS", 1)

    async def both() -> list[int]:
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def waits(request: Request) -> Answer:
            entered.set()
            await go_on.wait()
            return await answering(request)

        async def body() -> AsyncIterator[bytes]:
            yield json.dumps(ASKED).encode()

        one, headers = front(waits), {"authorization": f"Bearer {SECRET}"}
        first = asyncio.create_task(one.respond("POST", "/v1/activations", headers, body()))
        await entered.wait()
        second = await one.respond("POST", "/v1/activations", headers, body())
        go_on.set()
        return [second.status, (await first).status, (await one.respond("POST", "/v1/activations", headers, body())).status]

    assert asyncio.run(both()) == [429, 200, 200]


def test_a_token_has_to_be_there_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", object())
    monkeypatch.delenv("M2RAY_SERVE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="M2RAY_SERVE_TOKEN"):
        required_token()
    monkeypatch.setenv("M2RAY_SERVE_TOKEN", "short")
    with pytest.raises(ConfigError, match="16 characters") as raised:
        required_token()
    assert "short" not in str(raised.value)
    monkeypatch.setenv("M2RAY_SERVE_TOKEN", SECRET)
    assert required_token() == SECRET


@pytest.mark.parametrize("absent", ["starlette", "grpc_reflection"])
def test_without_all_of_ray_serve_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    """One that another package needs too may be there without the others."""

    def importing(_: str) -> None:
        raise ModuleNotFoundError(f"No module named {absent!r}", name=absent)

    monkeypatch.setattr("importlib.import_module", importing)
    with pytest.raises(MissingPackageError, match=r"m2ray\[serve\]"):
        required_token()


def test_what_ray_serve_cannot_do_is_told_in_a_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> NoReturn:
        raise RayServeException('Prefix / is being used by application "m2ray-other".\nTraceback')

    monkeypatch.setenv("M2RAY_SERVE_TOKEN", SECRET)
    monkeypatch.setattr(serve, "start", refuse)
    with pytest.raises(ClusterError) as caught:
        start_http("chain", "127.0.0.1", 8000, "/")
    assert caught.value.what == 'Ray Serve does not answer at http://127.0.0.1:8000/: Prefix / is being used by application "m2ray-other".'
    assert "--http-route" in caught.value.remedy


def test_ray_serve_that_listens_elsewhere_is_named_and_one_that_is_gone_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setenv("M2RAY_SERVE_TOKEN", SECRET)
    for name, does in (("start", lambda **_: None), ("run", never), ("delete", never), ("shutdown", lambda: None)):
        monkeypatch.setattr(serve, name, does)
    there = SimpleNamespace(http_config=HTTPOptions(host="127.0.0.1", port=8000))
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: there)
    with pytest.raises(ClusterError, match=r"already, at 127\.0\.0\.1:8000, and cannot listen at 127\.0\.0\.1:9000 too.*--http-port 8000"):
        start_http("chain", "127.0.0.1", 9000, "/")
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    stop_http("chain")


def test_a_port_and_a_route_that_are_none_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig.validated({"model": "folder", "http_port": 65536, "http_route": "m2/"})
    assert "http_port = 65536 is not less than or equal to 65535" in str(caught.value)
    assert "http_route = 'm2/' is not a path such as /m2" in str(caught.value)
    assert ServeConfig.validated({"model": "folder", "http_route": "/a/b"}).http_route == "/a/b"
