"""Output: the files of an export, written whole or not at all, each with its size and checksum in a small record.

Files are written unit by unit, a unit being some consecutive samples. `.m2ray/export.json` says what the export is of and is created
first; `.m2ray/unit-000012.json` names the files of a unit once all of them are durable; `m2ray_export.json` comes last. So whoever
runs the same command again keeps every unit whose files are all there, and does the rest.

Until a file is durable takes as long as to write it; so other threads wait for that, while the next files are written. Many wait at once,
since a disk makes all that is asked of it together durable at the cost of one.
"""

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import xxhash

from m2ray.activations.json_record import digest
from m2ray.errors import AlreadyExistsError, RunConflictError, RunDamagedError, StoreError
from m2ray.storage import Data, Store
from m2ray.storage.hashing import HashingFile

FOLDER = ".m2ray"
BEGUN_KEY = f"{FOLDER}/export.json"
SUMMARY_KEY = "m2ray_export.json"
_CHUNK_BYTES = 1 << 20
_OPEN_FILES = 16
"""That are written and not yet durable, at most."""

_CLOSE_TIMEOUT_S = 1800.0

_Result = TypeVar("_Result")


class Written(NamedTuple):
    """A file as it was written: xxh3-64 of its bytes, 16 hex digits."""

    key: str
    num_bytes: int
    xxh3: str


class Output:
    """The folder or bucket that an export goes to. Use it as a context: leaving it by an error gives up what is not whole yet.

    Args:
        store: where it goes.
        identity: what the export is of, as JSON values; another export's folder is refused.

    Raises:
        RunConflictError: there is another export, or something else.
        StoreError: it cannot be written.
    """

    def __init__(self, store: Store, identity: Mapping[str, Any]) -> None:
        self._store = store
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._pool = ThreadPoolExecutor(_OPEN_FILES, thread_name_prefix="export")
        self._closing: deque[tuple[HashingFile, Future[Written]]] = deque()
        self._unit: list[Future[Written]] = []
        self._unit_bytes = 0
        self._recording: list[Future[None]] = []
        self._units: dict[int, list[Written]] = {}
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file, closing in self._closing:
            if closing.cancelled():
                file.abort()

    # -- units --------------------------------------------------------------------------------------------------------

    def kept_unit(self, number: int) -> int | None:
        """The bytes of a unit that is there: recorded, and every file what was written, of which each byte is read. None if it is not."""
        key = _unit_key(number)
        if self._store.size(key) is None:
            return None
        files = [Written(*file) for file in _read(self._store, key)["files"]]
        damaged = [file.key for file in files if not self._is_there(file)]
        if damaged:
            self._store.delete([key, *damaged])  # they are written again
            return None
        self._units[number] = files
        return sum(file.num_bytes for file in files)

    def write(self, key: str, pieces: Iterable[Data]) -> None:
        """A file of these bytes, one piece behind the other; each may be used again afterwards. Durable once its unit is recorded.

        Raises:
            RunConflictError: there is another file of the name of this one, or of one that was written before.
            StoreError: this one, or one that was written before, cannot be written.
        """
        while len(self._closing) >= _OPEN_FILES:
            self._wait_for(self._closing[0][1])
            self._closing.popleft()
        file = HashingFile(self._store.open_part(key))
        try:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                for start in range(0, len(view), _CHUNK_BYTES):  # which stays in the processor's cache from the hash to the copy
                    file.write(view[start : start + _CHUNK_BYTES])
        except BaseException:
            file.abort()
            raise
        self._closing.append((file, self._pool.submit(self._close, key, file)))
        self._unit.append(self._closing[-1][1])
        self._unit_bytes += file.num_bytes

    def end_unit(self, number: int) -> int:
        """Let the files that were written since the last unit be recorded as soon as all of them are durable. Gives their bytes."""
        self._recording.append(self._pool.submit(self._record, number, self._unit))
        num_bytes = self._unit_bytes
        self._unit, self._unit_bytes = [], 0
        return num_bytes

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write `m2ray_export.json`, the sign that all is there, and give what it says: the identity, `facts`, and an account of the files.

        Raises as `write` does.
        """
        for _, closing in self._closing:
            self._wait_for(closing)
        for recording in self._recording:
            self._wait_for(recording)
        files = [file for number in sorted(self._units) for file in self._units[number]]
        lines = "".join(f"{file.xxh3} {file.num_bytes} {file.key}\n" for file in files)
        account = {
            "files": len(files),
            "num_bytes": sum(file.num_bytes for file in files),
            "xxh3": xxhash.xxh3_128_hexdigest(lines.encode()),
        }
        summary = self._identity | dict(facts) | account
        self._store.put(SUMMARY_KEY, _sealed(summary, indent=2))
        return summary

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._store.size(BEGUN_KEY) is None:
            if found := next(iter(self._store.list("")), None):
                raise RunConflictError(f"{self._store.url} is no export: it holds {found[0]!r}.", "Give an empty folder (--output).")
            with suppress(AlreadyExistsError):
                self._store.create(BEGUN_KEY, _sealed(self._identity, indent=2))
        there = _read(self._store, BEGUN_KEY)
        names = dict.fromkeys([*there, *self._identity])
        differing = [
            f"{name}: {json.dumps(there.get(name))} there, {json.dumps(self._identity.get(name))} now"
            for name in names
            if there.get(name) != self._identity.get(name)
        ]
        if differing:
            raise RunConflictError(f"{self._store.url} holds another export. What differs:", "Give another folder (--output).", differing)
        self._store.delete_unfinished()  # a trainer that walks the folder would take it for a sample

    def _record(self, number: int, unit: Sequence[Future[Written]]) -> None:
        """Name a unit's files once all are durable. They were given to the pool before, so each has a thread by now, or has ended."""
        files = [self._wait_for(closing) for closing in unit]
        self._store.put(_unit_key(number), _sealed({"files": files}))
        self._units[number] = files

    def _wait_for(self, ended: Future[_Result]) -> _Result:
        try:
            return ended.result(_CLOSE_TIMEOUT_S)
        except TimeoutError as error:
            raise StoreError(
                f"A file of {self._store.url} was not durable after {_CLOSE_TIMEOUT_S:g} s.", "Look at the store; the same command goes on."
            ) from error

    def _close(self, key: str, file: HashingFile) -> Written:
        """Make a file visible; one that an interrupted try has left is kept if it is the same."""
        written = Written(key, file.num_bytes, file.xxh3)
        try:
            file.publish()
        except AlreadyExistsError as error:
            if not self._is_there(written):
                raise RunConflictError(
                    f"{self._store.where(key)} is there, and is not what would be written.", "Remove it, or give another folder (--output)."
                ) from error
        return written

    def _is_there(self, file: Written) -> bool:
        if self._store.size(file.key) != file.num_bytes:
            return False
        hashed = xxhash.xxh3_64()
        for start in range(0, file.num_bytes, _CHUNK_BYTES):
            hashed.update(self._store.read_range(file.key, start, min(_CHUNK_BYTES, file.num_bytes - start)))
        return hashed.hexdigest() == file.xxh3


def _unit_key(number: int) -> str:
    return f"{FOLDER}/unit-{number:06d}.json"


def _sealed(fields: Mapping[str, Any], indent: int | None = None) -> bytes:
    """A JSON object with the digest of itself."""
    plain = json.loads(json.dumps(fields))
    return json.dumps(plain | {"digest": digest(plain)}, indent=indent).encode()


def _read(store: Store, key: str) -> dict[str, Any]:
    """The object that `_sealed` wrote, without its digest. Raises RunDamagedError."""
    try:
        fields = json.loads(store.read(key))
        if fields.pop("digest") != digest(fields):
            raise ValueError("it does not have the digest that it names")
        return dict(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunDamagedError(f"{store.where(key)} is damaged ({error}).", "Begin the export in another folder.") from error
