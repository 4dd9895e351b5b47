"""The driver's memory while a run of 2,000 shards goes on: `python -m benchmarks.driver_memory`. A tiny model, one stage, a local disk."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kill_and_resume import SIZES
from benchmarks.records import Row, record
from benchmarks.runs import ROOT, TIMEOUT_S, environment, start_extract

_WORDS_A_PROMPT = 12
_TOKENS_A_SHARD = 16
"""Less than two prompts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="m2ray-memory-") as name:
        folder = Path(name)
        make_inputs(folder, arguments.shards)
        sampled = sampled_bytes(folder, arguments.shards)
    at_10, at_50, at_90 = (sampled[int(len(sampled) * share)] / 1e6 for share in (0.1, 0.5, 0.9))
    row = Row(
        "the driver's memory at 90 % of the shards",
        at_90,
        "MB",
        at_10,
        "at 10 %",
        at_90 / at_10,
        "at most 1.1",
        f"{arguments.shards:,} shards; at 50 % {at_50:.0f} MB",
    )
    record("driver_memory", "The driver's memory over a long run", [row])


def make_inputs(folder: Path, num_shards: int) -> None:
    """A tiny model, and as many prompts as shards."""
    maker = [sys.executable, "-m", "scripts.make_checkpoint", str(folder / "model"), "--config", "tests/data/minimax_m2/config.json"]
    sizes = [word for name, value in (SIZES | {"layers": 4}).items() for word in (f"--{name}", str(value))]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    subprocess.run([*maker, "--format", "fp8", "--seed", "7", *sizes], cwd=ROOT, check=True, env=env, timeout=TIMEOUT_S)
    text = " ".join(["sea"] * _WORDS_A_PROMPT)
    lines = (json.dumps({"text": f"{text} {number}"}) + "\n" for number in range(num_shards))
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def sampled_bytes(folder: Path, num_shards: int) -> list[int]:
    """The driver's resident bytes, by the shards that were committed then; of those that no look fell on, the look before."""
    options = {"model": folder / "model", "prompts": folder / "prompts.jsonl", "output": folder / "run", "stages": 1}
    log = folder / "log"
    driver = start_extract(log, **options, shard_tokens=_TOKENS_A_SHARD, batch_tokens=_TOKENS_A_SHARD)
    sampled, deadline = [0] * num_shards, time.monotonic() + TIMEOUT_S
    while driver.poll() is None and time.monotonic() < deadline:
        committed = min(len(list((folder / "run/_commits").glob("*"))), num_shards - 1)
        if committed:
            sampled[committed] = rss_bytes(driver.pid) or sampled[committed]
        time.sleep(0.25)
    if driver.wait(60):
        raise RuntimeError(log.read_text())
    for place in range(1, num_shards):
        sampled[place] = sampled[place] or sampled[place - 1]
    return sampled


def rss_bytes(pid: int) -> int:
    """The memory that a process holds now; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)


if __name__ == "__main__":
    main()
