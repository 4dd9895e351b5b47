"""A real S3 server for the ring: the one that M2RAY_TEST_S3 names, else one that scripts/s3_server starts for the session."""

import hashlib
import hmac
import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "s3_server"


@dataclass(frozen=True)
class S3Server:
    """A server that answers at `endpoint`, and a bucket of this session there."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str
    bucket: str

    def request(self, method: str, path: str, query: str = "") -> bytes:
        """One signed request (AWS Signature Version 4), for what m2ray itself never asks: buckets, unfinished uploads."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        host, empty = urlsplit(self.endpoint).netloc, hashlib.sha256().hexdigest()
        headers = {"host": host, "x-amz-content-sha256": empty, "x-amz-date": now}
        names = ";".join(headers)
        canonical_headers = "".join(f"{name}:{value}\n" for name, value in headers.items())
        canonical = "\n".join((method, quote(path), query, canonical_headers, names, empty))
        scope = f"{now[:8]}/{self.region}/s3/aws4_request"
        to_sign = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        key = f"AWS4{self.secret_key}".encode()
        for word in (*scope.split("/"), to_sign):
            digest = hmac.new(key, word.encode(), hashlib.sha256)
            key = digest.digest()
        authorization = f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, SignedHeaders={names}, Signature={digest.hexdigest()}"
        url = f"{self.endpoint}{quote(path)}" + (f"?{query}" if query else "")
        request = Request(url, method=method, headers={**headers, "Authorization": authorization})
        with urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content

    def unfinished_uploads(self, url: str) -> list[str]:
        """The keys of multipart uploads below `url` that were neither completed nor aborted."""
        listing = self.request("GET", f"/{self.bucket}", f"prefix={quote(urlsplit(url).path[1:], safe='')}&uploads=").decode()
        assert "<ListMultipartUploadsResult" in listing
        return re.findall(r"<Upload>.*?<Key>([^<]*)</Key>", listing)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """The server, with AWS_* in the environment as a user would have them."""
    folder = Path(tempfile.mkdtemp(prefix="m2ray-s3-", dir="/tmp"))
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    try:
        settings = dict(os.environ) if os.environ.get("M2RAY_TEST_S3") else _start(folder)
        endpoint, region = settings["M2RAY_TEST_S3"].rstrip("/"), settings.get("AWS_REGION", "us-east-1")
        absent = [name for name in names if not settings.get(name)]
        if absent:
            _none_can_be_had(f"M2RAY_TEST_S3 is set, but not {' and '.join(absent)}")
        server = S3Server(endpoint, settings[names[0]], settings[names[1]], region, f"m2ray-test-{uuid.uuid4().hex[:12]}")
        try:
            server.request("PUT", f"/{server.bucket}")
        except OSError as error:
            _none_can_be_had(f"{endpoint} refuses to make a bucket: {error}")
        with pytest.MonkeyPatch.context() as patch:
            values = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": region, names[0]: server.access_key, names[1]: server.secret_key}
            for name, value in values.items():
                patch.setenv(name, value)
            yield server
            _empty(server)
    finally:
        if (folder / "pids").exists():
            subprocess.run([SCRIPT, "down", folder], check=True, timeout=60)
        subprocess.run(["rm", "-rf", folder], check=True, timeout=60)


def _start(folder: Path) -> dict[str, str]:
    """Install and start a server; what it prints are shell assignments."""
    for words in (["install"], ["up", str(folder)]):
        done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=240, check=False)
        if done.returncode:
            _none_can_be_had((done.stderr.strip().splitlines() or [f"scripts/s3_server {words[0]} failed"])[-1])
    return dict(line.split("=", 1) for line in done.stdout.split())


def _none_can_be_had(why: str) -> None:
    """Skip in one line, or fail where M2RAY_REQUIRE_S3 is 1."""
    message = f"no S3 server: {why}"
    if os.environ.get("M2RAY_REQUIRE_S3") == "1":
        pytest.fail(f"{message} (M2RAY_REQUIRE_S3=1)", pytrace=False)
    pytest.skip(message)


def _empty(server: S3Server) -> None:
    from m2ray.storage import open_store

    store = open_store(f"s3://{server.bucket}")
    store.delete([key for key, _ in store.list("")])
    try:
        server.request("DELETE", f"/{server.bucket}")
    except HTTPError as error:
        assert error.code == 409, error  # objects that a proxy's faults left behind: the server's own folder goes anyway


@pytest.fixture
def url(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own in the bucket."""
    return f"s3://{s3.bucket}/{re.sub('[^a-z0-9]+', '-', request.node.name.lower())}-{uuid.uuid4().hex[:6]}"
