"""TransformerLens, nnsight and fpwap beside m2ray and the loop that people write: 60 prompts, every layer's rows, a machine without a GPU.

    python -m benchmarks.laptop_peers FOLDER                 # 60 prompts, float32, 3 rounds; FOLDER as of benchmarks.laptop
    python -m benchmarks.laptop_peers FOLDER --only fpwap --prompts 4 --rounds 1 --keep

Each peer has an environment of its own in .peers/, made at the first call from PyPI: its package, pinned (benchmarks/peers/*.txt), before those
of this environment, so that torch and transformers are the same for all. A row is a program's median time from start to end; its note says
how its rows lie to those of transformers for one prompt at a time: the largest difference of a row's norm, of layer 0 and of the last,
and whether its tokens are those of the tokenizer.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import m2ray
from benchmarks.laptop import make_prompts, timed, trained_model
from benchmarks.records import Row, record
from benchmarks.runs import ROOT, TIMEOUT_S

PEERS = {"transformer_lens": "TransformerLens 4.3.0", "nnsight": "nnsight 0.8.1", "fpwap": "fpwap 0.1.8"}
CHECKED = 6
"""Prompts whose rows are held against transformers'."""

Rows = dict[int, tuple[list[int], torch.Tensor]]
"""By prompt: its token ids, and its rows, float32 [L, T, H]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["loop", "m2ray", *PEERS])
    parser.add_argument("--keep", action="store_true", help="print the rows and leave results/ as it is")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    model, prompts, few = trained_model(folder), make_prompts(folder, options.prompts), make_prompts(folder, CHECKED)
    expected = alone(model, few)
    times: dict[str, list[float]] = {name: [] for name in options.only}
    peaks: dict[str, list[int]] = {name: [] for name in options.only}
    notes = {}
    for name in options.only:
        notes[name] = difference(rows_of(name, run(folder, name, model, few, options.dtype, check=True)[2]), expected)
    for _ in range(options.rounds):
        for name in options.only:
            taken_s, peak_bytes, _ = run(folder, name, model, prompts, options.dtype)
            times[name].append(taken_s)
            peaks[name].append(peak_bytes)
            print(f"{name}: {taken_s:.1f} s", flush=True)
    base = statistics.median(times["loop"]) if "loop" in times else None
    rows = []
    for name in options.only:
        value = statistics.median(times[name])
        note = f"{max(peaks[name]) / 2**20:,.0f} MiB at the peak; {notes[name]}"
        what = f"{options.prompts} prompts, {options.dtype}: {PEERS.get(name, name)}"
        rows.append(Row(what, value, "s", base, "the loop" if base else "", value / base if base else None, "", note))
    if options.keep:
        print(*rows, sep="\n")
    else:
        record("laptop_peers", "Every layer's rows on a laptop: the loop, m2ray's defaults, and peers", rows)


def run(folder: Path, name: str, model: Path, prompts: Path, dtype: str, *, check: bool = False) -> tuple[float, int, Path]:
    """Seconds, bytes at the peak, and where the rows lie."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    if name == "m2ray":
        command = [sys.executable, "-m", "m2ray.cli", "extract", "--model", str(model), "--prompts", str(prompts), "--output", str(out)]
        command += ["--compute-dtype", dtype]
    else:
        program = ROOT / "benchmarks" / ("loop.py" if name == "loop" else f"peers/with_{name}.py")
        python = sys.executable if name == "loop" else str(environment_of(name))
        command = [python, str(program), str(model), str(prompts), str(out), "--dtype", dtype]
        command += ["--check", str(CHECKED)] if check and name == "fpwap" else []
    taken_s, peak_bytes = timed(command, folder / f"{name}.log")
    return taken_s, peak_bytes, out


def environment_of(name: str) -> Path:
    """The Python of a peer's environment, made unless it is there."""
    folder, wanted = ROOT / ".peers" / name, ROOT / "benchmarks/peers" / f"{name}.txt"
    python, installed = folder / "bin/python", folder / "installed.txt"
    if installed.exists() and installed.read_bytes() == wanted.read_bytes():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=TIMEOUT_S)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "project.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path) + "\n")
    words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-installed", "-r", str(wanted)]
    subprocess.run([str(python), *words], check=True, timeout=TIMEOUT_S)
    installed.write_bytes(wanted.read_bytes())
    return python


def alone(model: Path, prompts: Path) -> Rows:
    """Transformers' own rows of each prompt alone, in float32."""
    tokenizer, reference = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    kept: list[torch.Tensor] = []
    for layer in reference.layers:
        layer.register_forward_hook(lambda _module, _given, output: kept.append(output[0] if isinstance(output, tuple) else output))
    found = {}
    for number, line in enumerate(prompts.read_text(encoding="utf-8").splitlines()):
        kept.clear()
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        with torch.inference_mode():
            reference(input_ids=torch.tensor([ids]), use_cache=False)
        found[number] = ids, torch.cat(kept)
    return found


def rows_of(name: str, out: Path) -> Rows:
    """What a program has stored."""
    if name == "m2ray":
        run = m2ray.open_run(out)
        tokens = run.tokens()
        of_run: Rows = {}
        for number in np.unique(tokens["sequence_id"]).tolist():
            rows = torch.stack([torch.as_tensor(run.layer(layer).sequence(number)).float() for layer in run.layer_numbers])
            of_run[number] = tokens["token_id"][tokens["sequence_id"] == number].tolist(), rows
        return of_run
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        batch = load_file(path)
        num_layers = sum(key.startswith("layer_") for key in batch)
        for number in batch["prompt"].unique().tolist():
            chosen = batch["prompt"] == number
            rows = torch.stack([batch[f"layer_{layer}"][chosen].float() for layer in range(num_layers)])
            found[number] = batch["token_id"][chosen].tolist(), rows
    return found


def difference(rows: Rows, expected: Rows) -> str:
    """How the rows lie to transformers' own, in words. Those of a token that is not the prompt's are left out."""
    more = max(len(rows[number][0]) - len(ids) for number, (ids, _) in expected.items())
    pairs = [(rows[number][1][:, -len(ids) :], theirs) for number, (ids, theirs) in expected.items()]
    words = [
        f"{max(_largest(ours[layer], theirs[layer]) for ours, theirs in pairs):.2g} in {name}"
        for name, layer in (("layer 0", 0), ("the last layer", -1))
    ]
    tokens = "its tokens are the tokenizer's" if not more else f"{more} tokens a prompt are its own"
    return f"rows differ from transformers' for each prompt alone by at most {' and '.join(words)}; {tokens}"


def _largest(ours_TH: torch.Tensor, theirs_TH: torch.Tensor) -> float:
    """The largest difference of a row, as a share of its norm."""
    return float(((ours_TH - theirs_TH).norm(dim=1) / theirs_TH.norm(dim=1)).max())


if __name__ == "__main__":
    main()
