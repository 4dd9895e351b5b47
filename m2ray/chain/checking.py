"""What is known before Ray is started: the model, the prompts, the tokenizer, the output and its record, and the options."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

from m2ray.activations.job import JobRecord, read_job
from m2ray.activations.resumable import require_resumable
from m2ray.activations.writing.lease import held
from m2ray.chain.machine import allowed_threads, disk_free_bytes
from m2ray.chain.progress import Progress
from m2ray.chain.stopping import NOTHING_YET, Stop
from m2ray.config import ExtractConfig
from m2ray.errors import M2rayError, raise_all
from m2ray.model.attention import resolve_attn_implementation
from m2ray.model.checkpoint import Checkpoint, open_checkpoint
from m2ray.model.families import default_max_length, require_dtype, require_positions, steady_positions
from m2ray.model.proof import prove
from m2ray.model.site_proof import prove_sites
from m2ray.model.stage import DTYPES
from m2ray.model.tensor_table import up_to_layer
from m2ray.model.towers import placeholder_tokens
from m2ray.options import PromptOptions, RunOptions
from m2ray.planning.demand import Assumptions, Demand
from m2ray.planning.hardware import Cluster
from m2ray.planning.resolve import StatsAt, resolve
from m2ray.planning.shape import ModelShape
from m2ray.prompts import PromptSource, PromptTokenizer
from m2ray.sites import LayersOfSites, asked_sites, last_layer, present_sites
from m2ray.storage import Store, open_store
from m2ray.tensor_rows import TensorTable

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before Ray is started.

    `checkpoint` has the files of the layers that are run, and no others; `versions` is what changes when one of them is written anew, from before any
    of them is loaded. `options` are those of a machine without GPUs until `on` a cluster says otherwise; `recorded` is the record of a run that has begun.
    """

    config: ExtractConfig
    checkpoint: Checkpoint
    versions: Mapping[str, str]
    table: TensorTable
    shape: ModelShape
    source: PromptSource
    tokenizer: PromptTokenizer
    store: Store
    recorded: JobRecord | None
    options: RunOptions

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those that cost nothing to know; the prompts' is taken once their digest is needed."""
        return {
            "model": self.checkpoint.digest,
            "tokenizer": self.tokenizer.tokenizer_digest,
            "template": self.tokenizer.template_digest,
        }

    def demand(self, longest_tokens: int) -> Demand:
        """What this run asks of a cluster."""
        return Demand(self.table, self.shape, self.options, self._assumed(longest_tokens))

    def on(self, cluster: Cluster, longest_tokens: int, stats_at: StatsAt | None = None) -> "Inputs":
        """The same with the options as they are on this cluster, for these prompts. Raises as `resolve`."""
        recorded = self.recorded.options if self.recorded else None
        assumed = self._assumed(longest_tokens)
        return replace(
            self, options=resolve(self.config, self.options.prompts, self.table, self.shape, cluster, assumed, recorded, stats_at)
        )

    def _assumed(self, longest_tokens: int) -> Assumptions:
        free_bytes = disk_free_bytes(self.config.output)
        return Assumptions(longest_tokens=longest_tokens, disk_free_bytes=free_bytes, threads=allowed_threads())


def check(config: ExtractConfig, stack: ExitStack, stop: Stop, progress: Progress) -> Inputs:
    """Look at all that is known before Ray is started, and hold the run until the stack ends, so that no other driver works in vain.

    Raises:
        M2rayError: all problems at once; another driver is at the run; or the run was asked to stop.
    """
    with stop.at_once(NOTHING_YET):
        progress.waiting("check", "options, model and prompts")
        inputs = look(config)
        if stack.enter_context(held(inputs.store, progress.say, stop.outlived, wait=config.wait)):
            inputs = look(config)  # what another driver began meanwhile
        return inputs


def look(config: ExtractConfig) -> Inputs:
    """Look at checkpoint, layers, prompts, tokenizer and output. Raises all their problems at once."""
    store = open_store(config.output)
    problems: list[M2rayError] = []

    def tried(step: Callable[[], _Found]) -> _Found | None:
        """What a step finds; None where it raises a problem, which is kept for later."""
        try:
            return step()
        except M2rayError as problem:
            problems.append(problem)
            return None

    tried(store.probe)
    recorded = None if problems else tried(lambda: read_job(store))  # one that cannot be written is told of once
    if recorded:
        tried(lambda: require_resumable(store, recorded))
    of_the_run = recorded.options if recorded else {}
    opened = tried(lambda: open_checkpoint(config.model))
    # What is wrong with the prompts is said beside what is wrong with the model, whose limit is not known then.
    limit, steady = (default_max_length(opened.config), steady_positions(opened.config)) if opened else (1, None)
    prompts = PromptOptions.of(config, limit, of_the_run.get("template_date"), steady)
    source = tried(lambda: PromptSource.open(prompts))
    if opened is None:
        raise_all(problems)
    assert opened is not None
    tried(lambda: prove(opened.whole_config))
    tried(lambda: require_positions(opened.config, config.max_length))
    tried(lambda: require_positions(opened.config, config.pack, "pack"))
    tried(lambda: require_dtype(opened.config, config.compute_dtype))
    asked = tried(lambda: asked_sites(config.sites, config.layers, opened.config.num_hidden_layers))
    in_float8 = config.compute_dtype == "float8"
    of_the_layers = tried(lambda: _up_to_last_layer(opened, asked, in_float8=in_float8)) if asked else None
    no_text = placeholder_tokens(opened.whole_config)
    tokenizer = tried(lambda: PromptTokenizer.load(config.model, prompts, opened.config.vocab_size, no_text))
    attention = tried(lambda: resolve_attn_implementation(opened.whole_config, config.attn_implementation, DTYPES[config.compute_dtype]))
    raise_all(problems)
    assert source is not None
    assert tokenizer is not None
    assert attention is not None
    assert of_the_layers is not None
    checkpoint, table = of_the_layers
    shape = ModelShape.of(checkpoint.config, attention)
    options = resolve(config, tokenizer.settled(source.columns), table, shape, recorded=of_the_run)
    prove_sites(opened.whole_config, {part.site for part in options.of_statistics} - options.sites.keys())
    versions = checkpoint.versions(checkpoint.weight_files)
    return Inputs(config, checkpoint, versions, table, shape, source, tokenizer, store, recorded, options)


def _up_to_last_layer(opened: Checkpoint, asked: LayersOfSites, *, in_float8: bool) -> tuple[Checkpoint, TensorTable]:
    """The files and tensors of the layers that are run for what is asked. Raises as `up_to_layer`, `present_sites` and `prove_sites`."""
    num_layers = opened.config.num_hidden_layers
    with_final_norm = "final_norm" in asked
    checkpoint, table = up_to_layer(opened, last_layer(asked, num_layers), with_final_norm=with_final_norm, in_float8=in_float8)
    last = last_layer(present_sites(asked, table), num_layers)
    prove_sites(opened.whole_config, asked)
    if last == last_layer(asked, num_layers):
        return checkpoint, table
    return up_to_layer(opened, last, with_final_norm=with_final_norm, in_float8=in_float8)
