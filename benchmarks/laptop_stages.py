"""On a machine without a GPU: a stage's layers against bare transformers, and two stages of one thread against one.

    python -m benchmarks.laptop_stages FOLDER                # 60 prompts, float32 and bfloat16; FOLDER as of benchmarks.laptop

Against bare transformers the same micro-batches go through both in turns, in one process, with as many threads as there are cores; the stage captures every
layer. Chains are runs of `m2ray extract`, whose own report says how many tokens a second they did once they were loaded.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from benchmarks.laptop import make_prompts, trained_model
from benchmarks.records import Row, record
from benchmarks.runs import extract
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource, PromptTokenizer, micro_batches, survey
from m2ray.storage import open_store

BATCH_TOKENS = 512
SHARD_TOKENS = 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="print the rows and leave results/ as it is")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model, prompts = trained_model(folder), make_prompts(folder, options.prompts)
    rows = [against_transformers(model, prompts, dtype, options.rounds) for dtype in options.dtypes]
    rows += [two_stages(folder, model, prompts, dtype, options.rounds) for dtype in options.dtypes]
    if options.keep:
        print(*rows, sep="\n")
    else:
        record("laptop_stages", "Stages on a laptop: SmolLM2-135M, every layer's rows, no GPU", rows)


def against_transformers(model: Path, prompts: Path, dtype: str, rounds: int) -> Row:
    """Padded tokens a second of the same micro-batches."""
    config = json.loads((model / "config.json").read_text())
    batches = cut(model, prompts, config["vocab_size"])
    span = LayerSpan(0, config["num_hidden_layers"])
    stage = load_stage(StageSpec(str(model), span, dtype, "sdpa", "cpu", os.cpu_count()), lambda *_: None)
    stage.begin(CaptureSpec({"residual": tuple(range(span.stop))}, "bfloat16"))
    bare = AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    ways = {"stage": lambda batch: through(stage, batch), "bare": lambda batch: forward(bare, batch)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 else reversed(ways):
            rates[name].append(rate(ways[name], batches))
    ours, theirs = (statistics.median(rates[name]) for name in ("stage", "bare"))
    note = f"{len(batches)} micro-batches of {BATCH_TOKENS} tokens, {os.cpu_count()} threads; medians of {rounds}"
    return Row(f"{dtype}: padded tokens a second in a stage", ours, "tokens/s", theirs, "bare transformers", ours / theirs, "0.97", note)


def cut(model: Path, prompts: Path, vocab_size: int) -> list[MicroBatch]:
    options = PromptOptions(str(prompts), 4096, truncation="cut")
    tokenizer = PromptTokenizer.load(str(model), options, vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        found = survey(PromptSource.open(options), tokenizer, open_store(scratch), "prompts", SHARD_TOKENS)
        batches = [batch for shard in found.shards for batch in micro_batches(shard, found.tokens, BATCH_TOKENS)]
        found.tokens.close()
    return batches


def rate(way: Callable[[MicroBatch], object], batches: list[MicroBatch]) -> float:
    way(batches[0])
    began = time.monotonic()
    for batch in batches:
        way(batch)
    return sum(batch.padded_tokens for batch in batches) / (time.monotonic() - began)


def through(stage: Stage, batch: MicroBatch) -> int:
    return len(stage.forward(batch, None).captured)


def forward(bare: Any, batch: MicroBatch) -> None:
    token_ids_BT = torch.tensor(batch.token_ids_BT, dtype=torch.long)
    real_BT = torch.arange(token_ids_BT.shape[1]) < torch.tensor(batch.token_counts)[:, None]
    with torch.inference_mode():
        bare(input_ids=token_ids_BT, attention_mask=real_BT.long(), use_cache=False)


def two_stages(folder: Path, model: Path, prompts: Path, dtype: str, rounds: int) -> Row:
    """Tokens a second, by the runs' own reports."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for stages in (1, 2) if number % 2 else (2, 1):
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            options = {"model": model, "prompts": prompts, "output": out, "compute_dtype": dtype}
            extract(folder / f"stages-{stages}.log", **options, stages=stages, threads_per_stage=1)
            rates[stages].append(json.loads((out / "report.json").read_text())["tokens_per_s"]["measured"])
    two, one = (statistics.median(rates[stages]) for stages in (2, 1))
    return Row(
        f"{dtype}: two stages of one thread", two, "tokens/s", one, "one stage of one thread", two / one, "1.7", f"medians of {rounds}"
    )


if __name__ == "__main__":
    main()
