"""What a GPU holds at its peak, as `m2ray plan` predicts it and as `m2ray extract` measures it.

    python -m benchmarks.memory_on_gpu FOLDER           # at MiniMax-M2's real dimensions
    python -m benchmarks.memory_on_gpu FOLDER --wide    # Llama-70B's widths in bfloat16, layers brought from host memory, within 12 GB

Needs a CUDA device with 24 GB and 8 GB more a layer, 4 GB of disk a layer for the checkpoint, and 4 GB for the runs; `--wide` 12 GB of the device and 25 GB of FOLDER.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from benchmarks.against_fpwap import WIDTHS, checkpoint
from benchmarks.checkpoints import LAYERS, real_size
from benchmarks.records import Row, record
from benchmarks.runs import extract

SWEEP = ((16_384, 512, True), (32_768, 32_000, True), (32_768, 2048, False), (16_384, 512, False), (4096, 1024, False))
"""(batch_tokens, tokens of the longest prompt, compile)."""

WIDE_LAYERS, WIDE_LONGEST, WIDE_TOKENS = 6, 1024, 140_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--settings", type=int, default=len(SWEEP), help="how many of the sweep's settings, from its first one on")
    parser.add_argument(
        "--wide",
        action="store_true",
        help=f"{WIDE_LAYERS} layers of Llama-70B's widths, streamed, micro-batches and waves as they are chosen",
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    if arguments.wide:
        title = f"GPU memory of {WIDE_LAYERS} layers of Llama-70B's widths, brought from host memory: planned against measured"
        record("memory_on_gpu_wide", title, wide(folder))
        return
    model = real_size(folder, arguments.layers)
    rows: list[Row] = []
    for settings in SWEEP[: arguments.settings]:
        rows += measured(folder, model, *settings)
        # After each: a machine's time may end before the sweep does.
        record("memory_on_gpu", f"GPU memory of {arguments.layers} layers at MiniMax-M2's real dimensions: planned against measured", rows)


def wide(folder: Path) -> list[Row]:
    model, prompts = checkpoint(folder, WIDE_LAYERS, WIDTHS), folder / "prompts.txt"
    write_prompts(prompts, WIDE_LONGEST, WIDE_TOKENS)
    return planned_and_taken(folder, model, prompts, "within 12 GB, prompts up to 1,024 tokens, compiled", offload="cpu", max_memory="12GB")


def measured(folder: Path, model: Path, batch_tokens: int, longest: int, compiled: bool) -> list[Row]:  # noqa: FBT001 - a sweep's value
    prompts = folder / "prompts.txt"
    write_prompts(prompts, longest, 3 * max(batch_tokens, longest))
    what = f"batch_tokens {batch_tokens}, prompts up to {longest} tokens{', compiled' if compiled else ''}"
    return planned_and_taken(folder, model, prompts, what, batch_tokens=batch_tokens, compile=compiled)


def planned_and_taken(folder: Path, model: Path, prompts: Path, what: str, **options: object) -> list[Row]:
    """Of a run with these options, which is deleted."""
    run, log = folder / "run", folder / "extract.log"
    shutil.rmtree(run, ignore_errors=True)
    log.unlink(missing_ok=True)
    extract(log, model=model, prompts=prompts, output=run, **options)
    print(log.read_text(), flush=True)
    report = json.loads((run / "report.json").read_text())
    shutil.rmtree(run)
    gpu = report["stages"][0]["gpus"][0]
    # The driver's own account is what runs out: the allocator's peak and everything that is not the allocator's. It is asked now and then, so it may miss the peak.
    peak_bytes = max(gpu["used_bytes"], gpu["peak_reserved_bytes"])
    beside_bytes = peak_bytes - gpu["peak_reserved_bytes"]
    note = (
        f"allocated {gpu['peak_allocated_bytes'] / 1e9:.2f} GB, reserved {gpu['peak_reserved_bytes'] / 1e9:.2f} GB, "
        f"beside the allocator {beside_bytes / 1e9:.2f} GB"
    )
    parameters = report["parameter_bytes"]
    return [
        Row(
            f"GPU peak as planned, {what}",
            gpu["planned_peak_bytes"] / 1e9,
            "GB",
            peak_bytes / 1e9,
            "measured",
            gpu["planned_peak_bytes"] / peak_bytes,
            "1.00 to 1.10",
            note,
        ),
        Row(
            f"parameter bytes as planned, {what}",
            parameters["planned"],
            "bytes",
            parameters["measured"],
            "loaded",
            parameters["planned"] / parameters["measured"],
            "1",
        ),
    ]


def write_prompts(path: Path, longest: int, num_tokens: int) -> None:
    """Lines of about so many tokens in all, the longest first: one token a word, as the checkpoint's tokenizer splits digits."""
    rng = np.random.default_rng(0)
    lengths = [longest]
    while sum(lengths) < num_tokens:
        lengths.append(int(rng.integers(longest // 2, longest + 1)))
    path.write_text("\n".join("".join(rng.choice(list("0123456789"), length)) for length in lengths), encoding="utf-8")


if __name__ == "__main__":
    main()
