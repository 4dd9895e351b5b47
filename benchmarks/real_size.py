"""MiniMax-M2's real dimensions on a CPU: 2 FP8 layers, two stages, 8 short prompts; a stage's memory against its span's bytes.

Needs about 12 GB of disk and 20 GB of memory.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import m2ray
from benchmarks.records import Row, record
from benchmarks.runs import ROOT, environment, peak_rss_bytes, stage_processes, start_extract
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.tensor_table import tensor_table

PROMPTS = (
    "The tide came in.",
    "Why is the sky blue at noon and red at dusk?",
    "水从哪里来？",
    "def add(a, b): return a + b",
    "Three apples and five pears are eight pieces of fruit.",
    "Dear neighbour, your cat sleeps on our roof again.",
    "山高月小，水落石出，我们在江边等船。",
    "A proof begins with what is given and ends with what was asked.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model, prompts, run = folder / "model", folder / "prompts.txt", folder / f"run-{int(time.time())}"
    if not model.exists():
        maker = [sys.executable, "-m", "scripts.make_checkpoint", str(model), "--config", "tests/data/minimax_m2/config.json"]
        subprocess.run(
            [*maker, "--layers", "2", "--format", "fp8", "--seed", "1"],
            cwd=ROOT,
            check=True,
            env={**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    began = time.monotonic()
    driver = start_extract(folder / "log", model=model, prompts=prompts, output=run, stages=2, compute_dtype="bfloat16")
    peaks: dict[int, int] = {}
    while driver.poll() is None:
        for pid in stage_processes(driver.pid):
            peaks[pid] = max(peaks.get(pid, 0), peak_rss_bytes(pid))
        time.sleep(0.2)  # samples a high-water mark that only grows
    if driver.returncode:
        raise RuntimeError((folder / "log").read_text())
    elapsed_s = time.monotonic() - began
    table = tensor_table(open_checkpoint(str(model)))
    layers = table.layer_bytes(2)
    spans = [layers[0] + table.role_bytes("embedding", 2), layers[1]]
    rows = [
        Row(
            f"stage {number}: peak resident memory",
            peak / 1e9,
            "GB",
            baseline=span / 1e9,
            baseline_is="its span's tensors in bfloat16",
            ratio=peak / span,
            note="the process with Ray, torch and transformers in it takes about 0.6 GB before it loads anything" if not number else "",
        )
        for number, (peak, span) in enumerate(zip(sorted(peaks.values(), reverse=True), sorted(spans, reverse=True), strict=True))
    ]
    reader = m2ray.open_run(run)
    norm = reader.layer(1).mean_norm()
    rows.append(
        Row(
            "whole command, from start to _SUCCESS", elapsed_s, "s", note=f"{reader.num_tokens} tokens; mean norm after layer 1: {norm:.3g}"
        )
    )
    record("real_size", "2 layers at MiniMax-M2's real dimensions, FP8 checkpoint, bfloat16 on a CPU, 2 stages", rows)


if __name__ == "__main__":
    main()
