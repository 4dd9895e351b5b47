"""Packed layers on a GPU: the bits of those that are ready, memory registered no longer than it is there, and no more of the GPU than was said."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from m2ray.batches import LayerSpan, Residency
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.residency.places import InHostMemory
from m2ray.model.stage import Stage, StageSpec
from m2ray.model.tensor_table import tensor_table
from tests.packed import make_packed
from tests.reference import MINIMAX_TINY, load_capturing, make_minimax, micro_batch_of
from tests.unit.test_residency import mappings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NUM_LAYERS = MINIMAX_TINY["layers"]
PACKED = {"mxfp8": "qwen3_moe", "nvfp4": "llama", "awq": "llama", "gptq": "llama", "mxfp4": "gpt_oss", "pack-quantized": "llama"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("gpu") / "model", "fp8")


def spec_of(folder: Path, num_layers: int, residency: Mapping[int, Residency], **others: object) -> StageSpec:
    spec = StageSpec(str(folder), LayerSpan(0, num_layers), "bfloat16", "auto", "cuda:0", None, residency=residency)
    return replace(spec, **others)


def rows_of(stage: Stage, num_batches: int) -> list[np.ndarray]:
    """Of several micro-batches under way at once, so that a buffer filled too early would show."""
    batches = [micro_batch_of((9 + seed, 230, 1, 170, 4), 96, seed) for seed in range(num_batches)]
    outputs = [stage.forward(batch, None) for batch in batches]
    return [layer.columns[0] for output in outputs for layer in output.captured]


WHERE: dict[str, Mapping[int, Residency]] = {
    **{place: dict.fromkeys(range(NUM_LAYERS), place) for place in ("gpu_packed", "host", "checkpoint")},
    "mixed": {1: "gpu_packed", 2: "host", 3: "host", 4: "checkpoint", 5: "host", 6: "checkpoint"},
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_packed_layers_give_the_same_rows(folder: Path, tmp_path: Path, where: str, *, compiled: bool) -> None:
    stages = [
        load_capturing(spec_of(folder, NUM_LAYERS, residency, compile=compiled, offload_folder=copies))
        for residency, copies in (({}, ""), (WHERE[where], ""), (WHERE[where], str(tmp_path)))
    ]
    expected, *found = (rows_of(stage, 8) for stage in stages)
    assert all(np.array_equal(one, other) for rows in found for one, other in zip(rows, expected, strict=True))
    assert all(stage.digests == stages[0].digests for stage in stages)


@pytest.mark.parametrize("fmt", ["bf16", *PACKED])
def test_packed_layers_of_other_layouts_do_too(fmt: str, tmp_path: Path) -> None:
    folder = make_minimax(tmp_path / "m", "bf16") if fmt == "bf16" else make_packed(tmp_path / "m", PACKED[fmt], fmt)
    expected = rows_of(load_capturing(spec_of(folder, 3, {})), 2)
    for residency in ({0: "gpu_packed", 1: "host", 2: "checkpoint"}, dict.fromkeys(range(3), "host")):
        found = rows_of(load_capturing(spec_of(folder, 3, residency)), 2)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_was_registered_is_given_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several stages one after the other in one process, and the memory of the first could be registered by somebody else again."""
    held: list[torch.Tensor] = []
    was = InHostMemory.settle
    monkeypatch.setattr(InHostMemory, "settle", lambda self: (held.append(self.run), was(self))[1])
    for _ in range(3):
        stage = load_capturing(spec_of(folder, NUM_LAYERS, dict.fromkeys(range(NUM_LAYERS), "host")))
        assert rows_of(stage, 1)
        del stage
        gc.collect()
        driver = torch.cuda.cudart()
        while held:
            memory = held.pop()
            assert int(driver.cudaHostRegister(memory.data_ptr(), len(memory), 0)) == 0
            driver.cudaHostUnregister(memory.data_ptr())


def test_stages_of_a_node_pin_one_copy_of_the_layers_in_host_memory(folder: Path) -> None:
    """Each maps and registers it for itself; the one that read it may be gone before the others."""
    everything = dict.fromkeys(range(NUM_LAYERS), "host")
    expected = rows_of(load_capturing(spec_of(folder, NUM_LAYERS, {})), 8)
    stages = [load_capturing(spec_of(folder, NUM_LAYERS, everything, shared=frozenset(everything))) for _ in range(2)]
    assert [list(mappings().values())] == [[2] * NUM_LAYERS]
    assert stages[1].digests == stages[0].digests
    for stage in stages:
        assert all(np.array_equal(one, other) for one, other in zip(rows_of(stage, 8), expected, strict=True))
    del stage, stages[0]
    gc.collect()
    stages.append(load_capturing(spec_of(folder, NUM_LAYERS, everything, shared=frozenset(everything))))
    for stage in stages:
        assert all(np.array_equal(one, other) for one, other in zip(rows_of(stage, 8), expected, strict=True))
    del stage, stages
    gc.collect()
    assert not mappings()


@pytest.mark.parametrize("where", ["gpu_packed", "host", "checkpoint"])
def test_no_more_of_the_gpu_is_held_than_was_said(folder: Path, where: Residency) -> None:
    table = tensor_table(open_checkpoint(str(folder)))
    packed, unpacked = table.packed_bytes(), table.unpacked_bytes("bfloat16")
    gc.collect()
    before = torch.cuda.memory_allocated()
    stage = load_capturing(spec_of(folder, NUM_LAYERS, dict.fromkeys(range(NUM_LAYERS), where)))
    held = torch.cuda.memory_allocated() - before
    runs = sum(packed) if where == "gpu_packed" else 2 * max(packed)
    said = runs + max(unpacked) + table.role_bytes("embedding", 2)
    assert held <= 1.1 * said + 2**20, "tables of the kernel, rotary frequencies, and the allocator's rounding"
    assert rows_of(stage, 1)
