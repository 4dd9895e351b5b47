"""Prove every causal type of the installed transformers and write docs/models.md: `scripts/models`."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe, Process, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from m2ray.errors import CheckpointError, M2rayError
from m2ray.model.families import parse_config
from m2ray.model.proof import prove
from m2ray.model.site_proof import doubts
from m2ray.model.site_table import IN_LAYERS, layers_of, points_of, refused_sites
from m2ray.model.skeleton import build_skeleton

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PROVED = "proved"
LIMIT_S = 120
LIMIT_BYTES = 4 * 10**9

_HALF_OF_A_HEAD = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "moe_intermediate_size": 1536,
    },
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "glm46v": {"text_config": _HALF_OF_A_HEAD},
    "glm4v": {"text_config": _HALF_OF_A_HEAD},
    "glm4v_moe": {"text_config": {**_HALF_OF_A_HEAD, "head_dim": 128}},
    "glmga": {"text_config": _HALF_OF_A_HEAD},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
}
"""Fields that a type's released checkpoints have, where its default configuration leaves them out and is no model without them."""

_SITES = "## Sites"
_ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)


def causal_types() -> list[str]:
    """Every model type of which the installed transformers has a causal language model, or a multimodal one that gives text."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def outcome_of(model_type: str) -> str:
    """What comes of a type's default configuration: "proved", or why it is refused."""
    try:
        prove(_default_config(model_type))
    except M2rayError as error:
        return _in_a_cell(error)
    return PROVED


def _default_config(model_type: str) -> Any:
    """Raises M2rayError where there is none, or m2ray refuses it."""
    try:
        fields = json.loads(CONFIG_MAPPING[model_type]().to_json_string())
    except StrictDataclassError as error:
        raise CheckpointError(f"transformers has no default configuration of it: {error}") from error
    published = {
        name: fields[name] | value if name == "text_config" else value  # of which the rest stays as it is
        for name, value in PUBLISHED.get(model_type, {}).items()
    }
    return parse_config(json.dumps({**fields, "model_type": model_type, **published}).encode())


def sites_of(model_type: str) -> str:
    """Where a proved type's layers show their sites, as cells of the page's table, and why it lacks others."""
    config = _default_config(model_type)
    skeleton = build_skeleton(config, torch.bfloat16)
    of_layers = [points_of(layer, skeleton.config) for layer in skeleton.layers]
    reasons, there = refused_sites(skeleton.config), layers_of(skeleton)
    cells = [" or ".join(dict.fromkeys(str(points[site]) for points in of_layers if site in points)) or "-" for site in IN_LAYERS]
    lacking = [f"{', '.join(site for site in reasons if reasons[site] == reason)}: {reason}" for reason in dict.fromkeys(reasons.values())]
    lacking += ["final_norm"] if "final_norm" not in {*there, *reasons} else []
    return " | ".join([*cells, "; ".join(lacking) or "-"])


def doubts_of(model_type: str) -> dict[str, str]:
    """The sites of a proved type that are not transformers' own, by name, and what differs."""
    config = _default_config(model_type)
    there = layers_of(build_skeleton(config, torch.bfloat16))
    return {site: what for site, what in doubts(config).items() if site in there}


def outcomes_on_page() -> dict[str, str]:
    """Each type's outcome as docs/models.md has it."""
    return dict(_ROW.findall(PAGE.read_text().partition(_SITES)[0]))


def sites_on_page() -> dict[str, str]:
    """Each proved type's sites as docs/models.md has them."""
    return dict(_ROW.findall(PAGE.read_text().partition(_SITES)[2]))


def page_of(outcomes: dict[str, str], sites: dict[str, str]) -> str:
    """docs/models.md."""
    proved = [model_type for model_type, outcome in outcomes.items() if outcome == PROVED]
    rows = [f"| `{model_type}` | {outcome} |" for model_type, outcome in sorted(outcomes.items())]
    return "\n".join(
        [
            "# Models",
            "",
            f"What comes of each model type of which transformers {transformers.__version__} has a causal language model, or a multimodal one",
            "of which the text tower is run: proved, or refused and why. Written by `scripts/models`; CI proves 30 of them and a tenth of the others again, and fails where this page says otherwise.",
            "",
            "Proved means: of a tiny copy of the type's default configuration, with random weights, chains of one, three and as many stages as",
            "layers gave transformers' own rows bit by bit in float32 and bfloat16, and no row depended on later tokens or on other prompts",
            "([numerics](numerics.md)). No list decides what runs: each checkpoint's own config.json is proved before its extraction, so a",
            "configuration of a proved type may be refused, one of a refused type may run, and a type that is not on this page runs if it is",
            "right. `m2ray doctor --model DIR` says which. How a checkpoint's weights may be quantised is in [layouts](layouts.md).",
            "",
            f"{len(proved)} of {len(outcomes)} are proved.",
            "",
            "| model type | outcome |",
            "|---|---|",
            *rows,
            "",
            _SITES,
            "",
            "Where a decoder layer of each proved type shows what `sites` can name beside `residual`, the layer's output, `embedding`, what its first",
            "layer is given, and `final_norm`: a module's output, or what goes into it. [n] is a place in what it returns, x the layer's factor. Of a",
            "tiny copy, all of it was held against hooks on transformers' own modules and against the layer's own additions, bit by bit",
            "(m2ray/model/site_proof.py); so is the configuration of each run that asks for it. A layer without the module has no part, which the plan says.",
            "",
            f"| model type | {' | '.join(f'`{site}`' for site in IN_LAYERS)} | lacks |",
            "|---" * (len(IN_LAYERS) + 2) + "|",
            *(f"| `{model_type}` | {cells} |" for model_type, cells in sorted(sites.items())),
            "",
        ]
    )


def _in_a_cell(error: M2rayError) -> str:
    """Why, without what is the same for all."""
    text = re.sub(r"\s*m2ray runs (?:a model only|causal decoders|what it can)[^.]*\.", "", str(error))
    text = re.sub(r"config\.json: (?:of a tiny \S+ with its fields, )?", "", text)
    text = re.sub(r" from '/[^;]*", "", text)  # where this machine has transformers
    return " ".join(text.replace("|", "/").split())


def _answer(model_type: str, cache: str, answers: Connection) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until this process ends
    outcome = outcome_of(model_type)
    sites = ""
    if outcome == PROVED:
        wrong = doubts_of(model_type)
        sites = f"NOT PROVED: {wrong}" if wrong else sites_of(model_type)
    answers.send((outcome, sites, time.process_time()))


def _tried(model_type: str, cache: str) -> tuple[str, str, float]:
    """The outcome of a type in a process of its own, its sites if it is proved, and the seconds of a core that it took."""
    receiver, sender = Pipe(duplex=False)
    process = Process(target=_answer, args=(model_type, cache, sender))
    process.start()
    sender.close()
    began_s = time.monotonic()
    while not receiver.poll(0.1):
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        if time.monotonic() - began_s > LIMIT_S or pages * os.sysconf("SC_PAGE_SIZE") > LIMIT_BYTES:
            process.kill()
            process.join()
            return f"NOT FINISHED within {LIMIT_S} s and {LIMIT_BYTES / 1e9:g} GB", "", LIMIT_S
    try:
        outcome, sites, took_s = receiver.recv()
    except EOFError:
        outcome, sites, took_s = "ENDED WITHOUT AN OUTCOME", "", 0.0
    process.join(LIMIT_S)
    return outcome, sites, took_s


def tried(model_types: Sequence[str]) -> Iterator[tuple[str, str, str, float]]:
    """Each type with its outcome, its sites and the seconds of a core that it took."""
    with TemporaryDirectory() as cache:
        for model_type in model_types:
            yield model_type, *_tried(model_type, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/models.md.")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types, to the screen alone")
    only = parser.parse_args().only
    set_start_method("fork")  # transformers is imported once
    outcomes: dict[str, str] = {}
    of_sites: dict[str, str] = {}
    for model_type, outcome, sites, took_s in tried(only or causal_types()):
        print(f"{took_s:6.1f} s  {model_type}: {outcome} {sites}", flush=True)
        outcomes[model_type] = outcome
        of_sites |= {model_type: sites} if outcome == PROVED else {}
    if not only:
        PAGE.write_text(page_of(outcomes, of_sites))


if __name__ == "__main__":
    main()
