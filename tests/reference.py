"""Small checkpoints on disk, and transformers' own model of them as the reference that m2ray's rows are compared with."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.capture import CaptureSpec
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.families import parse_config
from m2ray.model.skeleton import build_skeleton
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.model.tiny import tiny_copies
from m2ray.model.weights import load_weights
from m2ray.selection import Selection
from scripts.make_checkpoint import make_checkpoint

DATA = Path(__file__).parent / "data"
FAMILIES = tuple(sorted(path.stem for path in (DATA / "families").glob("*.json")))
"""Model types of which there is a tiny configuration."""

MINIMAX_TINY = {
    "layers": 7,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_experts": 12,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "experts_per_token": 2,
    "vocab_size": 384,
}
"""Dimensions that FP8 blocks of 128 divide, and layers enough for five uneven spans."""

M3_TINY = {
    "layers": 6,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_experts": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
}
"""Of MiniMax-M3: three dense layers with full attention, and three of experts with block-sparse attention."""

LENGTHS = (9, 23, 1, 17, 4)
"""Of the sequences of a micro-batch: mixed, one of a single token."""


def make_minimax(folder: Path, fmt: str, layout: str = "hub") -> Path:
    """A tiny MiniMax-M2 checkpoint in several files. All formats and layouts hold the same values."""
    config = json.loads((DATA / "minimax_m2" / "config.json").read_text())
    make_checkpoint(folder, config, overrides=MINIMAX_TINY, fmt=fmt, layout=layout, seed=11, max_shard_bytes=2_000_000)
    return folder


def make_m3(folder: Path) -> Path:
    """A tiny MiniMax-M3, a multimodal model, with the fields of its release but for sizes; prompts are longer than the blocks it attends to."""
    config = json.loads((DATA / "minimax_m3" / "config.json").read_text())
    config["text_config"]["sparse_attention_config"] |= {"sparse_block_size": 4, "sparse_topk_blocks": 2, "sparse_index_dim": 32}
    config["vision_config"] |= {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 64}
    make_checkpoint(folder, config, overrides=M3_TINY, fmt="bf16", seed=3, max_shard_bytes=1_000_000)
    return folder


def minimax_config(**fields: object) -> Any:
    """MiniMax-M2's real configuration, with `fields` changed."""
    return parse_config(json.dumps({**json.loads((DATA / "minimax_m2" / "config.json").read_text()), **fields}).encode())


def make_family(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changed: object) -> Path:
    """A tiny checkpoint of a family, `changed` fields of its configuration apart, saved by transformers from weights that make every layer matter."""
    return _save_random(
        folder, {**json.loads((DATA / "families" / f"{model_type}.json").read_text()), **changed}, AutoModelForCausalLM, dtype
    )


def make_wrapper(folder: Path, model_type: str) -> Path:
    """The same of a multimodal model, its other towers included."""
    fields = json.loads((DATA / "wrappers" / f"{model_type}.json").read_text())
    return _save_random(folder, fields, AutoModelForImageTextToText, torch.float32)


def _save_random(folder: Path, fields: dict[str, Any], maker: Any, dtype: torch.dtype) -> Path:
    torch.manual_seed(5)
    model = maker.from_config(CONFIG_MAPPING[fields["model_type"]].from_dict(fields), dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.random_(0, model.config.num_local_experts, generator=generator)
            elif tensor.dim() >= 2:
                tensor.normal_(0, 1 / tensor.shape[-1] ** 0.5, generator=generator)
            else:
                tensor.add_(torch.empty_like(tensor).normal_(0, 0.1, generator=generator))
            assert tensor.isfinite().all(), name
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    return folder


def make_type(folder: Path, model_type: str, **fields: Any) -> Path:
    """A tiny checkpoint of any causal type, of its default configuration but for some fields, as transformers publishes it."""
    config = next(tiny_copies(CONFIG_MAPPING[model_type](**fields)))
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.empty_like(tensor).normal_(0, 0.1))
    model.save_pretrained(folder)
    return folder


def load_reference(folder: Path, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """transformers' own model of a checkpoint.

    MiniMax-M2: loaded in bfloat16 (FP8 dequantised), its parameters then cast to `dtype`, and its router put back in float32 from disk.
    """
    config = AutoConfig.from_pretrained(folder)
    is_minimax = config.model_type == "minimax_m2"
    if is_minimax:  # transformers before 5.23 overlooks rotary_dim
        config.rope_parameters["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if getattr(config, "quantization_config", None):
        config.quantization_config["dequantize"] = True
    if getattr(config, "attn_logit_softcapping", None):  # transformers before 5.23 lets sdpa drop the cap
        attn_implementation = attn_implementation or "eager"
    maker = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    model, info = maker.from_pretrained(
        folder,
        config=config,
        dtype=torch.bfloat16 if is_minimax else dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if is_minimax:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        _restore_router(model, folder)
    return model.eval().requires_grad_(requires_grad=False)  # torch sums some products in another order for weights that want gradients


def _restore_router(model: Any, folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for key, file in index.items():
        if key.endswith(("gate.weight", "e_score_correction_bias")):
            with safe_open(folder / file, framework="pt") as tensors:
                value = tensors.get_tensor(key).float()
            moe = model.model.layers[int(key.split(".")[2])].mlp
            if key.endswith("gate.weight"):
                moe.gate.weight = torch.nn.Parameter(value, requires_grad=False)
            else:
                moe.e_score_correction_bias = value


def micro_batch_of(lengths: Sequence[int], vocab_size: int, seed: int = 0, pad_to: int | None = None) -> MicroBatch:
    """Random sequences of the given lengths, right-padded; ids 100, 101, ..."""
    rng = np.random.default_rng(seed)
    token_ids_BT = np.zeros((len(lengths), pad_to or max(lengths)), np.int32)
    for row, length in enumerate(lengths):
        token_ids_BT[row, :length] = rng.integers(3, vocab_size, length)
    return MicroBatch(0, 0, True, np.arange(100, 100 + len(lengths)), np.array(lengths, np.int32), token_ids_BT)


def vocab_size(folder: Path) -> int:
    """A checkpoint's."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def alone(micro_batch: MicroBatch, row: int) -> MicroBatch:
    """One sequence of a micro-batch, without padding."""
    length = int(micro_batch.token_counts[row])
    return MicroBatch(
        0, row, True, micro_batch.sequence_ids[[row]], micro_batch.token_counts[[row]], micro_batch.token_ids_BT[[row], :length].copy()
    )


def reference_rows(model: Any, micro_batch: MicroBatch) -> list[torch.Tensor]:
    """Each decoder layer's output at the real positions, [N, H] a layer, by hooks on the layers of transformers' own forward pass.

    Of several residual streams the row is all of them, [N, S * H].
    """
    base = model.base_model
    inner = getattr(base, "language_model", base)
    inner = getattr(inner, "model", inner)
    layers = inner.h if hasattr(inner, "h") else inner.decoder.layers if hasattr(inner, "decoder") else inner.layers
    outputs: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).flatten(2).clone())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    if inner is not base:  # a multimodal model, of which what comes after the text tower does not count
        hooks.append(inner.register_forward_hook(_end))
    with torch.inference_mode(), suppress(_TowerDone):
        base(input_ids=torch.from_numpy(micro_batch.token_ids_BT).long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    is_real_BT = torch.arange(micro_batch.token_ids_BT.shape[1]) < torch.from_numpy(micro_batch.token_counts)[:, None]
    return [output[is_real_BT] for output in outputs]


class _TowerDone(Exception):  # noqa: N818 - no error
    """Llama 4 of transformers 5.24 fails at what it makes of its text tower's output."""


def _end(*_: object) -> None:
    raise _TowerDone


def load_capturing(
    spec: StageSpec, layers: Iterable[int] | None = None, store_dtype: str | None = None, selection: Selection | None = None
) -> Stage:
    """A stage that keeps the residual of `layers`, all of its span if None, in its compute dtype if no other is given."""
    stage = load_stage(spec, lambda *_: None)
    kept = range(spec.span.start, spec.span.stop) if layers is None else layers
    stage.begin(CaptureSpec({"residual": tuple(kept)}, store_dtype or spec.compute_dtype, selection or Selection()))
    return stage


def load_chain(folder: Path, bounds: Sequence[int], compute_dtype: str, store_dtype: str | None = None, attn: str = "auto") -> list[Stage]:
    """The stages of the spans between `bounds`, each loaded by itself and capturing all its layers."""
    return [
        load_capturing(StageSpec(str(folder), LayerSpan(*ends), compute_dtype, attn, "cpu", 1), store_dtype=store_dtype)
        for ends in pairwise(bounds)
    ]


def chain_rows(stages: Sequence[Stage], micro_batch: MicroBatch) -> list[torch.Tensor]:
    """What a chain captures of a micro-batch, [N, H] a layer, in the store dtype."""
    boundary, rows = None, []
    for stage in stages:
        output = stage.forward(micro_batch, boundary)
        boundary = output.boundary
        for part, captured in zip(stage.parts, output.captured, strict=True):
            assert (part.layer, part.site) == (captured.layer, captured.site)
            rows.append(torch.from_numpy(captured.columns[0].copy()).view(getattr(torch, part.columns[0].dtype)))
    assert boundary is None
    return rows


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; unlike `==`, tells -0 from 0 and finds NaN equal to itself."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """Rows [N, H] a layer that differ by float32's rounding alone: by less than 1e-5 of each row's norm."""
    for layer, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert ((one - other).norm(dim=1) / other.norm(dim=1)).max() < 1e-5, layer


def load_span(folder: Path, span: LayerSpan, dtype: torch.dtype = torch.bfloat16) -> tuple[DecoderSpan, int, int]:
    """A span's decoder, the bytes it needs and those that were read."""
    checkpoint = open_checkpoint(str(folder))
    checkpoint.check()
    decoder = DecoderSpan(build_skeleton(checkpoint.config, dtype), span, torch.device("cpu"))
    needed_bytes = load_weights(checkpoint, decoder, lambda *_: None).needed_bytes
    return decoder, needed_bytes, checkpoint.bytes_read


def edited(folder: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint as one file with other tensors."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


@contextmanager
def other_weights(folder: Path, of: str = "") -> Iterator[None]:
    """While it lasts, the checkpoint's files hold others of the same names, shapes and sizes: of the tensors whose names begin so."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        data = np.fromfile(file, np.uint8)
        begin = 8 + int(data[:8].view(np.uint64)[0])
        for name, tensor in json.loads(data[8:begin].tobytes()).items():
            if name != "__metadata__" and name.startswith(of):
                start, stop = tensor["data_offsets"]
                data[begin + start : begin + stop] ^= 1
        data.tofile(file.with_suffix(".other"))
        os.link(file, file.with_suffix(".kept"))
        file.with_suffix(".other").replace(file)
    try:
        yield
    finally:
        for file in files:
            file.with_suffix(".kept").replace(file)
