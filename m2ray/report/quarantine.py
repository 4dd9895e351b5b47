"""What was left out, and why."""

from collections import Counter
from typing import Any

from markupsafe import Markup

from m2ray.report.elements import paragraph, section, table

_SHOWN_REASONS, _SHOWN_ROWS = 30, 100


def quarantine(quarantined: Any, num_sequences: int) -> Markup:
    """The section. `quarantined`: those rows of `sequences`, a pyarrow table."""
    title, rows = "Quarantine", quarantined.select(["sequence_id", "row_id", "reason"]).to_pylist()
    if not rows:
        return section("quarantine", title, paragraph(f"None of the {num_sequences:,} rows of the prompts was quarantined."))
    reasons = Counter(row["reason"] for row in rows).most_common()
    listed = ((row["row_id"], str(row["sequence_id"]), row["reason"]) for row in rows[:_SHOWN_ROWS])
    more = len(rows) - _SHOWN_ROWS
    return section(
        "quarantine",
        title,
        paragraph(f"{len(rows):,} of {num_sequences:,} rows of the prompts ({len(rows) / num_sequences:.1%}) were quarantined."),
        table("Reasons", ("reason", "rows"), ((reason, f"{count:,}") for reason, count in reasons[:_SHOWN_REASONS])),
        paragraph(f"And {len(reasons) - _SHOWN_REASONS:,} other reasons.") if len(reasons) > _SHOWN_REASONS else Markup(""),
        table("Rows", ("row", "sequence", "reason"), listed, "words"),
        paragraph(f"And {more:,} rows more: m2ray inspect --json lists all.") if more > 0 else Markup(""),
    )
