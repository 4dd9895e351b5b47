"""What `m2ray plan` counts on: the model's tensors and dimensions, and the prompts' lengths. No weights are read."""

import tempfile
from dataclasses import dataclass
from typing import Any, Literal

from m2ray.errors import CheckpointError
from m2ray.model.attention import resolve_attn_implementation
from m2ray.model.checkpoint import CONFIG, open_checkpoint, read_config
from m2ray.model.stage import DTYPES
from m2ray.model.tensor_table import count_sources, table_without_weights, tensor_table
from m2ray.model.towers import decoder_config, placeholder_tokens
from m2ray.model.weight_files import INDEX, find_weights, indexed_bytes
from m2ray.options import PromptOptions
from m2ray.planning.shape import ModelShape
from m2ray.prompts import PromptSource, PromptTokenizer, ShardTable, survey
from m2ray.storage import open_store
from m2ray.tensor_rows import TensorTable

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class PlannedModel:
    """A model, by what its folder says of it.

    Attributes:
        whole_config: transformers' configuration.
        config: its decoder's, as `Checkpoint` has them.
        shape: its dimensions, and the attention that runs, "auto" resolved.
        table: every tensor.
        source: what the bytes on disk were read from: the safetensors "headers", or "config", where the files are not all there.
        index_bytes: the bytes of all tensors as the index sums them up; None without an index or its total.
    """

    whole_config: Any
    config: Any
    shape: ModelShape
    table: TensorTable
    source: Literal["headers", "config"]
    index_bytes: int | None


def read_model(url: str, attn_implementation: str, compute_dtype: str) -> PlannedModel:
    """The model of a checkpoint folder, of a folder with config.json (and the index) alone, or of a config.json.

    Raises:
        CheckpointError: no config.json, a model that m2ray does not run, damaged files, or an index of another model.
        ConfigError: the family or the dtype cannot have such attention, or the weights cannot stay FP8, as `compute_dtype` has it.
    """
    in_float8 = compute_dtype == "float8"
    alone = url.endswith(".json")
    store = open_store((url.rpartition("/")[0] or ".") if alone else url)
    config_key = url.rpartition("/")[2] if alone else CONFIG
    if store.size(config_key) is None:
        raise CheckpointError(f"There is no {config_key} in {store.url}.", "Give a checkpoint's folder, or its config.json.")
    whole_config, _ = read_config(store, config_key)
    weights = None if alone else find_weights(store, getattr(whole_config, "transformers_weights", None))
    weight_map, index, files = weights or ({}, b"", ())
    is_whole = bool(files) and all(store.size(file) is not None for file in files)
    if is_whole:
        checkpoint = open_checkpoint(url)
        whole_config, table = checkpoint.whole_config, tensor_table(checkpoint, in_float8=in_float8)
    else:
        table = table_without_weights(whole_config, in_float8=in_float8)
        if weight_map:
            _require_all(whole_config, table, set(weight_map))
    config = decoder_config(whole_config)
    attention = resolve_attn_implementation(whole_config, attn_implementation, DTYPES[compute_dtype])
    origin: Literal["headers", "config"] = "headers" if is_whole else "config"
    return PlannedModel(whole_config, config, ModelShape.of(config, attention), table, origin, indexed_bytes(index))


def _require_all(config: Any, table: TensorTable, keys: set[str]) -> None:
    """Refuse an index that lacks tensors of the model: config.json is another model's, or the index is damaged."""
    tied = {"head"}
    doubtful = [row for row in table.rows if row.role not in tied and not keys.issuperset(row.sources)]
    found = count_sources(config, keys) if doubtful else {}
    absent = [key for row in doubtful if found[row.name] < len(row.sources) for key in row.sources if key not in keys]
    if absent:
        shown = ", ".join(absent[:_SHOWN_NAMES])
        raise CheckpointError(
            f"{INDEX} lacks {len(absent)} tensors that config.json asks for: {shown}{' and more' if len(absent) > _SHOWN_NAMES else ''}.",
            "Give config.json and the index of the same model.",
        )


def survey_prompts(url: str, model: PlannedModel, options: PromptOptions, shard_tokens: int) -> tuple[PromptOptions, ShardTable]:
    """The options as the prompts settle them, and the shards that a run would cut: the prompts are read and tokenised as there, and nothing is kept.

    Raises:
        PromptsError, CheckpointError: as a run would.
    """
    with tempfile.TemporaryDirectory(prefix="m2ray-plan-") as folder:
        source = PromptSource.open(options)
        tokenizer = PromptTokenizer.load(url, options, model.config.vocab_size, placeholder_tokens(model.whole_config))
        settled = tokenizer.settled(source.columns)
        found = survey(source, tokenizer, open_store(folder), "plan", shard_tokens)
        found.tokens.close()
    return settled, found.shards
