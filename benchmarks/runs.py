"""What the benchmarks share: running `m2ray extract` as a user would, and looking at what it left."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

import m2ray

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 1800.0


def environment() -> dict[str, str]:
    """No other cluster's address, this interpreter first on the path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**env, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}


def start_extract(log: Path, **options: object) -> subprocess.Popen[bytes]:
    """Start `m2ray extract` with these options, a flag where the value is None; what it prints goes to `log`."""
    words = [sys.executable, "-m", "m2ray.cli", "extract"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is None else [str(value)])]
    with log.open("ab") as output:
        return subprocess.Popen(words, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def extract(log: Path, **options: object) -> float:
    """Run `m2ray extract` to its end. Returns its seconds; raises RuntimeError with the log if it fails."""
    began = time.monotonic()
    if start_extract(log, **options).wait(TIMEOUT_S):
        raise RuntimeError(log.read_text())
    return time.monotonic() - began


def planned(**options: object) -> dict[str, Any]:
    """What `m2ray plan` says of these options, as its JSON. Fitting or not is in it."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "m2ray.cli", "plan", "--json", *words]
    done = subprocess.run(command, env=environment(), cwd=ROOT, check=False, timeout=120, capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(done.stderr)
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def digest_of(run: Path) -> str:
    """xxh3-128 over which token each row is and over every layer's bits, in the reader's order."""
    reader = m2ray.open_run(run)
    digest = xxhash.xxh3_128(np.ascontiguousarray(reader.tokens()).tobytes())
    for layer in reader.layer_numbers:
        digest.update(reader.layer(layer).tensor().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def commits(run: Path) -> list[dict[str, Any]]:
    """The run's commit records, by shard."""
    return [json.loads(path.read_text()) for path in sorted((run / "_commits").glob("shard-*.json"))]


def stage_processes(session: int) -> Iterator[int]:
    """The stage actors among the descendants of process `session`."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != session:
            ancestor = parents[ancestor]
        try:
            if ancestor == session and b"ray::StageActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield pid
        except (FileNotFoundError, ProcessLookupError):
            continue


def peak_rss_bytes(pid: int) -> int:
    """A living process's greatest resident memory so far, from /proc; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
