"""compute_dtype = "float8" on a GPU: the kernels, a whole stage against the same products by torch, and weights that take what they take on disk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2ray.batches import LayerSpan
from m2ray.model import stage as stage_module
from m2ray.model.float8 import attention, norms, proof
from m2ray.model.float8.launching import by_triton, on_hopper
from m2ray.model.stage import Stage, StageSpec
from tests.float8 import make_float8
from tests.reference import chain_rows, load_capturing, micro_batch_of, same_bits

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= proof.LEAST_CAPABILITY
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FP8, reason="needs a CUDA device with FP8")]
NUM_LAYERS = 3


def load(folder: Path, device: str, **how: object) -> Stage:
    spec = StageSpec(str(folder), LayerSpan(0, NUM_LAYERS), "float8", "auto", device, None)
    return load_capturing(replace(spec, **how), store_dtype="bfloat16")  # type: ignore[arg-type]


def far(rows: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((rows.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)).median())


@pytest.mark.parametrize("kernel", [by_triton, on_hopper])
def test_products_are_those_of_torch(kernel: proof.Multiply) -> None:
    if kernel is on_hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper")
    assert proof.wrong(torch.device("cuda:0"), kernel) == ""


def test_experts_are_gated_as_by_torch() -> None:
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert proof.has_gated(torch.device("cuda:0")) == is_hopper


def test_norms_and_attention_are_rounded_as_by_torch() -> None:
    assert norms.has_kernel(torch.device("cuda:0"))
    assert attention.has_kernel(torch.device("cuda:0")) == (torch.cuda.get_device_capability()[0] == 9)


@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_moe", "llama"])
def test_a_stage_is_that_of_torch(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled or not, packed in host memory or not: rounding alone lies between.

    One bit of bfloat16 before a value is rounded to FP8 is a sixteenth of it after that, where it lies on an edge: rows that were rounded elsewhere on
    the way, as by another attention on the same CPU, are as far from one another as they are from bfloat16's.
    """
    folder, micro_batch = make_float8(tmp_path / "model", family), micro_batch_of((40, 25, 1), 96)
    monkeypatch.setattr(stage_module, "require_gpu", lambda _: None)
    expected = chain_rows([load(folder, "cpu")], micro_batch)
    monkeypatch.undo()
    plain = chain_rows([load(folder, "cpu", compute_dtype="bfloat16")], micro_batch)
    on_gpu = chain_rows([load(folder, "cuda:0")], micro_batch)
    compiled = load(folder, "cuda:0", compile=True)
    compiled.warm_up(256)
    for rows in (on_gpu, chain_rows([compiled], micro_batch)):
        for layer, each in enumerate(rows):
            assert far(each, expected[layer]) < 1.5 * far(plain[layer], expected[layer]), layer
    in_host = chain_rows([load(folder, "cuda:0", residency={0: "host", 2: "checkpoint"})], micro_batch)
    assert all(same_bits(*pair) for pair in zip(in_host, on_gpu, strict=True))
