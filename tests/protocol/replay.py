"""A schedule of the model, step by step on m2ray's own code and a real store, which has to hold after each step what the model's holds."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from m2ray.activations.job import Counts, JobRecord, read_job
from m2ray.activations.manifest import read_manifest
from m2ray.activations.reading.verify import verify
from m2ray.activations.records import SUCCESS_KEY, commit_key, committed_and_void, read_commit
from m2ray.activations.writing.commits import Run, RunSummary, claim_run, go_on_with, reopen
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.batches import Shard
from m2ray.errors import AlreadyExistsError, M2rayError, StoreError
from m2ray.storage import LocalStore, Store
from m2ray.storage.store import Data, PartSink
from tests.protocol.model import ENDED, NONE, NUM_DRIVERS, NUM_WRITERS, Request, World, steps
from tests.unit import activation_runs as runs

NUM_SHARDS, _TIMEOUT_S = 2, 60.0
SHARDS = range(NUM_SHARDS)


class _Died(BaseException):
    """The process ends here, as by SIGKILL."""


class Actor:
    """A process of the schedule on a thread, which stands still at each of its gates until it is told how to go on."""

    def __init__(self, work: Callable[["Actor"], object]) -> None:
        self.result: object = None
        self.is_over = False
        self._told: queue.Queue[str] = queue.Queue()
        self._arrived: queue.Queue[BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._await()

    def gate(self) -> str:
        """Stand still. Gives what becomes of the request that comes next."""
        self._arrived.put(None)
        what = self._told.get(timeout=10 * _TIMEOUT_S)
        if what == "dies":
            raise _Died
        return what

    def step(self, what: str) -> None:
        """Let it go on to its next gate or its end."""
        self._told.put(what)
        self._await()

    def end(self) -> None:
        if not self.is_over:
            self.step("dies")

    def _run(self, work: Callable[["Actor"], object]) -> None:
        defect = None
        try:
            self.result = work(self)
        except (_Died, M2rayError):
            pass
        except BaseException as error:  # noqa: BLE001 - raised again on the thread of the test
            defect = error
        self.is_over = True
        self._arrived.put(defect)

    def _await(self) -> None:
        defect = self._arrived.get(timeout=_TIMEOUT_S)
        if defect is not None:
            raise defect


class GatedStore(Store):
    """A store at which an actor stands still before each change, before it lists parts, and before it lists commits if `gates_commits`."""

    def __init__(
        self, store: Store, actor: Actor, late: list[tuple[Request, Callable[[], None]]], name: Callable[[str, str], Request]
    ) -> None:
        self.url = store.url
        self.gates_commits = False
        self._store, self._actor, self._late, self._name = store, actor, late, name
        self._is_free = False

    @contextmanager
    def free(self) -> Iterator[None]:
        """Without standing still."""
        was, self._is_free = self._is_free, True
        try:
            yield
        finally:
            self._is_free = was

    def ask(self, verb: str, key: str, send: Callable[[], None]) -> None:
        """Send a request, or let it go astray."""
        if self._is_free:
            send()
            return
        what = self._actor.gate()
        request = self._name(verb, key)
        if what in {"late", "doubled"}:
            self._late.append((request, send))
        if what == "late":
            raise StoreError(f"{key}: no answer came.")
        send()
        if what == "again":
            send()

    @property
    def folder(self) -> Path | None:
        return self._store.folder

    def size(self, key: str) -> int | None:
        return self._store.size(key)

    def version(self, key: str) -> str:
        return self._store.version(key)

    def read(self, key: str) -> bytes:
        return self._store.read(key)

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        self._store.read_into(key, offset, out)

    def list(self, prefix: str, depth: int | None = None) -> Iterator[tuple[str, int]]:
        if not self._is_free and prefix == "_commits" and self.gates_commits:
            self._actor.gate()
        return self._store.list(prefix, depth)

    def list_folders(self, above: str, folders: Iterable[str]) -> Iterator[tuple[str, int]]:
        if not self._is_free:
            self._actor.gate()
        return self._store.list_folders(above, folders)

    def create(self, key: str, data: Data) -> None:
        self.ask("create", key, lambda: self._store.create(key, data))

    def put(self, key: str, data: Data) -> None:
        self.ask("put", key, lambda: self._store.put(key, data))

    def open_part(self, key: str) -> PartSink:
        return self._store.open_part(key)

    def delete(self, keys: Iterable[str]) -> None:
        listed = list(keys)
        if listed:
            self.ask("delete", listed[0], lambda: self._store.delete(listed))


class _SteppedRun(Run):
    """A run whose looks at the whole of it are one step each, as in the model."""

    store: GatedStore
    is_finishing = False

    def finish(self) -> RunSummary:
        self.is_finishing = self.store.gates_commits = True
        return super().finish()

    def finished(self) -> RunSummary | None:
        if self.is_finishing:
            self.store._actor.gate()
        with self.store.free():
            return super().finished()

    def _require_parts(self, manifest: Any, stored: Any) -> None:
        with self.store.free():
            super()._require_parts(manifest, stored)

    def _mark_swept(self, attempts: Sequence[tuple[int, str]]) -> None:
        def mark() -> None:
            with self.store.free():
                Run._mark_swept(self, attempts)

        if attempts:
            self.store.ask("create", "_swept", mark)

    def _says(self, manifest: Any) -> bool:
        self.store._actor.gate()
        with self.store.free():
            return super()._says(manifest)


class Replay:
    """The model's world and a real store, side by side."""

    def __init__(self, store: Store, scratch: Path, *, faults: int = 1, strikes: int = 1) -> None:
        self.world = World(faults=faults, strikes=strikes)
        self.way: list[tuple[Any, ...]] = []
        self._store = store
        self._scratch = scratch
        self._late: list[tuple[Request, Callable[[], None]]] = []
        self._repair: Actor | None = None
        self._parts: dict[tuple[int, int], list[str]] = {}
        self._records = [self._record(driver) for driver in range(NUM_DRIVERS + 1)]
        self._drivers = [Actor(lambda actor, number=number: self._drive(number, actor)) for number in range(NUM_DRIVERS)]

    def walk(self, wanted: Iterable[tuple[Any, ...]], chance: Random) -> None:
        """Take the wanted steps, those that cannot be taken left out, and then others by chance until nothing more can happen."""
        for label in wanted:
            self._take(label, dict(steps(self.world)))
        while ways := dict(steps(self.world)):
            deaths = [label for label in ways if label[2] in {"dies", "late"}]
            self._take(chance.choice([label for label in ways if label not in deaths or chance.random() < 0.05] or deaths), ways)

    def heal(self) -> None:
        """What the same command does, undisturbed; it may have to stop once to say what is lost."""
        for actor in (*self._drivers, *([self._repair] if self._repair else [])):
            actor.end()
        for command in range(3):
            job = read_job(self._store)
            run = go_on_with(self._store, job) if job else claim_run(self._store, self._surveyed(NUM_DRIVERS))
            hold_weights(self._store, run.job, runs.LOADED)
            run.reopen_damaged()
            for shard in run.missing(map(runs.shard, SHARDS)):
                attempt = f"d{NUM_DRIVERS}s{shard.index}x{command}"
                runs.commit_shard(run, shard, attempt)
            with suppress(M2rayError):
                run.finish()
                return
        raise AssertionError(f"the same command does not close the run after {self.way}")

    def _take(self, label: tuple[Any, ...], ways: dict[tuple[Any, ...], World]) -> None:
        if label not in ways:
            return
        self.world = ways[label]
        self.way.append(label)
        kind, what, how = label
        if kind == "driver":
            self._drivers[what].step(how)
        elif kind == "repair":
            assert self._repair
            self._repair.step(how)
        elif kind == "repair begins":
            self._repair = Actor(lambda actor: reopen(self._gated(actor), self.job(), [what]))
        elif kind == "lands":
            place = next(place for place, (request, _) in enumerate(self._late) if request == what)
            with suppress(AlreadyExistsError):
                self._late.pop(place)[1]()
        elif kind == "commit lost":
            self._store.delete([commit_key(what)])
        else:
            assert kind == "part lost"
            assert self.world.broken
            shard, driver = self.world.broken
            self._store.delete([self._parts[driver, shard][0]])
        self._compare()

    # -- a driver, as m2ray/chain/extract.py goes ----------------------------------------------------------------------

    def _drive(self, number: int, actor: Actor) -> RunSummary:
        store = self._gated(actor)
        actor.gate()
        if read_job(store) is None:
            record = self._surveyed(number)
            claimed = claim_run(store, record)
            if claimed.job.run_id == record.run_id:
                return self._work(number, _SteppedRun(store, record))
            store.delete([file.key for file in record.sequence_files])
        actor.gate()
        run = _SteppedRun(store, self.job())
        run.reopen_damaged()
        return self._work(number, run)

    def _work(self, number: int, run: _SteppedRun) -> RunSummary:
        hold_weights(self._store, run.job, runs.LOADED)
        for shard in run.missing(map(runs.shard, SHARDS)):
            self._attempt(number, run, shard)
        return run.finish()

    def _attempt(self, number: int, run: _SteppedRun, shard: Shard) -> None:
        written = LocalStore(self._scratch / f"d{number}s{shard.index}")
        receipts = runs.write_shard(written, run.job, shard, f"d{number}s{shard.index}")
        self._parts[number, shard.index] = keys = [receipt.key for receipt in receipts]
        for key in keys:
            run.store.ask("put", key, lambda key=key: self._put_part(key, written.read(key)))
        shapes = [(len(each.sequence_ids), each.token_ids_BT.shape[1]) for each in runs.micro_batches(shard)]
        run.commit(shard, f"d{number}s{shard.index}", receipts, shapes, 1.0)

    def _put_part(self, key: str, data: bytes) -> None:
        """As a writer does. On a disk a second one finds the name taken."""
        sink = self._store.open_part(key)
        sink.write(data)
        with suppress(AlreadyExistsError):
            sink.close()

    def _gated(self, actor: Actor) -> GatedStore:
        return GatedStore(self._store, actor, self._late, lambda *_: self._in_flight())

    def _in_flight(self) -> Request:
        """The model's name of the request that just went astray."""
        return self.world.late[-1][0] if self.world.late else ("", (), None)

    # -- what the store holds ------------------------------------------------------------------------------------------

    def _record(self, number: int) -> JobRecord:
        """The record of a job of the model's shards, which names the survey of one driver."""
        survey = runs.survey(LocalStore(self._scratch / "surveys"), f"d{number}")
        record = replace(runs.job(LocalStore(self._scratch / "jobs")), num_shards=NUM_SHARDS, sequence_files=survey)
        ready, tokens = (sum(each) for each in zip(*((len(s.sequence_ids), s.num_tokens) for s in map(runs.shard, SHARDS)), strict=True))
        quarantined = record.counts.quarantined
        return replace(record, counts=Counts(ready + quarantined, ready, quarantined, tokens))

    def _surveyed(self, number: int) -> JobRecord:
        runs.survey(self._store, f"d{number}")
        return self._records[number]

    def job(self) -> JobRecord:
        job = read_job(self._store)
        assert job is not None
        return job

    def _compare(self) -> None:
        """Raise AssertionError unless the store holds what the model's holds, and who has ended there has ended here."""
        world = self.world
        stored = {key for key, _ in self._store.list("")}
        record = read_job(self._store)
        commits, counted = [NONE] * NUM_SHARDS, [NONE] * NUM_SHARDS
        committed, void = committed_and_void(self._store)
        for shard in committed | void:
            commits[shard] = _driver(read_commit(self._store, self.job(), shard).attempt)
        for shard in committed:
            counted[shard] = commits[shard]
        manifest = None
        if record and "manifest.parquet" in stored:
            table = read_manifest(self._store, record, NUM_SHARDS * NUM_WRITERS)
            attempts = dict(zip(table["shard"].to_pylist(), table["attempt"].to_pylist(), strict=True))
            manifest = tuple(_driver(attempts[shard]) for shard in SHARDS)
        parts = [0] * len(world.parts)
        for (driver, shard), keys in self._parts.items():
            parts[shard * (NUM_DRIVERS + 1) + driver] = sum(1 << bit for bit, key in enumerate(keys) if key in stored)
        surveys = sum(1 << n for n, each in enumerate(self._records) if all(file.key in stored for file in each.sequence_files))
        job = next((n for n, each in enumerate(self._records) if record and each.run_id == record.run_id), NONE)
        found = (job, surveys, tuple(parts), tuple(commits), tuple(counted), manifest, SUCCESS_KEY in stored)
        wanted = (world.job, world.surveys, world.parts, world.commits, world.counted, world.manifest, world.success)
        assert found == wanted, f"after {self.way}: the store holds {found}, the model's {wanted}"
        for number, (actor, driver) in enumerate(zip(self._drivers, world.drivers, strict=True)):
            state = "done" if actor.result is not None else "dead" if actor.is_over else "at work"
            expected = driver.at if driver.at in ENDED else "at work"
            assert state == expected, f"after {self.way}: driver {number} is {state}, in the model {driver}"


def replayed(store: Store, scratch: Path, wanted: Iterable[tuple[Any, ...]], chance: Random) -> None:
    """Replay a schedule, let the same command do the rest, and hold what the run holds then against what was to come."""
    replay = Replay(store, scratch / "scratch")
    replay.walk(wanted, chance)
    replay.heal()
    found = verify(store, checksums=True)
    assert (found.damages, found.unnamed, found.is_complete) == ((), (), True), f"after {replay.way}"
    assert {key for key, _ in store.list("sequences")} == {file.key for file in found.job.sequence_files}


def _driver(attempt: str) -> int:
    return int(attempt[1])
