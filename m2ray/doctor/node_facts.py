"""What the doctor looks at on one machine: its hardware, torch, NCCL's environment, who holds its GPUs, its folders and its disk."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from m2ray.chain.machine import probe_node
from m2ray.errors import M2rayError
from m2ray.planning.hardware import Node
from m2ray.storage import local_folder, looking, open_store
from m2ray.toolchain import triton_problem

READ_BYTES = 512 << 20
_PIECE_BYTES = 16 << 20
_TORCH_TIMEOUT_S = 120
# In a process of its own: Ray hides the GPUs from tasks that reserve none, and a library that crashes takes nothing with it.
_TORCH_SCRIPT = """
import json, torch
print(json.dumps({"cuda": torch.version.cuda, "available": torch.cuda.is_available(), "kernels": torch.cuda.get_arch_list()}))
"""


@dataclass(frozen=True)
class GpuUser:
    """A process that holds memory of a GPU; `used_bytes` is None where the driver keeps it to itself."""

    gpu: int
    pid: int
    used_bytes: int | None


@dataclass(frozen=True)
class NodeFacts:
    """One machine as the doctor found it.

    Attributes:
        hardware: GPUs, memory, disks, versions.
        source_digest: xxh3-64 of m2ray's own files: versions may be equal where the code is not.
        torch_cuda: the CUDA version that torch was built for; None for a build without CUDA.
        torch_sees_gpus: whether torch can use CUDA.
        torch_kernels: the architectures that torch has kernels for, such as "sm_90"; empty where CUDA cannot be used.
        torch_error: why torch could not be asked; "" if it could.
        triton_problem: why Triton can make no kernels; "" if it can.
        driver_cuda: the newest CUDA version that the driver runs; None without a driver.
        compute_capabilities: of each GPU, such as (9, 0).
        gpu_users: processes on the GPUs.
        nccl_env: the NCCL_* variables.
        interfaces: names of the network interfaces.
        temp_bytes, temp_free_bytes: of the file system with the temporary folder.
        model_problem, output_problem: why the node cannot use them; "" if it can, or if none was given.
        read_bytes_per_s: of the model folder, past the page cache; None where it was not measured.
    """

    hardware: Node
    source_digest: str = ""
    torch_cuda: str | None = None
    torch_sees_gpus: bool = False
    torch_kernels: tuple[str, ...] = ()
    torch_error: str = ""
    triton_problem: str = ""
    driver_cuda: str | None = None
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    gpu_users: tuple[GpuUser, ...] = ()
    nccl_env: Mapping[str, str] = field(default_factory=dict)
    interfaces: tuple[str, ...] = ()
    temp_bytes: int = 0
    temp_free_bytes: int = 0
    model_problem: str = ""
    output_problem: str = ""
    read_bytes_per_s: float | None = None


@looking()
def look_at_node(name: str | None = None, model: str | None = None, output: str | None = None, marker: str | None = None) -> NodeFacts:
    """Describe this machine. Reads at most READ_BYTES of the model.

    Args:
        name: what to call it.
        model: checkpoint folder.
        output: run folder, in which one small object is made and deleted.
        marker: a key below `output` that another machine has made, to see whether both see the same folder.
    """
    temp = shutil.disk_usage(tempfile.gettempdir())
    model_problem, read_bytes_per_s = look_at_model(model) if model else ("", None)
    return NodeFacts(
        hardware=probe_node(name, local_folder(output) if output else None),
        source_digest=_source_digest(),
        nccl_env={key: value for key, value in sorted(os.environ.items()) if key.startswith("NCCL_")},
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        temp_bytes=temp.total,
        temp_free_bytes=temp.free,
        model_problem=model_problem,
        output_problem=_look_at_output(output, marker) if output else "",
        read_bytes_per_s=read_bytes_per_s,
        triton_problem=triton_problem(),
        **_torch_facts(),
        **_driver_facts(),
    )


def _source_digest() -> str:
    folder, digest = Path(__file__).parents[1], xxhash.xxh3_64()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _torch_facts() -> dict[str, Any]:
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES" or value}
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _TORCH_SCRIPT], env=env, capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, check=True
        )
        found = json.loads(asked.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return {"torch_error": (error.stderr.strip().splitlines() or ["no output"])[-1]}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"torch_error": str(error)}
    return {"torch_cuda": found["cuda"], "torch_sees_gpus": found["available"], "torch_kernels": tuple(found["kernels"])}


def _driver_facts() -> dict[str, Any]:
    """What NVML says; nothing without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError):
        return {}
    except pynvml.NVMLError:
        return {}
    try:
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {
            "driver_cuda": f"{version // 1000}.{version % 1000 // 10}",
            "compute_capabilities": tuple(tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)) for handle in handles),
            "gpu_users": tuple(
                GpuUser(index, int(user.pid), None if user.usedGpuMemory is None else int(user.usedGpuMemory))
                for index, handle in enumerate(handles)
                for user in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            ),
        }
    except pynvml.NVMLError:
        return {}
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def look_at_model(model: str) -> tuple[str, float | None]:
    """(why the model cannot be read, bytes a second). The page cache is told to forget what is read."""
    try:
        store = open_store(model)
        if store.size("config.json") is None:
            return f"There is no config.json in {store.url}.", None
        files = sorted(((size, key) for key, size in store.list("") if key.endswith(".safetensors")), reverse=True)
        if not files:
            return "", None
        num_bytes, key = files[0]
        if store.folder:
            _forget(store.folder / key)
        begin, done, wanted = time.monotonic(), 0, min(num_bytes, READ_BYTES)
        while done < wanted:
            done += len(store.read_range(key, done, min(_PIECE_BYTES, wanted - done)))
        return "", done / max(time.monotonic() - begin, 1e-6)
    except (M2rayError, OSError) as error:
        return str(error), None


def _forget(path: Path) -> None:
    """Drop a file's clean pages; where the system cannot, the speed is that of the cache."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _look_at_output(output: str, marker: str | None) -> str:
    try:
        store = open_store(output)
        store.probe()
        if marker is not None and store.size(marker) is None:
            return f"{store.url} is another folder here than on the machine that asks: {marker} is not in it."
    except M2rayError as error:
        return str(error)
    return ""
