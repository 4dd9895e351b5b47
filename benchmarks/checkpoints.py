"""The checkpoint that the GPU benchmarks share: some layers at MiniMax-M2's real dimensions, FP8, random weights.

python -m benchmarks.checkpoints FOLDER [LAYERS]      makes it, on all cores
"""

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import ROOT
from scripts.make_checkpoint import lay_out, make_checkpoint, resolve_config, write_shards

LAYERS = 6
_SHARD_BYTES = 1_700_000_000
"""As the published checkpoint's files, and small enough that each core makes some."""


def real_size(folder: Path, layers: int = LAYERS, overrides: Mapping[str, int] | None = None) -> Path:
    """The checkpoint of so many layers in `folder`, made if it is not there: 3.7 GB a layer and 2.5 GB. `overrides` make a small one.

    Where one with more layers is there, its files serve: m2ray leaves layers past the last one unread.
    """
    small = f"-{overrides['hidden_size']}" if overrides else ""
    model = folder.resolve() / f"model-{layers}{small}"
    larger = [other for other in folder.resolve().glob("model-*") if other.name[6:].isdecimal() and int(other.name[6:]) > layers]
    if not model.exists() and larger and not overrides:
        link(larger[0], model, layers)
    if not model.exists():
        processes = 1 if overrides else min(16, os.cpu_count() or 1)
        make_checkpoint(model, _config(), processes=processes, **_how(layers, overrides))
    return model


def spread(folder: Path, elsewhere: Path, layers: int, here: int, overrides: Mapping[str, int] | None = None) -> tuple[Path, int]:
    """The same, on all cores, for what one disk does not hold: files from layer `here` on lie below `elsewhere`, and links in `folder`.

    Each file appears whole, and those that are there are not made again. Returns the model and the bytes that were written.
    """
    model, other = (place.resolve() / f"model-{layers}" for place in (folder, elsewhere))
    shards, weights = lay_out(model, _config(), **_how(layers, overrides))
    other.mkdir(parents=True, exist_ok=True)
    missing = {}
    for name, shard in shards.items():
        first = shard[0].number("layers") or 0
        path = (model if first < here else other) / name
        if path.parent == other and other != model:
            (model / name).unlink(missing_ok=True)
            (model / name).symlink_to(path)
        if not path.exists():
            missing[path] = shard
    write_shards(list(missing), missing.values(), weights, os.cpu_count() or 1)
    return model, sum(path.stat().st_size for path in missing)


def _config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / "tests/data/minimax_m2/config.json").read_text())
    return config


def _how(layers: int, overrides: Mapping[str, int] | None) -> dict[str, Any]:
    return {"overrides": {"layers": layers} | dict(overrides or {}), "fmt": "fp8", "seed": 1, "max_shard_bytes": _SHARD_BYTES}


def link(larger: Path, model: Path, layers: int) -> None:
    """The folder of a model with fewer layers over the same files."""
    config = resolve_config(json.loads((larger / "config.json").read_text()), {"layers": layers}, "fp8")
    model.mkdir()
    for path in larger.iterdir():
        (model / path.name).symlink_to(path)
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")


def free() -> None:
    """Give back a stage that nobody refers to any more: its hooks refer to it in circles, and compiled graphs to its layers."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    print(real_size(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else LAYERS))
