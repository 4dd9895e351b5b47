"""Which GPUs the chains take, in order: neighbours on one node, as few crossings between nodes as can be."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from m2ray.batches import LayerSpan, Residency
from m2ray.errors import ClusterError, ConfigError
from m2ray.options import RunOptions
from m2ray.planning.hardware import Cluster, Gpu, Node
from m2ray.planning.memory import Memory

HOST_SHARE = 0.9
"""Of a node's free memory, what layers may fill: others live there too."""


@dataclass(frozen=True)
class Device:
    """What one span lives on: a GPU, or a share of a node's cores where there is none.

    `usable_bytes` is what m2ray may take there; on a CPU a stage's share of its node's memory, None where that is not known.
    """

    node: Node
    gpu: Gpu | None
    usable_bytes: int | None


@dataclass(frozen=True)
class DevicePlan:
    """A device of a chain and what it holds.

    Attributes:
        replica, stage, place: the chain, the stage, and which of the chain's devices it is.
        span: None where a GPU gets no layer, and on all GPUs where the model does not fit.
        residency: where those of its layers live that are not ready on it.
        wave_tokens: padded tokens that it takes through one of those before the next; 0 for a micro-batch's.
        memory: of a GPU, once the plan is made.
    """

    replica: int
    stage: int
    place: int
    device: Device
    span: LayerSpan | None
    residency: Mapping[int, Residency] = field(default_factory=dict)
    wave_tokens: int = 0
    memory: Memory = field(default_factory=lambda: Memory({}, {}))

    @property
    def held(self) -> LayerSpan:
        """The span of a device that has one."""
        assert self.span is not None
        return self.span


def chain_devices(cluster: Cluster, num_layers: int, options: RunOptions) -> tuple[tuple[Device, ...], ...]:
    """The devices of each chain, in order, `gpus_per_stage` a stage; no more than the `num_layers` layers that are run.

    A chain takes the smallest node that holds it whole; where none does, the nodes with the most room, one after the other.
    Without any GPU a stage is a device of its own, spread over the nodes.

    Raises:
        ConfigError: "cuda:N" beside several stages or chains, more stages than layers, or `max_memory` naming what is not there.
        ClusterError: there are too few GPUs; says what is missing.
    """
    options.max_memory.require_known({node.name: len(node.gpus) for node in cluster.nodes})
    if not cluster.num_gpus:
        return _cpu_chains(cluster, num_layers, options)
    if options.device_map.startswith("cuda:"):
        return (_single_gpu(cluster, options),)
    most = num_layers // options.gpus_per_stage
    if most == 0 or (options.stages or 1) > most:
        wanted = f"{options.stages or 1} stages of {_gpus_in_words(options.gpus_per_stage)}"
        raise ConfigError(f"{wanted} cannot share {num_layers} layers.", "Each GPU holds at least one layer.")
    groups = [_groups(node, options) for node in cluster.nodes]
    num_groups = sum(len(of_node) for of_node in groups)
    num_stages = options.stages or min(max(1, num_groups // options.replicas), most)
    missing = num_stages * options.replicas - num_groups
    if missing > 0:
        found = ", ".join(f"{len(of_node)} on {node.name}" for node, of_node in zip(cluster.nodes, groups, strict=True))
        each = f"{_gpus_in_words(options.gpus_per_stage)} each{', of one node' if options.gpus_per_stage > 1 else ''}"
        fewer = f"Set stages = {num_groups // options.replicas}" if num_groups >= options.replicas else "Ask for fewer"
        raise ClusterError(
            f"{options.replicas} x {num_stages} stages need {each}. There is room for {found}: {missing} too few.",
            f"{fewer}, or add nodes.",
        )
    return tuple(_take(groups, num_stages) for _ in range(options.replicas))


def _gpus_in_words(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"


def _groups(node: Node, options: RunOptions) -> list[tuple[Device, ...]]:
    """A node's usable GPUs, `gpus_per_stage` at a time; what is left over stays free."""
    devices = [Device(node, gpu, options.max_memory.usable_bytes(node.name, gpu.index, gpu.free_bytes)) for gpu in node.gpus]
    usable, size = [device for device in devices if device.usable_bytes], options.gpus_per_stage
    return [tuple(usable[start : start + size]) for start in range(0, len(usable) - size + 1, size)]


def _take(groups: list[list[tuple[Device, ...]]], num_stages: int) -> tuple[Device, ...]:
    """Take one chain's groups off the nodes' lists."""
    taken: list[tuple[Device, ...]] = []
    while len(taken) < num_stages:
        missing = num_stages - len(taken)
        whole = [of_node for of_node in groups if len(of_node) >= missing]
        chosen = min(whole, key=len) if whole else max(groups, key=len)
        taken += chosen[:missing]
        del chosen[:missing]
    return tuple(device for group in taken for device in group)


def _single_gpu(cluster: Cluster, options: RunOptions) -> tuple[Device, ...]:
    match = re.fullmatch(r"cuda:(\d+)", options.device_map)
    if not match:
        raise ConfigError(f"device_map = {options.device_map!r} names no GPU.", 'Write "cuda:0".')
    if (options.stages or 1, options.replicas, options.gpus_per_stage) != (1, 1, 1):
        raise ConfigError(
            f"device_map = {options.device_map!r} is one GPU; stages, replicas or gpus_per_stage ask for more.", 'Use device_map = "auto".'
        )
    node = next(node for node in cluster.nodes if node.gpus)
    gpu = next((gpu for gpu in node.gpus if gpu.index == int(match[1])), None)
    if gpu is None:
        raise ClusterError(
            f"device_map = {options.device_map!r}, but node {node.name} has {len(node.gpus)} GPUs.", "Name one that is there."
        )
    return (Device(node, gpu, options.max_memory.usable_bytes(node.name, gpu.index, gpu.free_bytes)),)


def _cpu_chains(cluster: Cluster, num_layers: int, options: RunOptions) -> tuple[tuple[Device, ...], ...]:
    stages = options.stages or 1
    if stages > num_layers:
        raise ConfigError(f"{stages} stages cannot share {num_layers} layers.", f"Ask for at most {num_layers}.")
    if options.device_map.startswith("cuda:"):
        raise ClusterError(f"device_map = {options.device_map!r}, but there is no GPU.", 'Use device_map = "auto".')
    all_stages = stages * options.replicas
    nodes = [cluster.nodes[place * len(cluster.nodes) // all_stages] for place in range(all_stages)]
    devices = [Device(node, None, _share_bytes(node, nodes.count(node), options)) for node in nodes]
    return tuple(tuple(devices[start : start + stages]) for start in range(0, all_stages, stages))


def _share_bytes(node: Node, num_stages: int, options: RunOptions) -> int | None:
    """What each of a node's stages may take of its memory: as `max_memory` has it, at most an even share of what is free; None for no limit."""
    has_bytes = node.host_bytes if node.host_free_bytes is None else node.host_free_bytes
    share_bytes = sys.maxsize if has_bytes is None else int(has_bytes * HOST_SHARE) // num_stages
    usable_bytes = options.max_memory.usable_bytes(node.name, 0, share_bytes)
    return None if usable_bytes == sys.maxsize else usable_bytes
