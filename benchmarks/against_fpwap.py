"""m2ray against fpwap 0.1.8 on one GPU: a Llama-style bf16 checkpoint of 70B's widths, both streamed, every layer's rows into memory.

    python -m benchmarks.against_fpwap FOLDER                # 6 layers; FOLDER is best in memory, and so is --rows
    python -m benchmarks.against_fpwap FOLDER --equal        # prompts of one length, which fpwap writes without synchronising
    python -m benchmarks.against_fpwap FOLDER --tiny         # to try the script on a CPU

fpwap (benchmarks/peers/with_fpwap.py, its weight prefetch switched on, micro-batches as it sizes them) has the whole GPU; m2ray's limit is
`--max-memory`, so that layers come from host memory, by wave. fpwap's seconds are those of its own clock without setup and without what it waited for weights; m2ray's
are from its first micro-batch to its last commit, weights brought by wave among them. Needs fpwap in the interpreter that `--python` names, and
at the default sizes 11 GB for the checkpoint, 45 GB for rows, and 12 GB of host memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import m2ray
from benchmarks.against_guide import LONGEST, MEDIAN_TOKENS, SHORTEST, SPREAD
from benchmarks.extract_on_gpu import alone
from benchmarks.records import Row, record
from benchmarks.runs import ROOT, extract
from scripts.make_checkpoint import make_checkpoint

WIDTHS = {"hidden_size": 8192, "intermediate_size": 28672, "num_heads": 64, "num_kv_heads": 8, "vocab_size": 4096}
TINY = {"hidden_size": 64, "intermediate_size": 224, "num_heads": 8, "num_kv_heads": 2, "vocab_size": 512}
SHARD_BYTES = 600_000_000
EQUAL_TOKENS = 512
SAMPLE = 6
"""Prompts whose rows are held against one another."""

Sample = dict[int, torch.Tensor]
"""By prompt: its rows, float32 [L, T, H]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=Path, help="where rows are written; else FOLDER")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=260, help="fpwap's; m2ray gets --times as many, these first")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--max-memory", default="12GB", help="m2ray's, of the GPU")
    parser.add_argument("--equal", action="store_true", help=f"prompts of {EQUAL_TOKENS} tokens each")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has fpwap")
    parser.add_argument("--tiny", action="store_true", help="small layers on a CPU, printed and not recorded")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model = checkpoint(folder, options.layers, TINY if options.tiny else WIDTHS)
    few, many = (make_prompts(folder, options.prompts, times, equal=options.equal) for times in (1, options.times))
    longest = EQUAL_TOKENS if options.equal else LONGEST
    rows = folder / "rows" if options.rows is None else options.rows.resolve()
    theirs, their_sample = run_fpwap(options, model, few, rows / "fpwap", longest)
    print("fpwap", theirs, flush=True)
    report, token_ids, our_sample = run_m2ray(options, model, many, rows / "m2ray", longest)
    reference = alone(rows_alone, model, token_ids, "cpu" if options.tiny else "cuda:0")
    found = rates(options, theirs, report) + differences(our_sample, their_sample, reference)
    title = f"fpwap 0.1.8 and m2ray, both streamed: {options.layers} layers of Llama-70B's widths, bfloat16, rows of all layers into memory"
    title += f", prompts of {EQUAL_TOKENS} tokens" if options.equal else ""
    _ = print(*found, sep="\n") if options.tiny else record(f"against_fpwap{'_equal' if options.equal else ''}", title, found)


def checkpoint(folder: Path, layers: int, widths: dict[str, int]) -> Path:
    """Of random weights, made if it is not there, on all cores."""
    model = folder / f"llama-{layers}-{widths['hidden_size']}"
    if not model.exists():
        config = json.loads((ROOT / "tests/data/llama/config.json").read_text())
        how: dict[str, Any] = {"overrides": {"layers": layers, **widths}, "fmt": "bf16", "seed": 1, "max_shard_bytes": SHARD_BYTES}
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint(model, config, processes=1 if widths is TINY else min(18, os.cpu_count() or 1), **how)
    return model


def make_prompts(folder: Path, count: int, times: int, *, equal: bool) -> Path:
    """So many seeded prompts of the corpus's words, `times` over: as long as benchmarks/against_guide.py's in words, or longer than all are cut to."""
    path = folder / f"prompts-{count}-{times}{'-equal' if equal else ''}.jsonl"
    rng = np.random.default_rng(2)
    words = (ROOT / "scripts/corpus.txt").read_text(encoding="utf-8").split()
    drawn = np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count), SHORTEST, LONGEST).astype(int)
    texts = [" ".join(rng.choice(words, LONGEST if equal else length)) for length in drawn]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * times), encoding="utf-8")
    return path


def run_fpwap(options: argparse.Namespace, model: Path, prompts: Path, out: Path, longest: int) -> tuple[dict[str, float], Sample]:
    """What it measured, with `command_s`, and the sample. Its rows are deleted."""
    shutil.rmtree(out, ignore_errors=True)
    program = ROOT / "benchmarks/peers/with_fpwap.py"
    words = [options.python, str(program), str(model), str(prompts), str(out), "--dtype", "bfloat16", "--cut", str(longest)]
    words += ["--stream", "cpu" if options.tiny else "cuda:0", "--check", str(SAMPLE)]
    began = time.monotonic()
    subprocess.run(words, env=os.environ | {"FPWAP_PREFETCH_LOAD": "1"}, check=True, timeout=400)
    command_s = time.monotonic() - began
    sample: Sample = {}
    for path in out.glob("batch-*.safetensors"):
        batch = load_file(path)
        sample[int(batch["prompt"][0])] = torch.stack([batch[f"layer_{layer}"].float() for layer in range(options.layers)])
    measured: dict[str, float] = json.loads((out / "measured.json").read_text()) | {"command_s": command_s}
    shutil.rmtree(out)
    return measured, sample


def run_m2ray(
    options: argparse.Namespace, model: Path, prompts: Path, out: Path, longest: int
) -> tuple[dict[str, Any], dict[int, list[int]], Sample]:
    """Its report with `command_s`, the sample's token ids, and the sample. Its rows are deleted."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    words: dict[str, object] = {"model": model, "prompts": prompts, "output": out, "max_length": longest, "truncation": "cut"}
    words |= {"compute_dtype": "bfloat16"} if options.tiny else {"offload": "cpu", "max_memory": options.max_memory}
    command_s = extract(log, **words)
    print(log.read_text(), flush=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text()) | {"command_s": command_s}
    run = m2ray.open_run(out)
    tokens = run.tokens()
    token_ids = {number: tokens["token_id"][tokens["sequence_id"] == number].tolist() for number in range(SAMPLE)}
    layers = [run.layer(number) for number in run.layer_numbers]
    sample = {number: torch.stack([torch.as_tensor(layer.sequence(number)).float() for layer in layers]) for number in range(SAMPLE)}
    shutil.rmtree(out)
    return report, token_ids, sample


def rows_alone(model: Path, token_ids: dict[int, list[int]], device: str) -> Sample:
    """Transformers' own rows of each prompt alone."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map={"": device}).eval()
    kept: list[torch.Tensor] = []
    for layer in whole.model.layers:
        layer.register_forward_hook(lambda _module, _given, output: kept.append(output[0] if isinstance(output, tuple) else output))
    found = {}
    for number, ids in token_ids.items():
        kept.clear()
        with torch.inference_mode():
            whole(input_ids=torch.tensor([ids], device=device), use_cache=False)
        found[number] = torch.stack([each.reshape(len(ids), -1).float().cpu() for each in kept])
    return found


def rates(options: argparse.Namespace, theirs: dict[str, float], report: dict[str, Any]) -> list[Row]:
    own_s = theirs["run_s"] - theirs["setup_s"] - theirs["load_s"]
    their_rate, our_rate = theirs["tokens"] / own_s, float(report["tokens_per_s"]["measured"])
    (stage,) = report["stages"]
    note = (
        f"m2ray: {report['tokens']:,} tokens in {report['extract_s']:.1f} s, compute {stage['compute_s']:.1f} s, blocked by the writer "
        f"{stage['write_wait_s']:.1f} s; fpwap: {theirs['tokens']:,.0f} tokens, {theirs['run_s']:.1f} s from run() to its return, of these setup "
        f"{theirs['setup_s']:.1f} s, waiting for weights {theirs['load_s']:.1f} s, callbacks and writing {theirs['callback_s']:.1f} s, the end "
        f"{theirs['teardown_s']:.1f} s; {theirs['peak_bytes'] / 1e9:.1f} GB of the GPU at its peak"
    )
    their_command, our_command = theirs["tokens"] / theirs["command_s"], report["tokens"] / report["command_s"]
    found = [
        Row("rows of all layers committed", our_rate, "tokens/s", their_rate, "fpwap 0.1.8:", our_rate / their_rate, "10", note),
        Row(
            "the same from the command's start to its end",
            our_command,
            "tokens/s",
            their_command,
            "fpwap 0.1.8:",
            our_command / their_command,
            "",
            f"{report['command_s']:.1f} s, {theirs['command_s']:.1f} s: Python, loading and compiling among them; m2ray has {options.times} times the prompts",
        ),
    ]
    if not options.tiny:
        gpu = stage["gpus"][0]
        planned, used = gpu["planned_peak_bytes"] / 1e9, max(gpu["used_bytes"], gpu["peak_reserved_bytes"]) / 1e9
        note = f"limit {options.max_memory}; allocated {gpu['peak_allocated_bytes'] / 1e9:.2f} GB, reserved {gpu['peak_reserved_bytes'] / 1e9:.2f} GB"
        found.append(Row("GPU peak", planned, "GB planned", used, "GB measured", planned / used, "1.00 to 1.10", note))
    return found


def differences(ours: Sample, theirs: Sample, reference: Sample) -> list[Row]:
    """For each layer, of the sample's rows: m2ray's and fpwap's from transformers' for each prompt alone, over their norm, and from one another."""
    found = []
    for layer in range(next(iter(reference.values())).shape[0]):
        (our_p50, our_p99), (their_p50, their_p99), (apart_p50, apart_p99) = (
            _quantiles([_apart(one[number][layer], other[number][layer]) for number in reference])
            for one, other in ((ours, reference), (theirs, reference), (ours, theirs))
        )
        note = f"p99 {our_p99:.2g} and {their_p99:.2g}; from one another {apart_p50:.2g} and {apart_p99:.2g}"
        what = f"layer {layer}: relative difference from transformers' rows of each prompt alone, p50"
        found.append(Row(what, our_p50, "", their_p50, "fpwap's:", None, "4e-3, compiled" if layer == 0 else "", note))
    return found


def _apart(one_TH: torch.Tensor, other_TH: torch.Tensor) -> torch.Tensor:
    apart_T: torch.Tensor = (one_TH - other_TH).norm(dim=1) / other_TH.norm(dim=1)
    return apart_T


def _quantiles(each_N: Sequence[torch.Tensor]) -> tuple[float, float]:
    all_N = torch.cat(list(each_N))
    return float(all_N.quantile(0.5)), float(all_N.quantile(0.99))


if __name__ == "__main__":
    main()
