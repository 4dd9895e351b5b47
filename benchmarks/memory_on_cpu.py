"""A stage without a GPU: what it takes of memory beside its plan, and how fast it is where the checkpoint is three times what it may take.

    python -m benchmarks.memory_on_cpu FOLDER speed     # a checkpoint of 3 GB, all of it in memory and with 0.95 GB for everything; 3 minutes
    python -m benchmarks.memory_on_cpu FOLDER peaks     # ready, packed and in files, in the driver's process and as an actor; 3 minutes

A run's peak is its stage's resident memory (VmHWM), of which the driver is part where it is one process. The speed is that of the run's report, from the
first micro-batch to the last commit; the two ways take turns. The file is in the page cache, as it is after the first wave. With `--tiny` nothing is
recorded.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.records import Row, record
from benchmarks.runs import ROOT, extract
from scripts.make_checkpoint import make_checkpoint, train_tokenizer

LAYERS, HIDDEN, INNER = 57, 1024, 2816
"""12.8 million weights a layer."""
LIMIT = "950MB"
KEPT_LAYERS = "0,28,56"
ROUNDS = 2
PROMPT_TOKENS = 256
FP8 = {"layers": 12, "hidden_size": 1024, "intermediate_size": 2816, "num_heads": 16, "num_kv_heads": 16, "vocab_size": 4096}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=("speed", "peaks"))
    parser.add_argument("--prompts", type=int, help=f"of {PROMPT_TOKENS} tokens")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.part == "speed":
        rows = speed(folder, options.prompts or 12, rounds=1 if options.tiny else ROUNDS)
        title = "A checkpoint three times as large as what a machine without a GPU may use"
    else:
        rows = list(peaks(folder, options.prompts or 16))
        title = "The memory of a stage without a GPU: planned against measured"
    _ = print(*rows, sep="\n") if options.tiny else record(f"memory_on_cpu_{options.part}", title, rows)


def float32_llama(model: Path, num_layers: int, hidden_size: int, intermediate_size: int, vocab_size: int = 4096) -> Path:
    """A Llama checkpoint in float32, in one file a layer, made if it is not there; its layers hold the same values in other orders."""
    if model.exists():
        return model
    unfinished = model.with_name(f".{model.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer = train_tokenizer(vocab_size, 2048)
    tokenizer.save_pretrained(unfinished, save_jinja_files=False)
    config: dict[str, Any] = json.loads((ROOT / "tests/data/llama/config.json").read_text())
    config |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config |= {"num_hidden_layers": num_layers, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    config |= {"num_attention_heads": hidden_size // 64, "num_key_value_heads": hidden_size // 64, "vocab_size": vocab_size}
    (unfinished / "config.json").write_text(json.dumps(config))
    drawn = torch.randn(max(vocab_size, intermediate_size) * hidden_size, generator=torch.Generator().manual_seed(0)) * 0.02
    norm, embedding = torch.ones(hidden_size), drawn[: vocab_size * hidden_size].reshape(vocab_size, hidden_size)
    shapes = {f"self_attn.{name}_proj": (hidden_size, hidden_size) for name in "qkvo"}
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (intermediate_size, hidden_size))
    shapes["mlp.down_proj"] = (hidden_size, intermediate_size)
    files = {"ends": {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone(), "model.norm.weight": norm}}
    weight_map: dict[str, str] = {}
    for layer in (*range(num_layers), "ends"):
        tensors = files.get(str(layer)) or {
            f"model.layers.{layer}.{name}.weight": drawn.roll(1000 * int(layer) + place)[: shape[0] * shape[1]].reshape(shape).clone()
            for place, (name, shape) in enumerate(shapes.items())
        } | {f"model.layers.{layer}.{name}.weight": norm.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        save_file(tensors, unfinished / f"{layer}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{layer}.safetensors")
    (unfinished / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    unfinished.rename(model)
    return model


def make_prompts(folder: Path, count: int) -> Path:
    """Seeded prompts of words, each cut to PROMPT_TOKENS."""
    path = folder / f"prompts-{count}.txt"
    rng = np.random.default_rng(3)
    words = (ROOT / "scripts/corpus.txt").read_text(encoding="utf-8").split()
    path.write_text("".join(" ".join(rng.choice(words, PROMPT_TOKENS)) + "\n" for _ in range(count)), encoding="utf-8")
    return path


def ran(folder: Path, model: Path, prompts: Path, **options: object) -> dict[str, Any]:
    """The report of a run."""
    run, log = folder / "run", folder / "extract.log"
    shutil.rmtree(run, ignore_errors=True)
    log.unlink(missing_ok=True)
    extract(log, model=model, prompts=prompts, output=run, max_length=PROMPT_TOKENS, truncation="cut", **options)
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def stage_row(what: str, report: dict[str, Any]) -> Row:
    (stage,) = report["stages"]
    planned, taken = stage["planned_host_bytes"], stage["peak_rss_bytes"]
    return Row(f"peak, {what}", planned / 1e6, "MB planned", taken / 1e6, "MB measured", planned / taken, "1.00 to 1.10")


# -- speed ----------------------------------------------------------------------------------------------------------------


def speed(folder: Path, count: int, rounds: int) -> list[Row]:
    model, prompts = float32_llama(folder / f"llama-float32-{LAYERS}", LAYERS, HIDDEN, INNER), make_prompts(folder, count)
    size_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    ways: dict[str, dict[str, object]] = {"in memory": {}, "in files": {"offload": "disk", "max_memory": LIMIT}}
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, options in ways.items():
            reports[name].append(ran(folder, model, prompts, compute_dtype="float32", layers=KEPT_LAYERS, **options))
            print(f"{name}: {_rate(reports[name][-1]):.1f} tokens/s", flush=True)
    ratio = statistics.median(_rate(files) / _rate(memory) for memory, files in zip(*reports.values(), strict=True))
    in_memory, in_files = (statistics.median(map(_rate, each)) for each in reports.values())
    spread = ", ".join(f"{_rate(files) / _rate(memory):.3f}" for memory, files in zip(*reports.values(), strict=True))
    peak_bytes = max(report["stages"][0]["peak_rss_bytes"] for report in reports["in files"])
    limit_bytes = int(LIMIT.removesuffix("MB")) * 10**6
    assert peak_bytes <= limit_bytes, f"{peak_bytes} bytes at the peak"
    note = f"rounds {spread}; the checkpoint {size_bytes / 1e9:.2f} GB, {size_bytes / limit_bytes:.2f} of the limit; {reports['in files'][0]['tokens']:,} tokens"
    what = f"max_memory {LIMIT}, layers in files"
    return [
        Row(what, in_files, "tokens/s", in_memory, "all in memory:", ratio, "0.8", note),
        stage_row(what, reports["in files"][-1]),
        stage_row("all in memory", reports["in memory"][-1]),
    ]


def _rate(report: dict[str, Any]) -> float:
    return float(report["tokens_per_s"]["measured"])


# -- peaks ----------------------------------------------------------------------------------------------------------------


def peaks(folder: Path, count: int) -> Iterator[Row]:
    """An FP8 checkpoint of 12 layers, 0.16 GB, and what each place of its layers takes."""
    model, prompts = folder / "llama-fp8", make_prompts(folder, count)
    if not model.exists():
        config = json.loads((ROOT / "tests/data/llama/config.json").read_text())
        make_checkpoint(model, config, overrides=FP8, fmt="fp8", seed=1)
    ways: dict[str, dict[str, object]] = {
        "ready": {"weights": "bf16"},
        "packed": {"weights": "packed"},
        "in files": {"weights": "packed", "offload": "disk", "max_memory": "850MB"},
    }
    places: dict[str, dict[str, object]] = {"the driver's process": {}, "an actor": {"ray": None}}
    for name, options in ways.items():
        for place, more in places.items():
            report = ran(folder, model, prompts, compute_dtype="float32", layers="0,11", **options, **more)
            row = stage_row(f"{name}, {place}", report)
            print(row, flush=True)
            yield row


if __name__ == "__main__":
    main()
