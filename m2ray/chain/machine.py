"""Looking at the machine this process is on: GPUs as the driver sees them, host memory, shared memory, disk, versions.

Reads only. A machine without GPUs, driver, torch or Ray is described as such, never an error.
"""

import os
import platform
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from m2ray import __version__
from m2ray.planning.hardware import FLASH_PACKAGE, Gpu, Node
from m2ray.provenance import ROW_PACKAGES, cpu_kind, versions
from m2ray.storage import local_folder, with_home

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_SHM = Path("/dev/shm")  # noqa: S108 - its size is asked for; nothing is written


def probe_node(name: str | None = None, folder: str | Path | None = None, visible: str | None = None) -> Node:
    """Describe this machine.

    Args:
        name: what to call it; its host name by default.
        folder: where to ask for free disk space, there or yet to be made; None for not at all.
        visible: GPUs to see, in the form of CUDA_VISIBLE_DEVICES; None for all that the driver shows. The variable itself is not
            looked at: Ray empties it in tasks that reserve no GPU, which is what a probe is.
    """
    gpus, driver = _nvml_gpus(visible)
    if not gpus:
        gpus = _torch_gpus()
    host_bytes, host_free_bytes = _host_memory()
    place = _nearest(Path(folder)) if folder else None
    shm_bytes, shm_free_bytes = _file_system(_SHM) if _SHM.is_dir() else (None, None)
    return Node(
        name=name or platform.node() or "localhost",
        gpus=gpus,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        host_bytes=host_bytes,
        host_free_bytes=host_free_bytes,
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free_bytes,
        disk_free_bytes=_file_system(place)[1] if place else None,
        disk_in_memory=place is not None and _lies_in_memory(place),
        cpu_kind=cpu_kind(),
        versions=_versions() | driver,
    )


def disk_free_bytes(output: str | None) -> int | None:
    """What the disk of a run folder, there or yet to be made, has left; None for a bucket."""
    folder = local_folder(output) if output else None
    return _file_system(_nearest(folder))[1] if folder else None


def peak_rss_bytes() -> int:
    """The most memory that this process has had at one time.

    Not `ru_maxrss`, but where a kernel does not tell the other: it begins with what the parent had when it started this process.
    """
    kib = _memory_kib("self").get("VmHWM")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if kib is None else kib) * 1024


def unshared_bytes(pid: int) -> int:
    """The memory that another process of this machine has now beside what it shares; 0 where it has ended, or a kernel does not tell."""
    try:
        found = _memory_kib(str(pid))
    except OSError:
        return 0
    return (found.get("RssAnon", 0) + found.get("RssFile", 0)) * 1024


def _memory_kib(process: str) -> dict[str, int]:
    """What the kernel tells of a process's memory, by its names. Raises OSError: it has ended."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}


def allowed_threads() -> int | None:
    """What OMP_NUM_THREADS allows a process of this machine; None where it is not set, and for a cluster's driver, for which Ray sets it."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) and not os.environ.get("RAY_ADDRESS") else None


def _nvml_gpus(visible: str | None) -> tuple[tuple[Gpu, ...], dict[str, str]]:
    """The driver's own account, without a CUDA context, and its version; nothing without a driver."""
    try:
        import pynvml
    except ImportError:
        return (), {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), {}
    try:
        handles = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            handles[str(index), _text(pynvml.nvmlDeviceGetUUID(handle))] = handle
        gpus: list[Gpu] = []
        for device in visible_devices(visible, list(handles)):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handles[device])
            gpus.append(Gpu(len(gpus), _text(pynvml.nvmlDeviceGetName(handles[device])), int(memory.total), int(memory.free)))
        return tuple(gpus), {"driver": _text(pynvml.nvmlSystemGetDriverVersion())}
    except pynvml.NVMLError:
        return (), {}  # a virtual GPU whose driver answers in part: torch may know more
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def visible_devices(visible: str | None, devices: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the (index, UUID) pairs that `visible` names, in its order, by the rules of CUDA_VISIBLE_DEVICES.

    A UUID may be cut short; an unknown name hides all that come after it. None names all.
    """
    if visible is None:
        return list(devices)
    named: list[tuple[str, str]] = []
    for name in (part.strip() for part in visible.split(",")):
        device = next((known for known in devices if name == known[0] or (name.startswith("GPU-") and known[1].startswith(name))), None)
        if device is None:
            break
        named.append(device)
    return named


def _torch_gpus() -> tuple[Gpu, ...]:
    """The same through torch, where NVML does not answer. Makes a CUDA context on each GPU."""
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(index, torch.cuda.get_device_name(index), total_bytes, free_bytes))
    return tuple(gpus)


def _host_memory() -> tuple[int | None, int | None]:
    """Total and available bytes from /proc/meminfo, both at most the container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    total_bytes, available_bytes = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    limit_bytes, used_bytes = _container_memory()
    if limit_bytes is not None and limit_bytes < total_bytes:
        return limit_bytes, min(available_bytes, max(0, limit_bytes - used_bytes))
    return total_bytes, available_bytes


def _container_memory() -> tuple[int | None, int]:
    """The control group's limit and use (version 2, else 1); None without one."""
    group = Path("/sys/fs/cgroup")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            limit_text, used_text = ((group / name).read_text(encoding="ascii").strip() for name in (limit, used))
        except OSError:
            continue
        return (int(limit_text), int(used_text)) if limit_text.isdecimal() else (None, 0)
    return None, 0


def _file_system(folder: Path) -> tuple[int | None, int | None]:
    """Total bytes of the file system that holds `folder`, and those that this user may still write."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None, None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _lies_in_memory(folder: Path) -> bool:
    """Whether a folder's file system keeps its files in memory; False where that cannot be told."""
    try:
        device = folder.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    # The third field is the device's number, and after " - " comes the kind of file system: proc_pid_mountinfo(5).
    kinds = (kind.split()[0] for mount, _, kind in (line.partition(" - ") for line in mounts) if mount.split()[2] == _number(device))
    return next(kinds, "") in _IN_MEMORY


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _nearest(folder: Path) -> Path:
    """The folder itself or the nearest one above it that is there."""
    folder = with_home(folder).absolute()
    return next((place for place in (folder, *folder.parents) if place.exists()), folder)


def _versions() -> dict[str, str]:
    # m2ray's is that of the code at work, which need not be installed: Ray may have brought it.
    found = {"python": platform.python_version(), "m2ray": __version__, **versions((*ROW_PACKAGES, "ray", FLASH_PACKAGE))}
    if "torch" in found:
        found |= _torch_versions()
    return found


def _torch_versions() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError):  # OSError: one of CUDA's libraries is missing
        return {}
    if torch.version.cuda is None:
        return {}
    found = {"cuda": str(torch.version.cuda)}
    if torch.cuda.is_available():
        nccl: Any = torch.cuda.nccl.version()
        found["nccl"] = ".".join(str(part) for part in nccl)
    return found


def _text(value: str | bytes) -> str:
    """NVML's older bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value
