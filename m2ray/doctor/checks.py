"""What is wrong with a cluster, judged from facts alone: every problem with its remedy."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from m2ray.doctor.node_facts import NodeFacts
from m2ray.sizes import seconds_in_words
from m2ray.toolchain import TRITON_REMEDY

SAME_EVERYWHERE = ("python", "ray", "torch", "transformers", "tokenizers", "m2ray", "driver", "cuda", "nccl")
TEMP_FREE_SHARE = 0.05
"""Ray stores no more objects on a disk that is 95 % full (RAY_local_fs_capacity_threshold)."""

TEMP_FREE_BYTES = 2 << 30
TAKEN_BYTES = 2 << 30
"""Memory of a GPU that is normally taken: by the driver, and by a display."""

SLOW_LOAD_S = 3600.0


@dataclass(frozen=True)
class Finding:
    """One finding; a "note" is nothing to act on. `check` is a stable name, `where` a node's name or what was looked at."""

    check: str
    level: Literal["problem", "note"]
    where: str
    what: str
    remedy: str = ""


def check_nodes(nodes: Sequence[NodeFacts], in_flight_bytes: int, model_bytes: int | None = None) -> list[Finding]:
    """Everything that the facts of the nodes tell.

    Args:
        nodes: one entry a machine.
        in_flight_bytes: hidden states that may be in /dev/shm at a time.
        model_bytes: the checkpoint's size, to say how long it takes to load.
    """
    findings = list(_differences(nodes))
    for facts in nodes:
        for check in (_torch, _triton, _gpu_memory, _nccl, _folders):
            findings += check(facts)
        findings += _shared_memory(facts, in_flight_bytes)
        findings += _read_speed(facts, model_bytes)
    return findings


def _differences(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Versions, code and NCCL's settings that are not the same on every node. Nodes without GPUs have no driver to compare."""
    for name in SAME_EVERYWHERE:
        here = [facts for facts in nodes if facts.hardware.gpus or name not in ("driver", "cuda", "nccl")]
        versions = {facts.hardware.name: facts.hardware.versions.get(name, "absent") for facts in here}
        yield from _different(name, versions, "" if name == "nccl" else f"Install the same {name} everywhere.")
    digests = {facts.hardware.name: facts.source_digest for facts in nodes}
    yield from _different("m2ray's code", digests, "Install the same m2ray everywhere, or submit it as working_dir.")
    for variable in sorted({variable for facts in nodes for variable in facts.nccl_env}):
        yield from _different(variable, {facts.hardware.name: facts.nccl_env.get(variable, "unset") for facts in nodes}, "")


def _different(what: str, values: dict[str, str], remedy: str) -> Iterator[Finding]:
    """A problem where the nodes' values differ, by node; a note where there is no remedy, for nothing of m2ray depends on them."""
    if len(set(values.values())) > 1:
        level: Literal["problem", "note"] = "problem" if remedy else "note"
        listed = ", ".join(f"{node} has {value}" for node, value in values.items())
        yield Finding("same_everywhere", level, "cluster", f"{what} is not the same on every node: {listed}.", remedy)


def _torch(facts: NodeFacts) -> Iterator[Finding]:
    """Driver, CUDA and torch fit together. A driver runs programs of its own major CUDA version and older ones."""
    name, gpus = facts.hardware.name, facts.hardware.gpus
    if facts.torch_error:
        remedy = "Reinstall torch." if "torch" in facts.hardware.versions else "pip install 'm2ray[extract]'"
        yield Finding("torch", "problem", name, f"torch cannot be imported: {facts.torch_error}.", remedy)
    elif not gpus:
        yield Finding("torch", "note", name, "There is no GPU that the driver shows: stages run on the CPU.")
    elif facts.torch_cuda is None:
        yield Finding(
            "torch", "problem", name, f"torch is a build without CUDA, beside {len(gpus)} GPUs.", "Install a CUDA build of torch."
        )
    elif facts.driver_cuda and int(facts.torch_cuda.split(".")[0]) > int(facts.driver_cuda.split(".")[0]):
        what = f"torch is built for CUDA {facts.torch_cuda}, the driver {facts.hardware.versions.get('driver', '')} runs CUDA up to {facts.driver_cuda}."
        yield Finding("torch", "problem", name, what, "Update the driver, or install a torch built for an older CUDA.")
    elif not facts.torch_sees_gpus:
        yield Finding(
            "torch",
            "problem",
            name,
            f"torch cannot use any of {len(gpus)} GPUs.",
            "Run `python -c 'import torch; torch.cuda.init()'` there.",
        )
    else:
        for index, (major, minor) in enumerate(facts.compute_capabilities):
            if not _has_kernels(facts.torch_kernels, major, minor):
                what = f"torch has no kernels for GPU {index} of compute capability {major}.{minor}: {', '.join(facts.torch_kernels)}."
                yield Finding("torch", "problem", name, what, "Install a torch built for this GPU.")


def _triton(facts: NodeFacts) -> Iterator[Finding]:
    if facts.triton_problem and facts.hardware.gpus:
        what = f"Triton cannot make kernels: {facts.triton_problem}. Compiled layers will not run, and FP8 weights load slowly."
        yield Finding("triton", "problem", facts.hardware.name, what, TRITON_REMEDY)


def _has_kernels(kernels: Sequence[str], major: int, minor: int) -> bool:
    """Binary kernels (sm) run on the same major capability and as high a minor one; intermediate ones (compute) on all later."""
    for kernel in kernels:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", kernel)
        if match:
            built = (int(match[2]), int(match[3]))
            if (built <= (major, minor)) if match[1] == "compute" else (built[0] == major and built[1] <= minor):
                return True
    return not kernels


def _gpu_memory(facts: NodeFacts) -> Iterator[Finding]:
    remedy = "End them, or leave these GPUs out with max_memory or CUDA_VISIBLE_DEVICES."
    for gpu in facts.hardware.gpus:
        taken_bytes = gpu.total_bytes - gpu.free_bytes
        pids = [str(user.pid) for user in facts.gpu_users if user.gpu == gpu.index]
        if pids:
            what = f"GPU {gpu.index} is in use by process {', '.join(pids)}; {taken_bytes:,} of {gpu.total_bytes:,} bytes are taken."
            yield Finding("gpu_busy", "problem", facts.hardware.name, what, remedy)
        elif taken_bytes > TAKEN_BYTES:
            what = f"{taken_bytes:,} of {gpu.total_bytes:,} bytes of GPU {gpu.index} are taken by what cannot be seen from here."
            yield Finding("gpu_busy", "problem", facts.hardware.name, what, remedy)


def _nccl(facts: NodeFacts) -> Iterator[Finding]:
    """Notes alone, for the chain uses no NCCL: what else runs on these nodes may care."""
    name = facts.hardware.name
    if len(facts.hardware.gpus) > 1 and "nccl" not in facts.hardware.versions and facts.torch_sees_gpus:
        yield Finding("nccl", "note", name, "torch has no NCCL.")
    for variable in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        if facts.nccl_env.get(variable, "0") != "0":
            yield Finding("nccl", "note", name, f"{variable}={facts.nccl_env[variable]} turns off a fast path between GPUs.")
    if facts.nccl_env.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        yield Finding("nccl", "note", name, f"NCCL_DEBUG={facts.nccl_env['NCCL_DEBUG']} fills the logs.")
    wanted = facts.nccl_env.get("NCCL_SOCKET_IFNAME", "")
    if wanted and not _names_interface(wanted, facts.interfaces):
        what = f"NCCL_SOCKET_IFNAME={wanted} matches no network interface: there are {', '.join(facts.interfaces)}."
        yield Finding("nccl", "note", name, what)


def _names_interface(wanted: str, interfaces: Sequence[str]) -> bool:
    """NCCL's rule: prefixes with commas between; ^ in front leaves them out, = asks for whole names, ^= both."""
    excludes, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    names = wanted.lstrip("^").lstrip("=").split(",")
    matches = [any(each == name if exact else each.startswith(name) for name in names) for each in interfaces]
    return not all(matches) if excludes else any(matches)


def _folders(facts: NodeFacts) -> Iterator[Finding]:
    name = facts.hardware.name
    if facts.model_problem:
        yield Finding("model_visible", "problem", name, facts.model_problem, "Give a model folder that every node sees.")
    if facts.output_problem:
        yield Finding("store", "problem", name, facts.output_problem, "Give a bucket, or a folder on a disk that all nodes share.")
    least_bytes = max(TEMP_FREE_BYTES, int(facts.temp_bytes * TEMP_FREE_SHARE))
    if facts.temp_free_bytes < least_bytes:
        what = f"The temporary folder has {facts.temp_free_bytes:,} bytes left; Ray and the prompts' tokens need {least_bytes:,}."
        yield Finding("temp_space", "problem", name, what, "Free some, or set TMPDIR and Ray's --temp-dir to another disk.")


def _shared_memory(facts: NodeFacts, in_flight_bytes: int) -> Iterator[Finding]:
    shm_bytes = facts.hardware.shm_bytes
    if shm_bytes is None:
        yield Finding("shared_memory", "note", facts.hardware.name, "There is no /dev/shm: Ray puts its objects into the temporary folder.")
    elif shm_bytes < in_flight_bytes:
        what = f"The shared memory /dev/shm has {shm_bytes:,} bytes; hidden states between stages may take {in_flight_bytes:,}."
        yield Finding("shared_memory", "problem", facts.hardware.name, what, "Enlarge it (docker run --shm-size), or set in_flight lower.")


def _read_speed(facts: NodeFacts, model_bytes: int | None) -> Iterator[Finding]:
    if facts.read_bytes_per_s is None or not model_bytes:
        return
    load_s = model_bytes / facts.read_bytes_per_s
    what = f"The model folder reads at {facts.read_bytes_per_s / 1e6:,.0f} MB/s: {model_bytes:,} bytes take {seconds_in_words(load_s)} through this node."
    if load_s > SLOW_LOAD_S:
        yield Finding("read_speed", "problem", facts.hardware.name, what, "Copy the model to a faster disk.")
    else:
        yield Finding("read_speed", "note", facts.hardware.name, what)
