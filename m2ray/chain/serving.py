"""`m2ray serve`: from a configuration to a chain that is loaded and stays, and its end."""

import re
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from m2ray.chain.http import required_token, start_http, stop_left_behind
from m2ray.chain.joining import cluster, require_cluster
from m2ray.chain.keeper import keeper_class
from m2ray.chain.loading import absolute
from m2ray.chain.probing import probe_hardware, require_versions
from m2ray.chain.progress import Progress
from m2ray.chain.report import start_lines
from m2ray.chain.served import NAMESPACE, Served
from m2ray.chain.stopping import Stop, stop_on_sigterm
from m2ray.chain.warm import asked, find, names
from m2ray.config import ExtractConfig
from m2ray.errors import ClusterError, ConfigError, M2rayError, raise_all
from m2ray.hub import located
from m2ray.model.attention import resolve_attn_implementation
from m2ray.model.checkpoint import Checkpoint, open_checkpoint
from m2ray.model.families import default_max_length, require_dtype, require_positions, steady_positions
from m2ray.model.proof import prove
from m2ray.model.site_proof import prove_sites
from m2ray.model.stage import DTYPES
from m2ray.model.tensor_table import up_to_layer
from m2ray.options import PromptOptions
from m2ray.planning.demand import Demand
from m2ray.planning.plan import plan_run
from m2ray.planning.resolve import resolve
from m2ray.planning.shape import ModelShape
from m2ray.sites import asked_sites, last_layer
from m2ray.storage import open_store

if TYPE_CHECKING:
    from collections.abc import Callable

_NOTHING_LEFT = "Nothing of it is left: the same command begins again."
_POLL_S = 1.0
_STATUS_S = 600.0
"""What a keeper's process may take to start and to answer beside its own work."""

_STOP_S = 120.0


def serve(
    config: ExtractConfig, name: str, progress: Progress, *, idle_timeout_s: float | None = None, http: tuple[str, int, str] | None = None
) -> None:
    """Load a chain that stays in the cluster of RAY_ADDRESS until it is stopped. Returns once it can be used.

    Args:
        config: how the chain lies and computes, and with which defaults prompts of requests are read; `layers` and `sites` say up to which
            layer it is loaded, and what memory is planned for. Neither prompts nor an output are needed.
        name: the chain's own, in the cluster.
        idle_timeout_s: how long it stays without a job or a request; None for ever.
        http: host, port and route at which requests are answered too; None for nowhere.

    Raises:
        M2rayError: what is wrong with configuration or model, before the cluster is joined; the name is taken, the chain finds no room, or
            it fails to load. Nothing of it is left then.
    """
    config = absolute(located(config))
    with stop_on_sigterm() as stop, ExitStack() as stack:
        require_name(name)
        require_cluster()
        if http:
            required_token()
        with stop.at_once(_NOTHING_LEFT):
            progress.waiting("check", "options and model")
            checkpoint, demand, config = _look(config)
            stack.enter_context(cluster(config.placement_timeout_s, progress.say))
            if name in names():
                raise _taken(name)
            for left in stop_left_behind():
                progress.say(left_behind(left))
            hardware = probe_hardware(demand.options.node_labels, demand.options.watched_folder)
            require_versions(hardware.cluster)
            options = resolve(config, demand.options.prompts, demand.table, demand.shape, hardware.cluster)
            plan = plan_run(replace(demand, options=options), hardware.cluster)
            plan.require_fit()
        url = f"http://{http[0]}:{http[1]}{http[2].rstrip('/')}/v1/activations" if http else ""
        versions = checkpoint.versions(checkpoint.weight_files)
        served = Served(name, open_store(config.model).url, checkpoint.digests, versions, plan, hardware, idle_timeout_s, url)
        try:
            keeper = keeper_class().options(name=name, namespace=NAMESPACE, lifetime="detached").remote(served)
        except ValueError as error:  # somebody else's came between
            raise _taken(name) from error
        try:
            if http:  # what is wrong there is said before anything is loaded
                with stop.at_once(_NOTHING_LEFT):
                    start_http(name, *http)
            _load(keeper, stop, progress)
        except BaseException:
            _end(keeper)
            raise
        progress.say(f"The chain {name} is loaded. m2ray extract --chain {name} and m2ray.connect({name!r}) use it.")
        if url:
            progress.say(f"Requests are answered at {url}")


def stop(name: str) -> str:
    """End a chain, also where a job has it: that fails then, and its finished shards are kept. Returns what was done, in words.

    Raises:
        ClusterError: there is none.
    """
    if name in stop_left_behind():
        return left_behind(name)
    _end(find(name).keeper)
    return f"The chain {name} has ended."


def left_behind(name: str) -> str:
    """What is said of a chain whose keeper was killed, once nothing answers for it any longer."""
    return f"The chain {name} was gone, its keeper killed: its requests are not answered over HTTP any longer."


def require_name(name: str) -> None:
    """Raise ConfigError for what is no name of a chain."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(f"name = {name!r}: up to 64 letters, digits, '.', '_' and '-'.", "Give another one.")


def _taken(name: str) -> ClusterError:
    return ClusterError(f"There is a chain {name!r} in this cluster.", f"m2ray serve --stop {name} ends it; or give another name.")


def _look(config: ExtractConfig) -> tuple[Checkpoint, Demand, ExtractConfig]:
    """The model and what the chain asks of a cluster; with the final norm, where it has the model's last layer. Raises all problems at once."""
    opened = open_checkpoint(config.model)
    whole, decoder = opened.whole_config, opened.config
    steps: list[Callable[[], Any]] = [
        lambda: prove(whole),
        lambda: require_positions(decoder, config.max_length),
        lambda: require_dtype(decoder, config.compute_dtype),
        lambda: asked_sites(config.sites, config.layers, decoder.num_hidden_layers),
    ]
    problems: list[M2rayError] = []
    for step in steps:
        try:
            step()
        except M2rayError as problem:
            problems.append(problem)
    if config.replicas not in ("auto", 1):
        problems.append(
            ConfigError(f"replicas = {config.replicas}: a chain that is served is one.", "Serve several, each by a name of its own.")
        )
    raise_all(problems)
    attention = resolve_attn_implementation(whole, config.attn_implementation, DTYPES[config.compute_dtype])
    wanted = asked_sites(config.sites, config.layers, decoder.num_hidden_layers)
    last = last_layer(wanted, decoder.num_hidden_layers)
    has_end = last == decoder.num_hidden_layers - 1
    checkpoint, table = up_to_layer(opened, last, with_final_norm=has_end, in_float8=config.compute_dtype == "float8")
    if has_end and "final_norm" in table.layers_of and "final_norm" not in wanted:
        config = config.model_copy(update={"sites": f"{config.sites}, final_norm"})
        wanted = {**wanted, "final_norm": ()}
    prove_sites(whole, wanted)
    config = config.model_copy(update={"replicas": 1, "pack": None})
    prompts = PromptOptions.of(config, default_max_length(decoder), steady_positions=steady_positions(decoder))
    shape = ModelShape.of(checkpoint.config, attention)
    return checkpoint, Demand(table, shape, resolve(config, prompts, table, shape)), config


def _load(keeper: Any, stop: Stop, progress: Progress) -> None:
    """Wait until a keeper has loaded its chain. Raises what it raises, and StageError if it was asked to stop."""
    loading = keeper.load.remote()
    while not ray.wait([loading], timeout=_POLL_S)[0]:
        if stop.asked.is_set():
            raise stop.error(_NOTHING_LEFT)
        progress.loading(asked(keeper.status.remote(), _STATUS_S).stages)
    served: Served = asked(loading)
    for line in start_lines(served.plan):
        progress.say(line)


def _end(keeper: Any) -> None:
    """End a keeper and all that is its own."""
    try:
        ray.wait([keeper.stop.remote()], timeout=_STOP_S)
    finally:
        ray.kill(keeper)
