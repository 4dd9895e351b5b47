"""What m2ray makes of official models, by their config.json alone: planned, and proved or refused. Writes docs/official_models.md."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import transformers

from m2ray.cli.plan import PlanConfig, make_plan
from m2ray.errors import CheckpointError
from m2ray.model.families import parse_config
from m2ray.model.proof import prove

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "tests" / "data" / "official"
PAGE = ROOT / "docs" / "official_models.md"
GPUS = "8xH200"

_HEAD = f"""# Official models

What m2ray makes of releases by their own config.json, with transformers {transformers.__version__}. [tests/data/official](../tests/data/official/README.md) has
the fields and says where they were found. Written by `python -m scripts.official_models`; tests hold it against what the code says.

*Weights* are those that a run loads (all layers and the embedding) in bfloat16, as `m2ray plan` counts them, and whether the run fits on {GPUS}: with all layers ready, or
with some [packed](planning.md#where-weights-live) as on disk. *Proved*: a tiny copy of that very configuration gave transformers' own rows ([models](models.md)). Where only the layout of the quantised weights is in the way, the rest of the
configuration was tried without it. DeepSeek-V3.1-NVFP4's layout stands in a file of its own (hf_quant_config.json), of which its config.json knows nothing.
MiniMax-M3-NVFP4's list of quantised layers is not among the fields there.

| model | type | layers | weights, GB | {GPUS} | outcome |
|---|---|---|---|---|---|
"""


def models() -> list[str]:
    """The releases whose configuration is known."""
    return sorted((path.stem for path in FACTS.glob("*.json")), key=str.lower)


def row_of(model: str) -> str:
    """A release's line of the page."""
    fields = json.loads((FACTS / f"{model}.json").read_text())
    text = fields.get("text_config") or fields
    outcome, told = _outcome(fields), "| "
    if outcome == "proved":
        told = planned(model)
    return f"| {model} | `{fields['model_type']}` | {text['num_hidden_layers']} | {told} | {outcome} |"


def _outcome(fields: dict[str, Any]) -> str:
    """Proved, or why the configuration is refused; where that is its quantisation, also what comes of it without."""
    refused = _refused(fields)
    if refused is None:
        return "proved"
    plain = _without_quantization(fields)
    if plain == fields or (otherwise := _refused(plain)) == refused:
        return f"refused: {refused}"
    return f"refused: {refused} Without it: {'proved' if otherwise is None else otherwise}"


def _refused(fields: dict[str, Any]) -> str | None:
    try:
        prove(parse_config(json.dumps(fields).encode()))
    except CheckpointError as error:
        return " ".join(error.what.replace("|", "/").split())
    return None


def _without_quantization(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_quantization(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name != "quantization_config"
    }


def planned(model: str) -> str:
    """The bytes of its weights, and whether a run of all layers fits."""
    plan, _ = make_plan(PlanConfig.from_sources(None, {"model": str(FACTS / f"{model}.json"), "gpus": GPUS}))
    is_packed = any(place != "gpu" for each in plan.placed for place in each.residency.values())
    verdict = "does not fit" if not plan.fits else "fits packed" if is_packed else "fits"
    return f"{plan.weights.loaded_bytes / 1e9:,.1f} | {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these, to the screen alone")
    only = parser.parse_args().only
    rows = []
    for model in only or models():
        began_s = time.monotonic()
        rows.append(row_of(model))
        print(f"{time.monotonic() - began_s:5.1f} s  {rows[-1]}", flush=True)
    if not only:
        PAGE.write_text(_HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
