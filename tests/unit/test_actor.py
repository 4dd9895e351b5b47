"""A stage's actor, without Ray around it."""

import os
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import GetTimeoutError

from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan, MicroBatch, Residency
from m2ray.chain import actor
from m2ray.chain.job import Job
from m2ray.chain.passage import Passage
from m2ray.chain.status import StageStatus
from m2ray.errors import CheckpointError, StageMemoryError, StoreError
from m2ray.model import interpreter
from m2ray.model.boundary import Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.checkpoint import Checkpoint, open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.stage import StageSpec
from tests.reference import make_family, micro_batch_of, other_weights


def stage_of(spec: StageSpec, monkeypatch: pytest.MonkeyPatch) -> actor.StageActor:
    monkeypatch.setattr(actor, "status_here", lambda _: StageStatus(LayerSpan(0, 5), "here", "cpu", "node", os.getpid()))
    return actor.StageActor([spec], transport="auto", timeout_s=60.0, epoch=0)


def test_what_a_failed_load_held_is_given_back_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver asks the same process again; on a GPU there is no room for two spans."""
    model = make_family(tmp_path / "llama", "llama")
    spec = StageSpec(str(model), LayerSpan(0, 5), "float32", "auto", "cpu", 1)
    held: list[weakref.ref[DecoderSpan]] = []
    was_read, was_made = Checkpoint.read_extent, DecoderSpan.__init__

    def made(self: DecoderSpan, *arguments: Any, **options: Any) -> None:
        held.append(weakref.ref(self))
        assert all(earlier() is None for earlier in held[:-1]), "two spans at once"
        was_made(self, *arguments, **options)

    def refused(self: Checkpoint, file: str, offset: int, out: memoryview) -> None:
        if len(held) == 1 and offset == self.headers["model.layers.0.self_attn.o_proj.weight"].offset:
            raise StoreError("gone")
        was_read(self, file, offset, out)

    monkeypatch.setattr(DecoderSpan, "__init__", made)
    monkeypatch.setattr(Checkpoint, "read_extent", refused)
    stage = stage_of(spec, monkeypatch)
    with pytest.raises(StoreError, match="gone"):
        stage._build()
    stage._build()
    assert len(held) == 2
    stage.close()


def test_files_that_were_refused_are_not_read_again_until_they_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper asks every few seconds, and whoever wants rows whenever he likes: a span of hundreds of GB takes minutes each time."""
    model = make_family(tmp_path / "llama", "llama")
    of_run = StageSpec(str(model), LayerSpan(0, 5), "float32", "auto", "cpu", 1, model_files=open_checkpoint(str(model)).digests)
    first = stage_of(of_run, monkeypatch)
    first._build()
    back = stage_of(replace(of_run, weights=first.status().weights), monkeypatch)
    with other_weights(model):
        for _ in range(3):
            with pytest.raises(CheckpointError, match=r"they were replaced meanwhile \(the embedding and layers 0-4\). Put the files back"):
                back._build()
        assert back.status().read_bytes == first.status().read_bytes, "read once"
    back._build()
    for stage in (first, back):
        stage.close()


def test_switches_are_quick_as_long_as_a_stage_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its computation asks for the interpreter after each operation, and else gets it from the writer's threads 5 ms later."""
    monkeypatch.setattr(interpreter, "_usual_s", [])
    sys.setswitchinterval(usual_s := 0.005)
    stage = stage_of(StageSpec("nowhere", LayerSpan(0, 5), "float32", "auto", "cpu", 1), monkeypatch)
    assert sys.getswitchinterval() < usual_s
    stage.leave()
    assert sys.getswitchinterval() == usual_s


def test_receipts_are_not_collected_before_the_rows_of_the_last_micro_batch_are_with_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of(StageSpec("", LayerSpan(0, 5), "float32", "auto", "cpu", 1), monkeypatch)
    monkeypatch.setattr(stage._passage, "job", SimpleNamespace(collect=lambda *collected: collected[:2]))
    monkeypatch.setattr(stage._passage, "limit_s", 0.01)
    stage._turns.finish_step(0)
    stage.gather(0, 1, 7, "attempt", ())
    with pytest.raises(GetTimeoutError, match="for the rows of micro-batch 1"):
        stage._turns.watch(0, 0.0)
    stage._turns.begin(1)
    stage._turns.finish_step(1)
    stage._turns.finish_step(1)
    stage.gather(1, 1, 7, "attempt", ())
    (gathered,) = stage.completed(1, 2, 0).shards
    assert (gathered.shard, gathered.attempt, gathered.receipts) == (7, "attempt", (7, "attempt"))


def test_a_reset_that_comes_late_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job before may still be told to give up when the next one has begun."""
    stage = stage_of(StageSpec("", LayerSpan(0, 5), "float32", "auto", "cpu", 1), monkeypatch)
    stage.reset(7, [])
    stage.reset(6, [])
    assert stage._turns.epoch == 7


def test_a_job_may_go_while_it_is_closed_given_up_or_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The computing thread of a warm chain's stage takes the next one on: a stage that fails by that is started again, and loads again."""
    stage, done = stage_of(StageSpec("", LayerSpan(0, 5), "float32", "auto", "cpu", 1), monkeypatch), []
    job = SimpleNamespace(
        is_closed=False,
        close=lambda: done.append("closed"),
        abandon=lambda *_: done.append("given up"),
        collect=lambda *_: done.append("collected") or (),
    )
    for ask in (stage.close, lambda: stage.reset(1, []), lambda: stage.gather(1, -1, 7, "attempt", ())):
        once = iter([job])
        with monkeypatch.context() as patch:
            patch.setattr(Passage, "job", property(lambda _, once=once: next(once, None)), raising=False)
            ask()
    assert done == ["closed", "given up", "given up", "collected"]
    stage._turns.watch(1, 0.0)
    stage.leave()


def a_job(folder: Path) -> Job:
    return Job(CaptureSpec({"residual": (1, 3)}, "float32"), WriterSpec(str(folder / "run"), {}, 1 << 20, 1), 16)


def waving(folder: Path, span: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> actor.StageActor:
    """A stage that has begun a job, with waves of three micro-batches of 16 tokens."""
    residency: dict[int, Residency] = dict.fromkeys(range(5), "host")
    spec = StageSpec(str(folder / "llama"), LayerSpan(*span), "float32", "auto", "cpu", 1, residency=residency, wave_tokens=50)
    stage = stage_of(spec, monkeypatch)
    stage._build()
    stage._take_on(a_job(folder))
    return stage


def test_a_writer_behind_a_store_that_hangs_is_among_what_a_stage_waits_for_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends it (here.py) then ends the process; Python itself waits for such a thread, and says nothing."""
    make_family(tmp_path / "llama", "llama")
    stage, may_write = waving(tmp_path, (0, 5), monkeypatch), threading.Event()
    job = stage._passage.job
    assert job is not None
    job._writer.threads[0].submit(may_write.wait, 30)
    stage.close()
    stage.leave()
    ending = threading.Thread(target=lambda: [threads.shutdown() for threads in stage.threads])
    ending.start()
    ending.join(0.2)
    assert ending.is_alive()
    may_write.set()
    ending.join(30)
    assert not ending.is_alive()


def part_of_shard(index: int) -> MicroBatch:
    return replace(micro_batch_of((3, 8), 96, index), index=index, is_last=index == 4, sequence_ids=np.array([2 * index, 2 * index + 1]))


def test_micro_batches_wait_for_a_wave_until_it_is_full_or_nothing_more_can_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_family(tmp_path / "llama", "llama")
    stage, done = waving(tmp_path, (0, 5), monkeypatch), []
    for step in range(5):
        stage.take(0, step, "attempt", part_of_shard(step), None)
        stage._passage.compute.drain(30)
        stage._passage.capture.drain(30)
        done.append(stage._turns.done)
    assert done == [0, 0, 3, 3, 3]
    stage.mark(0, 4)
    stage.gather(0, 4, 0, "attempt", ())
    (gathered,) = stage.completed(0, 4, 0).shards
    assert [(receipt.layer, receipt.rows) for receipt in gathered.receipts] == [(1, 55), (3, 55)]
    assert (stage.status().micro_batches, stage.status().tokens) == (5, 55)
    stage.close()


def test_hidden_states_are_held_until_they_are_sent_and_not_until_their_rows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_family(tmp_path / "llama", "llama")
    stage, sent, outputs = waving(tmp_path, (0, 4), monkeypatch), [], []
    monkeypatch.setattr(stage._passage, "successor", SimpleNamespace(take=SimpleNamespace(remote=lambda *_: None)))
    monkeypatch.setattr(stage._passage.outgoing, "payload", lambda _, output: sent.append(output.boundary))
    monkeypatch.setattr(stage._passage, "_wait_until_taken", lambda *_: None)
    monkeypatch.setattr(stage._passage, "_give_to_writer", lambda *given: outputs.append(given[2]))
    for step in range(3):
        stage.take(0, step, "attempt", part_of_shard(step), None)
    for door in (stage._passage.compute, stage._passage.send, stage._passage.capture):
        door.drain(30)
    assert len(sent) == 3
    assert all(sent)
    assert [output.leaves for output in outputs].count(True) == 3
    assert not any(output.boundary for output in outputs)
    stage.close()


def test_half_a_wave_goes_with_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage before has died: what it had handed on is held no longer, and is in no wave of the next epoch."""
    make_family(tmp_path / "llama", "llama")
    stage, held = waving(tmp_path, (2, 5), monkeypatch), []

    def receive(*_: Any) -> Boundary:
        hidden_BTH = torch.ones(2, 8, 48)
        held.append(weakref.ref(hidden_BTH))
        return Boundary(hidden_BTH)

    monkeypatch.setattr(stage._passage.incoming, "receive", receive)
    for step in range(2):
        stage.take(0, step, "first", part_of_shard(step), {})
    stage.mark(0, 4)
    stage._passage.compute.drain(30)
    assert all(each() is not None for each in held)
    stage.reset(1, [(0, "first")])
    assert [each() for each in held] == [None, None]
    for step in range(5):
        stage.take(1, step, "second", part_of_shard(step), {})
    stage._passage.compute.drain(30)
    stage._passage.capture.drain(30)
    assert stage._turns.done == 3
    stage.mark(1, 4)
    stage.gather(1, 4, 0, "second", ())
    (gathered,) = stage.completed(1, 4, 0).shards
    assert [(receipt.attempt, receipt.rows) for receipt in gathered.receipts] == [("second", 55)]
    stage.close()
    assert ["second" in path.name for path in (tmp_path / "run").rglob("*.parquet")] == [True]


def test_nothing_of_a_closed_job_is_in_the_waves_of_the_next_on_a_warm_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that stands is told to close a job and to begin another epoch: half a wave, and a mark further on than the next job goes."""
    make_family(tmp_path / "llama", "llama")
    stage = waving(tmp_path, (0, 5), monkeypatch)
    for step in range(2):
        stage.take(0, step, "first", part_of_shard(step), None)
    stage.mark(0, 99)
    stage._passage.compute.drain(30)
    stage.close()
    stage.reset(1, [])
    stage.reset(2, [])
    stage._take_on(a_job(tmp_path))
    for step in range(2):
        stage.take(2, step, "second", replace(part_of_shard(step), is_last=step == 1), None)
    stage.mark(2, 1)
    stage._passage.compute.drain(30)
    stage._passage.capture.drain(30)
    assert stage._turns.done == 2
    stage.gather(2, 1, 0, "second", ())
    (gathered,) = stage.completed(2, 1, 0).shards
    assert [(receipt.attempt, receipt.rows) for receipt in gathered.receipts] == [("second", 22), ("second", 22)]
    stage.close()


def test_a_wave_that_was_halved_is_whole_again_in_the_next_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_family(tmp_path / "llama", "llama")
    stage = waving(tmp_path, (0, 5), monkeypatch)

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with monkeypatch.context() as patch:
        patch.setattr(stage._passage.stages[0], "_pass", no_room)
        for step in range(3):
            stage.take(0, step, "first", part_of_shard(step), None)
        stage._passage.compute.drain(30)
    with pytest.raises(StageMemoryError, match="A wave of 48 padded tokens"):
        stage.watch(0)

    def done_after_each(epoch: int) -> list[int]:
        done = []
        for step in range(3):
            stage.take(epoch, step, "again", part_of_shard(step), None)
            stage._passage.compute.drain(30)
            stage._passage.capture.drain(30)
            done.append(stage._turns.done)
        return done

    stage.reset(1, [(0, "first")])
    assert done_after_each(1) == [1, 2, 3], "two micro-batches find no room in half a wave"
    stage.close()
    stage.reset(2, [])
    stage._take_on(a_job(tmp_path))
    assert done_after_each(2) == [0, 0, 3]
    stage.close()


def test_a_stage_answers_requests_with_and_without_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads by itself, and what it hands on is what the next stage takes."""
    model = make_family(tmp_path / "llama", "llama")
    capture, micro_batch = CaptureSpec({"residual": (1, 4)}, "float32"), micro_batch_of((3, 8), 96)
    whole = stage_of(StageSpec(str(model), LayerSpan(0, 5), "float32", "auto", "cpu", 1), monkeypatch)
    halves = [stage_of(StageSpec(str(model), LayerSpan(*ends), "float32", "auto", "cpu", 1), monkeypatch) for ends in ((0, 2), (2, 5))]
    monkeypatch.setattr(actor.ray, "put", lambda value: value)
    follower = SimpleNamespace(answer=SimpleNamespace(remote=halves[1].answer))
    expected, nothing = whole.answer(capture, micro_batch, None, [])
    first, (second, last) = halves[0].answer(capture, micro_batch, None, [follower])
    assert nothing is last is None
    assert [each.layer for each in (*first, *second)] == [1, 4]
    for one, other in zip((*first, *second), expected, strict=True):
        assert np.array_equal(one.columns[0], other.columns[0])


def test_a_job_given_up_while_it_is_begun_is_not_left_begun_with_closed_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm chain's driver may die at that moment; the same command then brings the same job."""
    opened: list[str] = []
    monkeypatch.setattr(actor, "warm_up", lambda *_: None)
    stage = stage_of(StageSpec("", LayerSpan(0, 5), "float32", "auto", "cpu", 1), monkeypatch)
    stage._passage.stages = [SimpleNamespace(begin=lambda _: None, parts=(), statistics={})]  # type: ignore[list-item]

    def open_writer(_: Any) -> Any:
        opened.append("writer")
        stage.close()
        return SimpleNamespace(close=lambda _: opened.clear())

    job = Job(CaptureSpec({}, "float32"), SimpleNamespace(queue_bytes=1, open=open_writer), 64)  # type: ignore[arg-type]
    stage._take_on(job)
    stage._take_on(job)
    assert opened == ["writer"], "one writer, which is open"
    stage.close()
    stage._take_on(job)
    assert opened == ["writer"], "what was closed is not gone on with"
