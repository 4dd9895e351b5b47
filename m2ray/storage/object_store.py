"""ObjectStore: a prefix of an S3, Google Cloud Storage or Azure bucket, through obstore."""

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError as ObjectExistsError
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError

from m2ray.errors import AlreadyExistsError, StoreError
from m2ray.storage import connect
from m2ray.storage.address import parse_address
from m2ray.storage.store import Data, PartSink, Store

_UPLOAD_BYTES = 8 << 20
_UPLOADS_AT_ONCE = 4
_DOWNLOAD_BYTES = 8 << 20
_DOWNLOADS_AT_ONCE = 4
_DELETES_AT_ONCE = 8
_LISTED_AT_ONCE = 1000
_LISTINGS_AT_ONCE = 16
_PAUSES_S = (0.5, 2.0)


class ObjectStore(Store):
    """One bucket's prefix.

    Requests that fail for lack of a server, of an answer or of its strength are repeated with growing pauses; none begins later than
    three minutes after its first try, and each ends within a minute; inside of `connect.looking` both together end within 30 s. Then they
    fail with StoreError.

    Args:
        url: `s3://bucket/folder`, options of `Address` behind a "?".
        backend: obstore's store to use in place of the one that `url` names; for stores in memory.
    """

    def __init__(self, url: str, backend: Any = None) -> None:
        self._retry_s = connect.patience().retry_s
        if backend is not None:
            self.url = self._base = url
            self._store = backend
            return
        address = parse_address(url)
        self.url, self._base = address.url, address.name
        with self.naming("open", ""):
            self._store = connect.connect(address)

    def size(self, key: str) -> int | None:
        with self.naming("look at", key):
            try:
                return int(obstore.head(self._store, key)["size"])
            except FileNotFoundError:
                return None

    def sizes(self, keys: Collection[str]) -> Callable[[str], int | None]:
        if len(keys) == 1:
            return self.size
        found: dict[str, int] = {}
        for folder in sorted({key.rpartition("/")[0] for key in keys}):
            with self.naming("list", folder):
                found |= {entry["path"]: entry["size"] for entry in obstore.list_with_delimiter(self._store, folder or None)["objects"]}
        return found.get

    def version(self, key: str) -> str:
        with self.naming("look at", key):
            found = obstore.head(self._store, key)
        return f"{found['size']} {found['e_tag'] or found['last_modified']}"

    def read(self, key: str) -> bytes:
        with self.naming("read", key):
            return bytes(obstore.get(self._store, key).bytes())

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        begin = time.monotonic()
        try:
            if len(out) <= _DOWNLOAD_BYTES:
                self._read_piece(key, offset, out)
            else:
                self._read_pieces(key, offset, out)
        except StoreError:
            if time.monotonic() - begin > self._retry_s / 2:  # there was no answer at all
                raise
            # Stores answer a range past the end in words of their own.
            found = self.size(key)
            if found is None or found >= offset + len(out):
                raise
            what = f"{self.where(key)} ends at byte {found}, but bytes {offset} to {offset + len(out)} are needed."
            raise StoreError(what, "The file is truncated: copy it again.") from None

    def _read_pieces(self, key: str, offset: int, out: memoryview) -> None:
        def read(start: int) -> None:
            self._read_piece(key, offset + start, out[start : start + _DOWNLOAD_BYTES])

        with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE, thread_name_prefix="download") as pool:
            try:
                for _ in pool.map(read, range(0, len(out), _DOWNLOAD_BYTES)):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)

    def _read_piece(self, key: str, offset: int, out: memoryview) -> None:
        if not len(out):
            return
        with self.naming("read", key):
            data = obstore.get_range(self._store, key, start=offset, length=len(out))
        if len(data) != len(out):
            raise StoreError(f"{self.where(key)} gave {len(data)} bytes from byte {offset} on, not {len(out)}.")
        out[:] = memoryview(data)

    def list(self, prefix: str, depth: int | None = None) -> Iterator[tuple[str, int]]:
        with self.naming("list", prefix):
            for page in obstore.list(self._store, prefix or None, chunk_size=_LISTED_AT_ONCE):
                for entry in page:
                    yield entry["path"], entry["size"]

    def folders(self) -> Sequence[str]:
        with self.naming("list", ""):
            return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in obstore.list_with_delimiter(self._store)["common_prefixes"])

    def list_folders(self, above: str, folders: Iterable[str]) -> Iterator[tuple[str, int]]:
        """A page of a listing names where the next one begins: only those of several folders can be asked for at the same time."""
        with ThreadPoolExecutor(_LISTINGS_AT_ONCE, thread_name_prefix="list") as pool:
            for found in pool.map(lambda folder: list(self.list(folder)), folders):
                yield from found

    def create(self, key: str, data: Data) -> None:
        with self.naming("write", key):
            self._repeated(lambda: obstore.put(self._store, key, bytes(data), mode="create", use_multipart=False))

    def put(self, key: str, data: Data) -> None:
        with self.naming("write", key):
            obstore.put(self._store, key, bytes(data))

    def open_part(self, key: str) -> PartSink:
        with self.naming("write", key):
            writer = obstore.open_writer(self._store, key, buffer_size=_UPLOAD_BYTES, max_concurrency=_UPLOADS_AT_ONCE)
        return _ObjectSink(self, key, writer)

    def delete(self, keys: Iterable[str]) -> None:
        with ThreadPoolExecutor(_DELETES_AT_ONCE, thread_name_prefix="delete") as pool:
            for _ in pool.map(self._delete, keys):
                pass

    def _delete(self, key: str) -> None:
        with self.naming("delete", key):
            try:
                self._repeated(lambda: obstore.delete(self._store, key))
            except FileNotFoundError:
                return

    def where(self, key: str) -> str:
        return f"{self._base}/{key}" if key else self._base

    def _repeated(self, send: Callable[[], object]) -> None:
        """Send a request again that got no answer in time. obstore repeats all others itself, but not those that change something.

        A repeated `create` may find what the first one made: its callers look whether the object is their own.
        """
        deadline = time.monotonic() + self._retry_s  # what obstore has repeated for so long is not begun again
        for pause_s in _PAUSES_S:
            try:
                send()
                return
            except GenericError as error:
                if "status code" in str(error) or time.monotonic() + pause_s > deadline:
                    raise
            time.sleep(pause_s)
        send()

    @contextmanager
    def naming(self, action: str, key: str) -> Iterator[None]:
        """Turn obstore's errors into a StoreError that names the object and the reason, without its debug dump."""
        try:
            yield
        except ObjectExistsError:
            raise AlreadyExistsError(f"{self.where(key)} exists already.") from None
        except (BaseError, OSError, ValueError) as error:
            # "from None": the original's text holds a dump of the request, and with Azure a signature in its URL.
            raise StoreError(f"Cannot {action} {self.where(key)}: {_reason(error)}", _remedy(error)) from None


class _ObjectSink(PartSink):
    """A multipart upload. Keys of parts are unique to their attempt, so nothing is asked about what is there."""

    def __init__(self, store: ObjectStore, key: str, writer: Any) -> None:
        self._store = store
        self._key = key
        self._writer = writer
        self._num_bytes = 0

    def write(self, data: Data) -> None:
        with self._store.naming("write", self._key):
            # obstore keeps a reference until the bytes are sent: only immutable ones may be handed over as they are.
            self._writer.write(data if isinstance(data, bytes) else bytes(data))
        self._num_bytes += len(data)

    def close(self) -> None:
        try:
            with self._store.naming("write", self._key):
                self._writer.close()
        except StoreError:
            # The upload may have been completed, and only the answer lost.
            if self._store.size(self._key) != self._num_bytes:
                raise

    def abort(self) -> None:
        """An upload that stays unfinished would cost money unseen. obstore aborts one that it cannot complete, but an answer may be lost."""
        if self._writer.closed():
            self._store.delete([self._key])
        else:
            with self._store.naming("give up", self._key):
                self._writer.__exit__(StoreError, None, None)  # as a "with" that an error leaves: obstore aborts the upload


def _reason(error: Exception) -> str:
    """What happened, in one line: of an XML answer its code and message, of a URL not the part that may hold a signature."""
    if isinstance(error, FileNotFoundError):
        return f"there is no such {'bucket' if 'NoSuchBucket' in str(error) else 'object'}."
    if _asks_for_a_role(error):
        return "no credentials are in the environment, and this machine has no role that gives some."
    text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", str(error).split("\n\nDebug source", 1)[0])
    text, is_xml, answer = text.partition("<?xml")
    found = re.findall(r"<(?:Code|Message)>([^<]+)</", answer)
    return " ".join(f"{text}{': '.join(found) if is_xml else ''}".split()).rstrip(".:") + "."


def _asks_for_a_role(error: Exception) -> bool:
    """Whether a request failed at the metadata of AWS's machines, the last place where obstore looks for credentials."""
    return "/latest/api/token" in str(error) or "/latest/meta-data" in str(error)


def _remedy(error: Exception) -> str:
    if _asks_for_a_role(error):
        return (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, give this machine a role that may use the bucket, or, for a "
            "public one, add ?skip_signature=true to the URL."
        )
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return "Check the credentials in the environment and what they may do in this bucket."
    return "" if isinstance(error, FileNotFoundError) else "Check the bucket, the endpoint and the credentials in the environment."
