"""`m2ray inspect --foreign`: another tool's dump of hidden states, and the faults in it."""

import json
import time
from pathlib import Path

import click

from m2ray.cli.output import say
from m2ray.export.foreign.dumps import Dump, open_dump
from m2ray.export.foreign.faults import KINDS, Findings, look
from m2ray.export.foreign.vocabulary import Vocabulary

_EVERY_S = 5.0
_SHOWN_SAMPLES = 3


def inspect_foreign(folder: str, tokenizer: str | None, *, as_json: bool) -> bool:
    """Look at a dump, print what it is and what is wrong with it; whether it is without fault."""
    dump = open_dump(Path(folder).expanduser())
    vocabulary = Vocabulary.load(Path(tokenizer).expanduser()) if tokenizer else None
    findings = look(dump, vocabulary, _Progress())
    if as_json:
        click.echo(json.dumps(_facts(dump, findings, vocabulary), indent=2))
    else:
        _print(dump, findings, vocabulary)
    return not findings.faults


def _facts(dump: Dump, findings: Findings, vocabulary: Vocabulary | None) -> dict[str, object]:
    """The stable keys of `--json`."""
    return {
        "layout": dump.layout,
        "files": dump.num_files,
        "other_files": dump.num_others,
        "export": dump.export,
        "samples": findings.num_samples,
        "tokens": findings.num_tokens,
        "planes": list(findings.planes),
        "text_compared": bool(vocabulary and vocabulary.is_steady),
        "faults": {
            kind: {"samples": found.count, "first": [{"sample": name, "what": what} for name, what in found.first]}
            for kind, found in findings.faults.items()
        },
    }


def _print(dump: Dump, findings: Findings, vocabulary: Vocabulary | None) -> None:
    others = f"; {dump.num_others:,} other files were not looked at" if dump.num_others else ""
    say(f"{dump.layout}: {dump.num_files:,} files with {findings.num_samples:,} samples of {findings.num_tokens:,} tokens{others}")
    if dump.export:
        computed = f", computed in {dump.export['compute_dtype']}" if "compute_dtype" in dump.export else ""
        say(f"written by m2ray export, of run {dump.export.get('run_id', 'unknown')}{computed}")
    say(f"planes of the first sample: {', '.join(findings.planes) or 'none'}")
    if vocabulary is not None and not vocabulary.is_steady:
        say("The tokenizer makes other tokens of its own tokens' text: only ids beyond its vocabulary are told.")
    for kind in KINDS:
        if found := findings.faults.get(kind):
            say(f"{found.count:,} samples {KINDS[kind]}:")
            for name, what in found.first[:_SHOWN_SAMPLES]:
                say(f"  {name}: {what}")
            if found.count > _SHOWN_SAMPLES:
                say(f"  and {found.count - _SHOWN_SAMPLES:,} more; --json lists the first {len(found.first)}")
    if not findings.faults:
        say("No fault was found.")


class _Progress:
    """A line on the error stream every few seconds."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, samples: int, tokens: int) -> None:
        if time.monotonic() - self._said >= _EVERY_S:
            self._said = time.monotonic()
            say(f"inspect: {samples:,} samples, {tokens:,} tokens", err=True)
