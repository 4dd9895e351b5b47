"""SIGKILL of a run at random moments, and the same command again: are the rows the same, and is none lost or doubled?"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.records import Row, record
from benchmarks.runs import ROOT, commits, digest_of, environment, extract, start_extract

SIZES = {
    "layers": 16,
    "hidden-size": 128,
    "intermediate-size": 128,
    "num-experts": 8,
    "num-heads": 8,
    "num-kv-heads": 4,
    "head-dim": 32,
    "experts-per-token": 2,
    "vocab-size": 4096,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="where the checkpoint and the runs go; made, and left there")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model, log = folder / "model", folder / "log"
    if not model.exists():
        maker = [sys.executable, "-m", "scripts.make_checkpoint", str(model), "--config", "tests/data/minimax_m2/config.json"]
        sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
        subprocess.run(
            [*maker, "--format", "fp8", "--seed", "7", *sizes],
            cwd=ROOT,
            check=True,
            env={**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
    options = {"model": model, "prompts": ROOT / "scripts/demo_prompts.jsonl", "stages": 2, "batch_tokens": 2048, "shard_tokens": 2048}
    whole = Path(tempfile.mkdtemp(prefix="whole-", dir=folder)) / "run"
    duration_s = extract(log, output=whole, **options)
    expected, num_shards = digest_of(whole), len(commits(whole))
    chance = random.Random(arguments.seed)
    kept, equal = [], 0
    for number in range(arguments.kills):
        run = Path(tempfile.mkdtemp(prefix=f"killed-{number}-", dir=folder)) / "run"
        moment_s = chance.uniform(0.0, duration_s)
        driver = start_extract(log, output=run, **options)
        try:
            driver.wait(moment_s)
        except subprocess.TimeoutExpired:
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait(30)
        kept.append(len(commits(run)))
        extract(log, output=run, **options)
        equal += digest_of(run) == expected and len(commits(run)) == num_shards
        print(f"killed after {moment_s:.1f} s with {kept[-1]} of {num_shards} shards; equal so far: {equal} of {number + 1}", flush=True)
        shutil.rmtree(run.parent)
    listed = ", ".join(map(str, kept))
    record(
        "kill_and_resume",
        "SIGKILL at random moments, then the same command again",
        [
            Row(
                "runs with the rows of an uninterrupted one",
                equal,
                "runs",
                baseline=arguments.kills,
                baseline_is="killed",
                ratio=equal / arguments.kills,
                target="all",
                note=f"shards committed when killed, of {num_shards}: {listed}; an uninterrupted run takes {duration_s:.0f} s",
            )
        ],
    )


if __name__ == "__main__":
    main()
