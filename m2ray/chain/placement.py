"""Joining or starting a Ray cluster, and reserving room in it for the stages."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from m2ray.errors import ClusterError


@dataclass(frozen=True)
class ClusterSize:
    """What the living nodes have in all, whether free or not."""

    nodes: int
    cpus: float
    gpus: float


class Reservation:
    """Room for the stages of one replica: bundle `bundles[i]` of the placement group is stage i's."""

    def __init__(self, num_stages: int, num_cpus: float, num_gpus: float) -> None:
        self.num_cpus = num_cpus
        self.num_gpus = num_gpus
        self._bundles = [{"CPU": num_cpus, "GPU": num_gpus} if num_gpus else {"CPU": num_cpus}] * num_stages
        self.bundles: tuple[int, ...] = ()
        self.group: PlacementGroup = placement_group(self._bundles, strategy="PACK")

    def wait(self, timeout_s: float) -> None:
        """Wait until all bundles are there, and give them out node by node. Raises ClusterError after `timeout_s`."""
        if not self.group.wait(timeout_s):
            raise ClusterError(
                f"No room for {_wanted(self._bundles)} came free within {timeout_s:g} s: {_inventory()}.",
                "End what holds the rest, ask for fewer stages, or raise placement_timeout_s.",
            )
        nodes = self.nodes()
        self.bundles = tuple(sorted(nodes, key=lambda index: (nodes[index], index)))

    def nodes(self) -> dict[int, str]:
        """The node of each bundle."""
        nodes: dict[int, str] = placement_group_table(self.group)["bundles_to_node_id"]
        return nodes

    def is_whole(self) -> bool:
        """Whether every bundle is on a living node, as far as Ray knows."""
        return bool(placement_group_table(self.group)["state"] == "CREATED")

    def renew(self, timeout_s: float) -> None:
        """Give the room back and ask for it anew: a group whose node died may never be whole again. Ends its actors.

        Raises:
            ClusterError: there is no room within `timeout_s`.
        """
        self.release()
        self.group = placement_group(self._bundles, strategy="PACK")
        self.wait(timeout_s)

    def release(self) -> None:
        """Give the room back."""
        remove_placement_group(self.group)


@contextmanager
def cluster(connect_timeout_s: float) -> Iterator[ClusterSize]:
    """Join the cluster that RAY_ADDRESS names (in a job: the job's own), or start one on this machine and end it after.

    Raises:
        ClusterError: the named cluster does not answer, or refuses the token.
    """
    if os.environ.get("RAY_ADDRESS"):
        _join(connect_timeout_s)
        try:
            yield size()
        finally:
            ray.shutdown()
        return
    folder = Path(tempfile.mkdtemp(prefix="m2ray-"))
    try:
        ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), logging_level="ERROR", log_to_driver=True)
        yield size()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _join(timeout_s: float) -> None:
    address = os.environ["RAY_ADDRESS"]
    try:
        host, separator, port = address.rpartition(":")
        if separator and port.isdigit() and "/" not in host:
            # Ray itself goes on trying for minutes where nothing listens.
            socket.create_connection((host, int(port)), timeout_s).close()
        ray.init(logging_level="ERROR", log_to_driver=True)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"The Ray cluster at RAY_ADDRESS={address!r} cannot be joined: {error}.",
            "Check the address and the token, or unset RAY_ADDRESS to run on this machine.",
        ) from error


def size() -> ClusterSize:
    """The living nodes' CPUs and GPUs."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ClusterSize(len(alive), sum(node.get("CPU", 0.0) for node in alive), sum(node.get("GPU", 0.0) for node in alive))


@contextmanager
def reserve(num_stages: int, room: ClusterSize, timeout_s: float, num_replicas: int = 1) -> Iterator[list[Reservation]]:
    """Hold one bundle a stage and one placement group a replica: a GPU where the cluster has GPUs, else cores / stages of a CPU.

    Bundles are handed out node by node, so that neighbouring stages share a node as far as Ray's packing allows.

    Raises:
        ClusterError: there is no room, now or within `timeout_s`; says what is asked for and what there is.
    """
    num_gpus = 1.0 if room.gpus else 0.0
    total = num_stages * num_replicas
    # Ray counts resources in ten-thousandths; rounding down keeps the sum within what there is.
    num_cpus = min(1.0, int(room.cpus / total * 10_000) / 10_000)
    if num_gpus * total > room.gpus or not num_cpus:
        bundle = {"CPU": num_cpus, "GPU": num_gpus} if num_gpus else {"CPU": num_cpus}
        raise ClusterError(
            f"The cluster has no room for {_wanted([bundle] * total)}: {_inventory()}.", "Ask for fewer stages or add nodes."
        )
    held: list[Reservation] = []
    try:
        for _ in range(num_replicas):
            held.append(Reservation(num_stages, num_cpus, num_gpus))
            # One after the other, so that a replica is packed before the next one takes what is left.
            held[-1].wait(timeout_s)
        yield held
    finally:
        for reservation in held:
            reservation.release()


def _wanted(bundles: list[dict[str, float]]) -> str:
    return f"{len(bundles)} stages of {_words(bundles[0])}"


def _words(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _inventory() -> str:
    """What each living node has and what of it is free, in words."""
    # Ray has no public name for it; the state API that has one needs a dashboard.
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # noqa: SLF001
    lines: list[str] = []
    for node in ray.nodes():
        if node["Alive"]:
            parts: list[Any] = []
            for name in ("CPU", "GPU"):
                total = node["Resources"].get(name, 0.0)
                parts.append(f"{free.get(node['NodeID'], {}).get(name, 0.0):g} of {total:g} {name} free")
            lines.append(f"node {node['NodeManagerAddress']} has {', '.join(parts)}")
    return "; ".join(lines)
