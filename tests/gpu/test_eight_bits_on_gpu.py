"""Rows in 8 bits are the same bits whichever device encodes them."""

import pytest
import torch

from m2ray.model.eight_bits import Encoder
from m2ray.sites import parts_of_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("store_dtype", ["float8", "int8"])
def test_a_gpu_encodes_as_the_cpu_does(store_dtype: str, compute_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 3072, generator=generator) * torch.exp(2 * torch.randn(3072, generator=generator))
    rows[:, 7] *= 1000
    rows[17] = 0
    rows = rows.to(compute_dtype)
    (part,) = parts_of_run({"residual": (0,)}, store_dtype, 3072)
    here, there = Encoder(), Encoder()
    for ours, theirs in zip(here.encode(part, rows), there.encode(part, rows.cuda()), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.cpu().view(torch.uint8))
    assert here.losses()[0][2:] == pytest.approx(there.losses()[0][2:], rel=1e-5)
