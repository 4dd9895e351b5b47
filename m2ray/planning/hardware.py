"""The machines as plain values: what a node has, named GPUs, and how much of each may be used."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from m2ray.errors import ConfigError, did_you_mean, raise_all

_MIB = 2**20

MOST_GPUS = 4096
"""In `--gpus`, at most: a mistyped number is refused at once."""

DRIVER_BYTES = 512 * _MIB
"""Of a named GPU's memory, what its driver keeps to itself: nvidia-smi counts it, and no process is told of it."""

FLASH_PACKAGE = "flash-attn"
"""Without it on a node `attn_implementation = "flash_attention_2"` cannot run there."""


@dataclass(frozen=True)
class GpuModel:
    """A GPU by name: memory as the driver reports it, peak dense bfloat16 operations a second, and memory bandwidth as the data sheet has it.

    `has_fp8`: whether its tensor cores multiply FP8 (compute capability 8.9 and above). `source`: "seen" (nvidia-smi on such a GPU, by this project) or "published" (nvidia-smi's output in vendors' and users'
    documents, and for operations the vendor's data sheet).
    """

    total_bytes: int
    bf16_flops: float
    memory_bytes_per_s: float
    source: str
    has_fp8: bool = True


GPU_MODELS: Mapping[str, GpuModel] = {
    "A100-40GB": GpuModel(40_960 * _MIB, 312e12, 1.56e12, "published", has_fp8=False),
    "A100-80GB": GpuModel(81_920 * _MIB, 312e12, 2.04e12, "published", has_fp8=False),
    "H20-96GB": GpuModel(97_871 * _MIB, 148e12, 4.0e12, "published"),
    "H100-80GB": GpuModel(81_559 * _MIB, 989e12, 3.35e12, "seen"),
    "H200-141GB": GpuModel(143_771 * _MIB, 989e12, 4.8e12, "seen"),
    "B200-180GB": GpuModel(183_359 * _MIB, 2250e12, 8.0e12, "published"),
    "L4-24GB": GpuModel(23_034 * _MIB, 121e12, 300e9, "published"),
    "L40S-48GB": GpuModel(46_068 * _MIB, 362e12, 864e9, "published"),
    "A6000-48GB": GpuModel(49_140 * _MIB, 155e12, 768e9, "published", has_fp8=False),
    "3090-24GB": GpuModel(24_576 * _MIB, 71e12, 936e9, "published", has_fp8=False),
    "4090-24GB": GpuModel(24_564 * _MIB, 165e12, 1.01e12, "published"),
}
"""Names for `--gpus`. The memory size in a name is the vendor's; the bytes are the driver's."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: `index` is its place on its node, `name` the driver's or one of GPU_MODELS."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Node:
    """One machine; None where it is not known. "free" is at the time of the probe.

    `shm_bytes` is /dev/shm's size, `disk_free_bytes` what the probed folder's file system has left, and `disk_in_memory` whether that
    is one in memory (tmpfs). `cpu_kind` is m2ray.provenance's. `versions` maps python, m2ray, ray, torch, transformers, tokenizers, flash-attn, cuda, nccl and driver, where
    they are there, to their versions.
    """

    name: str
    gpus: tuple[Gpu, ...] = ()
    cpus: int | None = None
    host_bytes: int | None = None
    host_free_bytes: int | None = None
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    disk_free_bytes: int | None = None
    disk_in_memory: bool = False
    cpu_kind: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cluster:
    """All the nodes, in the order in which a chain goes through them."""

    nodes: tuple[Node, ...]

    @property
    def num_gpus(self) -> int:
        return sum(len(node.gpus) for node in self.nodes)

    def kinds(self, *, of_gpus: bool) -> str:
        """The kinds of all its GPUs, or of all its CPUs, joined by " + "."""
        names = {gpu.name for node in self.nodes for gpu in node.gpus} if of_gpus else {node.cpu_kind or "unknown" for node in self.nodes}
        return " + ".join(sorted(names))


def parse_gpus(text: str) -> Cluster:
    """A cluster in words: "8xA100-80GB", "H200", "2 nodes of 8xH100-80GB", and several of these separated by commas.

    Each piece makes nodes of its own; all their memory is free, and what they have besides GPUs is not known.

    Raises:
        ConfigError: a piece is malformed, or names no known GPU, all at once; or there are more than MOST_GPUS.
    """
    nodes: list[Node] = []
    problems: list[ConfigError] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s+nodes?\s+of\s+)?(?:(\d+)\s*[x×*]\s*)?([A-Za-z].*?)\s*", piece)
        if not match or match[1] == "0" or match[2] == "0":
            problems.append(
                ConfigError(f"gpus = {text!r}: {piece.strip()!r} is not a number of GPUs.", 'Write "8xH100-80GB" or "2 nodes of 8xH200".')
            )
            continue
        model = find_gpu_model(match[3])
        if model is None:
            problems.append(
                ConfigError(
                    f"gpus = {text!r}: there is no GPU {match[3]!r} in the table.",
                    f"{did_you_mean(match[3], _gpu_names())}Known are {', '.join(GPU_MODELS)}.",
                )
            )
            continue
        total_bytes = GPU_MODELS[model].total_bytes
        num_nodes, num_gpus = (min(int(number or 1), MOST_GPUS + 1) for number in (match[1], match[2]))
        gpus = tuple(Gpu(index, model, total_bytes, total_bytes - DRIVER_BYTES) for index in range(num_gpus))
        nodes += [Node(f"node-{len(nodes) + number}", gpus) for number in range(num_nodes)]
        if sum(len(node.gpus) for node in nodes) > MOST_GPUS:
            problems.append(ConfigError(f"gpus = {text!r}: these are more than {MOST_GPUS:,} GPUs.", "Ask for fewer."))
            break
    raise_all(problems)
    return Cluster(tuple(nodes))


def _gpu_names() -> list[str]:
    """As a user may write them: with the memory's size, and without it where only one size is known."""
    return [*GPU_MODELS, *(name for known in GPU_MODELS if find_gpu_model(name := known.partition("-")[0]))]


def find_gpu_model(name: str) -> str | None:
    """The key in GPU_MODELS of a name as a user ("H200") or the driver ("NVIDIA A100-SXM4-80GB") writes it; None if it has none.

    The memory size may be left out where only one size is in the table.
    """
    plain = re.sub(r"(\d)\s*GI?B\b", r"\1GB", name.upper())
    words = set(re.findall(r"[A-Z0-9]+", re.sub(r"NVIDIA|GEFORCE|RTX", " ", plain)))
    sizes = {word for word in words if re.fullmatch(r"\d+GB", word)}
    found = [known for known in GPU_MODELS if known.partition("-")[0] in words and (not sizes or known.partition("-")[2] in sizes)]
    return found[0] if len(found) == 1 else None
