"""The checkpoint that the GPU benchmarks share: some layers at MiniMax-M2's real dimensions, FP8, random weights.

python -m benchmarks.checkpoints FOLDER [LAYERS]      makes it, on all cores
"""

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.runs import ROOT
from scripts.make_checkpoint import make_checkpoint

LAYERS = 6
_SHARD_BYTES = 1_700_000_000
"""As the published checkpoint's files, and small enough that each core makes some."""


def real_size(folder: Path, layers: int = LAYERS, overrides: Mapping[str, int] | None = None) -> Path:
    """The checkpoint of so many layers in `folder`, made if it is not there: 3.7 GB a layer and 2.5 GB. `overrides` make a small one."""
    small = f"-{overrides['hidden_size']}" if overrides else ""
    model = folder.resolve() / f"model-{layers}{small}"
    if not model.exists():
        config = json.loads((ROOT / "tests/data/minimax_m2/config.json").read_text())
        processes = 1 if overrides else min(16, os.cpu_count() or 1)
        make_checkpoint(
            model,
            config,
            overrides={"layers": layers} | dict(overrides or {}),
            fmt="fp8",
            seed=1,
            max_shard_bytes=_SHARD_BYTES,
            processes=processes,
        )
    return model


def free() -> None:
    """Give back a stage that nobody refers to any more: its hooks refer to it in circles, and compiled graphs to its layers."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    print(real_size(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else LAYERS))
