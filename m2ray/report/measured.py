"""Plan against measured, padding among it, from report.json."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from markupsafe import Markup

from m2ray.report.elements import Cell, paragraph, section, table
from m2ray.sizes import bytes_in_words, seconds_in_words

Report = Mapping[str, Any]
"""What report.json holds: docs/planning.md."""

ABSENT = "The run has no report.json yet: it is written when the last shard is committed."

_WORDS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "tokens_per_s": ("tokens a second", lambda value: f"{value:,.0f}"),
    "padding_waste": ("share of the computed tokens that was padding", lambda value: f"{value:.1%}"),
    "output_bytes": ("output", bytes_in_words),
    "parameter_bytes": ("weights in memory", bytes_in_words),
    "rows": ("rows of each site and layer", lambda value: f"{value:,}"),
    "saved_bytes": ("less output than of all tokens", bytes_in_words),
    "limiting_resource": ("what limits the run", lambda value: str(value).replace("_", " ")),
}


def measured(report: Report | None) -> Markup:
    """The section."""
    if report is None:
        return section("measured", "Plan and measured", paragraph(ABSENT))
    return section(
        "measured",
        "Plan and measured",
        paragraph(
            f"{report['tokens']:,} tokens in {seconds_in_words(report['extract_s'])}, after {seconds_in_words(report['load_s'])} of loading,",
            "by the driver that finished the run.",
        ),
        table("What was planned, and what was measured", ("", "planned", "measured", "measured / planned"), _rows(report)),
        _padding(report),
    )


def _rows(report: Report) -> Iterator[tuple[Cell, ...]]:
    for key, (name, in_words) in _WORDS.items():
        pair = report.get(key) or {}
        planned, found = pair.get("planned"), pair.get("measured")
        share = f"{found / planned:.2f}" if _is_number(planned) and _is_number(found) and planned else ""
        yield name, *("not known" if value is None else in_words(value) for value in (planned, found)), share


def _padding(report: Report) -> Markup:
    stages = [stage for stage in report["stages"] if stage["padded_tokens"]]
    return table(
        "Padding by stage",
        ("stage", "micro-batches", "real tokens", "computed tokens", "padding"),
        (
            (
                f"{stage['replica']}.{stage['stage']}",
                f"{stage['micro_batches']:,}",
                f"{stage['tokens']:,}",
                f"{stage['padded_tokens']:,}",
                f"{1 - stage['tokens'] / stage['padded_tokens']:.1%}",
            )
            for stage in stages
        ),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
