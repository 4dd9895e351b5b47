"""An audit in words, for `m2ray verify` and `m2ray inspect`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from m2ray.activations.audits import AuditRecord, Compared

_NOT_SUMMED_UP = ("format_version", "run_id", "versions", "compared", "wrong", "cleared")
_SHOWN_WRONG = 10
_NAMES = {"transformers": "transformers' own model", "m2ray": "m2ray in other stages"}
_BATCHES = {"alone": "each sequence alone", "recorded": "the recorded micro-batches"}


def summary(record: AuditRecord) -> dict[str, Any]:
    """The audit without its distributions, as JSON values."""
    return {name: value for name, value in asdict(record).items() if name not in _NOT_SUMMED_UP}


def line(summed_up: Mapping[str, Any]) -> str:
    """One line on what `summary` gives."""
    of = f"{summed_up['sequences']:,} of {summed_up['of_sequences']:,} sequences (seed {summed_up['seed']})"
    verdict = "passed" if summed_up["passed"] else f"FAILED, {summed_up['num_wrong']:,} sequences are wrong"
    least = summed_up["least_share_found"]
    found = "" if least is None else f"; had {least:.3g} of all been wrong, it would have found one with 95 %"
    return f"{summed_up['audited_at']}  {of}, {'bit by bit' if summed_up['exact'] else 'within rounding'}: {verdict}{found}"


def lines(record: AuditRecord) -> Iterator[str]:
    """All that a person needs of an audit: how far rows are, by whom and in which batch, and what is wrong."""
    pairs = sorted({(each.by, each.batch) for each in record.compared}, reverse=True)
    for by, batch in pairs:
        found = [each for each in record.compared if (each.by, each.batch) == (by, batch)]
        yield f"{_NAMES[by]}, {_BATCHES[batch]}: {_told(found)}"
    yield from record.remarks
    for told in (record.cleared, record.wrong):
        for sequence_id, why in list(told.items())[:_SHOWN_WRONG]:
            yield f"sequence {sequence_id}: {why}"
    if record.num_wrong > _SHOWN_WRONG:
        yield f"and {record.num_wrong - _SHOWN_WRONG:,} more sequences"
    if not record.passed and not record.num_wrong:
        yield "Most rows of a layer differ by more than rounding: see `compared` of --json."
    if record.least_share_found is None:
        yield "Tokens choose experts, which rounding may change: how few wrong sequences would show cannot be told. Audit on the kind of machine that made the rows."
    yield f"audit: {line(summary(record))}"


def _told(found: list[Compared]) -> str:
    rows, same_bits, beyond = (sum(getattr(each, name) for each in found) for name in ("rows", "same_bits", "beyond"))
    worst = max(found, key=lambda each: each.greatest)
    at = worst.site if worst.layer is None else f"layer {worst.layer}" + ("" if worst.site == "residual" else f" ({worst.site})")
    where = f"; the largest difference is {worst.greatest:.2g} of the row's norm, at {at}" if worst.greatest else ""
    return f"{same_bits:,} of {rows:,} rows have the same bits, {beyond:,} lie beyond the bound{where}"
