"""m2ray against the guide's method (benchmarks/guide.py): the same checkpoint, prompts and GPU, every layer's rows in host memory.

    python -m benchmarks.against_guide FOLDER                # 6 layers at MiniMax-M2's real dimensions on a GPU
    python -m benchmarks.against_guide FOLDER --device cpu   # tiny layers, to try the script

Both methods in one process, one after the other so that one card of 80 GB holds each. A batch's rows are kept until the batch after the
next one is done, since a consumer takes them away. Prompts are tokenised before either clock starts. What `m2ray extract` commits as
Parquet is held against the guide in benchmarks/extract_on_gpu.py. Needs 8 GB of GPU memory a layer and 30 GB, and 4 GB of disk a layer.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoints import LAYERS, free, real_size
from benchmarks.guide import Guide
from benchmarks.records import Row, record
from benchmarks.runs import ROOT
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.options import PromptOptions
from m2ray.prompts import PromptSource, PromptTokenizer, micro_batches, survey
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
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="padded tokens in m2ray's micro-batches")
    parser.add_argument("--guide-batches", type=int, nargs="+", default=[3, 8, 32], help="prompts in a batch; 3 is the guide's own")
    parser.add_argument("--repeats", type=int, default=2, help="of the guide; m2ray's, which take little time, are twice as many")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model = real_size(folder, options.layers, TINY if options.device == "cpu" else None)
    title = f"The guide's method and m2ray: {options.layers} layers at MiniMax-M2's real dimensions, FP8 checkpoint, bfloat16"
    prompts = make_prompts(folder, model, options.prompts, options.batch_tokens)
    rows = in_memory(model, prompts, options)
    if options.device == "cpu":
        print(*rows, sep="\n")
    else:
        record("against_guide", title, rows)


def make_prompts(folder: Path, model: Path, count: int, batch_tokens: int) -> Prompts:
    """Seeded prompts of the corpus's words, read and cut by m2ray itself."""
    path = folder / f"prompts-{count}.jsonl"
    options = PromptOptions(str(path), 4 * LONGEST, truncation="cut")
    config = json.loads((model / "config.json").read_text())
    rng = np.random.default_rng(2)
    words = (ROOT / "scripts/corpus.txt").read_text(encoding="utf-8").split()
    lengths = np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count), SHORTEST, LONGEST).astype(int)
    tokenizer = PromptTokenizer.load(str(model), options, config["vocab_size"])
    sample = " ".join(rng.choice(words, 10_000))
    tokens_a_word = len(tokenizer._text_tokens.ids([sample], adds_special_tokens=False)[0]) / 10_000  # noqa: SLF001 - texts of wanted lengths
    texts = [" ".join(rng.choice(words, max(1, int(length / tokens_a_word)))) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = survey(PromptSource.open(options), tokenizer, open_store(scratch), "prompts", SHARD_TOKENS)
        batches = [batch for shard in found.shards for batch in micro_batches(shard, found.tokens, batch_tokens)]
        found.tokens.close()
    return Prompts(path, texts, batches)


# -- every layer's rows in host memory ------------------------------------------------------------------------------------


def in_memory(model: Path, prompts: Prompts, options: argparse.Namespace) -> list[Row]:
    """Both methods in this process, the guide first."""
    sample = prompts.batches[len(prompts.batches) // 2]
    guide = loaded_guide(model, options.device)
    guide_rates = rates_of_the_guide(guide, prompts, options.guide_batches, options.repeats)
    guide.restore_router(model)
    kept, alone = (guide_rows(guide, prompts, sample, size) for size in (min(guide_rates), 1))
    del guide
    free()
    stage = stage_of(model, options)
    found = [("eager", rates_of(stage, prompts, options), compare(stage, sample, kept, alone, "m2ray eager"))]
    if not options.no_compile:
        stage._decoder.compile_layers()  # noqa: SLF001 - the same weights, compiled
        stage.warm_up(options.batch_tokens)
        found.insert(0, ("compiled", rates_of(stage, prompts, options), compare(stage, sample, kept, alone, "m2ray compiled")))
    del stage
    free()
    first, best = min(guide_rates), max(guide_rates, key=lambda size: guide_rates[size])
    note = f"{len(prompts.texts)} prompts, {prompts.num_tokens:,} tokens; the guide's best of {options.repeats} repeats, "
    note += f"the median of {2 * options.repeats}"
    rows = []
    for number, (name, rate, _) in enumerate(found):
        for size in dict.fromkeys((first, best)):
            what = f"in memory, one stage {name}{'' if size == first else ', against the best of the guide with larger batches'}"
            target = "6" if number == 0 and size == first else ""
            rows.append(
                Row(what, rate, "tokens/s", guide_rates[size], f"guide, batches of {size}:", rate / guide_rates[size], target, note)
            )
    return rows + [row for _, _, differences in found for row in differences]


def loaded_guide(model: Path, device: str) -> Guide:
    began = time.monotonic()
    guide = Guide(model, device)
    print(f"the guide's model loaded in {time.monotonic() - began:.0f} s", flush=True)
    return guide


def rates_of_the_guide(guide: Guide, prompts: Prompts, sizes: Sequence[int], repeats: int) -> dict[int, float]:
    """Its tokens a second by prompts in a batch, those sizes left out that find no room on the GPU: the best of interleaved repeats."""
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in list(rates):
            if (taken := guide_s(guide, prompts, size)) is None:
                del rates[size]
            else:
                rates[size].append(prompts.num_tokens / taken)
                print(f"guide, batches of {size}: {rates[size][-1]:,.0f} tokens/s", flush=True)
    return {size: max(each) for size, each in rates.items()}


def rates_of(stage: Stage, prompts: Prompts, options: argparse.Namespace) -> float:
    """Tokens a second, after a pass that pins the buffers that later ones use again."""
    stage_s(stage, prompts)
    return prompts.num_tokens / statistics.median(stage_s(stage, prompts) for _ in range(2 * options.repeats))


def stage_of(model: Path, options: argparse.Namespace) -> Stage:
    stage = load_stage(
        StageSpec(
            model_url=str(model),
            span=LayerSpan(0, options.layers),
            compute_dtype="bfloat16",
            attn_implementation="auto",
            device=options.device,
            threads=None,
        ),
        lambda *_: None,
    )
    stage.begin(CaptureSpec({"residual": tuple(range(options.layers))}, "bfloat16"))
    return stage


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
    ours_LNH = torch.stack([torch.from_numpy(layer.columns[0].copy()).view(torch.bfloat16) for layer in captured]).float()
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


if __name__ == "__main__":
    main()
