"""A stream that follows a run: every row once by its shard's number, whenever it comes, through repairs and resumes, to the end or to silence."""

import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore
from torch.utils.data import DataLoader

from m2ray.activations.reading import arrivals, open_parts
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.reader import open_run
from m2ray.activations.reading.stream import ActivationStream, StreamOptions
from m2ray.activations.writing.commits import Run, claim_run, reopen
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.batches import TOKEN_ROW
from m2ray.errors import ConfigError, NotInRunError, RunDamagedError
from m2ray.storage import LocalStore, ObjectStore
from tests.unit import activation_runs as runs
from tests.unit.test_stream import ALL_ROWS, ROW_BYTES, identities

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S, SHORT_S = 600.0, 10.0


class Clock:
    """Time that passes only while the stream waits; what happens meanwhile is done then."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(arrivals, "time", SimpleNamespace(monotonic=lambda: clock.now_s, sleep=clock.sleep))
    return clock


def begun(folder: Path) -> Run:
    """A run without a single shard."""
    run = claim_run(LocalStore(folder), runs.job(LocalStore(folder)))
    hold_weights(run.store, run.job, runs.LOADED)
    return run


def commit(run: Run, shard: int, attempt: str = "a1") -> None:
    assert runs.commit_shard(run, runs.shard(shard), f"{attempt}{shard}", "planes" if shard == 1 else "none")


def follow(folder: Path, **options: object) -> ActivationStream:
    return open_run(folder).layer(7).stream(**{"batch_rows": 4, "shuffle_buffer_bytes": 32 * ROW_BYTES, "follow": True} | options)


def shards_of(rows: list[tuple[int, int]]) -> list[int]:
    shard_of = {i: number for number, ids in enumerate(runs.SHARD_SEQUENCES) for i in ids}
    return list(dict.fromkeys(shard_of[sequence_id] for sequence_id, _ in rows))


def test_shards_are_given_as_they_come(tmp_path: Path, clock: Clock) -> None:
    run, coming = begun(tmp_path), [2, 0, 1]
    clock.meanwhile = lambda: commit(run, coming.pop(0))
    batches = list(follow(tmp_path))
    assert sorted(identities(batches)) == ALL_ROWS
    assert shards_of(identities(batches)) == [2, 0, 1]
    assert all(len(batch["activations"]) == 4 for batch in batches[:-1])
    assert run.store.size("_SUCCESS") is None, "the last shard is the end"


def test_a_run_in_a_bucket_is_followed(clock: Clock) -> None:
    store = ObjectStore("memory:///run", MemoryStore())
    run, coming = claim_run(store, runs.job(store)), [2, 0, 1]
    hold_weights(store, run.job, runs.LOADED)
    clock.meanwhile = lambda: commit(run, coming.pop(0))
    options = StreamOptions(batch_rows=4, shuffle_buffer_bytes=32 * ROW_BYTES, seed=0, rank=0, world_size=1, follow=True)
    batches = list(ActivationStream(Catalogue(store), runs.PARTS[1], options, WAIT_S))
    assert sorted(identities(batches)) == ALL_ROWS
    for batch in batches:
        for (sequence_id, position), row in zip(identities([batch]), batch["activations"].view(torch.uint8), strict=True):
            assert row.tolist() == runs.bits(runs.PARTS[1], sequence_id)[position].tolist()


def test_training_begins_with_the_first_shard(tmp_path: Path, clock: Clock) -> None:
    run = begun(tmp_path)
    commit(run, 0)
    clock.meanwhile = lambda: pytest.fail("there is enough to give")
    stream = iter(follow(tmp_path))
    first = [next(stream) for _ in range(3)]
    assert shards_of(identities(first)) == [0]


def test_what_came_meanwhile_is_shuffled_together(tmp_path: Path, clock: Clock) -> None:
    run = begun(tmp_path)
    commit(run, 0)
    stream = follow(tmp_path, batch_rows=1, shuffle_buffer_bytes=1 << 20)
    found = []
    for batch in stream:
        found += identities([batch])
        if len(found) == 1:  # while the first group is given out
            clock.now_s += 0.1
            commit(run, 1)
            commit(run, 2)
            clock.now_s += arrivals._LOOK_S
    assert sorted(found) == ALL_ROWS
    assert stream.state_dict()["groups"] == [[0], [1, 2]]
    of_first = len([row for row in ALL_ROWS if row[0] in runs.SHARD_SEQUENCES[0]])
    assert shards_of(found[:of_first]) == [0]
    assert len(shards_of(found[of_first:])) == 2
    assert found[of_first:] != sorted(found[of_first:], key=lambda row: shards_of([row]))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(3)),
    there=st.integers(0, 3),
    world_size=st.integers(1, 3),
    batch_rows=st.integers(1, 12),
    buffer_rows=st.integers(1, 100),
    cuts=st.lists(st.integers(0, 9), max_size=3),
)
def test_every_row_once_over_all_ranks_however_often_they_are_resumed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, order, there, world_size, batch_rows, buffer_rows, cuts
) -> None:
    clock = Clock()
    monkeypatch.setattr(arrivals, "time", SimpleNamespace(monotonic=lambda: clock.now_s, sleep=clock.sleep))
    folder = tmp_path_factory.mktemp("run")
    run, coming = begun(folder), list(order)
    for _ in range(there):
        commit(run, coming.pop(0))
    clock.meanwhile = lambda: commit(run, coming.pop(0)) if coming else None
    found = []
    for rank in range(world_size):
        state, batches = None, []
        for cut in [*cuts, None]:
            clock.now_s += arrivals._LOOK_S
            stream = follow(folder, batch_rows=batch_rows, shuffle_buffer_bytes=buffer_rows * ROW_BYTES, rank=rank, world_size=world_size)
            if state is not None:
                stream.load_state_dict(pickle.loads(pickle.dumps(state)))
            batches += itertools.islice(stream, cut)
            state = stream.state_dict()
        assert all(len(batch["activations"]) == batch_rows for batch in batches[:-1])
        found += identities(batches)
    assert sorted(found) == ALL_ROWS


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
def test_ranks_that_open_an_unfinished_run_one_after_the_other_share_no_row(tmp_path: Path, order: tuple[int, ...]) -> None:
    run, of_rows, of_samples = begun(tmp_path), [], []
    for rank, shard in enumerate(order):
        commit(run, shard)
        view = open_run(tmp_path)
        of_rows += identities(view.layer(7).stream(batch_rows=4, shuffle_buffer_bytes=32 * ROW_BYTES, rank=rank, world_size=3))
        samples = view.draft_samples([7], all_tokens=True, rank=rank, world_size=3)
        of_samples += [int(sample["sequence_id"]) for sample in samples]
    assert of_rows
    assert len(set(of_rows)) == len(of_rows)
    assert of_samples
    assert len(set(of_samples)) == len(of_samples)


def test_a_resumed_stream_gives_what_the_uninterrupted_one_would(tmp_path: Path, clock: Clock) -> None:
    """Of the groups that it had taken before: same rows, same batches, same order."""
    run, coming = begun(tmp_path), [1, 0, 2]
    clock.meanwhile = lambda: commit(run, coming.pop(0))
    cut, states, batches = follow(tmp_path), [], []
    for batch in cut:
        batches.append({name: column.clone() for name, column in batch.items()})
        states.append(cut.state_dict())
    resumed = follow(tmp_path)
    for number, state in enumerate(states):
        resumed.load_state_dict(state)
        rest = list(resumed)
        if len(state["groups"]) == 3:
            assert len(rest) == len(batches) - number - 1
            assert all(
                torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
                for one, other in zip(rest, batches[number + 1 :], strict=True)
                for name in one
            )
        assert sorted(identities(batches[: number + 1] + rest)) == ALL_ROWS


def test_a_longer_shard_that_comes_later_leaves_the_order_of_a_state_as_it_was(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many parts are mixed at a time follows from their longest, which a resumed stream knows of more shards."""
    kept_bytes = 4 * TOKEN_ROW.itemsize * max(runs.shard(number).num_tokens for number in (1, 2))
    monkeypatch.setattr(open_parts, "_TOKENS_KEPT_BYTES", kept_bytes)
    assert runs.shard(0).num_tokens > runs.shard(1).num_tokens, "shard 0 leaves room for one part less"
    run = begun(tmp_path)
    commit(run, 1)
    commit(run, 2)
    cut = follow(tmp_path)
    head = list(itertools.islice(cut, 4))
    commit(run, 0)
    resumed = follow(tmp_path)
    resumed.load_state_dict(cut.state_dict())
    assert sorted(identities(head + list(resumed))) == ALL_ROWS


def test_a_repaired_shard_is_not_given_again(tmp_path: Path, clock: Clock) -> None:
    run = begun(tmp_path)
    commit(run, 0)
    steps = [lambda: reopen(run.store, run.job, [0]), lambda: commit(run, 1), lambda: commit(run, 0, "b2"), lambda: commit(run, 2)]

    def step() -> None:
        steps.pop(0)()

    clock.meanwhile = step
    assert sorted(identities(follow(tmp_path))) == ALL_ROWS


def test_a_shard_that_is_repaired_before_it_is_read_is_read_as_it_is_now(tmp_path: Path, clock: Clock) -> None:
    run = begun(tmp_path)
    for shard in range(3):
        commit(run, shard)
    stream = follow(tmp_path)
    reopen(run.store, run.job, [1])
    commit(Run(run.store, run.job), 1, "b2")
    run.store.delete([key for key, _ in run.store.list("data") if "a11" in key])  # as the end of the run does
    assert sorted(identities(stream)) == ALL_ROWS


def test_a_part_that_is_gone_and_not_repaired_is_damage(tmp_path: Path, clock: Clock) -> None:
    run = begun(tmp_path)
    for shard in range(3):
        commit(run, shard)
    run.store.delete([key for key, _ in run.store.list("data/site=residual/layer=007") if "a11" in key])
    with pytest.raises(RunDamagedError, match="is absent"):
        list(follow(tmp_path))


def test_a_shard_of_a_state_that_is_under_repair_is_waited_for(tmp_path: Path, clock: Clock) -> None:
    run = begun(tmp_path)
    commit(run, 0)
    cut = follow(tmp_path, batch_rows=1)
    head = list(itertools.islice(cut, 5))
    reopen(run.store, run.job, [0])
    resumed, coming = follow(tmp_path, batch_rows=1), [2, 0, 1]
    resumed.load_state_dict(cut.state_dict())
    again = Run(run.store, run.job)
    clock.meanwhile = lambda: commit(again, coming.pop(0), "b2")
    assert sorted(identities(head + list(resumed))) == ALL_ROWS


@pytest.mark.parametrize(("leases", "words"), [([], "no driver is at it"), ([7], "its driver gives no sign any more")])
def test_a_silent_run_is_an_error_in_time(tmp_path: Path, clock: Clock, leases: list[int], words: str) -> None:
    run = begun(tmp_path)
    commit(run, 0)
    for number in leases:
        run.store.create(f"_lease/{number:08d}.json", b"{}")
    with pytest.raises(NotInRunError, match=f"for {WAIT_S:g} s, and {words}: 1 of 3 shards are committed.*state_dict"):
        list(follow(tmp_path, idle_s=WAIT_S))
    assert WAIT_S <= clock.now_s < WAIT_S + 3 * arrivals._LOOK_S


def test_a_driver_at_work_is_waited_for_however_long_it_takes(tmp_path: Path, clock: Clock) -> None:
    run, numbers = begun(tmp_path), itertools.count(1)
    commit(run, 0)
    commit(run, 2)

    def renew() -> None:
        number, since_s = next(numbers), clock.now_s
        if since_s < 5 * SHORT_S:
            run.store.delete([key for key, _ in run.store.list("_lease")])
            run.store.create(f"_lease/{number:08d}.json", b"{}")
        elif run.store.size("_commits/shard-000001.json") is None:
            commit(run, 1)

    clock.meanwhile = renew
    assert sorted(identities(follow(tmp_path, idle_s=SHORT_S))) == ALL_ROWS


@pytest.mark.parametrize("workers", [0, 3])
def test_a_finished_run_is_followed_to_its_end_at_once(tmp_path: Path, workers: int) -> None:
    runs.finished_run(LocalStore(tmp_path))
    stream = follow(tmp_path)
    for epoch in range(2):
        stream.set_epoch(epoch)
        assert sorted(identities(DataLoader(stream, batch_size=None, num_workers=workers, timeout=60 if workers else 0))) == ALL_ROWS


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        runs.finished_run(LocalStore(tmp_path / name))
    state = follow(tmp_path / "one").state_dict()
    with pytest.raises(ConfigError, match="parts was"):
        follow(tmp_path / "two").load_state_dict(state)
    with pytest.raises(ConfigError, match="follow was True, is False"):
        follow(tmp_path / "one", follow=False).load_state_dict(state)
