"""What the parts of benchmarks/full_depth.py share: the sizes of everything, one extraction with its plan, and the rows that come of it."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.against_guide import LONGEST, Prompts, make_prompts
from benchmarks.records import Row, record
from benchmarks.runs import TIMEOUT_S, planned, start_extract
from m2ray.planning.hardware import find_gpu_model

BATCH_TOKENS = 16_384
ROW_BYTES = 6_200
"""Of one token and layer, with what the files say of it."""


Strike = Callable[[subprocess.Popen[bytes], Path], bool]
"""Called with the driver's process and the run's folder until it returns True."""


@dataclass(frozen=True)
class Depth:
    """What all parts share: the folder of the model, prompts and logs, and the size of everything."""

    folder: Path
    memory: Path
    layers: int
    stages: int
    prompts: int
    rows_bytes: int
    tiny: bool

    @property
    def model(self) -> Path:
        return self.folder / f"model-{self.layers}"

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda:0"

    @property
    def few(self) -> tuple[int, ...]:
        """Four layers, the last among them."""
        return tuple(number * self.layers // 4 - 1 for number in range(1, 5))

    def made_prompts(self, count: int | None = None) -> Prompts:
        """The prompts, or `count` of such."""
        return make_prompts(self.folder, self.model, count or self.prompts, BATCH_TOKENS)

    def record(self, part: str, title: str, rows: list[Row]) -> None:
        if self.tiny:
            print(*rows, sep="\n", flush=True)
        else:
            record(f"full_depth_{part}", f"{title}: {self.layers} layers at MiniMax-M2's real dimensions, {self.stages} stages", rows)


@dataclass(frozen=True)
class Ran:
    """An extraction: its report.json, what `m2ray plan` says of it, when each shard was committed (seconds since 1970) and with how many tokens.

    Attributes:
        rates: by the plan, as its JSON has them; what needs GPUs or a profile is None there.
        driver_cores: of the driver's process, while shards were committed.
        wall_s: of the command, from its start to its end.
    """

    report: dict[str, Any]
    commits: list[tuple[float, int]]
    rates: dict[str, Any]
    driver_cores: float
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return float(self.report["tokens_per_s"]["measured"])

    @property
    def planned_tokens_per_s(self) -> float | None:
        return self.report["tokens"] / self.rates["duration_s"] if self.rates["duration_s"] else None


def run(depth: Depth, name: str, prompts: Prompts, strike: Strike | None = None, **options: object) -> Ran:
    """Run `m2ray extract` into memory, plan it meanwhile, and delete what it wrote."""
    folder, log = depth.memory / f"run-{name}", depth.folder / f"{name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    words = {"model": depth.model, "prompts": prompts.path, "batch_tokens": BATCH_TOKENS, "max_length": 4 * LONGEST, "truncation": "cut"}
    words |= options
    began, used = time.monotonic(), []
    with ThreadPoolExecutor(1) as beside:
        plan = beside.submit(planned, **words, **gpus_here(), output=folder, profile=depth.folder / "profile.json")
        driver = start_extract(log, **words, output=folder)
        while driver.poll() is None and time.monotonic() - began < TIMEOUT_S:
            used.append((time.time(), cpu_s(driver.pid)))
            if strike is not None and strike(driver, folder):
                strike = None
            time.sleep(0.25)
    if driver.wait(0):
        raise RuntimeError(log.read_text()[-4000:])
    wall_s = time.monotonic() - began
    report = json.loads((folder / "report.json").read_text())
    done = sorted((path.stat().st_mtime, json.loads(path.read_text())["rows"]) for path in (folder / "_commits").glob("shard-*.json"))
    shutil.rmtree(folder)
    inside = [(at, cpu) for at, cpu in used if done[0][0] <= at <= done[-1][0]] or used[-2:]
    cores = (inside[-1][1] - inside[0][1]) / max(1e-3, inside[-1][0] - inside[0][0])
    return Ran(report, done, plan.result()["rates"], cores, wall_s)


def gpus_here() -> dict[str, str]:
    """The GPUs as `m2ray plan` takes them: to look at them now would show what the run has taken."""
    if not torch.cuda.device_count():
        return {}
    return {"gpus": f"{torch.cuda.device_count()}x{find_gpu_model(torch.cuda.get_device_name(0))}"}


def cpu_s(pid: int) -> float:
    """Seconds of the processor that a process has taken; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def speed_row(what: str, found: Ran) -> Row:
    """Tokens a second against the plan, and in the note where the time went, stage by stage."""
    report = found.report
    stages = "; ".join(
        f"{stage['replica']}.{stage['stage']}: compute {stage['compute_s']:.1f}, wait {stage['wait_s']:.1f}, writer {stage['write_wait_s']:.1f}, "
        f"load {stage['load_s']:.1f}"
        for stage in report["stages"]
    )
    note = (
        f"{report['tokens']:,} tokens in {report['extract_s']:.1f} s; "
        f"{report['output_bytes']['measured'] / 1e9:.0f} GB written; report.json names {report['limiting_resource']['measured']}; padding "
        f"{report['padding_waste']['measured']:.1%}; loading and warming up {report['load_s']:.1f} s, the whole command {found.wall_s:.0f} s; the driver "
        f"took {found.driver_cores:.2f} of a core; seconds by stage: {stages}; sent by {', '.join(stage['sends_by'] or '-' for stage in report['stages'])}"
    )
    plan = found.planned_tokens_per_s
    ratio = None if plan is None else found.tokens_per_s / plan
    return Row(what, found.tokens_per_s, "tokens/s", plan, "m2ray plan --profile", ratio, "0.85 to 1.15", note)


def memory_rows(what: str, found: Ran) -> Iterator[Row]:
    """The plan's peaks against the measured ones: of GPUs the least and the greatest ratio, of hosts the least."""
    gpus = [(gpu["planned_peak_bytes"], gpu["used_bytes"]) for stage in found.report["stages"] for gpu in stage["gpus"]]
    for name, choose in (("least", min), ("greatest", max)):
        if gpus:
            plan, used = choose(gpus, key=lambda each: each[0] / each[1])
            yield Row(f"GPU peak by the plan, {name} ratio, {what}", plan / 1e9, "GB", used / 1e9, "measured", plan / used, "1.00 to 1.10")
    hosts = [(stage["planned_host_bytes"], stage["peak_rss_bytes"]) for stage in found.report["stages"]]
    plan, used = min(hosts, key=lambda each: each[0] / each[1])
    yield Row(
        f"a stage's host memory by the plan, least ratio, {what}", plan / 1e9, "GB", used / 1e9, "measured", plan / used, "at least 1"
    )
