"""The audits of a run, `audit/audit-000001.json` and on: rows of a random sample, held against transformers itself (m2ray.audit)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

from m2ray.activations.job import JobRecord
from m2ray.activations.json_record import read_record, to_json
from m2ray.errors import AlreadyExistsError, RunDamagedError
from m2ray.storage import Store

FOLDER = "audit"
_NAME = re.compile(r"audit/audit-(\d{6,})\.json")
_TRIES = 100


@dataclass(frozen=True)
class Compared:
    """How far the run's rows of one site and layer are from those that were computed again.

    Attributes:
        by: transformers' whole model, or m2ray in stages of another cut.
        batch: each sequence "alone", or in the "recorded" micro-batch, padded as then.
        tolerance: the most that a row may differ by, as a share of its norm; 0 for the same bits.
        rows: that were compared.
        same_bits: of them.
        beyond: those that differ by more than the tolerance.
        greatest: the largest difference, as a share of the row's norm; infinite ones, of rows without a norm, as 1e300.
        exponents: rows whose bits differ, by the power of two below their difference: at -13 those from 2**-13 up to 2**-12.
    """

    by: Literal["transformers", "m2ray"]
    batch: Literal["alone", "recorded"]
    site: str
    layer: int | None
    tolerance: float
    rows: int
    same_bits: int
    beyond: int
    greatest: float
    exponents: Mapping[str, int]


@dataclass(frozen=True)
class AuditRecord:
    """One audit.

    Attributes:
        audited_at: when it began, UTC, ISO 8601.
        share, seed: what was asked for.
        sequences, of_sequences: that were audited, and that were committed then.
        tokens: of the audited ones.
        tokens_from: where the token ids came from: the "prompts", tokenised again, or the "run" itself.
        exact: whether the recorded micro-batches had to give the same bits.
        remarks: why not, why tokens came from the run, and what was left out.
        versions: of what it was done with.
        compared: the distribution of differences, by site and layer.
        wrong: sequences that failed by themselves, and why; `num_wrong` counts all, of which the first are listed.
        passed: whether nothing was found.
        least_share_found: the smallest share of wrong sequences of which this sample would have held one with 95 %; None where a wrong
            sequence would not show by itself.
        cleared: sequences with rows beyond a tolerance that transformers in float32 showed to be rounding, and how; the first 100. Absent from
            audits of before.
    """

    format_version: int
    run_id: str
    audited_at: str
    share: float
    seed: int
    sequences: int
    of_sequences: int
    tokens: int
    tokens_from: Literal["prompts", "run"]
    exact: bool
    remarks: tuple[str, ...]
    versions: Mapping[str, str]
    compared: tuple[Compared, ...]
    num_wrong: int
    wrong: Mapping[str, str]
    passed: bool
    least_share_found: float | None
    cleared: Mapping[str, str] = field(default_factory=dict)


def audit_keys(store: Store) -> list[str]:
    """The keys of a run's audits, in order. Raises StoreError."""
    return sorted((key for key, _ in store.list(FOLDER) if _NAME.fullmatch(key)), key=lambda key: (len(key), key))


def read_audit(store: Store, job: JobRecord, key: str) -> AuditRecord:
    """One audit.

    Raises:
        RunDamagedError: it is not understood, or of another run.
        RunConflictError: a newer m2ray wrote it.
        StoreError: it cannot be read.
    """
    record = read_record(store, key, _AUDIT)
    if record.run_id != job.run_id:
        raise RunDamagedError(
            f"{store.where(key)} is of run {record.run_id}; job.json is of run {job.run_id}.", "It came from another run: delete it."
        )
    return record


def read_audits(store: Store, job: JobRecord) -> Iterator[tuple[str, AuditRecord]]:
    """Key and content of each audit, in order. Raises as `read_audit` does."""
    return ((key, read_audit(store, job, key)) for key in audit_keys(store))


def write_audit(store: Store, record: AuditRecord) -> str:
    """Keep an audit under the next free number, and give its key. Raises StoreError."""
    for _ in range(_TRIES):
        number = max((int(key[len("audit/audit-") : -len(".json")]) for key in audit_keys(store)), default=0) + 1
        key = f"{FOLDER}/audit-{number:06d}.json"
        try:
            store.create(key, to_json(record, indent=2))
        except AlreadyExistsError:
            continue  # another audit ended at the same time
        return key
    raise AlreadyExistsError(f"{store.where(FOLDER)}: no number was free in {_TRIES} tries.", "Try again.")


_AUDIT = TypeAdapter(AuditRecord)
