"""ObjectStore against a real S3 server behind a proxy that misbehaves: refused, repeated, or told clearly."""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from m2ray.activations.writing.writer import ActivationWriter
from m2ray.batches import CapturedLayer, MicroBatch, PartSpec
from m2ray.errors import StoreError
from m2ray.storage import Store, connect, open_store
from tests.store.conftest import S3Server
from tests.store.faulty_proxy import FaultyProxy, faulty_proxy

CONTENT = os.urandom(100_000)
LARGE = os.urandom(20_000_000)


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3.endpoint) as started:
        yield started


@pytest.fixture
def store(proxy: FaultyProxy, url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Through the proxy, named in the URL: the environment still names the server itself."""
    monkeypatch.setattr(connect, "patience", lambda: connect.AT_WORK._replace(request_s=1))
    return open_store(f"{url}?endpoint={proxy.endpoint}&region=us-east-1&virtual_hosted_style=false")


def test_a_store_that_ignores_create_if_absent_is_refused(store: Store, proxy: FaultyProxy, s3: S3Server) -> None:
    proxy.before_create = lambda path: s3.request("DELETE", unquote(path))  # as good as ignoring the condition, which is signed
    with pytest.raises(StoreError, match="If-None-Match is ignored"):
        store.probe()
    proxy.before_create = lambda path: None
    store.probe()
    assert list(store.list("")) == []


def test_the_urls_endpoint_goes_before_the_environments(store: Store, proxy: FaultyProxy) -> None:
    store.put("key", b"1")
    assert proxy.seen == {"PUT": 1}
    assert store.url.endswith(f"?endpoint={proxy.endpoint}&region=us-east-1&virtual_hosted_style=false")
    assert open_store(store.url).read("key") == b"1"
    assert store.where("key").endswith("/key")
    assert "?" not in store.where("key")


def write_part(store: Store) -> bool:
    sink = store.open_part("part")
    sink.write(LARGE)
    sink.close()
    return store.size("part") == len(LARGE)


OPERATIONS: dict[str, Callable[[Store], bool]] = {
    "size": lambda store: store.size("there") == len(CONTENT),
    "read": lambda store: store.read("there") == CONTENT,
    "read a range": lambda store: store.read_range("there", 5, 90_000) == CONTENT[5:90_005],
    "list": lambda store: list(store.list("")) == [("there", len(CONTENT))],
    "put": lambda store: store.put("new", CONTENT) is None and store.read("new") == CONTENT,
    "delete": lambda store: store.delete(["there"]) is None and store.size("there") is None,
    "write a part": write_part,
}


@pytest.mark.parametrize("fault", ["503", "drop", "lose", "hang"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_request_without_a_good_answer_is_repeated(store: Store, proxy: FaultyProxy, fault: str, operation: str) -> None:
    store.put("there", CONTENT)
    proxy.faults = deque([fault, fault])
    assert OPERATIONS[operation](store)
    assert not proxy.faults, "the faults were met"


@pytest.mark.parametrize("operation", ["read", "read a range"])
def test_a_body_cut_short_is_read_on(store: Store, proxy: FaultyProxy, operation: str) -> None:
    store.put("there", CONTENT)
    proxy.faults = deque(["cut", "cut"])
    assert OPERATIONS[operation](store)
    assert not proxy.faults


@pytest.mark.parametrize("fault", ["503", "drop"])
def test_create_is_repeated_while_nothing_was_created(store: Store, proxy: FaultyProxy, fault: str) -> None:
    proxy.faults = deque([fault, fault])
    store.create("commit", b"mine")
    assert store.read("commit") == b"mine"


@pytest.mark.parametrize("fault", ["lose", "hang"])
def test_create_whose_answer_was_lost_finds_the_object_there(store: Store, proxy: FaultyProxy, fault: str) -> None:
    proxy.faults = deque([fault])
    with pytest.raises(StoreError, match="commit exists already"):
        store.create("commit", b"mine")
    assert store.read("commit") == b"mine"
    proxy.faults = deque([fault])
    store.probe()


@pytest.mark.parametrize("fault", ["503", "lose", "hang"])
def test_an_upload_whose_completion_got_no_answer_is_whole(store: Store, proxy: FaultyProxy, s3: S3Server, fault: str) -> None:
    proxy.applies_to = lambda method, path: method == "POST" and "uploadId" in path
    proxy.faults = deque([fault])
    assert write_part(store)
    assert store.read("part") == LARGE
    assert not proxy.faults
    assert s3.unfinished_uploads(store.url) == []


PIECE = "partNumber="


@pytest.mark.parametrize("fault", ["503", "drop", "lose", "hang"])
def test_a_piece_of_an_upload_without_a_good_answer_is_sent_again(store: Store, proxy: FaultyProxy, s3: S3Server, fault: str) -> None:
    proxy.applies_to = lambda method, path: method == "PUT" and PIECE in path
    proxy.faults = deque([fault] * 3)
    assert write_part(store)
    assert store.read("part") == LARGE
    assert not proxy.faults
    assert proxy.seen["PUT"] == 3 + 3, "three pieces of at most 8 MiB, three times in vain"
    assert s3.unfinished_uploads(store.url) == []


@pytest.mark.parametrize("writes", [1, 10])
def test_an_upload_that_cannot_go_on_is_an_error_and_leaves_nothing(
    url: str, proxy: FaultyProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """With one, all pieces are on their way at once, and what becomes of them is told on closing."""
    monkeypatch.setattr(connect, "patience", lambda: connect.AT_WORK._replace(retry_s=1))
    store = open_store(f"{url}?endpoint={proxy.endpoint}")
    proxy.applies_to = lambda method, path: method == "PUT" and PIECE in path
    proxy.faults = deque(["503"] * 10_000)
    sink = store.open_part("part")
    with pytest.raises(StoreError, match="Cannot write .*part: .*SlowDown"):
        for _ in range(writes):
            sink.write(LARGE)
        sink.close()
    proxy.faults.clear()
    sink.abort()
    assert store.size("part") is None
    assert s3.unfinished_uploads(url) == []


def test_a_server_that_stays_away_is_an_error_by_the_deadline(url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "patience", lambda: connect.AT_WORK._replace(retry_s=2))
    store = open_store(f"{url}?endpoint={proxy.endpoint}")
    proxy.faults = deque(["503"] * 10_000)
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"key: .*503.*SlowDown"):
        store.read("key")
    assert 1 < time.monotonic() - begin < 20
    assert proxy.seen["GET"] > 3


@pytest.mark.parametrize("operation", [*OPERATIONS, "create"])
def test_a_server_that_is_gone_is_an_error_by_the_deadline(
    url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(connect, "patience", lambda: connect.AT_WORK._replace(retry_s=3))
    store = open_store(f"{url}?endpoint={proxy.endpoint}")
    proxy.refuse()
    begin = time.monotonic()
    with pytest.raises(StoreError, match=f"Cannot .* {re.escape(store.where(''))}"):
        store.create("new", b"1") if operation == "create" else OPERATIONS[operation](store)
    assert 1 < time.monotonic() - begin < 6
    proxy.listen()


def test_on_loopback_bodies_are_not_hashed_for_their_signature(store: Store, proxy: FaultyProxy) -> None:
    store.put("key", CONTENT)
    assert write_part(store)
    assert proxy.payloads == {"UNSIGNED-PAYLOAD"}


# -- errors ---------------------------------------------------------------------------------------------------------------


def test_wrong_credentials_are_named_and_not_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-key")
    with pytest.raises(StoreError) as caught:
        open_store(url).probe()
    text = "".join(str(part) for part in (caught.value, repr(caught.value), caught.value.__cause__))
    assert "Check the credentials" in text
    assert "SignatureDoesNotMatch" in text
    for secret in ("not-the-secret-key", os.environ["AWS_ACCESS_KEY_ID"], "Signature=", "Debug"):
        assert secret not in text


def test_what_an_attempt_that_fails_has_uploaded_is_given_up(url: str, proxy: FaultyProxy, s3: S3Server) -> None:
    """The writer itself: a micro-batch of 40 MB is on its way, then the attempt is abandoned."""
    spec, num_tokens = PartSpec.of("residual", 0, "bfloat16", 2048), 10_000
    micro_batch = MicroBatch(0, 0, False, np.array([0]), np.array([num_tokens], np.int32), np.zeros((1, num_tokens), np.int32))
    rows = np.zeros((num_tokens, 4096), np.uint8)
    writer = ActivationWriter(open_store(f"{url}?endpoint={proxy.endpoint}"), {}, [spec], queue_bytes=1 << 30, threads=1)
    writer.submit("a1", micro_batch, [CapturedLayer("residual", 0, (rows,))], 60)
    deadline = time.monotonic() + 60
    while writer.backlog.queued_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(s3.unfinished_uploads(url)) == 1
    writer.abandon([(0, "a1")])
    writer.close()
    assert s3.unfinished_uploads(url) == []
    assert list(open_store(url).list("")) == []


def test_an_absent_bucket_is_named(s3: S3Server) -> None:
    with pytest.raises(StoreError, match=r"s3://m2ray-no-such-bucket/x/_probe.*no such bucket"):
        open_store("s3://m2ray-no-such-bucket/x").probe()


def test_no_credentials_at_all_is_said(s3: S3Server, proxy: FaultyProxy) -> None:
    """In a process of its own: the chain goes on to the metadata service, which answers 403 here."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env |= {"AWS_ENDPOINT_URL": s3.endpoint, "AWS_METADATA_ENDPOINT": proxy.endpoint}
    code = "from m2ray.storage import open_store; open_store('s3://bucket/x').probe()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False, cwd=Path.cwd())
    assert "no credentials are in the environment" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("?secret_access_key=hunter2", "'secret_access_key'.*environment"),
        ("?account_key=hunter2", "'account_key'.*environment"),
        ("?session_token=hunter2&region=x", "'session_token'"),
        ("?endpoint=http://me:hunter2@host", "comes with a user, a query or a fragment"),
        ("?colour=hunter2", "'colour'.*endpoint, region"),
        ("?virtual_hosted_style=hunter2", "true or false"),
    ],
)
def test_what_a_url_must_not_hold(ending: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_store(f"s3://bucket/run{ending}")
    assert "virtual" in ending or "hunter2" not in str(caught.value)


@pytest.mark.parametrize("malformed", ["s3://", "s3:///key", "s3://me:hunter2@bucket/run", "gs://?endpoint=x"])
def test_a_url_without_a_plain_bucket_is_refused(malformed: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(malformed)
    assert "hunter2" not in str(caught.value)


def test_odd_prefixes_are_taken_as_they_are(url: str) -> None:
    odd = open_store(f"{url}/a b#c%20d/part-?.x")
    odd.put("key", b"1")
    assert [key for key, _ in open_store(url).list("")] == ["a b#c%20d/part-?.x/key"]
    assert odd.read("key") == b"1"
