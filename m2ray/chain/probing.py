"""Looking at every node of a Ray cluster before anything is reserved in it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2ray import __version__
from m2ray.chain.joining import cluster
from m2ray.chain.machine import probe_node
from m2ray.errors import ClusterError, raise_all
from m2ray.planning.hardware import Cluster
from m2ray.provenance import ROW_PACKAGES, differences, versions

if TYPE_CHECKING:
    from m2ray.chain.warm import Standing

LOOK_TIMEOUT_S = 300.0
"""Imports of torch on a cold disk, and the reading of half a gigabyte."""

_NOT_THERE = "is not installed there"

_Seen = TypeVar("_Seen")


@dataclass(frozen=True)
class Hardware:
    """A cluster: of what each node has, the part that Ray may give out.

    Attributes:
        cluster: the nodes, and of their GPUs as many as Ray counts there.
        node_ids: Ray's id of each node, by name.
        cpus: Ray's count of each node's CPUs, by name.
        is_here: whether it is this machine alone, and the one stage runs in this process without Ray.
        chain: one that stands there already, which is to do the job; else a job starts its own.
    """

    cluster: Cluster
    node_ids: Mapping[str, str]
    cpus: Mapping[str, float]
    chain: "Standing | None" = None
    is_here: bool = False


def probe_cluster(connect_timeout_s: float, labels: Mapping[str, str] | None = None, folder: str = "") -> Cluster:
    """Every living node of the cluster that RAY_ADDRESS names, with what the disk of `folder` has left.

    Raises:
        ClusterError: it cannot be joined, or nodes do not answer.
    """
    with cluster(connect_timeout_s):
        return probe_hardware(labels or {}, folder).cluster


def probe_hardware(labels: Mapping[str, str], folder: str = "") -> Hardware:
    """Every living node of the cluster that this process has joined that has all these labels, and anything to offer.

    Args:
        labels: Ray's labels and their values.
        folder: on each node, whose disk's free bytes are asked for; "" for none.

    Raises:
        ClusterError: a node does not answer, its GPUs are not those that Ray counts, or no node has the labels.
    """
    labelled = {name: node for name, node in living_nodes().items() if labels.items() <= node["Labels"].items()}
    if not labelled:
        wanted = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise ClusterError(f"No living node has the labels {wanted}.", "`ray list nodes --detail` shows each node's labels.")
    # A head node is often kept free of work: it offers nothing.
    nodes = {name: node for name, node in labelled.items() if node["Resources"].get("CPU") or node["Resources"].get("GPU")}
    if not nodes:
        raise ClusterError(f"None of the nodes {', '.join(labelled)} offers CPUs or GPUs.", "Start Ray with --num-cpus above 0 somewhere.")
    here = ray.get_runtime_context().get_node_id()
    others = {name: node for name, node in nodes.items() if node["NodeID"] != here}
    found, silent = on_nodes(others, probe_node, {"folder": folder}, LOOK_TIMEOUT_S)
    # This process looks at its own node: another one would take seconds to import torch for that.
    found = {name: found[name] if name in others else probe_node(name, folder) for name in nodes if name not in silent}
    problems = [ClusterError(f"Node {name} could not be looked at: {why}.", _remedy(why)) for name, why in silent.items()]
    probed = []
    for name, seen in found.items():
        num_gpus = int(nodes[name]["Resources"].get("GPU", 0))
        if num_gpus > len(seen.gpus):
            problems.append(
                ClusterError(
                    f"Ray counts {num_gpus} GPUs on node {name}, its driver shows {len(seen.gpus)}.",
                    "Start Ray there without --num-gpus, or mend the driver; `m2ray doctor` tells more.",
                )
            )
        probed.append(replace(seen, gpus=seen.gpus[:num_gpus]))
    raise_all(problems)
    return Hardware(
        Cluster(tuple(probed)),
        {name: node["NodeID"] for name, node in nodes.items()},
        {name: node["Resources"].get("CPU", 0.0) for name, node in nodes.items()},
    )


def require_versions(cluster: Cluster) -> None:
    """Refuse nodes whose versions of m2ray or of what decides the rows are not the driver's: their rows could be others.

    Raises:
        ClusterError: naming every such node and package, with both versions.
    """
    here = {"m2ray": __version__, **versions()}
    lines = [
        f"node {node.name}: {package} {there}, {wanted} here"
        for node in cluster.nodes
        for package, (wanted, there) in differences(here, node.versions, ("m2ray", *ROW_PACKAGES)).items()
    ]
    if lines:
        raise ClusterError(
            "Nodes have other versions than this driver:",
            "Install the same everywhere (`m2ray doctor` shows all nodes), or use other nodes (node_labels).",
            lines,
        )


def living_nodes() -> dict[str, Any]:
    """Ray's record of each living node, by its address; where several share one, with the begin of their ids."""
    named: dict[str, Any] = {}
    for node in ray.nodes():
        if node["Alive"]:
            address = node["NodeManagerAddress"]
            named[address if address not in named else f"{address}/{node['NodeID'][:6]}"] = node
    return named


def on_nodes(
    nodes: Mapping[str, Any], look: Callable[..., _Seen], arguments: Mapping[str, Any], timeout_s: float
) -> tuple[dict[str, _Seen], dict[str, str]]:
    """Call `look(name=..., **arguments)` on each of the nodes at once, without reserving anything.

    Returns:
        What each node answered, by name, and for the others why not.
    """
    task = ray.remote(num_cpus=0, num_gpus=0, max_retries=0)(look)
    asked = {}
    for name, node in nodes.items():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[name] = task.options(scheduling_strategy=there).remote(name=name, **arguments)
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    seen: dict[str, _Seen] = {}
    silent: dict[str, str] = {}
    for name, ref in asked.items():
        try:
            seen[name] = ray.get(ref, timeout=0.1)
        except GetTimeoutError:
            silent[name] = f"no answer within {timeout_s:g} s"
        except RayError as error:
            silent[name] = _why(error)
    return seen, silent


def _why(error: RayError) -> str:
    """What ended a call, in a line: a trace has it last, what Ray itself says of a process that it has lost or ended has it first."""
    absent = re.search(r"No module named '(\w+)", str(error))
    if absent:
        return f"{absent[1]} {_NOT_THERE}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[-1] if isinstance(error, RayTaskError) else lines[0]).rstrip(".")


def _remedy(why: str) -> str:
    others = "use other nodes (node_labels)"
    if why.endswith(_NOT_THERE):
        return (
            f"Install the same m2ray on every node (here it is {__version__}), let Ray bring it "
            f'(cluster/README.md, "Without an image"), or {others}.'
        )
    return f"`m2ray doctor` tells more of it; or {others}."
