"""A stage on a GPU: loaded bitwise as on the CPU, captured rows right while later micro-batches run, compiled without recompiling."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.errors import StageError
from m2ray.model.capture import CaptureSpec
from m2ray.model.digests import WeightDigests
from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.gpu_hashes import can_hash
from m2ray.model.gpu_loading import Lanes
from m2ray.model.quantization import fused
from m2ray.model.quantization.fused import KernelTable
from m2ray.model.quantization.fused_proof import is_exact
from m2ray.model.quantization.scaling import ScaledUnpack, dequantize
from m2ray.model.stage import Stage, StageSpec
from m2ray.model.taking_rows import extremes, extremes_of, has_kernel, take_rows
from m2ray.selection import Selection
from tests.packed import make_packed
from tests.reference import LENGTHS, MINIMAX_TINY, load_capturing, load_reference, make_minimax, micro_batch_of, reference_rows, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FP8 = torch.float8_e4m3fn
NUM_LAYERS = MINIMAX_TINY["layers"]


def load(
    folder: Path,
    device: str,
    *,
    dtype: str = "bfloat16",
    compiled: bool = False,
    span: tuple[int, int] = (0, NUM_LAYERS),
    attn: str = "auto",
) -> Stage:
    return load_capturing(StageSpec(str(folder), LayerSpan(*span), dtype, attn, device, None, compile=compiled))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("gpu") / "model", "fp8")


def tensors(stage: Stage) -> dict[str, torch.Tensor]:
    model = stage._decoder.skeleton.model
    return {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if not tensor.is_meta}


@pytest.mark.parametrize(
    ("family", "fmt"),
    [("gpt_oss", "mxfp4"), *product(("qwen3_moe",), ("mxfp8", "deepseek-v4", "nvfp4", "nvfp4-pack-quantized", "awq", "gptq", "gptq-v2"))],
)
def test_packed_weights_are_bitwise_those_of_the_cpu(family: str, fmt: str, tmp_path: Path) -> None:
    packed = make_packed(tmp_path / "model", family, fmt)
    on_gpu, on_cpu = (tensors(load(packed, device, span=(0, 3))) for device in ("cuda:0", "cpu"))
    assert on_gpu.keys() == on_cpu.keys()
    for name, tensor in on_cpu.items():
        assert torch.equal(on_gpu[name].cpu(), tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_bitwise_those_of_the_cpu(folder: Path, dtype: str) -> None:
    on_gpu, on_cpu = tensors(load(folder, "cuda:0", dtype=dtype)), tensors(load(folder, "cpu", dtype=dtype))
    assert on_gpu.keys() == on_cpu.keys()
    for name, tensor in on_cpu.items():
        assert torch.equal(on_gpu[name].cpu(), tensor), name


def test_the_fused_kernel_has_the_bits_of_torch() -> None:
    assert is_exact(torch.device("cuda:0"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 3072), (700, 24), (9000, 256), (4000, 3000)])
def test_rows_are_taken_as_torch_takes_them(dtype: torch.dtype, num_rows: int, width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(num_rows)
    values_NW = torch.randn((num_rows + 9, width), generator=generator, device="cuda").to(dtype)
    places = torch.randperm(num_rows + 9, generator=generator, device="cuda")[:num_rows]
    assert has_kernel(values_NW.device, dtype)
    rows_NW, found = take_rows(values_NW, places)
    assert torch.equal(rows_NW, values_NW[places])
    assert torch.equal(extremes_of(found.cpu()), extremes(rows_NW).float().cpu())


def test_weights_are_hashed_on_the_gpu_as_on_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel from the first extent on, and from when it is there."""
    assert can_hash(torch.device("cuda:0"))
    put = WeightDigests.put
    by_cpu, in_time = load(folder, "cpu"), load(folder, "cuda:0")
    monkeypatch.setattr(Lanes, "_can_hash_there", lambda self: True)
    hashed = []
    monkeypatch.setattr(WeightDigests, "put", lambda self, piece, digest: hashed.append(piece) or put(self, piece, digest))
    always = load(folder, "cuda:0")
    assert hashed
    assert by_cpu.digests == in_time.digests == always.digests


def test_without_a_compiler_weights_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton cannot make the fused kernel then, and the formula serves."""
    by_kernel = tensors(load(folder, "cuda:0"))
    monkeypatch.setattr(fused, "triton_problem", lambda: "there is no C compiler")
    monkeypatch.setattr(fused, "_kernel", lambda name: pytest.fail("the kernel was asked for"))
    for cached in (fused.has_kernel, is_exact):
        cached.cache_clear()
    try:
        by_formula = tensors(load(folder, "cuda:0"))
    finally:
        for cached in (fused.has_kernel, is_exact):
            cached.cache_clear()
    assert by_formula.keys() == by_kernel.keys()
    for name, tensor in by_kernel.items():
        assert torch.equal(by_formula[name], tensor), name


def test_compiling_without_a_compiler_is_refused_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(StageError, match="compile = true needs Triton.*no-such-compiler"):
        load(folder, "cuda:0", compiled=True)


E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
PACKINGS = [
    (E4M3, (128, 128), torch.float32),
    (E4M3, (1, 0), torch.bfloat16),
    (E4M3, None, torch.float16),
    (E4M3, (1, 32), torch.uint8),
    (E4M3, (128, 128), E8M0),
    (E5M2, (128, 128), torch.float32),
    (torch.int8, (1, 0), torch.bfloat16),
]


def test_the_fused_kernel_is_bitwise_the_formula() -> None:
    """Weights of all shapes and packings in two launches, at any eighth byte of a buffer, their scales beside them or elsewhere."""
    generator = torch.Generator("cuda").manual_seed(0)
    data, at = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda"), 8
    table, cases, elsewhere = KernelTable(), [], []
    shapes = ((128, 128), (1536, 3072), (200, 312), (64, 4096), (1, 8))
    for number, (shape, packing) in enumerate(product(shapes, PACKINGS)):
        (rows, columns), (dtype, block, scale_dtype) = shape, packing
        block = (1, columns) if block == (1, 0) else block
        bits = torch.randint(0, 256, (rows, columns), generator=generator, device="cuda", dtype=torch.uint8)
        bits[bits.view(dtype).float().isnan()] = 0
        grid = (1, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
        if scale_dtype.itemsize == 1:
            scale = torch.randint(0, 255, grid, generator=generator, device="cuda", dtype=torch.uint8).view(scale_dtype)
        else:
            scale = (torch.rand(grid, generator=generator, device="cuda") * 1e-3).to(scale_dtype)
        into = torch.full((rows + 1, columns + 8), float("nan"), dtype=torch.bfloat16, device="cuda")
        values = Range("f", at, bits.numel(), dtype, (rows, columns))
        scales = Range("f", -(-values.stop // 4) * 4, scale.nbytes, scale_dtype, grid)
        data[values.offset : values.stop] = bits.view(-1)
        data[scales.offset : scales.stop] = scale.view(torch.uint8).view(-1)
        elsewhere.append(scale.clone())
        scale_at = scales.offset if number % 2 else -elsewhere[-1].data_ptr()
        wanted = RowsToLoad("", {"values": values, "scale": scales}, ScaledUnpack(block), into[:rows, :columns])
        assert fused.is_for_kernel(wanted, into.device)
        table.add(wanted, {"values": values.offset, "scale": scale_at})
        cases.append((into, dequantize(bits.view(dtype), scale, block)))
        at = -(-scales.stop // 8) * 8
    table.to(data.device)
    table.run(data, slice(0, 2))
    table.run(data, slice(2, len(cases)))
    for (into, expected), (shape, packing) in zip(cases, product(shapes, PACKINGS), strict=True):
        rows, columns = expected.shape
        assert same_bits(into[:rows, :columns], expected), (shape, packing)
        assert into[rows:].isnan().all()
        assert into[:, columns:].isnan().all()


def test_reads_no_more_than_needed(folder: Path) -> None:
    stage = load(folder, "cuda:0", span=(2, 4))
    assert stage.needed_bytes <= stage.bytes_read <= 1.01 * stage.needed_bytes


def test_rows_are_right_while_later_micro_batches_run(folder: Path) -> None:
    """All outputs are collected only after the last was started: nothing may have been overwritten meanwhile."""
    stage = load(folder, "cuda:0", dtype="float32")
    batches = [micro_batch_of((9 + seed, 23, 1, 17, 4), MINIMAX_TINY["vocab_size"], seed) for seed in range(12)]
    outputs = [stage.forward(batch, None) for batch in batches]
    reference = load_reference(folder, torch.float32)
    for batch, output in zip(batches, outputs, strict=True):
        for captured, expected in zip(output.captured, reference_rows(reference, batch), strict=True):
            rows = torch.from_numpy(captured.columns[0]).view(torch.float32)
            assert ((rows - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4


@pytest.mark.parametrize("tokens", ["last:3", "mask", "mean", "mean:mask"])
def test_chosen_tokens_are_those_of_all_rows(folder: Path, tokens: str) -> None:
    """A mean is summed there in the order of positions, as NumPy does it."""
    stage, batch = load(folder, "cuda:0", dtype="float32"), micro_batch_of(LENGTHS, MINIMAX_TINY["vocab_size"])
    batch = replace(batch, mask_BT=np.random.default_rng(5).random(batch.token_ids_BT.shape) < 0.5)
    whole = [torch.from_numpy(one.columns[0]).view(torch.float32) for one in stage.forward(batch, None).captured]
    chosen = Selection(tokens)
    stage.begin(CaptureSpec({"residual": tuple(range(NUM_LAYERS))}, "float32", chosen))
    numbers = np.cumsum(np.arange(batch.token_ids_BT.shape[1]) < batch.token_counts[:, None]).reshape(-1) - 1
    places = numbers[chosen.places(batch)]
    for all_NW, captured in zip(whole, stage.forward(batch, None).captured, strict=True):
        expected = all_NW[torch.from_numpy(places)]
        if chosen.is_mean:
            pieces = expected.split(chosen.chosen_counts(batch).tolist())
            expected = torch.from_numpy(np.stack([piece.numpy().sum(axis=0) / np.float32(len(piece)) for piece in pieces]))
        assert np.array_equal(captured.columns[0], expected.contiguous().view(torch.uint8).numpy()), captured.layer


def test_a_chain_on_the_gpu_equals_one_stage(folder: Path) -> None:
    batch = micro_batch_of(LENGTHS, MINIMAX_TINY["vocab_size"])
    whole = load(folder, "cuda:0").forward(batch, None).captured
    first, second = load(folder, "cuda:0", span=(0, 3)), load(folder, "cuda:0", span=(3, NUM_LAYERS))
    handed_on = first.forward(batch, None)
    assert handed_on.ready is not None
    handed_on.ready.synchronize()
    assert handed_on.boundary is not None
    chained = (*handed_on.captured, *second.forward(batch, handed_on.boundary.map(lambda tensor: tensor.cpu().pin_memory())).captured)
    for one, other in zip(whole, chained, strict=True):
        assert np.array_equal(one.columns[0], other.columns[0]), one.layer


@pytest.mark.parametrize(("attn", "compiled"), [("sdpa", True), ("flex_attention", True), ("flex_attention", False)])
def test_nothing_is_compiled_again_after_the_warm_up(folder: Path, attn: str, *, compiled: bool) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    stage = load(folder, "cuda:0", compiled=compiled, attn=attn)
    stage.warm_up(2048)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for lengths in ((512,), (100, 90, 80), (7, 6, 5, 3), (256, 250), (33,) * 15, (2, 2), (60,), (1000, 900), (130,) * 3):
        batch: MicroBatch = micro_batch_of(lengths, MINIMAX_TINY["vocab_size"])
        assert stage.forward(batch, None).captured
    assert counters["stats"]["unique_graphs"] == graphs


def test_no_micro_batch_waits_for_pinned_memory_after_the_warm_up(folder: Path) -> None:
    """As much as may wait for the store is there before the first, and serves micro-batches with less real tokens too."""
    stage, num_batches = load(folder, "cuda:0"), 6
    lengths = [(512,) * 3 + (512 - 90 * number,) for number in range(3)] + [(300 - 20 * number,) * 4 for number in range(3)]
    batches = [micro_batch_of(each, MINIMAX_TINY["vocab_size"]) for each in lengths]
    row_bytes = stage.parts[0].columns[0].width * 2
    stage.warm_up(2048, waiting_bytes=(num_batches - 2) * 2048 * row_bytes * len(stage.parts))
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    held = [stage.forward(batch, None).captured for batch in batches]
    taken = torch.cuda.host_memory_stats()["num_host_alloc"] - before
    assert len(held) == num_batches
    assert taken < num_batches, "places, token ids and extremes are small; rows would be one a layer and micro-batch"


def test_attention_plans_nothing_for_a_shape(folder: Path) -> None:
    """cuDNN would, for each number and length of sequences."""
    stage = load(folder, "cuda:0")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for lengths in ((512, 500), (130,) * 3):
            assert stage.forward(micro_batch_of(lengths, MINIMAX_TINY["vocab_size"]), None).captured
    kernels = [event.key.lower() for event in profiled.key_averages()]
    assert any("flash" in kernel for kernel in kernels), kernels
    assert not any("cudnn" in kernel for kernel in kernels), kernels


@pytest.mark.parametrize(("attn", "dtype", "most"), [("flex_attention", "float32", 1e-4), ("flash_attention_2", "bfloat16", 0.05)])
def test_other_attention_is_within_rounding_of_the_reference(folder: Path, attn: str, dtype: str, most: float) -> None:
    """Layer 0 alone: in bfloat16 tokens may choose other experts further on, whatever the attention."""
    if attn == "flash_attention_2":
        pytest.importorskip("flash_attn")
    stage = load(folder, "cuda:0", dtype=dtype, span=(0, 1), attn=attn)
    for lengths in (LENGTHS, (300,), (700, 650, 3)):
        batch = micro_batch_of(lengths, MINIMAX_TINY["vocab_size"])
        rows = torch.from_numpy(stage.forward(batch, None).captured[0].columns[0]).view(getattr(torch, dtype)).float()
        expected = reference_rows(load_reference(folder, torch.float32), batch)[0]
        error_N = (rows - expected).norm(dim=1) / expected.norm(dim=1)
        assert error_N.quantile(0.9) < most


def test_an_infinity_is_found_when_the_rows_are_taken(folder: Path) -> None:
    stage = load(folder, "cuda:0")
    with torch.no_grad():
        tensors(stage)["model.layers.3.mlp.experts.down_proj"].fill_(float("inf"))
    output = stage.forward(micro_batch_of((5, 3), MINIMAX_TINY["vocab_size"]), None)
    with pytest.raises(StageError, match="Residual of layer 3"):
        _ = output.captured
