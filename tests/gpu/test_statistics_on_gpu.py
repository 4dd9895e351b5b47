"""Statistics on a GPU: those of one pass in float64 on the CPU, the same bits twice, and a stage's beside rows and without."""

from pathlib import Path

import numpy as np
import pytest
import torch

from m2ray.batches import LayerSpan
from m2ray.model import fused_statistics
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import StageSpec, load_stage
from m2ray.model.statistics import experts_statistics, rows_statistics
from tests.reference import LENGTHS, make_minimax, micro_batch_of
from tests.summed import against_numpy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ALL = {"moments", "norms", "covariance"}


@pytest.mark.parametrize("by", ["kernels", "torch"])
@pytest.mark.parametrize(("num_rows", "width"), [(9000, 768), (1, 40), (257, 3072)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_they_are_numpys_in_float64(dtype: torch.dtype, num_rows: int, width: int, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_statistics.has_kernels(torch.device("cuda:0"), dtype)
    if by == "torch":
        monkeypatch.setattr(fused_statistics, "has_kernels", lambda *_: False)
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn((num_rows, width), generator=generator) * torch.logspace(-2, 2, width) + 20 * torch.randn(width, generator=generator)
    rows[:, 5] = 0.1
    rows = rows.to(dtype)
    once, again = (rows_statistics(ALL, rows.cuda()) for _ in range(2))
    assert all(torch.equal(once[kind], again[kind]) for kind in ALL)
    against_numpy(len(rows), {kind: values.cpu().numpy() for kind, values in once.items()}, rows.double().numpy())


def test_experts_are_counted() -> None:
    ids = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(row))[:8] for row in range(9000)]).short()
    pairs = experts_statistics(ids.cuda(), 256)["experts"].cpu().numpy()
    assert np.array_equal(np.diagonal(pairs), np.bincount(ids.numpy().ravel(), minlength=256))
    assert np.array_equal(pairs, experts_statistics(ids, 256)["experts"].numpy())


def test_a_stage_takes_the_same_whether_it_keeps_rows_or_not(tmp_path: Path) -> None:
    folder = make_minimax(tmp_path / "model", "fp8")
    asked = {"moments": {"residual": (0, 1, 4)}, "covariance": {"residual": (1,)}, "experts": {"router_topk": (0, 3)}}
    stage = load_stage(StageSpec(str(folder), LayerSpan(0, 5), "bfloat16", "auto", "cuda:0", None), lambda *_: None)
    found = []
    for kept in ({"residual": (0, 1, 4)}, {}):
        stage.begin(CaptureSpec(kept, "bfloat16", statistics=asked))
        captured = stage.forward(micro_batch_of(LENGTHS, 384), None).captured
        found.append({(layer.site, layer.layer, kind): values.tobytes() for layer in captured for kind, values in layer.statistics.items()})
        assert any(layer.columns for layer in captured) == bool(kept)
    assert found[0] == found[1]
