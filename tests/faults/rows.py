"""What an undisturbed run holds, and a reader that holds a run which is being disturbed against it all the while."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import m2ray
from m2ray.activations.records import commit_key, committed_shards, read_commit
from m2ray.activations.schema import parse_part_key
from m2ray.errors import M2rayError, StoreError
from m2ray.storage import Store, open_store
from tests.reference import same_bits


class Expected:
    """Every row of an undisturbed run, by shard: tokens [N] and activations [L, N, W]."""

    def __init__(self, run: str) -> None:
        self.shards = {shard.index: (shard.tokens, shard.activations) for shard in m2ray.open_run(run).shards()}
        self.num_shards = len(self.shards)

    def differences(self, run: str) -> list[str]:
        """What of a finished run is not bit by bit the same."""
        problems, seen = [], set()
        for shard in m2ray.open_run(run).shards():
            seen.add(shard.index)
            tokens, activations = self.shards[shard.index]
            if not np.array_equal(tokens, shard.tokens):
                problems.append(f"shard {shard.index} has other tokens")
            elif not same_bits(activations, shard.activations):
                problems.append(f"shard {shard.index} has other rows")
        absent = self.shards.keys() - seen
        return [*problems, *([f"shards {sorted(absent)} are absent"] if absent else [])]

    def sequence(self, shard: int, *, last: bool) -> tuple[int, torch.Tensor]:
        """A shard's first or last sequence and its rows [L, T, W]."""
        tokens, activations = self.shards[shard]
        ids: npt.NDArray[Any] = tokens["sequence_id"]
        chosen = ids[-1 if last else 0]
        return int(chosen), activations[:, torch.from_numpy(ids == chosen)]


@dataclass
class Watcher:
    """A reader on a thread of its own: opens the run again and again, as a trainer would beside a running extraction.

    Whatever is committed must be whole, right and never change; a shard that is committed must not be computed again.

    Attributes:
        problems: what should not have been seen.
        refused: polls that the store did not answer.
        lost: shards whose commit was deleted on purpose and was not seen again.
    """

    run: str
    expected: Expected
    poll_s: float
    polls: int = 0
    refused: int = 0
    shards: int = 0
    problems: list[str] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._look_lock = threading.Lock()
        self._attempts: dict[int, str] = {}
        self._seen_parts: set[tuple[int, str]] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Stop looking. A poll may be waiting for a store that is gone."""
        self._ended.set()
        self._thread.join(240)
        if self._thread.is_alive():
            self.problems.append("the reader hangs")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The reader does not look meanwhile."""
        with self._look_lock:
            yield

    def lose_commit(self, chance: Random) -> None:
        """Delete the commit of a shard, if any was seen: it may be committed once more."""
        with self._look_lock:
            for shard in chance.sample(sorted(self._attempts), min(1, len(self._attempts))):
                open_store(self.run).delete([commit_key(shard)])
                del self._attempts[shard]
                self.lost.add(shard)

    def changed_commits(self) -> list[str]:
        """The shards whose commit is not the one that was seen first."""
        store = open_store(self.run)
        job = m2ray.open_run(self.run).job
        now = {shard: read_commit(store, job, shard).attempt for shard in committed_shards(store)}
        return [f"the commit of shard {shard} changed" for shard, attempt in self._attempts.items() if now.get(shard) != attempt]

    def _watch(self) -> None:
        store = open_store(self.run)
        while not self._ended.wait(self.poll_s):
            try:
                if store.size("job.json") is not None:
                    with self._look_lock:
                        self._look(store)
                    self.polls += 1
            except StoreError:
                self.refused += 1
            except (M2rayError, AssertionError, KeyError, ValueError) as error:
                self.problems.append(f"the reader saw: {error!r}")

    def _look(self, store: Store) -> None:
        done = committed_shards(store)
        reader = m2ray.open_run(self.run)
        for shard in sorted(done - self._attempts.keys()):
            for last in (False, True):
                sequence_id, rows = self.expected.sequence(shard, last=last)
                if not same_bits(reader.sequence(sequence_id), rows):
                    self.problems.append(f"the reader saw other rows in shard {shard}, sequence {sequence_id}")
        before = dict(self._attempts)
        for shard in sorted(done - before.keys()):
            self._attempts[shard] = read_commit(store, reader.job, shard).attempt
        if before.keys() - done:
            self.problems.append(f"shards {sorted(before.keys() - done)} are no longer committed")
        parts = {named[:2] for key, _ in store.list("data") if (named := parse_part_key(key))}
        for shard, attempt in parts - self._seen_parts:
            if shard in before and before[shard] != attempt:
                self.problems.append(f"shard {shard} was computed again (attempt {attempt}) after it was committed")
        self._seen_parts |= parts
        self.lost -= done
        self.shards = len(done)


def unnamed_files(run: str) -> list[str]:
    """Objects of a finished run that no record names."""
    store = open_store(run)
    job = m2ray.open_run(run).job
    named = {part.key for shard in committed_shards(store) for part in read_commit(store, job, shard).parts}
    named |= {file.key for file in job.sequence_files}
    return sorted(key for key, _ in store.list("") if key.startswith(("data/", "sequences/", "_probe", "_lease/")) and key not in named)


def unfinished_files(folder: Path) -> list[str]:
    """What dead writers left in a local run."""
    return sorted(path.name for path in (folder / "_unfinished").glob("*"))
