"""A warm chain's requests over HTTP: one deployment of Ray Serve, which asks the keeper.

    POST /v1/activations   {"prompts" | "messages" | "input_ids": [...], "sites": "residual:30", "tokens": "all"}

Whoever has the token of M2RAY_SERVE_TOKEN may ask; Ray is told no more than its SHA-256. The answer is safetensors, an error JSON.
"""

import asyncio
import hashlib
import hmac
import importlib
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import ray
import safetensors.torch

from m2ray.chain.failure import cause_of
from m2ray.chain.requests import MAX_REQUEST_BYTES, MAX_REQUESTS, Answer, Request
from m2ray.chain.served import NAMESPACE
from m2ray.chain.warm import as_ours, names
from m2ray.errors import (
    BusyError,
    ClusterError,
    ConfigError,
    M2rayError,
    PromptsError,
    StageError,
    StageMemoryError,
    TooLargeError,
)
from m2ray.extras import naming_extras

TOKEN = "M2RAY_SERVE_TOKEN"  # noqa: S105 - the name of the variable
PATH = "/v1/activations"

_PREFIX = "m2ray-"
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
"""Ray Serve's own actor, where it runs."""

_LEAST_CHARACTERS = 16
_READ_S = 60.0
"""What a request's body may take to come: until then it has one of the places."""

_ANSWER_S = 600.0
_STATUSES: Mapping[type[M2rayError], int] = {
    TooLargeError: 413,
    StageMemoryError: 413,
    BusyError: 429,
    ConfigError: 422,
    PromptsError: 422,
    ClusterError: 503,
    StageError: 503,
}
"""Of m2ray's errors; of any other 500."""


class Response(NamedTuple):
    """What goes back: the status, the headers, and the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Front:
    """Answers over HTTP, in one process; each request is looked at before its body is read.

    Args:
        name: of the chain.
        token_digest: SHA-256 of the token, 64 hex digits.
        ask: what answers a request; by default the chain's keeper.
    """

    def __init__(self, name: str, token_digest: str, ask: Callable[[Request], Awaitable[Answer]] | None = None) -> None:
        self._name = name
        self._token_digest = token_digest
        self._ask = ask or self._ask_keeper
        self._at_work = 0

    async def __call__(self, request: Any) -> Any:
        """One request of Ray Serve."""
        from starlette.responses import Response as Sent

        found = await self.respond(request.method, request.url.path, request.headers, request.stream())
        return Sent(found.body, found.status, dict(found.headers))

    async def respond(self, method: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> Response:
        """The answer to a request, whatever is wrong with it. `headers` by lower-case names."""
        refused = self._refusal(method, path, headers)
        if refused is not None:
            return refused
        self._at_work += 1
        try:
            try:
                came = await asyncio.wait_for(_read(headers, body), _READ_S)
            except TimeoutError:
                return _refused(408, ConfigError(f"The body did not come within {_READ_S:g} s.", "Ask again over a quicker connection."))
            answer = await asyncio.wait_for(self._ask(_parsed(came)), _ANSWER_S)
            sent = await asyncio.to_thread(lambda: safetensors.torch.save(answer.tensors(), {"compute_dtype": answer.compute_dtype}))
            return Response(200, {"Content-Type": "application/vnd.safetensors"}, sent)
        except M2rayError as error:
            return _as_response(error)
        except TimeoutError:
            return _as_response(ClusterError(f"No answer came within {_ANSWER_S:g} s.", "Ask again."))
        finally:
            self._at_work -= 1

    def _refusal(self, method: str, path: str, headers: Mapping[str, str]) -> Response | None:
        """Why a request is not even read."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(digest_of(token.strip()), self._token_digest):
            wrong = ConfigError("The token is missing or wrong.", "Send `Authorization: Bearer TOKEN`.")
            return _refused(401, wrong, {"WWW-Authenticate": "Bearer"})
        if not path.endswith(PATH):
            return _refused(404, ConfigError(f"There is nothing at {path}.", f"Ask at {PATH}."))
        if method != "POST":
            return _refused(405, ConfigError(f"{method} is not answered.", "Send POST."), {"Allow": "POST"})
        if self._at_work >= MAX_REQUESTS:
            return _as_response(BusyError(f"{self._at_work} requests are at work, as many as may be.", "Ask again in a moment."))
        return None

    async def _ask_keeper(self, request: Request) -> Answer:
        try:
            answer: Answer = await ray.get_actor(self._name, NAMESPACE).answer.remote(request)
        except ValueError as error:
            raise ClusterError(f"The chain {self._name} is gone.", "`m2ray serve` starts it again.") from error
        except ray.exceptions.RayError as error:
            raise as_ours(error) from error
        return answer


async def _read(headers: Mapping[str, str], body: AsyncIterator[bytes]) -> bytes:
    """A request's body. Raises TooLargeError as soon as it is too large, unread where it says so itself."""
    too_large = TooLargeError(f"A request has at most {MAX_REQUEST_BYTES:,} bytes.", "Ask for fewer prompts at a time.")
    said = headers.get("content-length", "0")
    if said.isdecimal() and int(said[:20]) > MAX_REQUEST_BYTES:
        raise too_large
    read = bytearray()
    async for piece in body:
        read += piece
        if len(read) > MAX_REQUEST_BYTES:
            raise too_large
    return bytes(read)


def _parsed(body: bytes) -> Request:
    """Raises ConfigError or PromptsError."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The body is no JSON: {error}.", "Send an object with prompts, messages or input_ids, and sites.") from error
    if not isinstance(asked, dict):
        raise ConfigError(
            f"The body is not an object but {type(asked).__name__}.", "Send an object with prompts, messages or input_ids, and sites."
        )
    return Request.of(asked)


def _as_response(error: M2rayError) -> Response:
    status = next((_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES), 422 if type(error) is M2rayError else 500)
    return _refused(status, error, {"Retry-After": "1"} if status in (429, 503) else {})


def _refused(status: int, error: M2rayError, headers: Mapping[str, str] = {}) -> Response:
    told = {"error": type(error).__name__, "what": error.what, "remedy": error.remedy}
    return Response(status, {"Content-Type": "application/json", **headers}, json.dumps(told).encode())


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def required_token() -> str:
    """The token that requests have to bring. Raises ConfigError, and MissingPackageError where Ray Serve is not installed."""
    with naming_extras():
        importlib.import_module("ray.serve")  # whole: others bring parts of what it needs, and it would fail once the chain is loaded
    token = os.environ.get(TOKEN, "")
    if len(token) < _LEAST_CHARACTERS:
        raise ConfigError(
            f"{TOKEN} has to hold the token of requests, of {_LEAST_CHARACTERS} characters or more.",
            f"export {TOKEN}=$(openssl rand -hex 32)",
        )
    return token


def start_http(name: str, host: str, port: int, route: str) -> None:
    """Answer a chain's requests at this address. Raises as `required_token`, and ClusterError where Ray Serve cannot."""
    token = required_token()
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    served = serve.deployment(name="front", max_ongoing_requests=2 * MAX_REQUESTS, ray_actor_options={"num_cpus": 0}, logging_config=quiet)(
        Front
    )
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet)
        _require_listening(host, port)
        serve.run(served.bind(name, digest_of(token)), name=_application(name), route_prefix=route)
    except (ray.exceptions.RayError, serve.exceptions.RayServeException, RuntimeError, TimeoutError, ValueError) as error:
        why = (str(cause_of(error)).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ClusterError(
            f"Ray Serve does not answer at http://{host}:{port}{route}: {why}.",
            "Name a port and a host that are free on the head node, and a route that no other chain has (--http-port, --http-host, --http-route).",
        ) from error


def _require_listening(host: str, port: int) -> None:
    """Raise ClusterError where Ray Serve ran already and listens elsewhere: it stays there, whatever it is told, and says no word."""
    from ray.serve.context import _get_global_client  # Ray has no public name for what it listens at

    options = _get_global_client().http_config
    if (options.host, options.port) != (host, port):
        raise ClusterError(
            f"Ray Serve runs in this cluster already, at {options.host}:{options.port}, and cannot listen at {host}:{port} too.",
            f"Give --http-host {options.host} --http-port {options.port}, and a --http-route of the chain's own.",
        )


def stop_http(name: str) -> None:
    """Answer a chain's requests no longer, if they are. Ray Serve ends with its last application."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if _application(name) in serve.status().applications:  # else it was never there, or somebody has ended Ray Serve
        serve.delete(_application(name))
    if not serve.status().applications:
        serve.shutdown()


def stop_left_behind() -> list[str]:
    """Have nothing answer any longer for chains whose keepers were killed, and so could not see to it. Returns the chains' names."""
    if not any(actor["name"] == _CONTROLLER for actor in ray.util.list_named_actors(all_namespaces=True)):
        return []
    with naming_extras():
        from ray import serve
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    answering = [name.removeprefix(_PREFIX) for name in serve.status().applications if name.startswith(_PREFIX)]
    there = names()  # asked last: a chain is there before anything answers for it
    left = [name for name in answering if name not in there]
    for name in left:
        stop_http(name)
    return left


def _application(name: str) -> str:
    """Ray Serve's name of it."""
    return f"{_PREFIX}{name}"
