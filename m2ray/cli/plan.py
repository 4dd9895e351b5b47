"""`m2ray plan`: what a run needs and whether it fits, from config.json and the index alone."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import Field

from m2ray.chain.machine import allowed_threads, disk_free_bytes, probe_node
from m2ray.cli import Command
from m2ray.cli.extract import metavar
from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError
from m2ray.hub import located
from m2ray.model.interpreter import quick_imports, without_collector
from m2ray.option_types import NonEmpty, Number, Positive
from m2ray.options import PromptOptions, RunOptions
from m2ray.planning.demand import Assumptions, Demand
from m2ray.planning.hardware import Cluster, parse_gpus
from m2ray.planning.plan import Plan, plan_run
from m2ray.planning.profile import Profile
from m2ray.planning.resolve import resolve
from m2ray.storage import looking

DOES_NOT_FIT = 3
"""The exit code: 0 is for a plan that fits, 1 for an error, 2 for a wrong flag."""

_ALIASES = {"tokens_per_s": "--rate", "price_per_gb_month": "--price"}
_Amount = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]


class PlanConfig(ExtractConfig):
    """The options of an extraction, so that its TOML file can be planned; prompts and output may be left out."""

    prompts: NonEmpty | None = Field(None, description="Prompt file, folder or glob; adds the output's size.")  # type: ignore[assignment]
    output: NonEmpty | None = Field(None, description="Run folder; only the free space of its disk is looked at.")  # type: ignore[assignment]
    gpus: NonEmpty | None = Field(
        None, description='"8xA100-80GB", "2 nodes of 8xH200"; default: the cluster of RAY_ADDRESS, else this machine.'
    )
    longest_tokens: Positive | None = Field(None, description="Tokens of the longest prompt; default: as prompts show, else batch_tokens.")
    profile: NonEmpty | None = Field(None, description="What `m2ray bench` measured; default: estimates from the GPUs' names.")
    tokens_per_s: _Amount | None = Field(None, description="Assumed rate; default: estimated from the GPUs.")
    store_gb_per_s: _Amount | None = Field(None, description="What the store takes, in 10^9 bytes a second.")
    price_per_gb_month: _Amount | None = Field(None, description="Of the store, for 10^9 bytes and a month.")
    price_gpu_hour: _Amount | None = Field(None, description="Of a GPU for an hour; adds what the run costs, with prompts.")


def _plan_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """[CONFIG.toml], and a flag an option."""
    for name, field in reversed(PlanConfig.model_fields.items()):
        names = [f"--{name.replace('_', '-')}", *([_ALIASES[name]] if name in _ALIASES else []), name]
        function = click.option(*names, help=field.description, metavar=metavar(field))(function)
    return click.argument("toml_path", metavar="[CONFIG.toml]", required=False, type=click.Path(path_type=Path))(function)


@click.command(cls=Command)
@_plan_options
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON; docs/planning.md lists the keys.")
@click.pass_context
def command(ctx: click.Context, /, toml_path: Path | None, as_json: bool, **flags: Any) -> None:
    """Say whether a model fits on a cluster, how it would lie there, and what the run would write.

    Needs the model's config.json and, if it is there, its index; no weights, no GPU, no Ray. MODEL may be a config.json. The options
    are those of `m2ray extract`, from CONFIG.toml or flags, and some more. Exit code 0 if it fits, 3 if not.
    """
    config = PlanConfig.from_sources(toml_path, {name: value for name, value in flags.items() if value is not None})
    with looking():
        plan, checkpoint = make_plan(config, quick_imports)
    if as_json:
        from m2ray.planning.report import to_json

        click.echo(json.dumps({**to_json(plan), "checkpoint": checkpoint}, indent=2))
    else:
        _print(plan, checkpoint, chose_batch_tokens=config.batch_tokens == "auto")
    ctx.exit(0 if plan.fits else DOES_NOT_FIT)


def make_plan(config: PlanConfig, importing: Callable[[], AbstractContextManager[None]] = without_collector) -> tuple[Plan, dict[str, Any]]:
    """The plan that the options ask for, and the JSON key `checkpoint`: where the bytes on disk come from.

    Args:
        importing: around the imports of torch and transformers; a program that ends with its plan may have them quicker.

    Raises:
        M2rayError: the options, the model, the prompts or the cluster are no good. Not fitting is no error.
    """
    config = located(config)
    # What is wrong with the options is said before the seconds that torch and transformers take to import.
    cluster = parse_gpus(config.gpus) if config.gpus else None
    profile = _profile(config.profile) if config.profile else None
    with importing():
        from m2ray.cli.plan_inputs import read_model, survey_prompts
        from m2ray.model.families import default_max_length, require_dtype, require_positions, steady_positions
        from m2ray.prompts import batching, estimated_batching

    model = read_model(config.model, config.attn_implementation, config.compute_dtype)
    require_positions(model.config, config.max_length)
    require_positions(model.config, config.pack, "pack")
    require_dtype(model.config, config.compute_dtype)
    assumed = Assumptions(
        longest_tokens=config.longest_tokens,
        disk_free_bytes=disk_free_bytes(config.output),
        tokens_per_s=config.tokens_per_s,
        store_bytes_per_s=config.store_gb_per_s and config.store_gb_per_s * 1e9,
        price_per_gb_month=config.price_per_gb_month,
        price_gpu_hour=config.price_gpu_hour,
        profile=profile,
        threads=allowed_threads(),
    )
    prompts = PromptOptions.of(config, default_max_length(model.config), steady_positions=steady_positions(model.config))
    shards, stats_at = None, None
    options = resolve(config, prompts, model.table, model.shape)
    if config.prompts:
        prompts, shards = survey_prompts(config.model, model, prompts, options.shard_tokens)
        stats_at = partial(estimated_batching, shards)
        assumed = replace(assumed, longest_tokens=config.longest_tokens or shards.longest_tokens)
    cluster = cluster or _found_cluster(options)
    options = resolve(config, prompts, model.table, model.shape, cluster, assumed, stats_at=stats_at)
    demand = Demand(model.table, model.shape, options, assumed)
    stats = batching(shards, options.batch_tokens) if shards else None
    return plan_run(demand, cluster, stats), {"source": model.source, "index_bytes": model.index_bytes}


def _profile(path: str) -> Profile:
    try:
        return Profile.from_json(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"profile = {path!r} cannot be read: {error}.", "`m2ray bench MODEL` writes one.") from error


def _found_cluster(options: RunOptions) -> Cluster:
    """Every node of the cluster that RAY_ADDRESS names, or this machine."""
    if not os.environ.get("RAY_ADDRESS"):
        return Cluster((probe_node(folder=options.watched_folder, visible=os.environ.get("CUDA_VISIBLE_DEVICES")),))
    from m2ray.chain.probing import probe_cluster

    return probe_cluster(options.placement_timeout_s, options.node_labels, options.watched_folder)


def _print(plan: Plan, checkpoint: dict[str, Any], *, chose_batch_tokens: bool) -> None:
    from m2ray.cli.output import console_of_tables
    from m2ray.planning.layout import render

    console = console_of_tables()
    console.print(render(plan, console.width, chose_batch_tokens=chose_batch_tokens))
    index_bytes, counted_bytes = checkpoint["index_bytes"], plan.weights.disk_bytes
    if checkpoint["source"] == "config":
        console.print("The files are not at hand: bytes on disk are as config.json tells.")
        if any(plan.weights.layouts):
            console.print("It does not tell the dtype of scales: they are counted as such a layout usually has them.")
    if index_bytes is not None and index_bytes != counted_bytes:
        console.print(f"The index says {index_bytes:,} bytes on disk, {counted_bytes:,} were counted.")
