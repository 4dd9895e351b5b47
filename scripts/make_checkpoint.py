"""Write a random-weight checkpoint in a published on-disk layout: a decoder such as MiniMax-M2, Qwen3 or Llama in bf16, fp8 or any format of
scripts/checkpoint_formats, or a multimodal model such as MiniMax-M3 (bf16), of which the options change the text tower; with `--layers` its
other towers get one layer.

    python -m scripts.make_checkpoint OUT --config tests/data/minimax_m2/config.json --layers 4 --hidden-size 256 --format fp8 --seed 0

Names and shapes come from transformers: its model on the meta device, taken back through its own checkpoint conversion. A tensor's
values depend on the seed and its published name alone, so the shard size changes nothing, `--format bf16` holds exactly what
`--format fp8` dequantises to, and `--layout fused` stacks exactly that (its router rounded to bf16, as transformers itself saves it).
The other formats have random codes under scales of a like size: their packed tensors are drawn, no weights are quantised.
"""

import argparse
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from math import prod, sqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2ray.errors import ConfigError, M2rayError, raise_all
from m2ray.model.towers import decoder_config, model_class
from m2ray.sizes import parse_bytes
from scripts.checkpoint_formats.format import Format
from scripts.checkpoint_formats.stored import BLOCK, Drawer, Piece, StoredTensor
from scripts.checkpoint_formats.table import FORMATS

# Options and their config fields, unless the config has a field of the option's name.
OVERRIDES = {name: name for name in ("hidden_size", "intermediate_size", "head_dim", "rotary_dim", "vocab_size")}
OVERRIDES |= {"layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
OVERRIDES |= {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
FOLLOWS = {"rotary_dim": "head_dim", "dense_intermediate_size": "intermediate_size", "shared_intermediate_size": "intermediate_size"}
DENSE_FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head"]}
# Published in F32 although their neighbours are not.
F32_TENSORS = {
    "minimax_m2": (".gate.weight", ".e_score_correction_bias"),
    "minimax_m3_vl": (".gate.weight", ".e_score_correction_bias", ".patch_embedding.weight"),
}
CHUNK_VALUES = 2**20
RELATIVE_UPDATE = 0.4  # what attention and MLP each add to the residual stream, over its norm
SILU_GATED_RMS = 0.6  # of silu(a) * b with a and b standard normal

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
PLACEHOLDER = re.compile(r"(image|video|audio)_token_(?:id|index)")
TOWER = "text_config"
DEPTHS = ("num_hidden_layers", "depth", "num_layers")
REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings")
VOCABULARY = range(256 + len(SPECIAL_TOKENS), 4096 + 1)  # from all bytes to what the corpus can fill


def resolve_config(config: Mapping[str, Any], overrides: Mapping[str, int], fmt: str) -> dict[str, Any]:
    """`config` with `overrides` (keys of OVERRIDES) applied to its decoder: lists with an entry a layer cut, the fields of FOLLOWS in proportion.

    Raises:
        ConfigError: naming every field that the family lacks and all values that do not go together.
    """
    family = config.get("model_type")
    if family not in CONFIG_MAPPING:
        raise ConfigError(f"The config's model_type is {family!r}.", "Give the config.json of a model that transformers knows.")
    if TOWER not in config:
        return _resolve(config, CONFIG_MAPPING[family](), overrides, fmt)
    if fmt != "bf16":
        raise ConfigError("The layout of a multimodal model is written in bf16 only.", "Choose --format bf16.")
    known = decoder_config(CONFIG_MAPPING[family].from_dict(deepcopy(dict(config))))
    tower = _resolve({name: getattr(known, name) for name in REQUIRED} | dict(config[TOWER]), known, overrides, fmt)
    whole = {name: value for name, value in config.items() if name not in (TOWER, "quantization_config")}
    if "layers" in overrides:
        whole = _shallow(whole)
    return _as_wide(whole, known.hidden_size, tower["hidden_size"]) | {TOWER: tower}


def _resolve(config: Mapping[str, Any], known: Any, overrides: Mapping[str, int], fmt: str) -> dict[str, Any]:
    """The fields of a plain decoder."""
    remedy = f"It must be a field of {known.model_type}, and at least 1."
    fields = {option if option in config else OVERRIDES[option]: value for option, value in overrides.items()}
    wrong = [name for name, value in fields.items() if value < 1 or not (name in config or hasattr(known, name))]
    raise_all([ConfigError(f"{name} = {fields[name]}.", remedy) for name in wrong])
    layers_before = config["num_hidden_layers"]
    resolved = {**config, **fields}
    for name, leader in FOLLOWS.items():
        if name in config and name not in fields:
            resolved[name] = config[name] * resolved[leader] // config[leader]
    per_layer = [name for name, value in config.items() if isinstance(value, list) and len(value) == layers_before]
    layers, heads, groups = (resolved[f"num_{things}"] for things in ("hidden_layers", "attention_heads", "key_value_heads"))
    resolved = _cut(resolved, layers_before, layers)
    resolved["quantization_config"] = config.get("quantization_config", DENSE_FP8) if fmt == "fp8" else DENSE_FP8
    block, vocab_size = resolved["quantization_config"]["weight_block_size"], resolved["vocab_size"]
    head_dim, rotary_dim = resolved.get("head_dim", resolved["hidden_size"] // heads), resolved.get("rotary_dim", 0)
    odd, chosen, experts = (head_dim | rotary_dim) % 2, resolved.get("num_experts_per_tok", 0), resolved.get("num_local_experts", 0)
    checks = (
        (heads % groups, f"{heads} attention heads cannot share {groups} key-value heads.", "Change one of the two."),
        (odd or rotary_dim > head_dim, f"head_dim {head_dim}, rotary_dim {rotary_dim}.", "Give even ones, the second at most the first."),
        (chosen > experts > 0, f"{chosen} of {experts} experts a token.", "Lower --experts-per-token."),
        (vocab_size < VOCABULARY[0], f"vocab_size {vocab_size}.", f"A byte-level tokenizer needs {VOCABULARY[0]}."),
        (per_layer and layers > layers_before, f"{layers} layers, but {per_layer} has fewer entries.", "Lower --layers."),
        (block != [BLOCK, BLOCK], f"weight_block_size is {block}.", f"Only {BLOCK}x{BLOCK} is written."),
    )
    raise_all([ConfigError(what, remedy) for wrong, what, remedy in checks if wrong])
    if fmt != "fp8":
        del resolved["quantization_config"]
    if fmt in FORMATS and (said := FORMATS[fmt].quantization_config()):
        resolved["quantization_config"] = said
    return resolved


def _cut(fields: Mapping[str, Any], layers_before: int, layers: int) -> dict[str, Any]:
    """Lists with an entry a layer, those of nested fields too, with as many as there are layers now."""
    return {
        name: _cut(value, layers_before, layers)
        if isinstance(value, dict)
        else value[:layers]
        if isinstance(value, list) and len(value) == layers_before
        else value
        for name, value in fields.items()
    }


def _shallow(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A multimodal model's other towers with one layer each."""
    return {
        name: {**value, **{depth: 1 for depth in DEPTHS if depth in value}} if isinstance(value, dict) else value
        for name, value in fields.items()
    }


def _as_wide(fields: Mapping[str, Any], hidden_before: int, hidden_size: int) -> dict[str, Any]:
    """What is as wide as the decoder was stays as wide as it is."""
    return {
        name: _as_wide(value, hidden_before, hidden_size)
        if isinstance(value, dict)
        else hidden_size
        if value == hidden_before and name.endswith(("_size", "_dim"))
        else value
        for name, value in fields.items()
    }


def plan_tensors(config: Mapping[str, Any], layout: Literal["hub", "fused"] = "hub", fmt: str = "fp8") -> list[StoredTensor]:
    """Every tensor of the checkpoint of a resolved `config`, in file order. Allocates nothing.

    Args:
        fmt: "fp8" is bf16 where `config` has no quantization_config.

    Raises:
        ConfigError: matrices to be quantised with a side that is no multiple of what the format needs, or a packed fused layout.
    """
    packing = FORMATS.get(fmt)
    skipped = None if packing else config.get("quantization_config", {}).get("modules_to_not_convert")
    if (packing or skipped is not None) and layout == "fused":
        raise ConfigError("The fused layout is written in bf16 only.", "Add --format bf16.")
    with torch.device("meta"):
        plain = {key: value for key, value in deepcopy(dict(config)).items() if key != "quantization_config"}
        resolved = CONFIG_MAPPING[config["model_type"]].from_dict(plain)
        model = model_class(resolved)(resolved)
    # What transformers reverts a name by. It would walk through the whole model to find it, for each name again.
    published = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [entry for entry in published if not isinstance(entry, PrefixChange)]  # noqa: SLF001 - not public
    tensors: list[StoredTensor] = []
    for name, skeleton in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        pieces = [Piece(key, tuple(tensor.shape)) for key, tensor in revert_weight_conversion(model, {name: skeleton}).items()]
        if layout == "fused":
            # A stack holds one expert after the other, and of each its matrices in the conversion's order, which a stable sort keeps.
            pieces.sort(key=lambda piece: piece.number("experts") or 0)
            tensors.append(StoredTensor(name, tuple(skeleton.shape), "BF16", tuple(pieces)))
            continue
        for piece in pieces:
            if packing and packing.packs(piece):
                tensors += _packed(packing, piece)
                continue
            dtype = "F32" if piece.name.endswith(F32_TENSORS.get(config["model_type"], ())) else "BF16"
            quantised = skipped is not None and piece.in_blocks and not any(f".{module}." in piece.name for module in skipped)
            tensors.append(StoredTensor(piece.name, piece.shape, "F8_E4M3" if quantised else dtype, (piece,)))
            tensors += [StoredTensor(f"{piece.name}_scale_inv", piece.grid, "F32", (piece,))] if quantised else []
    uneven = [each for each in tensors if each.fill is None and each.dtype == "F8_E4M3" and any(side % BLOCK for side in each.shape)]
    found = {f"{re.sub('[.][0-9]+', '', each.name)} would be {each.shape[0]} x {each.shape[1]}.": None for each in uneven}
    raise_all([ConfigError(problem, f"FP8 needs multiples of {BLOCK} here: change them, or choose --format bf16.") for problem in found])
    return tensors


def _packed(packing: Format, piece: Piece) -> Iterable[StoredTensor]:
    """What a format stores for a weight. Raises ConfigError for one that it cannot pack."""
    raise_all([problem for problem in [packing.misfit(piece)] if problem])
    return packing.tensors(piece)


class RandomWeights:
    """The bytes of any tensor, from the seed: row-major, little-endian, in chunks of bounded size."""

    def __init__(self, seed: int, experts_per_token: int) -> None:
        self.seed = seed
        self.experts_per_token = experts_per_token
        self.normal = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).float().numpy()  # its quantiles
        # 256 of them, the outermost at 448, which is e4m3's largest value: a real quantiser puts each block's largest weight there.
        values = torch.from_numpy(self.normal[128::256] / self.normal[128::256].max() * 448).to(torch.float8_e4m3fn)
        self.codes, self.codes_rms = values.view(torch.uint8).numpy().tobytes(), float(values.float().square().mean().sqrt())

    def chunks(self, tensor: StoredTensor) -> Iterator[bytes]:
        if tensor.fill is not None:
            yield from tensor.fill(self._drawer(tensor.name), self._std(tensor.pieces[0]))
            return
        for piece in tensor.pieces:
            if tensor.name.endswith("_scale_inv"):
                yield self._scales(piece).numpy().tobytes()
                continue
            for values, scale in self._blocks(piece) if piece.in_blocks else self._plain(piece):
                stored = (values.float() * scale()).to(torch.bfloat16) if tensor.dtype == "BF16" else values
                yield stored.view(torch.uint8).numpy().tobytes()

    def _drawer(self, name: str) -> Drawer:
        bits = np.random.PCG64(int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest(), "little"))
        return lambda size_bytes: bits.random_raw(-(-size_bytes // 8)).astype("<u8").view(np.uint8)[:size_bytes]

    def _scales(self, piece: Piece) -> torch.Tensor:
        """F32 [row blocks, column blocks], each up to a factor 2^(1/4) off the middle, so that none can stand for another unnoticed."""
        drawn = self._drawer(f"{piece.name}_scale_inv")(8 * prod(piece.grid)).view("<u8") / 2.0**64
        factors = np.exp2((drawn - 0.5) / 2)
        return torch.from_numpy(factors * self._std(piece) / self.codes_rms).float().reshape(piece.grid)

    def _blocks(self, piece: Piece) -> Iterator[tuple[torch.Tensor, Callable[[], torch.Tensor]]]:
        """e4m3 values and, once called for, the F32 scale of each, whole rows of blocks at a time."""
        draw, (rows, columns) = self._drawer(piece.name), piece.shape
        scales = self._scales(piece).repeat_interleave(BLOCK, 0)[:rows]
        step = max(1, CHUNK_VALUES // (BLOCK * columns)) * BLOCK
        for start in range(0, rows, step):
            shape = (min(step, rows - start), columns)
            values = bytearray(draw(prod(shape)).tobytes().translate(self.codes))
            of_rows = scales[start : start + step]
            spread = partial(lambda of_rows: of_rows.repeat_interleave(BLOCK, 1)[:, :columns], of_rows)
            yield torch.frombuffer(values, dtype=torch.float8_e4m3fn).reshape(shape), spread

    def _plain(self, piece: Piece) -> Iterator[tuple[torch.Tensor, Callable[[], float]]]:
        """F32 values of what no format quantises, and scale 1."""
        draw, num_values = self._drawer(piece.name), prod(piece.shape)
        for start in range(0, num_values, CHUNK_VALUES):
            drawn = draw(2 * min(CHUNK_VALUES, num_values - start)).view("<u2")
            if piece.name.endswith("correction_bias"):
                # Around 1, where bf16 is coarse enough to change the top-k, and one value in each of equal strata, lest all be alike.
                strata = (drawn.argsort().argsort() + drawn / 65536) / num_values
                values = 1 + 0.3 / sqrt(num_values) * (2 * strata - 1)
            else:
                values = 1 + 0.1 * (drawn / 32767.5 - 1) if "norm" in piece.name else self.normal[drawn] * self._std(piece)
            yield torch.from_numpy(values.astype(np.float32)), lambda: 1.0

    def _std(self, piece: Piece) -> float:
        """The standard deviation that keeps activations of order one and a layer's update about RELATIVE_UPDATE of its input."""
        # What writes into the residual stream grows with depth as the stream does: their ratio then settles at one value for all layers.
        layer, std = piece.number("layers"), 0.1 if len(piece.shape) == 1 else 1 / sqrt(piece.shape[1])
        if layer is None:
            return 1.0 if "embed" in piece.name else std
        if re.search(r"\.(o_proj|down_proj|w2)\.weight$", piece.name):
            std *= RELATIVE_UPDATE * (1 + RELATIVE_UPDATE**2) ** (layer / 2)
            std /= 1 if ".o_proj." in piece.name else SILU_GATED_RMS
            std *= sqrt(self.experts_per_token) if ".experts." in piece.name else 1  # the mean of independent experts is this much smaller
        return std


def split_shards(tensors: Sequence[StoredTensor], max_shard_bytes: int) -> dict[str, list[StoredTensor]]:
    """File names and their tensors: consecutive, at most `max_shard_bytes` together, or a larger one alone."""
    shards: list[list[StoredTensor]] = []
    room_bytes = 0
    for tensor in tensors:
        if not shards or tensor.size_bytes > room_bytes:
            shards.append([])
            room_bytes = max_shard_bytes
        shards[-1].append(tensor)
        room_bytes -= tensor.size_bytes
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_shard(path: Path, shard: Sequence[StoredTensor], weights: RandomWeights) -> None:
    """A safetensors file (https://huggingface.co/docs/safetensors, "Format"), written as values are made: memory holds one chunk.

    It gets its name once it is whole.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial_path = path.with_suffix(".partial")
    with partial_path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in shard:
            file.writelines(weights.chunks(tensor))
    partial_path.rename(path)
    print(f"{path.name}: {len(shard)} tensors, {end / 1e9:.3f} GB", flush=True)


def train_tokenizer(vocab_size: int, max_length: int, placeholders: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, trained on corpus.txt beside this script, with a chat template.

    `placeholders` are special tokens behind SPECIAL_TOKENS.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, size = pre_tokenizers.ByteLevel.alphabet(), min(vocab_size, VOCABULARY[-1])
    special, named = [*SPECIAL_TOKENS, *placeholders], dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=False))
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train([str(Path(__file__).with_name("corpus.txt"))], trainer)
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=max_length, chat_template=template, **named)


def lay_out(
    out: Path,
    config: Mapping[str, Any],
    *,
    overrides: Mapping[str, int] | None = None,
    fmt: str = "fp8",
    layout: Literal["hub", "fused"] = "hub",
    seed: int = 0,
    max_shard_bytes: int = 4 * 10**9,
) -> tuple[dict[str, list[StoredTensor]], RandomWeights]:
    """Write all but the weights into the folder `out`: config.json, index and tokenizer. Returns the weights' files, and what fills them.

    Raises:
        ConfigError: the dimensions do not go together.
    """
    resolved = resolve_config(config, overrides or {}, fmt)
    decoder = resolved.get(TOWER, resolved)
    placeholders = {name: f"<|{match[1]}|>" for name in resolved if (match := PLACEHOLDER.fullmatch(name))}
    tokenizer = train_tokenizer(decoder["vocab_size"], decoder["max_position_embeddings"], list(placeholders.values()))
    resolved |= {name: tokenizer.convert_tokens_to_ids(token) for name, token in placeholders.items()}
    decoder |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tensors = plan_tensors(resolved, layout, fmt)
    shards = split_shards(tensors, max_shard_bytes)
    weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.size_bytes for tensor in tensors)}, "weight_map": weight_map}
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    beside = FORMATS[fmt].other_files() if fmt in FORMATS else {}
    for name, value in {"config.json": resolved, "model.safetensors.index.json": index, **beside}.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return shards, RandomWeights(seed, decoder.get("num_experts_per_tok", 1))


def write_shards(paths: Sequence[Path], shards: Iterable[Sequence[StoredTensor]], weights: RandomWeights, processes: int) -> None:
    """Write the weights' files, several at one time."""
    # Not forked: a process that was has no threads left for torch's own pool. A thread each: more of them wait for one another.
    several = partial(ProcessPoolExecutor, processes, get_context("spawn"), torch.set_num_threads, (1,))
    with several() if processes > 1 else nullcontext() as pool:
        for _ in (pool.map if pool else map)(write_shard, paths, shards, [weights] * len(paths)):
            pass


def make_checkpoint(out: Path, config: Mapping[str, Any], *, processes: int = 1, **how: Any) -> None:
    """Write the checkpoint folder `out`, absent or empty before, from the fields of a published config.json. It appears whole or not at all.

    Args:
        how: as `lay_out` takes it.

    Raises:
        ConfigError: `out` holds something, or the dimensions do not go together.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already.", "Choose a new or an empty folder.")
    unfinished = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex}")
    try:
        shards, weights = lay_out(unfinished, config, **how)
        write_shards([unfinished / name for name in shards], shards.values(), weights, processes)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random-weight checkpoint in a published model's on-disk layout.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--config", type=Path, required=True, help="config.json of the published model")
    for option, field in OVERRIDES.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, metavar="N", help=f"changes {field}")
    parser.add_argument("--format", dest="fmt", choices=("fp8", "bf16", *FORMATS), required=True)
    parser.add_argument("--layout", choices=("hub", "fused"), default="hub", help="fused: transformers' own names, in bf16")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--max-shard-size", default="4GB")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that write shards at one time")
    given = vars(parser.parse_args())
    try:
        given["overrides"] = {option: value for option in OVERRIDES if (value := given.pop(option)) is not None}
        given["config"] = json.loads(given["config"].read_text(encoding="utf-8"))
        make_checkpoint(max_shard_bytes=parse_bytes(given.pop("max_shard_size"), "--max-shard-size"), **given)
    except (M2rayError, OSError, json.JSONDecodeError) as error:
        parser.exit(1, f"make_checkpoint: {error}\n")


if __name__ == "__main__":
    main()
