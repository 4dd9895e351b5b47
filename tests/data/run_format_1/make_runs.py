"""What made the run folders beside this file, at commit 6feae92 of m2ray 0.1.0: the last that wrote format 1.

They are never made again; tests take the model, the prompts and the options from here, to hold the rows against transformers.
"""

import json
import subprocess
import tempfile
from pathlib import Path

from scripts.make_checkpoint import make_checkpoint

HERE = Path(__file__).parent
LLAMA = HERE.parent / "llama" / "config.json"
PROMPTS = HERE / "prompts.jsonl"
SIZES = {"layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": 384}
OPTIONS = ("--id-column", "id", "--compute-dtype", "float32", "--batch-tokens", "64", "--shard-tokens", "80", "--max-length", "128")
RUNS = {"float32": ("--store-dtype", "float32"), "planes": ("--store-dtype", "bfloat16", "--compression", "planes")}
"""Each run's options beside those that all have."""

TEXTS = ["the river carries a stone", "low water", "", "a bridge was built later, and nobody remembers", "水浅的时候", "rain on the hill"]
"""The third is quarantined."""


def make_model(folder: Path) -> Path:
    """The model of all runs, always of the same bits."""
    make_checkpoint(folder, json.loads(LLAMA.read_text()), overrides=SIZES, fmt="bf16", seed=7)
    return folder


def command(model: Path, name: str, output: Path) -> list[str]:
    """The words that make the run of this name, or go on with it."""
    return ["m2ray", "extract", "--model", str(model), "--prompts", str(PROMPTS), "--output", str(output), *OPTIONS, *RUNS[name]]


def main() -> None:
    rows = [{"id": f"row-{number}", "text": text} for number, text in enumerate(TEXTS)]
    PROMPTS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        for name in RUNS:
            subprocess.run(command(model, name, HERE / name), check=True)


if __name__ == "__main__":
    main()
