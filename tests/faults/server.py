"""A real S3 server that can be restarted, taken away and made to refuse a key, with the faulty proxy before it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.store.conftest import SCRIPT, S3Server
from tests.store.faulty_proxy import FaultyProxy, faulty_proxy

_BUCKET = "m2ray-faults"
_TIMEOUT_S = 240.0


class FaultyServer:
    """Clients go through `proxy`. `s3` is the server itself, `env` what a client needs beside the endpoint in a run's URL."""

    def __init__(self, folder: Path, settings: dict[str, str], proxy: FaultyProxy) -> None:
        self._folder = folder
        self.proxy = proxy
        self.env = {name: settings[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")}
        self.s3 = S3Server(
            settings["M2RAY_TEST_S3"], self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"], self.env["AWS_REGION"], _BUCKET
        )

    def url(self, name: str, *, is_direct: bool = False) -> str:
        """A folder of the bucket as a user writes it, behind the proxy or not."""
        return f"s3://{_BUCKET}/{name}?endpoint={self.s3.endpoint if is_direct else self.proxy.endpoint}"

    def stop(self) -> None:
        """End the server; connections are refused."""
        self.proxy.refuse()
        _script("down", str(self._folder))

    def start(self) -> None:
        """Start it again, with the same data at the same place."""
        _script("up", str(self._folder))
        self.proxy.listen()

    def revoke_key(self) -> None:
        """The access key is unknown from now on."""
        self._admin("key", "rm", "--uid=m2ray", f"--access-key={self.s3.access_key}")

    def restore_key(self) -> None:
        """The access key holds again."""
        self._admin("key", "create", "--uid=m2ray", f"--access-key={self.s3.access_key}", f"--secret-key={self.s3.secret_key}")

    def _admin(self, *words: str) -> None:
        env = {**os.environ, "CEPH_CONF": str(self._folder / "ceph.conf"), "CEPH_ARGS": f"--conf {self._folder / 'ceph.conf'}"}
        subprocess.run(["radosgw-admin", *words], env=env, capture_output=True, timeout=60, check=True)


@contextmanager
def faulty_server() -> Iterator[FaultyServer]:
    """A server of its own with an empty bucket, gone after. Raises FileNotFoundError where none can be had."""
    folder = Path(tempfile.mkdtemp(prefix="m2ray-s3-", dir="/tmp"))
    try:
        settings = dict(line.split("=", 1) for line in _script("up", str(folder)).split())
        with faulty_proxy(settings["M2RAY_TEST_S3"]) as proxy:
            server = FaultyServer(folder, settings, proxy)
            server.s3.request("PUT", f"/{_BUCKET}")
            yield server
    finally:
        _script("down", str(folder))
        shutil.rmtree(folder, ignore_errors=True)


def _script(*words: str) -> str:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise FileNotFoundError(done.stderr.strip())
    return done.stdout
