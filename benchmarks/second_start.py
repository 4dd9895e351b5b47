"""What a second start saves: a stage loaded, compiled and warmed up in a process of its own, twice, with a cache folder that is empty at first.

    python -m benchmarks.second_start FOLDER                      # MiniMax-M2's real dimensions, on a GPU
    python -m benchmarks.second_start FOLDER --model MODEL        # any checkpoint; on a CPU where there is no GPU

The files that it needs are read once before, so that both find them in the page cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.checkpoints import real_size
from benchmarks.records import Row, record
from benchmarks.runs import TIMEOUT_S
from m2ray.batches import LayerSpan
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.stage import StageSpec, load_stage
from m2ray.model.tensor_table import up_to_layer

TARGET = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--one", action="store_true", help="one start, its seconds printed")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(start(options.model, options.layers, options.batch_tokens)))
        return
    model = options.model or real_size(options.folder, options.layers)
    for name in set(up_to_layer(open_checkpoint(str(model)), options.layers - 1)[0].weight_map.values()):
        with (model / name).open("rb") as stream:
            while stream.read(1 << 26):
                pass
    with tempfile.TemporaryDirectory(dir=options.folder) as cache:
        (first_load_s, first_s), (second_load_s, second_s) = [by_itself(model, options, cache) for _ in range(2)]
    row = Row(
        what=f"{options.layers} layers loaded, compiled and warmed up, the second time",
        value=second_load_s + second_s,
        unit="s",
        baseline=first_load_s + first_s,
        baseline_is="the first start, with no compiled graphs kept",
        ratio=(second_load_s + second_s) / (first_load_s + first_s),
        target=str(TARGET),
        note=f"loading {first_load_s:.1f} and {second_load_s:.1f} s, warm-up {first_s:.1f} and {second_s:.1f} s; imports are not counted",
    )
    record("second_start", "Compiled graphs kept between processes", [row])


def by_itself(model: Path, options: argparse.Namespace, cache: str) -> tuple[float, float]:
    """Seconds of `start` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.second_start", str(options.folder), "--model", str(model), "--one"]
    command += ["--layers", str(options.layers), "--batch-tokens", str(options.batch_tokens)]
    kept = {name: value for name, value in os.environ.items() if name not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    done = subprocess.run(command, env={**kept, "XDG_CACHE_HOME": cache}, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    load_s, warm_up_s = json.loads(done.stdout.splitlines()[-1])
    return load_s, warm_up_s


def start(model: Path, num_layers: int, batch_tokens: int) -> tuple[float, float]:
    """Seconds of loading, and of the warm-up."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    open_checkpoint(str(model))
    began = time.perf_counter()
    stage = load_stage(StageSpec(str(model), LayerSpan(0, num_layers), "bfloat16", "auto", device, None, compile=True), lambda *_: None)
    loaded = time.perf_counter()
    stage.warm_up(batch_tokens)
    return loaded - began, time.perf_counter() - loaded


if __name__ == "__main__":
    main()
