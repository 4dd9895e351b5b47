"""`m2ray verify`: is every file of a run what was written, and are its rows the model's? Opens damaged shards for extraction again."""

import json
import os
import time
from contextlib import nullcontext
from dataclasses import asdict

import click

from m2ray.activations.audits import FOLDER, AuditRecord, write_audit
from m2ray.activations.job import read_job
from m2ray.activations.json_record import to_json
from m2ray.activations.reading.verify import Damage, Verification, verify
from m2ray.activations.records import WEIGHTS_KEY
from m2ray.activations.resumable import require_todays_format
from m2ray.activations.schema import FORMAT_VERSION
from m2ray.activations.writing.commits import reopen
from m2ray.activations.writing.lease import held
from m2ray.audit import report
from m2ray.cli import Command
from m2ray.cli.output import say
from m2ray.errors import in_ranges
from m2ray.storage import Store, looking, open_store

_EVERY_S = 5.0
_SHOWN_FILES = 20


@click.command(cls=Command)
@click.argument("run", metavar="RUN")
@click.option("--checksums", is_flag=True, help="Read every byte: xxh3 of each file, and the digest of its tokens.")
@click.option(
    "--repair", is_flag=True, help="Take damaged shards back, so that the same extract command extracts them again. No driver may run."
)
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    help="Audit this share of the sequences: compute their rows again by transformers' own model and by m2ray in other stages.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of --sample: which sequences, and which stages.")
@click.option("--model", metavar="FOLDER", help="Of --sample: where the run's model is now; default: where it was.")
@click.option("--prompts", metavar="PATH", help="Of --sample: where the run's prompts are now; default: where they were.")
@click.option("--threads", default=min(16, 2 * (os.cpu_count() or 1)), show_default=True, type=click.IntRange(1), help="Files at a time.")
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    checksums: bool,
    repair: bool,
    sample: float | None,
    seed: int,
    model: str | None,
    prompts: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Check every file of the run folder RUN against its commit: size, footer and rows, and with --checksums every byte.

    Names the damaged files, and those that no record names. Ends with exit code 1 if any is damaged, if a complete run holds other .parquet
    files, or if rows that --sample computes again differ by more than they may.
    """
    with looking():  # whether it can be reached; what takes hours bears a pause of the store
        job = read_job(open_store(run))
    store = open_store(run)
    reopened: list[int] = []
    deleted: list[str] = []
    if repair and job:
        require_todays_format(store, job)  # before every byte is read in vain
    with held(store, _tell, _tell) if repair else nullcontext():
        found = verify(store, checksums=checksums, threads=threads, on_progress=_Progress())
        if repair:
            reopened, deleted = _repair(store, found)
    record = None
    if sample is not None and not found.damages:
        from m2ray.audit.auditing import audit

        record = audit(store, sample, seed, model, prompts, on_progress=_AuditProgress())
    if as_json:
        audited = {"audit": json.loads(to_json(record)) if record else None}
        click.echo(json.dumps(_facts(found, checksums, reopened, deleted) | audited, indent=2))
    else:
        _print(found, checksums, reopened, deleted)
        _print_audit(record, wanted=sample is not None)
    if record:
        _tell(f"The audit is kept as {store.where(write_audit(store, record))}")
    is_right = sample is None or (record is not None and record.passed)
    ctx.exit(0 if found.is_sound and is_right else 1)


def _repair(store: Store, found: Verification) -> tuple[list[int], list[str]]:
    """Delete damaged audits, and open damaged shards again; nothing while a file is damaged that is written once.

    Returns the shards that were opened, and the keys of what was deleted.
    """
    audits = [damage.key for damage in found.damages if _is_audit(damage)]
    store.delete(audits)
    if all(_is_audit(damage) for damage in found.damages) or _written_once(found):
        return [], audits
    return list(found.damaged_shards), audits + reopen(store, found.job, found.damaged_shards)


def _is_audit(damage: Damage) -> bool:
    return damage.key.startswith(f"{FOLDER}/")


def _print_audit(record: AuditRecord | None, *, wanted: bool) -> None:
    if record:
        for line in report.lines(record):
            say(line)
    elif wanted:
        say("Not audited: what is damaged comes first.")


def _tell(line: str) -> None:
    say(line, err=True)


def _facts(found: Verification, checksums: bool, reopened: list[int], deleted: list[str]) -> dict[str, object]:
    """The stable keys of `--json`."""
    return {
        "run_id": found.job.run_id,
        "complete": found.is_complete,
        "checksums": checksums,
        "files": found.files,
        "num_bytes": found.num_bytes,
        "damaged": [asdict(damage) for damage in found.damages],
        "unnamed": [{"key": key, "num_bytes": num_bytes} for key, num_bytes in found.unnamed],
        "reopened_shards": reopened,
        "deleted": deleted,
    }


def _print(found: Verification, checksums: bool, reopened: list[int], deleted: list[str]) -> None:
    for damage in found.damages:
        say(damage.problem)
    depth = "every byte was read" if checksums else "sizes and footers only; --checksums reads every byte"
    state = "complete" if found.is_complete else "not complete"
    say(f"{found.files:,} files with {found.num_bytes:,} bytes ({depth}); {len(found.damages):,} damaged; the run is {state}.")
    _print_unnamed(found)
    if deleted:
        say(
            f"Deleted: {len(deleted):,} files, by which the damaged shards counted and the run was finished; their parts go at the end of the next run:"
        )
        _print_keys(deleted)
    if found.damaged_shards and found.job.format_version == FORMAT_VERSION:
        listed = in_ranges(found.damaged_shards)
        say(
            f"Opened again: shards {listed}. Run the same extract command: it extracts them again."
            if reopened
            else f"Shards {listed} can be extracted again: once no driver runs, repeat this with --repair, then run the same extract command."
        )
    elif found.damaged_shards:
        say(f"The run has format {found.job.format_version}, whose shards this m2ray does not extract again: restore them from a copy.")
    if once := _written_once(found):
        say(f"Files that are written once, at the start, are damaged ({', '.join(once)}): restore them from a copy before all else.")


def _written_once(found: Verification) -> list[str]:
    """The damaged files that no command writes again, and without which none goes on: a shard opened again would stay so."""
    return [damage.key for damage in found.damages if damage.key == WEIGHTS_KEY or damage.key.startswith("sequences/")]


def _print_unnamed(found: Verification) -> None:
    if not found.unnamed:
        return
    num_bytes = sum(size for _, size in found.unnamed)
    say(f"{len(found.unnamed):,} files with {num_bytes:,} bytes are named by no record, and do not count:")
    _print_keys([key for key, _ in found.unnamed])
    say(
        "A glob reads them too. The same extract command deletes those that m2ray wrote; the others are yours to remove."
        if found.is_complete
        else "Shards that are not committed yet left them, or are at work: the end of the run deletes those that m2ray wrote."
    )


def _print_keys(keys: list[str]) -> None:
    for key in keys[:_SHOWN_FILES]:
        say(f"  {key}")
    if len(keys) > _SHOWN_FILES:
        say(f"  and {len(keys) - _SHOWN_FILES:,} more: --json lists all")


class _Progress:
    """A line on the error stream every few seconds."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def __call__(self, files: int, all_files: int, num_bytes: int, all_bytes: int) -> None:
        now = time.monotonic()
        if now - self._said < _EVERY_S:
            return
        self._said = now
        rate = num_bytes / (now - self._began) / 1e6
        say(
            f"verify: {files:,} of {all_files:,} files, {num_bytes / 1e9:.1f} of {all_bytes / 1e9:.1f} GB, {rate:,.0f} MB/s",
            err=True,
        )


class _AuditProgress:
    """The same of an audit."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, what: str, done: int, of: int) -> None:
        if time.monotonic() - self._said >= _EVERY_S:
            self._said = time.monotonic()
            click.echo(f"audit: {done:,}{f' of {of:,}' if of else ''} {what}", err=True)
