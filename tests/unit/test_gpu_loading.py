"""The lanes with host memory in a GPU's place: what is read when, and what the kernel's table says. The kernel itself: tests/gpu."""

import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError, StoreError
from m2ray.model import extents, gpu_hashes, gpu_loading, pieces
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.quantization import fused, fused_proof
from m2ray.model.quantization.gptq import Gptq
from m2ray.model.quantization.scaling import ScaledUnpack
from m2ray.model.skeleton import build_skeleton
from m2ray.model.stage import StageSpec, load_stage
from m2ray.model.weights import Loaded, load_weights
from tests.hashed_by_numpy import HostHashes
from tests.host_kernels import RAN, HostKernel, memory
from tests.packed import make_packed
from tests.reference import edited, load_span, make_minimax, same_bits

CPU = torch.device("cpu")
PACKED = {"mxfp8": "qwen3_moe", "modelopt-fp8": "llama", "mxfp4": "gpt_oss", "deepseek-v4": "qwen3_moe", "nvfp4-pack-quantized": "llama"}
PACKED |= dict.fromkeys(("nvfp4", "pack-quantized", "pack-quantized-asymmetric", "awq", "gptq", "gptq-v2"), "llama")
"""Formats, each with a family."""


class HostLane(gpu_loading._Lane):
    def __init__(self, device: torch.device) -> None:
        self.stream = SimpleNamespace(synchronize=lambda: None)
        self._copied = SimpleNamespace(synchronize=lambda: None, record=lambda stream: None)
        self._pinned = torch.empty(gpu_loading.EXTENT_BYTES, dtype=torch.uint8)
        self._memory = self._pinned.numpy().data
        self._on_gpu = torch.empty(gpu_loading.EXTENT_BYTES + 16, dtype=torch.uint8)


@pytest.fixture(params=["kernel", "formula"])
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernels, and as on a GPU that has no FP8, where Triton makes none."""
    monkeypatch.setattr(gpu_loading, "_Lane", HostLane)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    if request.param == "kernel":
        monkeypatch.setattr(fused, "has_kernel", lambda device: True)
        monkeypatch.setattr(fused, "_kernel", HostKernel)
        monkeypatch.setattr(gpu_loading, "is_exact", lambda device: True)
        monkeypatch.setattr(gpu_loading.Lanes, "_can_hash_there", lambda self: True)
        monkeypatch.setattr(gpu_hashes, "_kernel", HostHashes)
    RAN.clear()
    return request.param


class RoundsOnceMore(HostKernel):
    """As one that rounds its sums otherwise: the last bit of some numbers differs."""

    def run(self, programs: int, table: torch.Tensor, data: torch.Tensor, max_tiles: int) -> None:
        super().run(programs, table, data, max_tiles)
        line = fused.Line(*table[0].tolist())
        bits = memory(line.into, 2 * line.rows * line.columns).view(torch.int16)
        bits[5] ^= 1


@pytest.mark.parametrize(("kernel", "said"), [(HostKernel, ""), (RoundsOnceMore, "does not have torch's bits")])
def test_a_kernel_is_held_against_torch_before_it_is_used(kernel: type, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_proof, "has_kernel", lambda device: True)
    monkeypatch.setattr(fused, "_kernel", kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setitem(sys.modules, "triton.errors", SimpleNamespace(TritonError=ArithmeticError))
    RAN.clear()
    with pytest.warns(RuntimeWarning, match=said) if said else nullcontext():
        assert fused_proof.is_exact.__wrapped__(CPU) == (not said)
    assert len(RAN) == len([*fused_proof._of_bytes(CPU), *fused_proof._of_nibbles(CPU)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lanes")
    beside = make_minimax(root / "beside", "fp8")
    return {
        "scales beside": beside,
        "scales first": edited(beside, root / "first", lambda tensors: None),  # safetensors' own writer sorts by dtype
        "bf16": make_minimax(root / "bf16", "bf16"),
        "fused": make_minimax(root / "fused", "bf16", "fused"),
        **{fmt: make_packed(root / fmt, family, fmt) for fmt, family in PACKED.items()},
    }


def load(folder: Path, span: LayerSpan, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, torch.Tensor], Loaded, int]:
    checkpoint = open_checkpoint(str(folder))
    decoder = DecoderSpan(build_skeleton(checkpoint.config, dtype), span, CPU)
    with gpu_loading.Lanes(CPU) as lanes:
        loaded = load_weights(checkpoint, decoder, lambda *_: None, lanes)
    return filled(decoder), loaded, checkpoint.bytes_read


def spec(folder: Path, span: LayerSpan) -> StageSpec:
    return StageSpec(str(folder), span, "bfloat16", "auto", "cpu", None)


def filled(decoder: DecoderSpan) -> dict[str, torch.Tensor]:
    model = decoder.skeleton.model
    return {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if not tensor.is_meta}


@pytest.mark.parametrize(
    ("layout", "extent_bytes"),
    [
        *product(["scales beside", "scales first", "bf16", "fused", *PACKED], [333]),
        *product(["scales beside", "scales first", "bf16", "fused", "mxfp4", "gptq-v2"], [extents.EXTENT_BYTES]),
    ],
)
def test_lanes_load_what_the_cpu_loads(
    on_host: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, layout: str, extent_bytes: int
) -> None:
    span = LayerSpan(0, 3)
    expected = filled(load_span(folders[layout], span)[0])
    for module in (extents, gpu_loading):
        monkeypatch.setattr(module, "EXTENT_BYTES", extent_bytes)
    monkeypatch.setattr(gpu_loading, "APART_BYTES", extent_bytes)
    found, loaded, bytes_read = load(folders[layout], span)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    # Gaps of up to 4 KiB between wanted tensors are read too, which is much of a file of 100 KB.
    assert loaded.needed_bytes <= bytes_read <= 1.1 * loaded.needed_bytes or layout in PACKED
    assert loaded.digests == load_stage(spec(folders[layout], span), lambda *_: None).digests
    assert bool(RAN) == (on_host == "kernel" and layout not in ("bf16", "fused"))


@pytest.mark.parametrize(
    ("block", "scale_shape"), [(None, ()), ((16, 32), (3,)), ((16, 32), (3, 1, 1)), ((8, 16), (3, 2, 2)), ((1, 32), (3, 16))]
)
def test_stacked_matrices_are_a_line_each(on_host: str, block: tuple[int, int] | None, scale_shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 120, (3, 16, 32), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale, into = torch.rand(scale_shape), torch.empty(3, 16, 32, dtype=torch.bfloat16)
    data = torch.cat((values.view(torch.uint8).view(-1), scale.view(-1).view(torch.uint8)))
    parts = {
        "values": extents.Range("f", 0, values.nbytes, values.dtype, (3, 16, 32)),
        "scale": extents.Range("f", values.nbytes, scale.nbytes, scale.dtype, scale_shape),
    }
    wanted = extents.RowsToLoad("w", parts, ScaledUnpack(block), into)
    assert fused.is_for_kernel(wanted, CPU) == (on_host == "kernel")
    if on_host == "kernel":
        table = fused.KernelTable()
        table.add(wanted, {"values": 0, "scale": values.nbytes})
        table.to(CPU)
        table.run(data, slice(0, len(table)))
        assert RAN == [3]
        assert same_bits(into, ScaledUnpack(block)({"values": values, "scale": scale}))


def test_groups_in_an_order_that_config_json_denies_are_told(on_host: str, folders: dict[str, Path], tmp_path: Path) -> None:
    def reorder(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.0.mlp.up_proj.g_idx"
        tensors[key] = tensors[key].flip(0).contiguous()

    folder = edited(folders["gptq-v2"], tmp_path / "reordered", reorder)
    with pytest.raises(CheckpointError, match=r"desc_act = false.*order of their own"):
        load(folder, LayerSpan(0, 3))


@pytest.mark.parametrize("on_host", ["kernel"], indirect=True)
def test_groups_are_looked_at_where_they_were_read(on_host: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at what lies on a GPU would wait for it, once a matrix."""
    read, looked_at = set(), set()
    held = HostLane.held
    monkeypatch.setattr(HostLane, "held", lambda self, extent: (read.add(self._pinned.untyped_storage().data_ptr()), held(self, extent))[1])
    monkeypatch.setattr(Gptq, "_check", lambda self, parts: looked_at.add(parts["group"].untyped_storage().data_ptr()))
    load(folders["gptq"], LayerSpan(0, 3))
    assert looked_at, on_host
    assert looked_at <= read


@pytest.mark.parametrize("on_host", ["kernel"], indirect=True)
@pytest.mark.parametrize("layout", ["scales first", "mxfp8", "awq"])
def test_without_a_proved_kernel_torch_unpacks(
    on_host: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(gpu_loading, "is_exact", lambda device: False)
    expected = filled(load_span(folders[layout], LayerSpan(0, 3))[0])
    found, _, _ = load(folders[layout], LayerSpan(0, 3))
    assert all(same_bits(found[name], expected[name]) for name in expected), on_host
    assert not RAN


@pytest.mark.parametrize("layout", ["scales beside", "scales first"])
def test_cut_tensors_find_their_scales(on_host: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Rows of a tensor lie in another piece than its scales, beside or not."""
    expected = filled(load_span(folders[layout], LayerSpan(2, 4))[0])
    monkeypatch.setattr(pieces, "PIECE_BYTES", 512)
    found, loaded, _ = load(folders[layout], LayerSpan(2, 4))
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert loaded.digests == load_stage(spec(folders[layout], LayerSpan(2, 4)), lambda *_: None).digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_compute_dtypes_go_through_bfloat16_by_the_formula(on_host: str, folders: dict[str, Path], dtype: torch.dtype) -> None:
    expected = filled(load_span(folders["scales first"], LayerSpan(0, 1), dtype)[0])
    found = load(folders["scales first"], LayerSpan(0, 1), dtype)[0]
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert not RAN


@pytest.mark.parametrize("on_host", ["kernel"], indirect=True)
def test_one_launch_does_many_tensors(on_host: str, folders: dict[str, Path]) -> None:
    load(folders["scales first"], LayerSpan(0, 2))
    tensors = [
        key for key in load_file(folders["scales first"] / "model.safetensors") if ".layers.0." in key and key.endswith("_scale_inv")
    ]
    assert [len(tensors)] * 2 == RAN  # a layer's FP8 lies side by side


@pytest.mark.parametrize("on_host", ["kernel"], indirect=True)
def test_scales_that_do_not_begin_at_a_multiple_of_four_bytes_are_right(on_host: str) -> None:
    data = torch.arange(64, dtype=torch.uint8)
    odd = extents.Range("f", 13, 8, torch.float32, (2, 1))
    assert torch.equal(odd.of(data, 10), data[3:11].clone().view(torch.float32).view(2, 1))
    parts = {"values": extents.Range("f", 5, 8, torch.float8_e4m3fn, (2, 4)), "scale": odd}
    wanted = extents.RowsToLoad("w", parts, ScaledUnpack((1, 4)), torch.empty(2, 4, dtype=torch.bfloat16))
    assert wanted.in_one_run == tuple(parts.values())
    assert not fused.is_for_kernel(wanted, CPU)


def test_a_wrong_tensor_is_told_while_others_are_read(on_host: str, folders: dict[str, Path], tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
        tensors["model.layers.2.self_attn.q_proj.weight"] = tensors["model.layers.2.self_attn.q_proj.weight"][:8].clone()

    folder = edited(folders["scales beside"], tmp_path / "damaged", damage)
    with pytest.raises(CheckpointError, match=r"(?s)experts\.3\.w2.*layers\.2\.self_attn\.q_proj\.weight has shape"):
        load(folder, LayerSpan(0, 3))


def test_a_reader_that_fails_ends_the_loading(on_host: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(lane: HostLane, checkpoint: Any, extent: Any, digests: Any) -> torch.Tensor:
        raise StoreError("the disk is gone")

    monkeypatch.setattr(HostLane, "read", read)
    with pytest.raises(StoreError, match="the disk is gone"):
        load(folders["bf16"], LayerSpan(0, 1))
