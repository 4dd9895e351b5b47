"""What is known before Ray is started: the model, the prompts, the tokenizer, the output, and the options that change rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from m2ray.activations.job import JobRecord, read_job, require_todays_format
from m2ray.batches import TensorTable
from m2ray.config import ExtractConfig, parse_labels, parse_layers
from m2ray.errors import ConfigError, M2rayError, raise_all
from m2ray.model.attention import resolve_attn_implementation
from m2ray.model.checkpoint import Checkpoint, open_checkpoint, tensor_table
from m2ray.model.stage import DTYPES
from m2ray.planning.batch_size import AUTO_BATCH_TOKENS
from m2ray.planning.demand import Demand, PlanOptions
from m2ray.planning.memory import ModelShape
from m2ray.planning.probe import disk_free_bytes
from m2ray.prompts import PromptOptions, PromptSource, PromptTokenizer
from m2ray.storage import Store, open_store

_AUTO_SHARD_TOKENS = 32_768


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before Ray is started.

    `options` are those that change rows, "auto" resolved but for `compile` and `batch_tokens` of a new run: the hardware decides.
    """

    config: ExtractConfig
    checkpoint: Checkpoint
    table: TensorTable
    layers: tuple[int, ...]
    source: PromptSource
    tokenizer: PromptTokenizer
    store: Store
    options: dict[str, Any]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those that cost nothing to know; the prompts' is taken once their digest is needed."""
        return {
            "model": self.checkpoint.digest,
            "tokenizer": self.tokenizer.tokenizer_digest,
            "template": self.tokenizer.template_digest,
        }

    def demand(self, longest_tokens: int | None) -> Demand:
        """What this run asks of a cluster, at the automatic size of micro-batches where none is set yet."""
        batch_tokens = AUTO_BATCH_TOKENS if self.options["batch_tokens"] == "auto" else self.options["batch_tokens"]
        options = PlanOptions.of(self.config, self.layers, self.table.hidden_size, batch_tokens, longest_tokens)
        options = replace(options, disk_free_bytes=disk_free_bytes(self.config.output), compiled=self.options["compile"] is True)
        return Demand(self.table, ModelShape.of(self.checkpoint.config, self.options["attn_implementation"]), options)


def check(config: ExtractConfig) -> Inputs:
    """Look at checkpoint, layers, prompts, tokenizer and output. Raises all their problems at once."""
    PlanOptions.of(config, (), 1, 1, None)
    parse_labels(config.node_labels)
    store = open_store(config.output)
    problems: list[M2rayError] = []

    def look(*steps: Callable[[], Any]) -> list[Any]:
        """Take each step, keep its problem for later, and give what the successful ones found."""
        found = []
        for step in steps:
            try:
                found.append(step())
            except M2rayError as problem:
                problems.append(problem)
        return found

    look(store.probe)
    recorded = next(iter(look(lambda: read_job(store))), None)
    if recorded:
        look(lambda: require_todays_format(store, recorded))
    opened = look(lambda: open_checkpoint(config.model))
    limit = opened[0].config.max_position_embeddings if opened else 1
    prompts = PromptOptions(
        config.prompts, config.max_length or limit, config.text_column, config.messages_column, config.id_column, config.truncation
    )
    source = look(lambda: PromptSource.open(prompts))
    if not opened:
        raise_all(problems)
    checkpoint: Checkpoint = opened[0]
    look(checkpoint.check)
    layers = look(lambda: parse_layers(config.layers, checkpoint.config.num_hidden_layers))
    tokenizer = look(lambda: PromptTokenizer.load(config.model, prompts, checkpoint.config.vocab_size))
    attention = look(lambda: resolve_attn_implementation(checkpoint.config, config.attn_implementation, DTYPES[config.compute_dtype]))
    raise_all(problems)
    table = tensor_table(checkpoint)
    num_layers = layers[0][-1] + 1
    if isinstance(config.stages, int) and config.stages > num_layers:
        raise ConfigError(f"stages = {config.stages}, but only {num_layers} layers are run.", f"Ask for at most {num_layers}.")
    options = _resolved(config, layers[0], prompts.max_length, attention[0], recorded)
    return Inputs(config, checkpoint, table, layers[0], source[0], tokenizer[0], store, options)


def _resolved(config: ExtractConfig, layers: Sequence[int], max_length: int, attention: str, recorded: JobRecord | None) -> dict[str, Any]:
    """The options that change rows, without "auto": a run that began keeps its values, a new one takes today's.

    The model and the prompts are left out: their digests say more than their paths.
    """
    options = config.model_dump(include=set(config.row_options()) - {"model", "prompts"})
    options |= {"layers": list(layers), "max_length": max_length}
    automatic = {
        "shard_tokens": _AUTO_SHARD_TOKENS,
        "attn_implementation": attention,
        "threads_per_stage": 1,
    }
    for name, value in options.items():
        if value == "auto":
            options[name] = recorded.options[name] if recorded and name in recorded.options else automatic.get(name, value)
    return options
