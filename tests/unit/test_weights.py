"""Loading a span: the right bytes into the right places, in the right dtype, and nothing else read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2ray.batches import LayerSpan
from m2ray.model import pieces
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.quantization.scaling import dequantize
from m2ray.model.skeleton import build_skeleton
from m2ray.model.tensor_table import tensor_table
from m2ray.model.weights import load_weights
from scripts.make_checkpoint import make_checkpoint
from tests.reference import (
    DATA,
    chain_rows,
    edited,
    load_chain,
    load_reference,
    load_span,
    make_family,
    make_minimax,
    micro_batch_of,
    reference_rows,
    same_bits,
)

REPOSITORY = Path(__file__).parents[2]
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {
        "fp8": make_minimax(root / "fp8", "fp8"),
        "bf16": make_minimax(root / "bf16", "bf16"),
        "fused": make_minimax(root / "fused", "bf16", "fused"),
        "llama": make_family(root / "llama", "llama", torch.bfloat16),
        "mixtral": make_family(root / "mixtral", "mixtral"),
    }


def parameters(decoder: DecoderSpan) -> dict[str, torch.Tensor]:
    model = decoder.skeleton.model
    return {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if not tensor.is_meta}


def dequantized_one_by_one(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The formula, element by element."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    plain = weight.float()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            out[row, column] = plain[row, column] * scale[row // block[0], column // block[1]].float()
    return out


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (130, 100), (1, 1), (257, 129), (64, 300)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_dequantize_of_any_shape_is_the_formula(rows: int, columns: int, scale_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).mul(100).to(FP8)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator).add(0.1).to(scale_dtype)
    assert torch.equal(dequantize(weight, scale, (128, 128)), dequantized_one_by_one(weight, scale, (128, 128)))


def test_dequantize_of_stacked_experts_is_that_of_each() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 40, 24, generator=generator).mul(100).to(FP8)
    scale = torch.rand(3, 3, 2, generator=generator)
    found = dequantize(weight, scale, (16, 16))
    for expert in range(3):
        assert torch.equal(found[expert], dequantized_one_by_one(weight[expert], scale[expert], (16, 16)))


def test_dequantize_with_one_scale_for_all() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).to(FP8)
    assert torch.equal(dequantize(weight, torch.tensor([0.3]), None), (weight.float() * 0.3).to(torch.bfloat16))


def quantize_ragged(tensors: dict[str, torch.Tensor]) -> None:
    """Turn a layer's matrices into FP8 in blocks of 32 x 20, which divide none of their sides."""
    generator = torch.Generator().manual_seed(3)
    for key in [key for key in tensors if ".layers." in key and tensors[key].dim() >= 2]:
        shape = tensors[key].shape
        tensors[key] = tensors[key].float().mul(500).to(FP8)
        scale = torch.rand(*shape[:-2], -(-shape[-2] // 32), -(-shape[-1] // 20), generator=generator).add(0.5)
        tensors[f"{key}_scale_inv"] = scale / 500


def dequantize_ragged(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("_scale_inv")]:
        scale, weight_key = tensors.pop(key), key.removesuffix("_scale_inv")
        tensors[weight_key] = dequantized_one_by_one(tensors[weight_key], scale, (32, 20))


@pytest.mark.parametrize("piece_bytes", [pieces.PIECE_BYTES, 512])
def test_blocks_that_do_not_divide_are_dequantised_right(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    folder = edited(originals["llama"], tmp_path / "fp8", quantize_ragged)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 20]}
    (folder / "config.json").write_text(json.dumps(config))
    plain = edited(folder, tmp_path / "plain", dequantize_ragged)
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    micro_batch = micro_batch_of((7, 12), 96)
    expected = reference_rows(load_reference(plain, torch.bfloat16), micro_batch)
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    rows = chain_rows(load_chain(folder, (0, 2, 5), "bfloat16"), micro_batch)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True))


@pytest.mark.parametrize("layout", ["fp8", "bf16", "fused"])
def test_small_pieces_load_the_same_values(originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    whole = parameters(load_span(originals[layout], LayerSpan(0, 2))[0])
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    in_pieces = parameters(load_span(originals[layout], LayerSpan(0, 2))[0])
    assert whole.keys() == in_pieces.keys()
    assert all(same_bits(whole[name], in_pieces[name]) for name in whole)


def test_fused_fp8_experts_load_like_separate_ones(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(7):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            stacks = {
                (name, suffix): torch.stack(
                    [tensors.pop(f"{prefix}.{expert}.{name}.weight{suffix}").view(torch.uint8) for expert in range(12)]
                )
                for name in ("w1", "w2", "w3")
                for suffix in ("", "_scale_inv")
            }
            for suffix, dtype in (("", FP8), ("_scale_inv", torch.float32)):
                fused = torch.cat([stacks["w1", suffix], stacks["w3", suffix]], dim=1)
                tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj{suffix}"] = fused.view(dtype)
                tensors[f"model.layers.{layer}.mlp.experts.down_proj{suffix}"] = stacks["w2", suffix].view(dtype)

    separate = parameters(load_span(originals["fp8"], LayerSpan(2, 4))[0])
    folder = edited(originals["fp8"], tmp_path / "fused", fuse)
    for piece_bytes in (pieces.PIECE_BYTES, 20_000):
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        fused = parameters(load_span(folder, LayerSpan(2, 4))[0])
        assert all(same_bits(fused[name], separate[name]) for name in separate)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_router_keeps_the_values_it_has_on_disk(
    originals: dict[str, Path], tmp_path: Path, compute: torch.dtype, stored: torch.dtype
) -> None:
    names = ("gate.weight", "e_score_correction_bias")

    def store(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(names)]:
            assert tensors[key].dtype == torch.float32
            assert not torch.equal(tensors[key], tensors[key].bfloat16().float()), "the values must show rounding"
            tensors[key] = tensors[key].to(stored)

    folder = edited(originals["fp8"], tmp_path / "router", store)
    disk = load_file(folder / "model.safetensors")
    found = parameters(load_span(folder, LayerSpan(1, 3), compute)[0])
    for layer in (1, 2):
        for name in names:
            ours = found[f"model.layers.{layer}.mlp.{name}"]
            assert same_bits(ours, disk[f"model.layers.{layer}.block_sparse_moe.{name}"].float())
    assert found["model.layers.1.self_attn.q_proj.weight"].dtype == compute


def test_fp8_goes_through_bfloat16_whatever_the_compute_dtype(originals: dict[str, Path]) -> None:
    bf16 = parameters(load_span(originals["fp8"], LayerSpan(0, 1), torch.bfloat16)[0])
    f32 = parameters(load_span(originals["fp8"], LayerSpan(0, 1), torch.float32)[0])
    for name in ("self_attn.o_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert same_bits(f32[f"model.layers.0.{name}"], bf16[f"model.layers.0.{name}"].float())


@pytest.mark.parametrize("span", [LayerSpan(0, 1), LayerSpan(0, 7), LayerSpan(3, 5), LayerSpan(6, 7)])
@pytest.mark.parametrize("layout", ["fp8", "bf16", "fused"])
def test_only_the_span_is_read(originals: dict[str, Path], layout: str, span: LayerSpan) -> None:
    decoder, needed_bytes, bytes_read = load_span(originals[layout], span)
    rows = tensor_table(open_checkpoint(str(originals[layout]))).rows
    expected = sum(row.disk_bytes for row in rows if row.layer in span or (row.role == "embedding" and span.start == 0))
    assert needed_bytes == bytes_read == expected
    layers = {int(name.split(".")[2]) for name in parameters(decoder) if ".layers." in name}
    assert layers == set(range(span.start, span.stop))
    assert ("model.embed_tokens.weight" in parameters(decoder)) == (span.start == 0)


IO_PROBE = """
import sys
from pathlib import Path
from m2ray.batches import LayerSpan
from m2ray.model.stage import StageSpec, load_stage

def read_chars():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

def load(start, stop):
    return load_stage(StageSpec(sys.argv[1], LayerSpan(start, stop), "bfloat16", "auto", "cpu", 1), lambda *_: None)

load(0, 1)  # for what is imported late, so that only the checkpoint is counted
before = read_chars()
stage = load(3, 6)
print(read_chars() - before, stage.needed_bytes, stage.bytes_read)
"""


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc/self/io")
def test_the_process_reads_the_span_and_no_more(originals: dict[str, Path]) -> None:
    folder = originals["fp8"]
    probe = subprocess.run(
        [sys.executable, "-c", IO_PROBE, str(folder)], capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=True
    )
    process_bytes, needed_bytes, bytes_read = (int(number) for number in probe.stdout.split())
    beside = sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as data:
            beside += 8 + int.from_bytes(data.read(8), "little")
    assert bytes_read <= 1.01 * needed_bytes
    assert process_bytes - beside <= 1.01 * needed_bytes
    total_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert needed_bytes < 0.6 * total_bytes


PEAK_PROBE = """
import resource, sys
from m2ray.batches import LayerSpan
from m2ray.model import pieces
from m2ray.model.stage import StageSpec, load_stage

pieces.PIECE_BYTES = 2**20

def load(folder, start):
    spec = StageSpec(folder, LayerSpan(start, start + 1), "bfloat16", "auto", "cpu", 1)
    return load_stage(spec, lambda *_: None)

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

load(sys.argv[1], 0)  # a tiny one first, for what is imported late
before = peak_bytes()
stage = load(sys.argv[2], 1)
print(peak_bytes() - before, stage.parameter_bytes)
"""
WIDE = {"layers": 2, "hidden_size": 512, "intermediate_size": 1024, "num_experts": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 384}


def test_loading_peaks_little_above_the_final_size(originals: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((DATA / "minimax_m2" / "config.json").read_text())
    make_checkpoint(tmp_path / "wide", config, overrides=WIDE, fmt="fp8", seed=1)
    command = [sys.executable, "-c", PEAK_PROBE, str(originals["fp8"]), str(tmp_path / "wide")]
    probe = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=240, check=True)
    grown_bytes, parameter_bytes = (int(number) for number in probe.stdout.split())
    assert parameter_bytes > 150_000_000
    assert grown_bytes < 1.2 * parameter_bytes


def test_progress_grows_to_what_is_needed(originals: dict[str, Path]) -> None:
    reports: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(str(originals["fp8"]))
    decoder = DecoderSpan(build_skeleton(checkpoint.config, torch.bfloat16), LayerSpan(0, 3), torch.device("cpu"))
    needed_bytes = load_weights(checkpoint, decoder, lambda read, needed: reports.append((read, needed))).needed_bytes
    reads = [read for read, _ in reports]
    assert reads == sorted(reads)
    assert (reads[0], reads[-1]) == (0, needed_bytes)
    assert {needed for _, needed in reports} == {needed_bytes}
    assert len(set(reads)) > 10


def test_mixtral_experts_go_where_transformers_puts_them(originals: dict[str, Path]) -> None:
    ours = parameters(load_span(originals["mixtral"], LayerSpan(1, 3), torch.float32)[0])
    theirs = dict(load_reference(originals["mixtral"], torch.float32).named_parameters())
    for name in ("gate_up_proj", "down_proj"):
        for layer in (1, 2):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            assert same_bits(ours[key], theirs[key].detach())
