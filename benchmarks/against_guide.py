"""m2ray against the guide's method (benchmarks/guide.py): the same checkpoint, prompts and GPU, every layer captured.

    python -m benchmarks.against_guide FOLDER                # 6 layers at MiniMax-M2's real dimensions on a GPU
    python -m benchmarks.against_guide FOLDER --device cpu   # tiny layers, to try the script

Both methods in one process, one after the other so that one card of 80 GB holds each, end with every layer's rows in host memory; a
batch's rows are kept until the batch after the next one is done, since a consumer takes them away. Prompts are tokenised before either
clock starts. `m2ray extract` then writes the rows of more prompts of the same kind to a local disk, from its first micro-batch to its
last commit. Needs on a GPU: 8 GB of memory a layer and 30 GB, 4 GB of disk a layer, and 37 kB of disk a token of the extraction.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoints import LAYERS, free, real_size
from benchmarks.guide import Guide
from benchmarks.records import Row, record
from benchmarks.runs import ROOT, extract
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.prompts import PromptOptions, PromptSource, PromptTokenizer, micro_batches, survey
from m2ray.storage import open_store

TINY = {"hidden_size": 128, "intermediate_size": 128, "num_experts": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
TINY |= {"experts_per_token": 2, "vocab_size": 512}
SHARD_TOKENS = 32_768
MEDIAN_TOKENS, SPREAD, SHORTEST, LONGEST = 220, 0.7, 50, 1024
"""The prompts' lengths: log-normal, cut at both ends."""

_WARM_UP_BATCHES = 16


@dataclass(frozen=True)
class Prompts:
    """A prompt file, its texts, and the micro-batches that `m2ray extract` makes of it."""

    path: Path
    texts: list[str]
    batches: list[MicroBatch]

    @property
    def num_tokens(self) -> int:
        """Real ones."""
        return sum(batch.num_tokens for batch in self.batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda:0", "cpu"), default="cuda:0")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--prompts", type=int, default=768, help="for the methods in one process")
    parser.add_argument("--extract-prompts", type=int, default=2048, help="for m2ray extract; 0 leaves it out")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="padded tokens in m2ray's micro-batches")
    parser.add_argument("--guide-batches", type=int, nargs="+", default=[3, 8, 32], help="prompts in a batch; 3 is the guide's own")
    parser.add_argument("--repeats", type=int, default=2, help="of the guide; m2ray's, which take little time, are twice as many")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model = real_size(folder, options.layers, TINY if options.device == "cpu" else None)
    title = f"The guide's method and m2ray: {options.layers} layers at MiniMax-M2's real dimensions, FP8 checkpoint, bfloat16"
    prompts = make_prompts(folder, model, options.prompts, options.batch_tokens)
    rows, guide_rates = in_memory(model, prompts, options)
    keep(title, rows, options)
    if options.extract_prompts:
        more = make_prompts(folder, model, options.extract_prompts, options.batch_tokens)
        keep(title, rows + committed(folder, model, more, options, guide_rates), options)


def keep(title: str, rows: list[Row], options: argparse.Namespace) -> None:
    """Record what a GPU measured; a trial on the CPU is printed only."""
    if options.device == "cpu":
        print(*rows, sep="\n")
    else:
        record("against_guide", title, rows)


def make_prompts(folder: Path, model: Path, count: int, batch_tokens: int) -> Prompts:
    """Seeded prompts of the corpus's words, read and cut by m2ray itself."""
    path = folder / f"prompts-{count}.jsonl"
    options = PromptOptions(str(path), 4 * LONGEST, "text", "messages", None, "cut")
    config = json.loads((model / "config.json").read_text())
    rng = np.random.default_rng(2)
    words = (ROOT / "scripts/corpus.txt").read_text(encoding="utf-8").split()
    lengths = np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count), SHORTEST, LONGEST).astype(int)
    tokenizer = PromptTokenizer.load(str(model), options, config["vocab_size"])
    sample = " ".join(rng.choice(words, 10_000))
    tokens_a_word = len(tokenizer._tokenize([sample], adds_special_tokens=False)[0]) / 10_000  # noqa: SLF001 - texts of wanted lengths
    texts = [" ".join(rng.choice(words, max(1, int(length / tokens_a_word)))) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = survey(PromptSource.open(options), tokenizer, open_store(scratch), "prompts", SHARD_TOKENS)
        batches = [batch for shard in found.shards for batch in micro_batches(shard, found.tokens, batch_tokens)]
        found.tokens.close()
    return Prompts(path, texts, batches)


# -- every layer's rows in host memory ------------------------------------------------------------------------------------


def in_memory(model: Path, prompts: Prompts, options: argparse.Namespace) -> tuple[list[Row], dict[int, float]]:
    """Both methods in this process, the guide first. Also gives the guide's tokens a second by prompts in a batch."""
    sample = prompts.batches[len(prompts.batches) // 2]
    guide_rates, kept, alone = of_the_guide(model, prompts, sample, options)
    stage = stage_of(model, options)
    found = [("eager", rates_of(stage, prompts, options), compare(stage, sample, kept, alone, "m2ray eager"))]
    if not options.no_compile:
        stage._decoder.compile_layers()  # noqa: SLF001 - the same weights, compiled
        stage.warm_up(options.batch_tokens)
        found.insert(0, ("compiled", rates_of(stage, prompts, options), compare(stage, sample, kept, alone, "m2ray compiled")))
    del stage
    free()
    first, best = options.guide_batches[0], max(guide_rates, key=lambda size: guide_rates[size])
    note = f"{len(prompts.texts)} prompts, {prompts.num_tokens:,} tokens; medians of {options.repeats} and {2 * options.repeats} repeats"
    rows = []
    for number, (name, rate, _) in enumerate(found):
        for size in dict.fromkeys((first, best)):
            what = f"in memory, one stage {name}{'' if size == first else ', against the best of the guide with larger batches'}"
            target = "6" if number == 0 and size == first else ""
            rows.append(
                Row(what, rate, "tokens/s", guide_rates[size], f"guide, batches of {size}:", rate / guide_rates[size], target, note)
            )
    return rows + [row for _, _, differences in found for row in differences], guide_rates


def of_the_guide(
    model: Path, prompts: Prompts, sample: MicroBatch, options: argparse.Namespace
) -> tuple[dict[int, float], list[torch.Tensor], list[torch.Tensor]]:
    """Its tokens a second by prompts in a batch; and its rows of `sample`'s prompts, in its own batches and each prompt alone."""
    began = time.monotonic()
    guide = Guide(model, options.device)
    print(f"the guide's model loaded in {time.monotonic() - began:.0f} s", flush=True)
    rates: dict[int, list[float]] = {}
    for _ in range(options.repeats):
        for size in list(options.guide_batches):
            if (taken := guide_s(guide, prompts, size)) is None:
                options.guide_batches.remove(size)
                rates.pop(size, None)
            else:
                rates.setdefault(size, []).append(prompts.num_tokens / taken)
                print(f"guide, batches of {size}: {rates[size][-1]:,.0f} tokens/s", flush=True)
    guide.restore_router(model)
    rows = [guide_rows(guide, prompts, sample, size) for size in (options.guide_batches[0], 1)]
    del guide
    free()
    return {size: statistics.median(each) for size, each in rates.items()}, rows[0], rows[1]


def rates_of(stage: Stage, prompts: Prompts, options: argparse.Namespace) -> float:
    """Tokens a second, after a pass that pins the buffers that later ones use again."""
    stage_s(stage, prompts)
    return prompts.num_tokens / statistics.median(stage_s(stage, prompts) for _ in range(2 * options.repeats))


def stage_of(model: Path, options: argparse.Namespace) -> Stage:
    layers = tuple(range(options.layers))
    return load_stage(
        StageSpec(
            model_url=str(model),
            span=LayerSpan(0, options.layers),
            capture_layers=layers,
            sites=("residual",),
            compute_dtype="bfloat16",
            store_dtype="bfloat16",
            attn_implementation="auto",
            device=options.device,
            threads=None,
        ),
        lambda *_: None,
    )


def stage_s(stage: Stage, prompts: Prompts) -> float:
    """Seconds of all micro-batches, two under way."""
    under_way: list[Any] = []
    began = time.monotonic()
    for batch in prompts.batches:
        under_way.append(stage.forward(batch, None))
        if len(under_way) > 2:
            assert len(under_way.pop(0).captured) == len(stage.parts)
    for output in under_way:
        assert len(output.captured) == len(stage.parts)
    return time.monotonic() - began


def guide_s(guide: Guide, prompts: Prompts, size: int) -> float | None:
    """Seconds of all batches of `size` prompts; None where the GPU's memory does not hold one."""
    encoded = [guide.encode(prompts.texts[start : start + size]) for start in range(0, len(prompts.texts), size)]
    try:
        for batch in encoded[:_WARM_UP_BATCHES]:
            guide.run(batch)
        began = time.monotonic()
        for batch in encoded:
            guide.run(batch)  # .cpu() in the last layer's hook waits for the GPU
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic() - began
    except torch.OutOfMemoryError as error:
        print(f"guide, batches of {size}: {error}")
        torch.cuda.empty_cache()
        return None


# -- the same rows --------------------------------------------------------------------------------------------------------


def guide_rows(guide: Guide, prompts: Prompts, sample: MicroBatch, size: int) -> list[torch.Tensor]:
    """The guide's rows [L, T, H] of each of the micro-batch's prompts, in batches of `size`."""
    ids = sample.sequence_ids.tolist()
    found = []
    for start in range(0, len(ids), size):
        for row, (token_ids_T, rows_LTH) in enumerate(guide.rows([prompts.texts[number] for number in ids[start : start + size]])):
            count = int(sample.token_counts[start + row])
            assert token_ids_T.tolist() == sample.token_ids_BT[start + row, :count].tolist(), "both must see the same tokens"
            found.append(rows_LTH)
    return found


def compare(stage: Stage, sample: MicroBatch, guide: list[torch.Tensor], alone: list[torch.Tensor], name: str) -> list[Row]:
    """How far m2ray's rows are from the guide's, and beside it how far the guide's own are from those of each prompt run alone."""
    captured = stage.forward(sample, None).captured
    ours_LNH = torch.stack([torch.from_numpy(layer.rows.copy()).view(torch.bfloat16) for layer in captured]).float()
    guide_LNH, alone_LNH = torch.cat(guide, 1).float(), torch.cat(alone, 1).float()
    rows = []
    for layer in dict.fromkeys((0, len(captured) // 2, len(captured) - 1)):
        norms_N = guide_LNH[layer].norm(dim=1)
        ours_N = (ours_LNH[layer] - guide_LNH[layer]).norm(dim=1) / norms_N
        alone_N = (alone_LNH[layer] - guide_LNH[layer]).norm(dim=1) / norms_N
        flipped = f"above 0.02: {(ours_N > 0.02).float().mean():.2%} of rows, alone {(alone_N > 0.02).float().mean():.2%}"
        for share, target in ((0.5, "7e-3, two bfloat16 roundings" if layer == 0 else ""), (0.99, "")):
            value, base = float(ours_N.quantile(share)), float(alone_N.quantile(share))
            what = f"{name}: relative difference of layer {layer}'s rows, p{share * 100:.0f}"
            rows.append(Row(what, value, "", base, "the guide, each prompt alone:", None, target, flipped if share < 0.9 else ""))
    return rows


# -- committed as Parquet -------------------------------------------------------------------------------------------------


def committed(folder: Path, model: Path, prompts: Prompts, options: argparse.Namespace, guide_rates: dict[int, float]) -> list[Row]:
    """`m2ray extract` to the local disk, and the same bytes written and synced as plainly as can be."""
    compiled = str(not options.no_compile).lower()
    run = Path(tempfile.mkdtemp(prefix="run-", dir=folder)) / "run"
    words = {"model": model, "prompts": prompts.path, "output": run, "stages": 1, "batch_tokens": options.batch_tokens, "truncation": "cut"}
    (folder / "log").unlink(missing_ok=True)
    whole_s = extract(folder / "log", max_length=4 * LONGEST, compile=compiled, **words)
    report = json.loads((run / "report.json").read_text())
    assert report["tokens"] == prompts.num_tokens, "both must see the same tokens"
    rate, seconds = report["tokens_per_s"]["measured"], report["extract_s"]
    parts = [path.stat().st_size for path in run.rglob("shard-*.parquet")]
    shutil.rmtree(run.parent)
    num_bytes = sum(parts)
    raw = {threads: written_bytes_per_s(folder, parts, threads) for threads in (1, 8)}
    threads = max(raw, key=lambda number: raw[number])
    size = options.guide_batches[0]
    limit = raw[threads] / (num_bytes / prompts.num_tokens)
    bound = f"the disk's limit is {limit:,.0f} tokens/s, {limit / guide_rates[size]:.2f} of the guide's"
    limiting = f"report.json says that it was limited by {report['limiting_resource']['measured']}"
    note = f"{prompts.num_tokens:,} tokens, {num_bytes / 1e9:.1f} GB in {len(parts)} parts; the whole command {whole_s:.0f} s; {bound}; {limiting}"
    return [
        Row(
            f"committed as Parquet, m2ray extract, compile = {compiled}",
            rate,
            "tokens/s",
            guide_rates[size],
            f"guide, batches of {size}, nothing written:",
            rate / guide_rates[size],
            "4, or the disk's limit",
            note,
        ),
        Row(
            "bytes to the local disk, m2ray extract",
            num_bytes / seconds / 1e9,
            "GB/s",
            raw[threads] / 1e9,
            f"write() and fsync, {threads} threads:",
            num_bytes / seconds / raw[threads],
            "1, where the disk binds",
        ),
    ]


def written_bytes_per_s(folder: Path, sizes: list[int], threads: int) -> float:
    """Files of these sizes, each written and synced, on so many threads; at most 8 GB of them."""
    block = np.random.default_rng(3).bytes(16 << 20)
    chosen = list(_up_to(sizes, 8 * 10**9))
    with tempfile.TemporaryDirectory(prefix="raw-", dir=folder) as scratch, ThreadPoolExecutor(threads) as pool:

        def write(job: tuple[int, int]) -> None:
            fd = os.open(Path(scratch) / str(job[0]), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            left = job[1]
            while left:
                left -= os.write(fd, memoryview(block)[: min(left, len(block))])
            os.fsync(fd)
            os.close(fd)

        os.sync()
        seconds = timed(lambda: list(pool.map(write, enumerate(chosen))))
    return sum(chosen) / seconds


def _up_to(sizes: list[int], limit_bytes: int) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        if total > limit_bytes and total > size:
            return
        yield size


def timed(step: Callable[[], object]) -> float:
    began = time.monotonic()
    step()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
