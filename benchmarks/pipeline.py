"""Does the chain keep its stages busy? S computing stages of equal work against one such stage alone, each on a core of its own.

S stages need M + S - 1 steps for M micro-batches; so the best that S stages can do is S x M / (M + S - 1) times one stage's rate. All
layers are run; only the last one's rows are written, as by the stage alone.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.records import Row, record
from benchmarks.runs import ROOT, commits, extract
from scripts.make_checkpoint import make_checkpoint

LAYERS_PER_STAGE = 2
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "num_kv_heads": 4, "head_dim": 64, "vocab_size": 512}
BATCH_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    parser.add_argument("--micro-batches", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [measure(folder, stages, arguments.micro_batches, arguments.repeats) for stages in arguments.stages]
    record("pipeline", "Computing stages on the CPU: a chain against one of its stages alone", rows)


def measure(folder: Path, num_stages: int, num_micro_batches: int, repeats: int) -> Row:
    """Interleave runs of one stage alone and of the whole chain; compare the medians."""
    model = folder / f"model-{num_stages}"
    if not model.exists():
        config = json.loads((ROOT / "tests/data/qwen3/config.json").read_text())
        make_checkpoint(model, config, overrides={**SIZES, "layers": num_stages * LAYERS_PER_STAGE}, fmt="bf16", seed=1)
    prompts = folder / f"prompts-{num_micro_batches}.txt"
    line = "the quick brown fox jumps over the lazy dog and runs home again " * 4
    prompts.write_text((line + "\n") * (num_micro_batches * 16), encoding="utf-8")
    options = {"model": model, "prompts": prompts, "compute_dtype": "float32", "batch_tokens": BATCH_TOKENS, "shard_tokens": 10**9}
    alone_s, chain_s, done = [], [], 0
    for _ in range(repeats):
        one = run(folder, layers=LAYERS_PER_STAGE - 1, stages=1, **options)
        whole = run(folder, layers=num_stages * LAYERS_PER_STAGE - 1, stages=num_stages, **options)
        done = len(whole["micro_batches"])
        alone_s.append(one["elapsed_s"])
        chain_s.append(whole["elapsed_s"])
    alone, chain = statistics.median(alone_s), statistics.median(chain_s)
    best_s = alone * (done + num_stages - 1) / done
    return Row(
        f"{num_stages} stages of {LAYERS_PER_STAGE} layers, {done} micro-batches of {BATCH_TOKENS} tokens",
        chain,
        "s",
        baseline=best_s,
        baseline_is="the best possible, from one stage alone:",
        ratio=best_s / chain,
        target="0.9",
        note=f"one stage alone {alone:.1f} s; {repeats} interleaved repeats, medians",
    )


def run(folder: Path, **options: object) -> dict[str, Any]:
    """One extraction; its only shard's commit says how long it took from the first micro-batch to the last receipt."""
    output = Path(tempfile.mkdtemp(prefix="run-", dir=folder)) / "run"
    extract(folder / "log", output=output, **options)
    (commit,) = commits(output)
    return commit


if __name__ == "__main__":
    main()
