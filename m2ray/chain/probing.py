"""Looking at every node of a Ray cluster before anything is reserved in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2ray.chain.placement import cluster
from m2ray.errors import ClusterError, raise_all
from m2ray.planning.hardware import Cluster, Node
from m2ray.planning.node_facts import NodeFacts, look_at_node
from m2ray.planning.probe import probe_node

LOOK_TIMEOUT_S = 300.0
"""Imports of torch on a cold disk, and the reading of half a gigabyte."""

_Seen = TypeVar("_Seen")


@dataclass(frozen=True)
class Looks:
    """What each node answered by name, and for the others why not."""

    seen: Mapping[str, Any]
    silent: Mapping[str, str]


def probe_cluster(connect_timeout_s: float) -> Cluster:
    """Every living node of the cluster that RAY_ADDRESS names.

    Raises:
        ClusterError: it cannot be joined, or nodes do not answer.
    """
    with cluster(connect_timeout_s):
        looks = _on_every_node(probe_node, {}, LOOK_TIMEOUT_S)
    raise_all([ClusterError(f"Node {name} could not be looked at: {why}") for name, why in looks.silent.items()])
    return Cluster(tuple(cast("Node", node) for node in looks.seen.values()))


def look_at_cluster(
    connect_timeout_s: float, model: str | None, output: str | None, marker: str | None
) -> tuple[list[NodeFacts], dict[str, str]]:
    """(the facts of each node that answered, why the others did not) of the cluster that RAY_ADDRESS names.

    Raises:
        ClusterError: it cannot be joined.
    """
    with cluster(connect_timeout_s):
        looks = _on_every_node(look_at_node, {"model": model, "output": output, "marker": marker}, LOOK_TIMEOUT_S)
    return list(looks.seen.values()), dict(looks.silent)


def _on_every_node(look: Callable[..., _Seen], arguments: Mapping[str, Any], timeout_s: float) -> Looks:
    """Call `look(name=..., **arguments)` on each living node at once, without reserving anything."""
    task = ray.remote(num_cpus=0, num_gpus=0, max_retries=0)(look)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            name = (
                node["NodeManagerAddress"]
                if node["NodeManagerAddress"] not in asked
                else f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}"
            )
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[name] = task.options(scheduling_strategy=there).remote(name=name, **arguments)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    seen: dict[str, Any] = {}
    silent = {}
    for name, ref in asked.items():
        try:
            seen[name] = ray.get(ref, timeout=0.1)
        except GetTimeoutError:
            silent[name] = f"no answer within {timeout_s:g} s"
        except RayError as error:
            silent[name] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return Looks(seen, silent)
