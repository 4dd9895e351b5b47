"""The driver of one chain, step by step, over stages that fail, finish, hang and answer when the test says so."""

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError

from m2ray.batches import MicroBatch, PartReceipt, Shard
from m2ray.chain import driver
from m2ray.chain.completion import Completed, GatheredShard
from m2ray.chain.driver import Chain, ChainLostError, ShardAttempt
from m2ray.chain.failure import FailurePolicy
from m2ray.chain.queue import ShardQueue
from m2ray.chain.wave import Entered, Gathering
from m2ray.errors import ConfigError, M2rayError, StageMemoryError, StoreError

SEQUENCES, LENGTH, BATCH_TOKENS = 8, 4, 16
"""A shard's, and a micro-batch's padded tokens: 2 micro-batches of 4 sequences."""

HIDDEN_BYTES = 10
BATCH_BYTES = BATCH_TOKENS * HIDDEN_BYTES
RECEIPT = PartReceipt(0, "", "residual", 0, "key", 32, 1, "0" * 16, "0" * 32)


class LeverStages:
    """Stands for Stages. Levers say what comes next; an answer belongs to the epoch in which it was made, however late it is fetched."""

    def __init__(self, number: int = 2) -> None:
        self.number = number
        self.window = 6
        self.marks: list[tuple[int, int]] = []
        self.epoch = 0
        self.taken: list[tuple[int, int, str, MicroBatch]] = []
        self.gathers: list[tuple[int, int, int, str]] = []
        self.resets: list[tuple[int, list[tuple[int, str]]]] = []
        self.restarted: list[dict[int, str]] = []
        self.asked: list[tuple[int, int, int]] = []
        self.lost: dict[int, str] = {}
        self.work_done = (0, 0)
        self._steps: dict[int, int] = {}
        self._shards: dict[int, list[GatheredShard]] = {}
        self._failure: RayError | None = None
        self.script: Iterator[None] = itertools.repeat(None)

    def __len__(self) -> int:
        return self.number

    # -- levers

    def finish(self, count: int = 1, epoch: int = 0) -> None:
        """So many micro-batches more leave the last stage."""
        self._steps[epoch] = self._steps.get(epoch, 0) + count

    def answer(self, gather: tuple[int, int, int, str]) -> None:
        """A shard's receipts have come down the chain."""
        epoch, _, shard, attempt = gather
        self._shards.setdefault(epoch, []).append(GatheredShard(shard, attempt, (RECEIPT,)))

    def fail(self, error: Exception, lost: dict[int, str] | None = None) -> None:
        self._failure = error if isinstance(error, RayError) else RayTaskError("take", "trace", error)
        self.lost = lost or {}

    # -- what the driver calls

    def start(self) -> None:
        pass

    load = link = ask = lambda *_: None

    def take(self, *taken: Any) -> None:
        self.taken.append(taken)

    def mark(self, *mark: int) -> None:
        self.marks.append(mark)

    def gather(self, *gather: Any) -> None:
        self.gathers.append(gather)

    def news(self, epoch: int, steps: int, shards: int, timeout_s: float) -> Completed | None:
        self.asked.append((epoch, steps, shards))
        next(self.script)
        done = self._steps.get(epoch, 0)
        gathered = self._shards.get(epoch, [])[shards:]
        return Completed(done, tuple(gathered)) if done > steps or gathered else None

    def failed(self) -> RayError | None:
        return self._failure

    def reset(self, epoch: int, attempts: list[tuple[int, str]]) -> dict[int, str]:
        self.resets.append((epoch, attempts))
        self._failure = None
        return self.lost

    def restart(self, lost: dict[int, str]) -> bool:
        self.restarted.append(lost)
        return True

    def span(self, index: int) -> str:
        return f"layers {index}-{index}"

    def diagnosis(self) -> str:
        return "stage 1 does not answer"


def micro_batches(shard: Shard, batch_tokens: int) -> Iterator[MicroBatch]:
    size = max(1, batch_tokens // LENGTH)
    for index, start in enumerate(range(0, SEQUENCES, size)):
        ids = shard.sequence_ids[start : start + size]
        tokens_BT = np.zeros((len(ids), LENGTH), np.int32)
        yield MicroBatch(shard.index, index, start + size >= SEQUENCES, ids, shard.token_counts[: len(ids)], tokens_BT)


class Run:
    """A chain over `shards` shards: `run(script)` lets the levers of `script` act, one step of it before each piece of news."""

    def __init__(self, shards: int = 1, in_flight_bytes: int = 100 * BATCH_BYTES, policy: FailurePolicy | None = None) -> None:
        ids, counts = np.arange(SEQUENCES), np.full(SEQUENCES, LENGTH, np.int32)
        self.stages = LeverStages()
        self.queue = ShardQueue([Shard(index, ids, counts) for index in range(shards)])
        self.results: list[ShardAttempt] = []
        self.said: list[str] = []
        limits: dict[str, Any] = {"in_flight_bytes": in_flight_bytes, "hidden_bytes": HIDDEN_BYTES, "timeout_s": 30.0, "policy": policy}
        self.chain = Chain(self.stages, micro_batches, BATCH_TOKENS, self.said.append, **limits)  # type: ignore[arg-type]

    def __call__(self, script: Callable[[], Iterator[None]]) -> None:
        self.stages.script = script()
        self.chain.run(self.queue, self._take)

    def _take(self, result: ShardAttempt) -> None:
        self.results.append(result)
        self.queue.finish(result.shard)

    def complete(self, epoch: int = 0) -> None:
        """Every micro-batch that was taken leaves the chain, and all receipts that were asked for are there."""
        self.stages.finish(sum(taken[0] == epoch for taken in self.stages.taken) - self.stages._steps.get(epoch, 0), epoch)
        done = {(each.shard, each.attempt) for each in self.stages._shards.get(epoch, [])}
        for gather in self.stages.gathers:
            if gather[0] == epoch and gather[2:] not in done:
                self.stages.answer(gather)


def test_shards_are_complete_in_whichever_order_their_receipts_come() -> None:
    run = Run(shards=2)
    stages = run.stages

    def script() -> Iterator[None]:
        assert [(taken[:2], taken[3].shard) for taken in stages.taken] == [((0, 0), 0), ((0, 1), 0), ((0, 2), 1), ((0, 3), 1)]
        stages.finish(4)
        yield
        assert run.chain.tokens_done == 2 * SEQUENCES * LENGTH
        stages.answer(stages.gathers[1])
        yield
        assert stages.asked[-1] == (0, 4, 1)
        stages.answer(stages.gathers[0])
        yield

    run(script)
    assert [(result.shard.index, result.attempt) for result in run.results] == [(1, stages.taken[2][2]), (0, stages.taken[0][2])]
    assert [(result.micro_batches, result.receipts) for result in run.results] == [([(4, LENGTH), (4, LENGTH)], (RECEIPT,))] * 2
    assert run.chain.tokens_done == 2 * SEQUENCES * LENGTH


def test_receipts_are_asked_for_behind_the_last_micro_batch_of_a_shard() -> None:
    """Stages give them once they are done with that step: an earlier one would let them be asked too soon."""
    run = Run(shards=2)
    stages = run.stages

    def script() -> Iterator[None]:
        stages.finish(1)
        yield
        assert stages.gathers == []
        stages.finish(2)
        yield
        assert stages.gathers == [(0, 1, 0, stages.taken[0][2])]
        stages.finish(1)
        yield
        assert stages.gathers[1:] == [(0, 3, 1, stages.taken[2][2])]
        run.complete()
        yield

    run(script)
    assert len(run.results) == 2


@pytest.mark.parametrize(("bound_bytes", "held"), [(3 * BATCH_BYTES, 3), (4 * BATCH_BYTES - 1, 3), (BATCH_BYTES - 1, 1)])
def test_no_more_bytes_are_in_the_chain_than_may_be(bound_bytes: int, held: int) -> None:
    """But for one micro-batch, which is there even if it is larger by itself."""
    run = Run(shards=4, in_flight_bytes=bound_bytes)
    stages, left = run.stages, 0

    def script() -> Iterator[None]:
        nonlocal left
        for _ in range(8):
            assert len(stages.taken) == min(left + held, 8)
            left += 1
            stages.finish(1)
            yield
        run.complete()
        yield

    run(script)
    assert len(run.results) == 4


def test_no_more_micro_batches_are_in_the_chain_than_its_stages_have_use_for() -> None:
    run = Run(shards=2)
    run.stages.window = 3

    def script() -> Iterator[None]:
        assert len(run.stages.taken) == 3
        run.stages.finish(1)
        yield
        assert len(run.stages.taken) == 4
        run.complete()
        yield
        run.complete()
        yield

    run(script)


def test_a_lack_of_memory_halves_the_micro_batches_from_there_on() -> None:
    run = Run(shards=2)
    stages = run.stages

    def script() -> Iterator[None]:
        stages.finish(2)
        yield
        run.complete()
        yield  # the first shard is done
        stages.fail(StageMemoryError("No room.", "Halve.", 4, LENGTH))
        yield
        again = [taken for taken in stages.taken if taken[0] == 1]
        assert [len(taken[3].sequence_ids) for taken in again] == [2] * 4
        assert {taken[3].shard for taken in again} == {1}
        run.complete(1)
        yield
        run.complete(1)
        yield

    run(script)
    assert run.said == ["No room. Micro-batches of at most 8 padded tokens from here on."]
    assert [(result.shard.index, len(result.micro_batches)) for result in run.results] == [(0, 2), (1, 4)]
    assert stages.restarted == []


def test_a_lack_of_memory_in_a_wave_leaves_micro_batches_as_they_are() -> None:
    """The stage has halved its waves."""
    run = Run()
    stages = run.stages

    def script() -> Iterator[None]:
        stages.fail(StageMemoryError("No room.", "Halve.", 1, LENGTH, in_wave=True))
        yield
        assert [len(taken[3].sequence_ids) for taken in stages.taken if taken[0] == 1] == [4, 4]
        run.complete(1)
        yield
        run.complete(1)
        yield

    run(script)
    assert run.said == ["No room. Waves of half the size from here on."]


def test_the_last_that_may_come_is_marked_and_no_other_before_it_has_left() -> None:
    """All up to a marked one is sure to leave: another mark would begin waves for nothing that are not full."""
    run = Run(shards=3, in_flight_bytes=3 * BATCH_BYTES)
    stages = run.stages

    def script() -> Iterator[None]:
        assert stages.marks == [(0, 2)]
        stages.finish(2)
        yield
        assert (len(stages.taken), stages.marks) == (5, [(0, 2)])
        stages.finish(1)
        yield
        assert (len(stages.taken), stages.marks) == (6, [(0, 2), (0, 5)])
        run.complete()
        yield
        run.complete()
        yield

    run(script)
    assert stages.marks == [(0, 2), (0, 5)]


def test_where_no_more_come_the_last_is_marked_though_there_were_room() -> None:
    """Other replicas hold the other shards, and one of them may come back."""
    run = Run()
    held = Shard(1, np.arange(SEQUENCES), np.full(SEQUENCES, LENGTH, np.int32))
    run.queue._unfinished.add(1)

    def script() -> Iterator[None]:
        assert run.stages.marks == [(0, 1)]
        run.stages.finish(1)
        run.queue.give_back([held])
        yield
        assert (len(run.stages.taken), run.stages.marks) == (4, [(0, 1)])
        run.complete()
        yield
        run.complete()
        yield

    run(script)


class WaveStages(LeverStages):
    """Stages that gather waves as real ones do; each does a step of its work between two pieces of news."""

    def __init__(self, limits_tokens: Sequence[int], rng: random.Random) -> None:
        super().__init__(len(limits_tokens))
        self._rng = rng
        self._stages = [Gathering(limit) for limit in limits_tokens]
        self._work: list[deque[Any]] = [deque() for _ in limits_tokens]
        self.waves: list[list[int]] = [[] for _ in limits_tokens]

    def take(self, *taken: Any) -> None:
        super().take(*taken)
        self._work[0].append(Entered(taken[1], taken[2], taken[3], None))

    def mark(self, *mark: int) -> None:
        super().mark(*mark)
        for work in self._work:  # a mark may come before the micro-batches do, and after
            work.insert(self._rng.randrange(len(work) + 1), mark[1])

    def news(self, *asked: Any) -> Completed | None:
        for _ in range(20):
            index = self._rng.randrange(self.number)
            if self._work[index]:
                self._step(index)
        for gather in self.gathers[len(self._shards.get(0, [])) :]:
            self.answer(gather)
        return super().news(*asked)

    def _step(self, index: int) -> None:
        done = self._work[index].popleft()
        stage = self._stages[index]
        for wave in stage.mark(done) if isinstance(done, int) else stage.join(done):
            self.waves[index].append(len(wave))
            if index == self.number - 1:
                self.finish(len(wave))
            else:
                self._work[index + 1].extend(wave)


@pytest.mark.parametrize("seed", range(30))
def test_nothing_waits_for_ever_whatever_waves_and_bounds_there_are(seed: int) -> None:
    rng = random.Random(seed)
    limits = [rng.choice([0, 1, 2, 3, 7, 50]) * BATCH_TOKENS for _ in range(rng.randint(1, 4))]
    num_shards = rng.randint(1, 12)
    run = Run(shards=num_shards, in_flight_bytes=rng.choice([1, 2, 5, 100]) * BATCH_BYTES)
    run.stages = run.chain._stages = WaveStages(limits, rng)  # type: ignore[assignment]
    run.stages.window = rng.choice([1, 3, 40])

    def script() -> Iterator[None]:
        yield from itertools.repeat(None, 5000)
        pytest.fail(f"it stands still with {len(run.results)} shards done")

    run(script)
    assert sorted(result.shard.index for result in run.results) == list(range(num_shards)), "each once"


def test_waves_are_full_while_work_comes_where_every_stage_has_room_for_one() -> None:
    """Of two stages and one more in flight, and though each micro-batch enters by itself as another leaves."""
    run = Run(shards=60, in_flight_bytes=12 * BATCH_BYTES)
    run.stages = run.chain._stages = WaveStages([4 * BATCH_TOKENS] * 2, random.Random(0))  # type: ignore[assignment]
    run.stages.window = 40
    run(lambda: itertools.repeat(None))
    assert run.stages.waves == [[4] * 30] * 2


def test_a_single_sequence_without_room_ends_the_run() -> None:
    run = Run()

    def script() -> Iterator[None]:
        run.stages.fail(StageMemoryError("No room.", "Halve.", 1, LENGTH))
        yield

    with pytest.raises(StageMemoryError):
        run(script)
    assert run.queue.take() is not None, "the shard is given back"


def test_a_lost_stage_begins_a_fresh_epoch_and_nothing_late_of_the_old_one_counts() -> None:
    run = Run(shards=2)
    stages = run.stages

    def script() -> Iterator[None]:
        stages.finish(2)
        yield
        assert len(stages.gathers) == 1
        stages.fail(ActorDiedError(), lost={1: "died"})
        yield
        attempts = {(taken[3].shard, taken[2]) for taken in stages.taken if taken[0] == 0}
        assert (stages.resets[0][0], set(stages.resets[0][1])) == (1, attempts)
        assert stages.restarted == [{1: "died"}]
        assert run.chain.tokens_done == 0
        assert [taken[:2] for taken in stages.taken[4:]] == [(1, 0), (1, 1), (1, 2), (1, 3)]
        assert stages.asked[-1] == (1, 0, 0)
        stages.finish(2)  # what the old epoch had still to say
        stages.answer(stages.gathers[0])
        yield
        assert run.results == []
        assert len(stages.gathers) == 1
        assert run.chain.tokens_done == 0
        run.complete(1)
        yield
        run.complete(1)
        yield

    run(script)
    assert {result.attempt for result in run.results} == {taken[2] for taken in stages.taken if taken[0] == 1}
    assert len(run.results) == 2
    assert run.said == ["stage 1 (layers 1-1) died: restarted, 2 shards in flight are tried again"]


def test_a_failure_is_heard_before_news_that_is_there_too() -> None:
    run = Run()

    def script() -> Iterator[None]:
        run.stages.finish(2)
        run.stages.fail(ConfigError("no", "yes"))
        yield

    with pytest.raises(ConfigError):
        run(script)
    assert run.stages.gathers == []


def test_a_chain_that_stands_still_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not while a stage computes or writes."""
    run, clock = Run(), SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: clock.now_s))

    def script() -> Iterator[None]:
        for work in range(4):
            clock.now_s += 20.0
            run.stages.work_done = (work, 0)
            yield
        assert run.stages.resets == []
        run.stages.lost = {1: "hung"}
        clock.now_s += 31.0
        yield
        run.complete(1)
        yield
        run.complete(1)
        yield

    run(script)
    assert run.stages.restarted == [{1: "hung"}]
    assert len(run.results) == 1


@pytest.mark.parametrize(
    ("error", "lost", "raised"), [(ActorDiedError(), {0: "died"}, ChainLostError), (StoreError("full", "clean"), {}, StoreError)]
)
def test_what_fails_too_often_ends_the_chain(error: Exception, lost: dict[int, str], raised: type[M2rayError]) -> None:
    run = Run(policy=FailurePolicy(stage_restarts=0, store_retries=0))

    def script() -> Iterator[None]:
        run.stages.finish(2)
        yield
        assert run.chain.tokens_done == SEQUENCES * LENGTH
        run.stages.fail(error, lost)
        yield

    with pytest.raises(raised):
        run(script)
    assert run.queue.take() is not None
    assert run.chain.tokens_done == 0, "another chain does them again"


def test_a_load_that_hangs_each_time_ends_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages answer, so none of them is lost, and each try takes all the patience that the chain has."""
    run, clock = Run(), SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: clock.now_s))

    def hang(_: object) -> None:
        clock.now_s += 1800.0
        assert clock.now_s < 20 * 1800.0, "without end"
        raise GetTimeoutError("Loading stood still for 1800 s in stage 1 (layers 1-1).")

    run.stages.load = hang  # type: ignore[method-assign]
    run.chain._policy = FailurePolicy(patience_s=1800.0)
    with pytest.raises(ChainLostError, match=r"stage 1 \(layers 1-1\)\.. The chain failed 6 times .*raise stage_timeout_s"):
        run(lambda: iter(()))


def test_a_hang_that_lost_no_stage_counts_for_the_shards_in_flight() -> None:
    run = Run(policy=FailurePolicy(shard_failures=3))

    def script() -> Iterator[None]:
        while True:
            run.stages.fail(GetTimeoutError("late"))
            yield

    with pytest.raises(ChainLostError, match="Shard 0 was in flight in 3 failures"):
        run(script)


def test_the_shortest_shard_comes_first_and_the_others_in_their_order() -> None:
    tokens = [9, 7, 3, 8, 3]
    queue = ShardQueue([Shard(index, np.arange(1), np.array([count], np.int32)) for index, count in enumerate(tokens)])
    order = [shard.index for shard in iter(queue.take, None)]
    assert order == [2, 0, 1, 3, 4]
