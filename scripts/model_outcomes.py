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

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from m2ray.errors import M2rayError
from m2ray.model.families import parse_config
from m2ray.model.proof import prove

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PROVED = "proved"
LIMIT_S = 120
LIMIT_BYTES = 4 * 10**9

_ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)


def causal_types() -> list[str]:
    """Every model type of which the installed transformers has a causal language model, or a multimodal one that gives text."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def outcome_of(model_type: str) -> str:
    """What comes of a type's default configuration: "proved", or why it is refused."""
    try:
        fields = {"model_type": model_type, **json.loads(CONFIG_MAPPING[model_type]().to_json_string())}
        prove(parse_config(json.dumps(fields).encode()))
    except M2rayError as error:
        return _in_a_cell(error.what)
    return PROVED


def outcomes_on_page(page: str | None = None) -> dict[str, str]:
    """Each type's outcome as docs/models.md has it."""
    return dict(_ROW.findall(PAGE.read_text() if page is None else page))


def page_of(outcomes: dict[str, str]) -> str:
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
            "right. `m2ray doctor --model DIR` says which.",
            "",
            f"{len(proved)} of {len(outcomes)} are proved.",
            "",
            "| model type | outcome |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _answer(model_type: str, cache: str, answers: Connection) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until this process ends
    answers.send(outcome_of(model_type))


def _tried(model_type: str, cache: str) -> str:
    """The outcome of a type in a process of its own."""
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
            return f"NOT FINISHED within {LIMIT_S} s and {LIMIT_BYTES / 1e9:g} GB"
    try:
        outcome = str(receiver.recv())
    except EOFError:
        outcome = "ENDED WITHOUT AN OUTCOME"
    process.join(LIMIT_S)
    return outcome


def tried(model_types: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """Each type with its outcome and the seconds that it took."""
    with TemporaryDirectory() as cache:
        for model_type in model_types:
            began_s = time.monotonic()
            yield model_type, _tried(model_type, cache), time.monotonic() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/models.md.")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types, to the screen alone")
    only = parser.parse_args().only
    set_start_method("fork")  # transformers is imported once
    outcomes = {}
    for model_type, outcome, took_s in tried(only or causal_types()):
        print(f"{took_s:5.1f} s  {model_type}: {outcome}", flush=True)
        outcomes[model_type] = outcome
    if not only:
        PAGE.write_text(page_of(outcomes))


if __name__ == "__main__":
    main()
