"""A GPU's stage and the process beside it that writes: real jobs, one after the other, in memory that is registered as long as it is there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.chain.actor import StageActor
from m2ray.chain.job import Job
from m2ray.chain.machine import peak_rss_bytes
from m2ray.chain.status import StageStatus
from m2ray.model.capture import CaptureSpec
from m2ray.model.registered import register, unregister
from m2ray.model.stage import StageSpec
from m2ray.shared_memory import SharedMemory
from m2ray.sites import LayersOfSites
from tests.reference import MINIMAX_TINY, make_minimax, micro_batch_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = ((60, 40), (23, 1, 17), (1,), (120, 110), (64,) * 4)
SITES: LayersOfSites = {"residual": (0, 1, 3, 6), "router_topk": (2,)}
QUEUE_BYTES = 1 << 20


def batches() -> list[MicroBatch]:
    found = [micro_batch_of(lengths, MINIMAX_TINY["vocab_size"], seed) for seed, lengths in enumerate(LENGTHS)]
    return [
        replace(batch, index=number, is_last=number == len(found) - 1, sequence_ids=batch.sequence_ids + 1000 * number)
        for number, batch in enumerate(found)
    ]


def stage_of(model: Path) -> StageActor:
    spec = StageSpec(str(model), LayerSpan(0, MINIMAX_TINY["layers"]), "bfloat16", "auto", "cuda:0", None)
    stage = StageActor([spec], transport="auto", timeout_s=60.0, epoch=0)
    stage.load()
    return stage


def done(
    stage: StageActor, epoch: int, folder: Path, sites: LayersOfSites = SITES, batch_tokens: int = 256, *, with_crcs: bool = True
) -> StageStatus:
    """A job of one shard."""
    stage._passage.compute.thread.submit(
        stage._take_on, Job(CaptureSpec(sites, "bfloat16", with_crcs=with_crcs), WriterSpec(str(folder), {}, QUEUE_BYTES, 2), batch_tokens)
    ).result(120)
    stage.reset(epoch, [])
    shard = batches()
    for step, batch in enumerate(shard):
        stage.take(epoch, step, "a1", batch, None)
    stage.gather(epoch, len(shard) - 1, 0, "a1", ())
    if stage._turns._now.failure is not None:
        raise stage._turns._now.failure
    (gathered,) = stage.completed(epoch, len(shard), 0).shards
    assert len(gathered.receipts) == sum(map(len, sites.values()))
    return stage.status()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def are_pinned(stage: StageActor) -> list[bool]:
    assert stage._beside is not None
    return [torch.from_numpy(np.frombuffer(slab.memory, np.uint8)).is_pinned() for slab in stage._beside.memory.slabs]


def test_rows_are_those_of_a_writer_in_the_stages_process_and_memory_is_given_back(tmp_path: Path) -> None:
    model = make_minimax(tmp_path / "model", "fp8")
    stage = stage_of(model)
    first, other = done(stage, 1, tmp_path / "first"), done(stage, 2, tmp_path / "other", {"residual": (5,)}, 512)
    assert first.stored_parts == 5
    assert other.written_bytes < first.written_bytes
    assert stage._beside is not None
    own_bytes = peak_rss_bytes()
    assert stage.status().peak_rss_bytes > own_bytes + 10 * 2**20, "the process that writes is part of it"
    slabs, (memory,) = stage._beside.memory.slabs, [each.row_memory for each in stage._passage.stages]
    assert all(are_pinned(stage))
    again = done(stage, 3, tmp_path / "again", {"residual": (5,)}, 512)
    assert stage._beside.memory.slabs[:1] == slabs[:1], "a job like the one before pins nothing"
    assert again.written_bytes == other.written_bytes
    beside, stage._beside = stage._beside, None
    stage._passage.stages[0].row_memory = None
    done(stage, 4, tmp_path / "here", with_crcs=False)
    assert files_below(tmp_path / "here") == files_below(tmp_path / "first")
    stage._beside = beside
    held = torch.from_numpy(np.frombuffer(slabs[0].memory, np.uint8))
    memory.close()  # type: ignore[union-attr]
    assert beside.memory.slabs == ()
    assert not held.is_pinned()
    stage.close()
    stage.leave()
    assert not beside._process.is_alive  # type: ignore[union-attr]
    second = stage_of(model)
    done(second, 1, tmp_path / "second")
    assert files_below(tmp_path / "second") == files_below(tmp_path / "first")
    second.close()
    second.leave()


def test_a_refused_registration_is_not_told_of_the_next_kernel() -> None:
    device, slab = torch.device("cuda:0"), SharedMemory().add(1 << 20)
    assert register(slab.address, len(slab.memory), device) == 0
    assert register(slab.address, len(slab.memory), device), "it is registered already"
    assert torch.arange(4, device=device).sum().item() == 6
    unregister(slab.address)
