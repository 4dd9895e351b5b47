"""Reserving room in a Ray cluster for the stages of a plan."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from m2ray.chain.machine import probe_node
from m2ray.chain.probing import Hardware
from m2ray.errors import ClusterError
from m2ray.planning.devices import Device
from m2ray.planning.hardware import Gpu
from m2ray.planning.plan import Plan, plan_run

_START_S = 60.0
"""What a worker process may take to start on a busy node."""


@dataclass(frozen=True)
class Room:
    """What one bundle asks for: a node by name and by Ray's id, GPUs, and CPUs. A room without a stage keeps GPUs from being used."""

    node: str
    node_id: str
    num_gpus: float
    num_cpus: float
    is_stage: bool = True

    @property
    def resources(self) -> dict[str, float]:
        return {name: amount for name, amount in (("CPU", self.num_cpus), ("GPU", self.num_gpus)) if amount}


@dataclass(frozen=True)
class Bundle:
    """Room that was given: its number in the placement group, its node, and the driver's view of its GPUs."""

    number: int
    room: Room
    gpus: tuple[Gpu, ...]


class Reservation:
    """Room for the stages of one replica: stage i's is bundle `places[i][1]` of the placement group `places[i][0]`.

    Room that takes the place of a lost one is on nodes with `node_labels`, as the first was.
    """

    def __init__(self, rooms: Sequence[Room], node_labels: Mapping[str, str]) -> None:
        self.rooms = list(rooms)
        self._node_labels = dict(node_labels)
        group = placement_group(
            [room.resources for room in rooms],
            strategy="PACK",
            bundle_label_selector=[{"ray.io/node-id": room.node_id} for room in rooms],
        )
        self._groups: list[PlacementGroup] = [group]
        self.places: list[tuple[PlacementGroup, int]] = [(group, number) for number in range(len(rooms))]

    def wait(self, timeout_s: float) -> None:
        """Wait until all bundles are there. Raises ClusterError after `timeout_s`."""
        _wait(self._groups[-1], self.rooms, timeout_s)

    def look(self, timeout_s: float) -> list[Bundle]:
        """What was given, in the order of the rooms: Ray chooses the GPUs, and only now is known which. Raises ClusterError."""
        asked = [
            _gpus_here.options(num_gpus=room.num_gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(*place)).remote()
            for room, place in zip(self.rooms, self.places, strict=True)
            if room.num_gpus
        ]
        try:
            answers = iter(ray.get(asked, timeout=timeout_s + _START_S))
        except ray.exceptions.RayError as error:
            raise ClusterError(f"The GPUs that Ray gave could not be looked at: {error}.", "`m2ray doctor` tells more.") from error
        return [Bundle(number, room, next(answers) if room.num_gpus else ()) for number, room in enumerate(self.rooms)]

    def give_out(self, bundles: Sequence[Bundle]) -> None:
        """Say which bundle is which stage's."""
        self.rooms = [bundle.room for bundle in bundles]
        self.places = [self.places[bundle.number] for bundle in bundles]

    def gone(self, stages: Sequence[int]) -> list[int]:
        """Those of the stages whose node is not alive any more."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return [stage for stage in stages if self.rooms[stage].node_id not in alive]

    def replace(self, stages: Sequence[int], timeout_s: float) -> None:
        """Take room on any node with the labels for some stages, beside that of the others.

        A group is bound to its nodes, and one that was repaired in part can stay pending for ever (ray-project/ray#65147).

        Raises:
            ClusterError: there is no room within `timeout_s`.
        """
        rooms = [self.rooms[stage] for stage in stages]
        group = placement_group(
            [room.resources for room in rooms], strategy="PACK", bundle_label_selector=[self._node_labels for _ in rooms]
        )
        self._groups.append(group)
        _wait(group, rooms, timeout_s)
        nodes = placement_group_table(group)["bundles_to_node_id"]
        for number, stage in enumerate(stages):
            self.places[stage] = (group, number)
            self.rooms[stage] = replace(self.rooms[stage], node_id=nodes[number])

    def renew(self, timeout_s: float) -> None:
        """Give all the room back and ask for as much on any nodes with the labels. Ends its actors. Raises ClusterError as `replace` does."""
        self.release()
        self._groups = []
        self.replace(range(len(self.rooms)), timeout_s)

    def release(self) -> None:
        """Give the room back."""
        for group in self._groups:
            remove_placement_group(group)


def _wait(group: PlacementGroup, rooms: Sequence[Room], timeout_s: float) -> None:
    if not group.wait(timeout_s):
        raise ClusterError(
            f"No room for {_wanted(rooms)} came free within {timeout_s:g} s: {_inventory()}.",
            "End what holds the rest, ask for fewer stages, or raise placement_timeout_s.",
        )


@ray.remote(num_cpus=0, max_retries=0)
def _gpus_here() -> tuple[Gpu, ...]:
    """This bundle's GPUs, numbered as by the node's driver where that is known."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [name.strip() for name in visible.split(",")]
    gpus = probe_node(visible=visible).gpus
    return tuple(replace(gpu, index=int(name)) if name.isdecimal() else gpu for gpu, name in zip(gpus, numbers, strict=False))


@contextmanager
def reserve(plan: Plan, hardware: Hardware, timeout_s: float) -> Iterator[tuple[Plan, list[Reservation]]]:
    """Hold the room that a plan asks for, one placement group a replica, and lay the plan out over the GPUs that were given.

    A bundle goes to its stage's node. Which of a node's GPUs it gets is Ray's choice: the layers are dealt out again over these. Where
    `max_memory` or `device_map` leave GPUs of a node out, all of the node's GPUs are held, so that the right ones are among them.

    Yields:
        The plan over the GPUs at hand, and a reservation for each replica, bundles in the order of `plan.stages`.

    Raises:
        ClusterError: there is no room within `timeout_s`, or not for this plan on what was given; says what is missing where.
    """
    held: list[Reservation] = []
    try:
        given: list[list[Bundle]] = []
        for rooms in _rooms(plan, hardware):
            held.append(Reservation(rooms, plan.demand.options.node_labels))
            # One after the other: two groups that wait for the same GPUs could each hold a half of them.
            held[-1].wait(timeout_s)
            given.append(held[-1].look(timeout_s))
        chains = [_stages_of(plan, bundles) for bundles in given]
        devices = [[device for bundle in chain for device in _devices(plan, bundle)] for chain in chains]
        final = plan_run(plan.demand, plan.cluster, plan.prompts, devices)
        final.require_fit(has_begun=True)
        for replica, (reservation, chain) in enumerate(zip(held, chains, strict=True)):
            stages = [stage.stage for stage in final.stages if stage.replica == replica]
            reservation.give_out([chain[stage] for stage in stages])
        yield final, held
    finally:
        for reservation in held:
            reservation.release()


def _rooms(plan: Plan, hardware: Hardware) -> list[list[Room]]:
    """The bundles of each replica: one a stage, and one for each GPU that is to be left out of a node that is used."""
    size = plan.demand.options.gpus_per_stage
    stages_on: Counter[str] = Counter(name for chain in plan.chains for name in _stage_nodes(chain, size))
    rooms: list[list[Room]] = []
    spared: set[str] = set()
    for chain in plan.chains:
        of_chain = []
        for name in _stage_nodes(chain, size):
            share = hardware.cpus[name] / stages_on[name]
            # Ray counts in ten-thousandths; rounding down keeps the sum within what there is.
            num_cpus = min(1.0, int(share * 10_000) / 10_000)
            num_gpus = size if chain[0].gpu else 0
            if not num_cpus and not num_gpus:
                raise ClusterError(f"Node {name} has {hardware.cpus[name]:g} CPUs for {stages_on[name]} stages.", "Ask for fewer stages.")
            of_chain.append(Room(name, hardware.node_ids[name], num_gpus, num_cpus))
        for name in dict.fromkeys(room.node for room in of_chain):
            if chain[0].gpu and name not in spared:
                spared.add(name)
                of_chain += [Room(name, hardware.node_ids[name], 1, 0.0, is_stage=False)] * _num_left_out(plan, name)
        rooms.append(of_chain)
    return rooms


def _stage_nodes(chain: Sequence[Device], gpus_per_stage: int) -> list[str]:
    """The node of each stage of a chain."""
    return [device.node.name for device in chain[:: gpus_per_stage if chain[0].gpu else 1]]


def _num_left_out(plan: Plan, node_name: str) -> int:
    node = next(node for node in plan.cluster.nodes if node.name == node_name)
    return sum(not _may_use(plan, node_name, gpu) for gpu in node.gpus)


def _may_use(plan: Plan, node_name: str, gpu: Gpu) -> bool:
    options = plan.demand.options
    if options.device_map.startswith("cuda:"):
        return options.device_map == f"cuda:{gpu.index}"
    return options.max_memory.usable_bytes(node_name, gpu.index, gpu.free_bytes) > 0


def _stages_of(plan: Plan, bundles: Sequence[Bundle]) -> list[Bundle]:
    """The bundles that stages get: node by node in the plan's order, GPU by GPU; those of GPUs to be left out are not among them."""
    order = {name: place for place, name in enumerate(dict.fromkeys(bundle.room.node for bundle in bundles))}
    wanted = Counter(bundle.room.node for bundle in bundles if bundle.room.is_stage)
    chosen: list[Bundle] = []
    for bundle in sorted(bundles, key=lambda bundle: (order[bundle.room.node], [gpu.index for gpu in bundle.gpus], bundle.number)):
        if wanted[bundle.room.node] and all(_may_use(plan, bundle.room.node, gpu) for gpu in bundle.gpus):
            wanted[bundle.room.node] -= 1
            chosen.append(bundle)
    if missing := +wanted:
        raise ClusterError(
            f"Ray gave GPUs that max_memory or device_map leave out: {_counts(missing)} too few.",
            "Hide them from Ray: set CUDA_VISIBLE_DEVICES where the node's Ray is started.",
        )
    return chosen


def _devices(plan: Plan, bundle: Bundle) -> list[Device]:
    node = next(node for node in plan.cluster.nodes if node.name == bundle.room.node)
    if not bundle.gpus:
        return [next(device for chain in plan.chains for device in chain if device.node.name == node.name)]
    max_memory = plan.demand.options.max_memory
    return [Device(node, gpu, max_memory.usable_bytes(node.name, gpu.index, gpu.free_bytes)) for gpu in bundle.gpus]


def _wanted(rooms: Sequence[Room]) -> str:
    """The bundles in words, node by node."""
    counted = Counter((room.node, tuple(room.resources.items())) for room in rooms)
    return ", ".join(f"{count} x ({_words(dict(resources))}) on {node}" for (node, resources), count in counted.items())


def _counts(nodes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} on {name}" for name, count in nodes.items())


def _words(resources: Mapping[str, float]) -> str:
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
