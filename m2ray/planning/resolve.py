"""RunOptions from what a user asks for: every "auto" is decided here but those of `device_map` and `transport`, for `m2ray plan` and `m2ray extract` alike."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, TypeVar

from m2ray.batches import PartSpec, PromptStats, TensorTable
from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError
from m2ray.option_text import parse_labels
from m2ray.option_types import Auto
from m2ray.options import PromptOptions, RunOptions
from m2ray.planning.batch_size import AUTO_BATCH_TOKENS, MOST_ON_CPU, ON_CPU, ON_GPU, best_batch_tokens
from m2ray.planning.demand import Assumptions, Demand
from m2ray.planning.hardware import Cluster
from m2ray.planning.memory import ModelShape
from m2ray.planning.plan import most_batch_tokens, most_replicas, plan_run
from m2ray.sites import asked_sites, layers_run, parts_of_run, present_sites
from m2ray.sizes import parse_bytes, parse_max_memory
from m2ray.statistics import ROUTER, Asked, contribution_bytes, statistic_sites, statistics_of_run, widths

AUTO_SHARD_TOKENS = 32_768

STATISTICS_SHARE = 0.01
"""Of the bytes that rows would take, what shards leave until the end of a run where statistics alone are kept."""

WRITER_QUEUE_SHARE = 8
"""Captured rows that wait for the store take one part in so many of a stage's memory where that is limited, at most."""

_Value = TypeVar("_Value", bool, int, str)

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
    _require_means(prompts, (*kept, *of_statistics))
    num_layers = layers_run((*kept, *of_statistics), table.num_layers)
    if isinstance(config.stages, int) and config.stages > num_layers:
        raise ConfigError(f"stages = {config.stages}, but only {num_layers} layers are run.", f"Ask for at most {num_layers}.")
    if config.weights == "packed" and not any(row.method for row in table.rows if row.role == "layer"):
        raise ConfigError('weights = "packed", but no weights of this checkpoint are quantised.', "Leave weights out.")
    of_the_run = recorded or {}

    def decided(name: str, asked: _Value | Auto, automatic: _Value) -> _Value:
        return of_the_run.get(name, automatic) if asked == "auto" else asked

    options = RunOptions(
        prompts=prompts,
        layers=tuple(sorted({layer for layers in sites.values() for layer in layers})),
        sites=sites,
        parts=kept,
        compute_dtype=config.compute_dtype,
        store_dtype=config.store_dtype,
        batch_tokens=decided("batch_tokens", config.batch_tokens, MOST_ON_CPU),
        shard_tokens=decided(
            "shard_tokens", config.shard_tokens, _shard_tokens(config, parts, statistics, of_statistics, table.num_experts)
        ),
        attn_implementation=decided("attn_implementation", config.attn_implementation, shape.attn_implementation),
        compile=decided("compile", config.compile, cluster is not None and cluster.num_gpus > 0),
        threads_per_stage=decided("threads_per_stage", config.threads_per_stage, 1),
        output=config.output,
        compression=config.compression,
        stages=None if config.stages == "auto" else config.stages,
        replicas=1 if config.replicas == "auto" else config.replicas,
        gpus_per_stage=config.gpus_per_stage,
        device_map=config.device_map,
        max_memory=parse_max_memory(config.max_memory),
        weights=config.weights,
        offload=config.offload,
        offload_folder=config.offload_folder,
        node_labels=parse_labels(config.node_labels),
        in_flight_bytes=parse_bytes(config.in_flight, "in_flight"),
        transport=config.transport,
        placement_timeout_s=config.placement_timeout_s,
        stage_timeout_s=config.stage_timeout_s,
        statistics=statistics,
        keep=("both" if statistics else "rows") if config.keep == "auto" else config.keep,
        of_statistics=of_statistics,
    )
    if cluster is None:
        return options
    demand = Demand(table, shape, options, assumed or Assumptions())
    demand = demand.asking(writer_queue_bytes=_writer_queue_bytes(options, cluster))
    if config.batch_tokens == "auto" and "batch_tokens" not in of_the_run:
        demand = demand.asking(batch_tokens=_batch_tokens(config, demand, cluster, stats_at))
    demand = demand.asking(replicas=_replicas(config, demand, cluster))
    if config.threads_per_stage == "auto" and "threads_per_stage" not in of_the_run:
        demand = demand.asking(threads_per_stage=_threads(demand, cluster))
    return demand.options


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


def _writer_queue_bytes(options: RunOptions, cluster: Cluster) -> int:
    """Without GPUs, where `max_memory` is of all that a stage takes, no more than a part of that."""
    if cluster.num_gpus:
        return options.writer_queue_bytes
    allowed = (options.max_memory.usable_bytes(node.name, 0, WRITER_QUEUE_SHARE * options.writer_queue_bytes) for node in cluster.nodes)
    return min(allowed) // WRITER_QUEUE_SHARE


def _threads(demand: Demand, cluster: Cluster) -> int:
    """What the user allows, or the cores of a node for each of its stages, where there are no GPUs; the same for all stages, since the number decides the rows."""
    if cluster.num_gpus:
        return 1
    if demand.assumed.threads is not None:
        return demand.assumed.threads
    stages = Counter(stage.node for stage in plan_run(demand, cluster).stages)
    return max(1, min(((node.cpus or 1) // stages[node.name] for node in cluster.nodes if node.name in stages), default=1))
