"""The writer in a process beside the stage's: what it writes is what a writer in this one does, whatever becomes of the store, the process or the stage."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch

from m2ray.activations.job import JobRecord
from m2ray.activations.writing import beside as module
from m2ray.activations.writing.backlog import Figures
from m2ray.activations.writing.beside import Beside, WriterBeside
from m2ray.activations.writing.writer import ActivationWriter, WriterSpec
from m2ray.batches import Bits, CapturedLayer, MicroBatch, PartReceipt, PartSpec
from m2ray.errors import StageError, StoreError
from m2ray.model import capture
from m2ray.model.pinned import PinnedRuns, SharedRuns
from m2ray.storage import LocalStore
from tests.gated import Gated
from tests.gpu import test_beside_on_gpu as on_gpu
from tests.played_gpu import play
from tests.unit import activation_runs as runs

ATTEMPT = "abc123"
FIRST, SECOND = (runs.micro_batches(runs.shard(index)) for index in (0, 1))


class Rows:
    """What a GPU's stage would capture, in the memory that the process maps."""

    def __init__(self, beside: Beside, *, with_crcs: bool = False) -> None:
        self.memory = SharedRuns(beside.memory, torch.device("cpu"))
        self.with_crcs = with_crcs
        self._runs = PinnedRuns(64, self.memory)

    def of(self, parts: Sequence[PartSpec], micro_batch: MicroBatch) -> list[CapturedLayer]:
        captured = runs.captured(parts, micro_batch)
        return [
            replace(
                layer,
                columns=tuple(map(self._shared, layer.columns)),
                crcs=tuple(self._shared(self._crcs(rows)).view(np.uint32)[:, 0] for rows in layer.columns) if self.with_crcs else (),
            )
            for layer in captured
        ]

    def _crcs(self, rows: Bits) -> Bits:
        return np.array([[crc32(row)] for row in rows], np.uint32).view(np.uint8)

    def _shared(self, rows: Bits) -> Bits:
        taken = self._runs.take(rows.shape, torch.uint8)
        taken.copy_(torch.from_numpy(rows))
        return taken.numpy()

    @property
    def lent(self) -> int:
        """Runs that somebody has, here or there."""
        self._runs = PinnedRuns(64, self.memory)
        gc.collect()
        return sum(run._lent is not None and run._lent() is not None for of_size in self.memory._runs.values() for run in of_size)


@pytest.fixture(scope="module")
def process() -> Iterator[Beside]:
    """One for all jobs, as on a warm chain."""
    beside = Beside()
    yield beside
    beside.close()


@pytest.fixture
def beside(process: Beside) -> Iterator[Beside]:
    yield process
    until(lambda: not process.start()._read_there)


def pid_of(beside: Beside) -> int:
    return beside.start().pid


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def record_of(folder: Path) -> JobRecord:
    return runs.job(LocalStore(folder))


def spec_of(folder: Path, record: JobRecord, queue_bytes: int = 1 << 20) -> WriterSpec:
    return WriterSpec(str(folder), record.run_metadata(), queue_bytes, 2)


def write(
    writer: WriterBeside | ActivationWriter, rows: Rows, parts: Sequence[PartSpec], *batches: MicroBatch, timeout_s: float = 10
) -> None:
    for micro_batch in batches:
        writer.submit(ATTEMPT, micro_batch, rows.of(parts, micro_batch), timeout_s)


def collected(writer: WriterBeside | ActivationWriter) -> list[PartReceipt]:
    return [receipt for shard in (1, 0) for receipt in writer.collect(shard, ATTEMPT, 10)]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "sequences" not in path.parts
    }


def test_jobs_one_after_the_other_leave_what_a_writer_in_this_process_does(beside: Beside, tmp_path: Path) -> None:
    record, rows, with_crcs = record_of(tmp_path / "record"), Rows(beside), Rows(beside, with_crcs=True)
    alternating = (FIRST[0], SECOND[0], SECOND[1], *FIRST[1:])
    pids = set()
    for job in ("one", "other"):
        found, figures = {}, {}
        for there in (True, False):
            folder = tmp_path / job / str(there)
            spec = spec_of(folder, record)
            writer = beside.open(spec, record.parts) if there else spec.open(record.parts)
            write(writer, with_crcs if there and job == "other" else rows, record.parts, *alternating)
            found[there] = collected(writer), files_below(folder)
            if there:
                until(lambda writer=writer: writer.figures.queued_bytes == 0)
            figures[there] = writer.figures
            writer.close()
        assert found[True] == found[False]
        assert len(found[True][1]) == 2 * len(record.parts)
        for name in ("queued_bytes", "written_bytes", "stored_parts"):
            assert getattr(figures[True], name) == getattr(figures[False], name)
        assert 0 < figures[True].store_s < figures[True].write_s
        pids.add(pid_of(beside))
        assert "libtorch" not in Path(f"/proc/{pid_of(beside)}/maps").read_text()
    assert len(pids) == 1
    until(lambda: not rows.lent and not with_crcs.lent)
    maps = Path(f"/proc/{pid_of(beside)}/maps")
    assert "m2ray-rows" in maps.read_text()
    for each in (rows, with_crcs):
        each.memory.close()
    until(lambda: "m2ray-rows" not in maps.read_text())


def test_a_full_queue_waits_and_an_attempt_that_is_given_up_leaves_nothing(beside: Beside, tmp_path: Path) -> None:
    record, rows, gate = record_of(tmp_path / "record"), Rows(beside), tmp_path / "gate"
    room = FIRST[0].num_tokens * 2 * runs.WIDTH
    folder = tmp_path / "run"
    writer = beside.open(Gated(**vars(spec_of(folder, record, room)), gate=str(gate)), record.parts)
    with pytest.raises(StoreError, match=rf"Writing fell behind: {room} of at most {room} bytes"):
        write(writer, rows, record.parts, FIRST[0], timeout_s=0.1)
    assert rows.lent
    gate.touch()
    writer.abandon([(0, ATTEMPT)])
    assert files_below(folder) == {}
    until(lambda: not rows.lent)
    assert writer.figures.waited_s > 0.05
    write(writer, rows, record.parts, *SECOND)
    assert len(writer.collect(1, ATTEMPT, 10)) == len(record.parts)
    writer.close()


def test_what_the_store_refuses_and_what_is_out_of_order_is_raised_here(beside: Beside, tmp_path: Path) -> None:
    record, rows, gate = record_of(tmp_path / "record"), Rows(beside), tmp_path / "gate"
    gate.write_text("No space left")
    folder = tmp_path / "run"
    writer = beside.open(Gated(**vars(spec_of(folder, record)), gate=str(gate)), record.parts)
    with pytest.raises(StoreError, match=r"Cannot write: No space left\. The disk is full\."):
        write(writer, rows, record.parts, *FIRST)
        writer.collect(0, ATTEMPT, 10)
    writer.abandon([(0, ATTEMPT)])
    with pytest.raises(StageError, match="micro-batch 1 came, expected was 0"):
        write(writer, rows, record.parts, SECOND[1])
    with pytest.raises(StageError, match="collected before its last micro-batch"):
        writer.collect(1, ATTEMPT, 10)
    writer.close()
    writer.close()
    with pytest.raises(StageError, match="writer is closed"):
        write(writer, rows, record.parts, FIRST[0])
    assert files_below(folder) == {}
    until(lambda: not rows.lent)
    with pytest.raises(StoreError, match="ftp"):
        beside.open(replace(spec_of(folder, record), output="ftp://nowhere"), record.parts)


@pytest.mark.parametrize("struck", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_hangs_fails_what_it_had_and_the_next_attempt_has_another(
    struck: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 1.0)
    beside = Beside()
    record, rows, gate = record_of(tmp_path / "record"), Rows(beside), tmp_path / "gate"
    folder = tmp_path / "run"
    writer = beside.open(Gated(**vars(spec_of(folder, record)), gate=str(gate)), record.parts)
    write(writer, rows, record.parts, *FIRST)
    pid = pid_of(beside)
    os.kill(pid, struck)
    how = r"was killed by signal 9 \(Killed\)" if struck == signal.SIGKILL else r"did not answer within 1.2 s, and was killed therefore"
    for fails in (lambda: writer.collect(0, ATTEMPT, 0.1), lambda: write(writer, rows, record.parts, FIRST[0])):
        with pytest.raises(StoreError, match=rf"The process {pid} that writes this stage's rows {how}\."):
            writer._attempts.setdefault((0, ATTEMPT), writer._process)  # type: ignore[arg-type]
            fails()
    until(lambda: not rows.lent)
    gate.touch()
    writer.abandon([(0, ATTEMPT)])
    write(writer, rows, record.parts, *SECOND)
    receipts = writer.collect(1, ATTEMPT, 10)
    assert pid_of(beside) != pid
    assert len(receipts) == len(record.parts)
    until(lambda: writer.figures.queued_bytes == 0)
    assert writer.figures.written_bytes >= sum(receipt.num_bytes for receipt in receipts)
    LocalStore(folder).delete_unfinished()
    assert set(files_below(folder)) == {receipt.key for receipt in receipts}
    writer.close()
    beside.close()
    assert writer.figures != Figures()


def test_a_stage_that_plays_that_it_is_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests/gpu has a GPU's stage do."""
    registered = play(monkeypatch)
    monkeypatch.setattr(capture, "_HANDED_BYTES", 1)
    submit, layers = WriterBeside.submit, list[list[int | None]]()

    def noted(writer: WriterBeside, attempt: str, micro_batch: MicroBatch, captured: Sequence[CapturedLayer], timeout_s: float) -> None:
        layers.append([each.layer for each in captured])
        submit(writer, attempt, micro_batch, captured, timeout_s)

    monkeypatch.setattr(WriterBeside, "submit", noted)
    on_gpu.test_rows_are_those_of_a_writer_in_the_stages_process_and_memory_is_given_back(tmp_path)
    assert layers[:5] == [[0], [1], [2], [3], [6]], "as each is there"
    assert registered.num_bytes > 0
    assert registered.bytes_at == {}, "what is freed and still registered is in the way of what comes to lie there"


_STAGE = """
import sys, time
from m2ray.activations.writing.beside import Beside
print(Beside().start().pid, flush=True)
time.sleep(60)
"""


def test_it_is_gone_with_the_stage_however_that_ends_and_heeds_no_signal_meant_for_that(tmp_path: Path) -> None:
    stage = subprocess.Popen([sys.executable, "-c", _STAGE], stdout=subprocess.PIPE, text=True)
    assert stage.stdout is not None
    pid = int(stage.stdout.readline())
    status = Path(f"/proc/{pid}/status")
    ignored = (1 << signal.SIGINT - 1) | (1 << signal.SIGTERM - 1) | (1 << signal.SIGHUP - 1)
    until(lambda: ignored & ~int(status.read_text().split("SigIgn:")[1].split()[0], 16) == 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert "State:\tZ" not in status.read_text()
    stage.kill()
    stage.wait(10)
    until(lambda: not status.exists() or "State:\tZ" in status.read_text())
