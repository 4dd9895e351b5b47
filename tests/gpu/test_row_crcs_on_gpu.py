"""CRC32s of rows made on a GPU: zlib's, of rows of all dtypes, and a stored part is the same by them."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan
from m2ray.model import row_crcs as module
from m2ray.model.capture import CaptureSpec
from m2ray.model.row_crcs import can_make_crcs, has_kernel, row_crcs
from m2ray.model.stage import Stage, StageSpec, load_stage
from tests.reference import MINIMAX_TINY, make_minimax, micro_batch_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda:0")
LENGTHS = ((300, 40), (23, 1, 17), (1,), (900, 800))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    layers = MINIMAX_TINY["layers"]
    return load_stage(
        StageSpec(str(make_minimax(tmp_path / "model", "fp8")), LayerSpan(0, layers), "bfloat16", "auto", str(GPU), None), lambda *_: None
    )


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """What was proved of kernels before and in the test."""
    has_kernel.cache_clear()
    yield
    has_kernel.cache_clear()
    module._masks.cache_clear()


@pytest.mark.parametrize("unit_bytes", [1, 2, 4])
def test_the_kernel_is_proved(unit_bytes: int) -> None:
    assert module._problem(unit_bytes, GPU) == ""
    assert has_kernel(GPU, unit_bytes)


@pytest.mark.parametrize(("num_rows", "width"), [(16_384, 3072), (1, 7), (700, 24), (4001, 2881), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int16])
def test_rows_have_the_crcs_of_zlib(dtype: torch.dtype, num_rows: int, width: int) -> None:
    octets = torch.randint(0, 256, (num_rows, width * dtype.itemsize), dtype=torch.uint8, device=GPU)
    rows_NW = octets.view(dtype)
    assert can_make_crcs(rows_NW)
    assert row_crcs(rows_NW).cpu().numpy().view(np.uint32).tolist() == [zlib.crc32(row) for row in octets.cpu().numpy()]


@pytest.mark.parametrize("store_dtype", ["bfloat16", "float16", "float32", "float8", "int8"])
def test_a_stage_hands_them_over_and_a_part_is_the_same_by_them(store_dtype: str, stage: Stage, tmp_path: Path) -> None:
    """Several micro-batches are under way before the first is looked at."""
    stage.begin(CaptureSpec({"residual": (0, 3), "router_topk": (2,)}, store_dtype, with_crcs=True))
    batches = [micro_batch_of(lengths, MINIMAX_TINY["vocab_size"], seed) for seed, lengths in enumerate(LENGTHS)]
    batches = [
        replace(batch, index=number, is_last=number == len(batches) - 1, sequence_ids=batch.sequence_ids + 1000 * number)
        for number, batch in enumerate(batches)
    ]
    captured = [output.captured for output in [stage.forward(batch, None) for batch in batches]]
    for layer in (layer for layers in captured for layer in layers):
        for crcs, rows in zip(layer.crcs, layer.columns, strict=True):
            assert crcs.tolist() == [zlib.crc32(np.ascontiguousarray(row)) for row in rows]
    files = []
    for name in ("by_gpu", "by_core"):
        writer = WriterSpec(str(tmp_path / name), {}, 1 << 28, 2).open(stage.parts)
        try:
            for batch, layers in zip(batches, captured, strict=True):
                given = layers if name == "by_gpu" else [replace(layer, crcs=()) for layer in layers]
                writer.submit("a1", batch, given, 60.0)
            files.append([tmp_path / name / receipt.key for receipt in writer.collect(0, "a1", 60.0)])
        finally:
            writer.close()
    for by_gpu, by_core in zip(*files, strict=True):
        assert by_gpu.read_bytes() == by_core.read_bytes()
        pq.ParquetFile(by_gpu, page_checksum_verification=True).read()


@pytest.mark.usefixtures("_forgotten")
def test_a_kernel_that_is_wrong_or_cannot_be_made_leaves_them_to_the_writer(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.begin(CaptureSpec({"residual": (0,)}, "bfloat16", with_crcs=True))
    batch = micro_batch_of((5, 3), MINIMAX_TINY["vocab_size"])
    masks = module._masks
    monkeypatch.setattr(module, "_masks", lambda *given: (masks(*given)[0] ^ 1, masks(*given)[1]))
    with pytest.warns(RuntimeWarning, match="Rows' CRCs are computed without a kernel on cuda:0, which takes longer: those of rows of"):
        assert stage.forward(batch, None).captured[0].crcs == ()
    monkeypatch.setattr(module, "_masks", masks)
    has_kernel.cache_clear()
    monkeypatch.setattr("m2ray.model.kernel_proof.triton_problem", lambda: "there is no C compiler")
    assert stage.forward(batch, None).captured[0].crcs == ()
