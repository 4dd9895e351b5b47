"""ObjectStore: a prefix of an S3, Google Cloud Storage or Azure bucket, through obstore."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError as ObjectExistsError
from obstore.exceptions import BaseError
from obstore.store import from_url

from m2ray.errors import AlreadyExistsError, StoreError
from m2ray.storage.store import Data, PartSink, Store

SCHEMES = ("s3", "gs", "az")

_UPLOAD_BYTES = 8 << 20
_UPLOADS_AT_ONCE = 4
_REQUEST_TIMEOUT_S = 60
_RETRY_TIMEOUT_S = 180
_MAX_RETRIES = 12


class ObjectStore(Store):
    """One bucket's prefix. Requests are retried with backoff, for three minutes at most, and then fail with StoreError."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        options: Any = {"timeout": f"{_REQUEST_TIMEOUT_S}s", "connect_timeout": "10s"}
        retry: Any = {"max_retries": _MAX_RETRIES, "retry_timeout": timedelta(seconds=_RETRY_TIMEOUT_S)}
        settings: dict[str, Any] = {}
        if self.url.startswith("s3://"):
            is_plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
            options["allow_http"] = is_plain
            # TLS protects the body; hashing it again costs three quarters of the client's time.
            settings["unsigned_payload"] = True
        with self.naming("open", ""):
            self._store: Any = from_url(self.url, client_options=options, retry_config=retry, **settings)

    def size(self, key: str) -> int | None:
        with self.naming("look at", key):
            try:
                return int(obstore.head(self._store, key)["size"])
            except FileNotFoundError:
                return None

    def read(self, key: str) -> bytes:
        with self.naming("read", key):
            return bytes(obstore.get(self._store, key).bytes())

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        if not len(out):
            return
        with self.naming("read", key):
            data = obstore.get_range(self._store, key, start=offset, length=len(out))
        if len(data) != len(out):
            raise StoreError(f"{self._name(key)} ends at byte {offset + len(data)}, but bytes {offset} to {offset + len(out)} are needed.")
        out[:] = memoryview(data)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        with self.naming("list", prefix):
            for page in obstore.list(self._store, prefix or None):
                for entry in page:
                    yield entry["path"], entry["size"]

    def create(self, key: str, data: Data) -> None:
        with self.naming("write", key):
            obstore.put(self._store, key, bytes(data), mode="create")

    def put(self, key: str, data: Data) -> None:
        with self.naming("write", key):
            obstore.put(self._store, key, bytes(data))

    def open_part(self, key: str) -> PartSink:
        with self.naming("write", key):
            return _ObjectSink(
                self, key, obstore.open_writer(self._store, key, buffer_size=_UPLOAD_BYTES, max_concurrency=_UPLOADS_AT_ONCE)
            )

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self.naming("delete", key):
                try:
                    obstore.delete(self._store, key)
                except FileNotFoundError:
                    continue

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    @contextmanager
    def naming(self, action: str, key: str) -> Iterator[None]:
        """Turn obstore's errors into a StoreError that says which object and why, without its debug dump."""
        try:
            yield
        except ObjectExistsError as error:
            raise AlreadyExistsError(f"{self._name(key)} exists already.") from error
        except (BaseError, OSError, ValueError) as error:
            reason = str(error).split("\n\nDebug source", 1)[0].strip()
            raise StoreError(
                f"Cannot {action} {self._name(key)}: {reason}", "Check the bucket, the credentials and the endpoint in the environment."
            ) from error


class _ObjectSink(PartSink):
    """A multipart upload. Keys of parts are unique to their attempt, so nothing is asked about what is there."""

    def __init__(self, store: ObjectStore, key: str, writer: Any) -> None:
        self._store = store
        self._key = key
        self._writer = writer

    def write(self, data: Data) -> None:
        with self._store.naming("write", self._key):
            self._writer.write(data)

    def close(self) -> None:
        with self._store.naming("write", self._key):
            self._writer.close()

    def abort(self) -> None:
        """Completing the upload and deleting the object leaves no unfinished upload, which would cost money unseen."""
        if not self._writer.closed():
            self.close()
        self._store.delete([self._key])
