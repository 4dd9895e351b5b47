"""RunOptions from what a user asks for: every "auto" is decided here but those of `device_map` and `transport`, for `m2ray plan` and `m2ray extract` alike."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

from m2ray.batches import PartSpec, PromptStats
from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError
from m2ray.option_text import parse_labels
from m2ray.options import PromptOptions, RunOptions
from m2ray.planning.batch_size import AUTO_BATCH_TOKENS, MOST_ON_CPU, ON_CPU, ON_GPU, best_batch_tokens
from m2ray.planning.demand import Assumptions, Demand
from m2ray.planning.hardware import Cluster
from m2ray.planning.plan import most_batch_tokens, most_replicas, plan_run
from m2ray.planning.shape import ModelShape
from m2ray.sites import asked_sites, layers_run, parts_of_run, present_sites
from m2ray.sizes import parse_bytes, parse_max_memory
from m2ray.statistics import ROUTER, Asked, contribution_bytes, statistic_sites, statistics_of_run, widths
from m2ray.tensor_rows import TensorTable

AUTO_SHARD_TOKENS = 32_768

STATISTICS_SHARE = 0.01
"""Of the bytes that rows would take, what shards leave until the end of a run where statistics alone are kept."""

WRITER_QUEUE_SHARE = 8
"""Captured rows that wait for the store take one part in so many of a stage's memory where that is limited, at most."""

WRITER_QUEUE_A_CORE_BYTES = 32 << 20
"""The same where layers run on cores: of SmolLM2-135M, all layers, about a second and a half's rows, or those of two micro-batches."""

WRITER_QUEUE_BATCHES = 4
"""Full micro-batches whose rows wait for the store without GPUs, at most."""

_AS_ASKED = (
    *("compute_dtype", "store_dtype", "output", "compression", "gpus_per_stage", "device_map", "weights", "offload", "offload_folder"),
    *("transport", "placement_timeout_s", "stage_timeout_s"),
)
"""Options in which nothing is open."""

StatsAt = Callable[[int], PromptStats]
"""From the most padded tokens of a micro-batch to what the prompts come to in such micro-batches."""


def resolve(
    config: ExtractConfig,
    prompts: PromptOptions,
    table: TensorTable,
    shape: ModelShape,
    cluster: Cluster | None = None,
    assumed: Assumptions | None = None,
    recorded: Mapping[str, Any] | None = None,
    stats_at: StatsAt | None = None,
) -> RunOptions:
    """Decide what a configuration leaves open.

    What decides the rows stays as a run that has begun recorded it. A new run's micro-batches get the size that takes least time where
    memory has room for it, and `replicas` as many as find room.

    Args:
        config: what is asked for.
        prompts: what the prompts settled of it.
        table, shape: the model; `shape` names the attention that "auto" means for it.
        cluster: where it is to run; without it, what depends on one is as on a machine without GPUs.
        assumed: of the world around the run; nothing is known of it by default.
        recorded: the options in job.json, if the run has begun.
        stats_at: the prompts; None where none are known.

    Raises:
        ConfigError: a value is malformed, or does not suit the model or the cluster.
        ClusterError: there are fewer GPUs than stages.
    """
    sites = present_sites(asked_sites(config.sites, config.layers, table.num_layers), table)
    widths_of_model = (table.hidden_size, table.num_experts, table.experts_per_token)
    parts = parts_of_run(sites, config.store_dtype, *widths_of_model)
    routers = [layer for layer in table.layers_of.get(ROUTER, ()) if layer < layers_run(parts, table.num_layers)]
    statistics = statistics_of_run(config.statistics, parts, routers, table.num_layers)
    of_statistics = parts_of_run(statistic_sites(statistics), config.store_dtype, *widths_of_model)
    kept = () if config.keep == "statistics" else parts
    _require_suitable(config, prompts, table, (*kept, *of_statistics))
    automatic = {
        "batch_tokens": MOST_ON_CPU,
        "shard_tokens": _shard_tokens(config, parts, statistics, of_statistics, table.num_experts),
        "attn_implementation": shape.attn_implementation,
        "compile": cluster is not None and cluster.num_gpus > 0,
        "threads_per_stage": 1,
    }
    options = RunOptions(
        prompts=prompts,
        layers=tuple(sorted({layer for layers in sites.values() for layer in layers})),
        sites=sites,
        parts=kept,
        stages=None if config.stages == "auto" else config.stages,
        replicas=1 if config.replicas == "auto" else config.replicas,
        max_memory=parse_max_memory(config.max_memory),
        node_labels=parse_labels(config.node_labels),
        in_flight_bytes=parse_bytes(config.in_flight, "in_flight"),
        statistics=statistics,
        keep=("both" if statistics else "rows") if config.keep == "auto" else config.keep,
        of_statistics=of_statistics,
        **{name: getattr(config, name) for name in _AS_ASKED},
        **{name: _decided(config, name, {**automatic, **(recorded or {})}) for name in automatic},
    )
    if cluster is None:
        return options
    return _suited(config, Demand(table, shape, options, assumed or Assumptions()), cluster, recorded or {}, stats_at)


def _decided(config: ExtractConfig, name: str, otherwise: Mapping[str, Any]) -> Any:
    """An option's value, or what stands for "auto"."""
    asked = getattr(config, name)
    return otherwise[name] if asked == "auto" else asked


def _suited(config: ExtractConfig, demand: Demand, cluster: Cluster, recorded: Mapping[str, Any], stats_at: StatsAt | None) -> RunOptions:
    """The options with what a cluster decides of them."""

    def is_open(name: str) -> bool:
        return getattr(config, name) == "auto" and name not in recorded

    demand = demand.asking(writer_queue_bytes=_writer_queue_bytes(demand, cluster))
    if is_open("batch_tokens"):
        demand = demand.asking(batch_tokens=_batch_tokens(config, demand, cluster, stats_at))
        demand = demand.asking(writer_queue_bytes=_writer_queue_bytes(demand, cluster))
    demand = demand.asking(replicas=_replicas(config, demand, cluster))
    if is_open("threads_per_stage"):
        demand = demand.asking(threads_per_stage=_threads(demand, cluster))
    return demand.options


def _require_suitable(config: ExtractConfig, prompts: PromptOptions, table: TensorTable, captured: Sequence[PartSpec]) -> None:
    """Raise ConfigError for what this model cannot do."""
    _require_means(prompts, captured)
    num_layers = layers_run(captured, table.num_layers)
    if isinstance(config.stages, int) and config.stages > num_layers:
        raise ConfigError(f"stages = {config.stages}, but only {num_layers} layers are run.", f"Ask for at most {num_layers}.")
    if config.weights == "packed" and not any(row.method for row in table.rows if row.role == "layer"):
        raise ConfigError('weights = "packed", but no weights of this checkpoint are quantised.', "Leave weights out.")


def _shard_tokens(
    config: ExtractConfig, parts: Sequence[PartSpec], statistics: Asked, of_statistics: Sequence[PartSpec], num_experts: int
) -> int:
    """Where statistics alone are kept, as many as make what a shard leaves little beside what its rows would take, if all tokens had some."""
    if config.keep != "statistics":
        return AUTO_SHARD_TOKENS
    shard_bytes = sum(contribution_bytes(kinds, width) for kinds, width in widths(statistics, of_statistics, num_experts))
    least = shard_bytes / (STATISTICS_SHARE * sum(part.row_bytes for part in parts))
    return AUTO_SHARD_TOKENS * max(1, ceil(least / AUTO_SHARD_TOKENS))


def _require_means(prompts: PromptOptions, parts: Sequence[PartSpec]) -> None:
    """Raise ConfigError for means of what has none: numbers of experts."""
    without = sorted({part.site for part in parts if any(column.name == "expert_ids" for column in part.columns)})
    if prompts.selection.is_mean and without:
        raise ConfigError(
            f"tokens = {prompts.tokens!r}, and {', '.join(without)} has numbers of experts, which have no mean.", "Leave it out."
        )


def _replicas(config: ExtractConfig, demand: Demand, cluster: Cluster) -> int:
    return most_replicas(demand, cluster) if config.replicas == "auto" else config.replicas


def _batch_tokens(config: ExtractConfig, demand: Demand, cluster: Cluster, stats_at: StatsAt | None) -> int:
    """What memory has room for and takes least time; the most there is where nothing fits, or where no prompts are known."""
    demand = demand.asking(replicas=_replicas(config, demand, cluster))
    costs, at_most = (ON_GPU, AUTO_BATCH_TOKENS) if cluster.num_gpus else (ON_CPU, MOST_ON_CPU)
    most_tokens = most_batch_tokens(demand, cluster, at_most, costs.ready_tokens)
    if most_tokens is None:
        return MOST_ON_CPU
    stats_at = stats_at or _endless
    replicas = demand.options.replicas
    plan = plan_run(demand.asking(batch_tokens=most_tokens), cluster)
    return best_batch_tokens(most_tokens, stats_at, len(plan.stages) // replicas, replicas, costs)


def _endless(batch_tokens: int) -> PromptStats:
    """Where no prompts are known: many, without padding."""
    tokens = 1 << 30
    return PromptStats(0, tokens, tokens, 0, 0, tokens // batch_tokens)


def _writer_queue_bytes(demand: Demand, cluster: Cluster) -> int:
    """Without GPUs as much as a node's cores make in a short while, no more than the rows of few micro-batches, and no more than a part of `max_memory`, which
    is of all that a stage takes there.
    """
    options = demand.options
    if cluster.num_gpus:
        return options.writer_queue_bytes
    made_bytes = (WRITER_QUEUE_A_CORE_BYTES * node.cpus for node in cluster.nodes if node.cpus)
    allowed_bytes = [options.max_memory.usable_bytes(node.name, 0, sys.maxsize) // WRITER_QUEUE_SHARE for node in cluster.nodes]
    row_bytes = sum(part.row_bytes for part in options.parts)
    few_bytes = [WRITER_QUEUE_BATCHES * demand.workload.padded_tokens * row_bytes] if row_bytes else []
    return min(options.writer_queue_bytes, *made_bytes, *allowed_bytes, *few_bytes)


def _threads(demand: Demand, cluster: Cluster) -> int:
    """What the user allows, or the cores of a node for each of its stages, where there are no GPUs; the same for all stages, since the number decides the rows."""
    if cluster.num_gpus:
        return 1
    if demand.assumed.threads is not None:
        return demand.assumed.threads
    stages = Counter(stage.node for stage in plan_run(demand, cluster).stages)
    return max(1, min(((node.cpus or 1) // stages[node.name] for node in cluster.nodes if node.name in stages), default=1))
