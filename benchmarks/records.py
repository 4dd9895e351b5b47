"""Benchmark results: one JSON file a benchmark in results/, and README.md rendered from all of them.

python benchmarks/records.py     renders README.md again
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class Row:
    """One measured claim. `ratio` is `value` to `baseline`, both measured in the same run; `target` is what was aimed at."""

    what: str
    value: float
    unit: str
    baseline: float | None = None
    baseline_is: str = ""
    ratio: float | None = None
    target: str = ""
    note: str = ""


def machine() -> str:
    """The machine in words: cores, memory, GPU."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ", no GPU"
    return f"{os.cpu_count()} cores, {memory_gib:.0f} GiB{gpus}"


def record(name: str, title: str, rows: list[Row], command: str = "") -> Path:
    """Write results/NAME.json with what is needed to run it again: `command`, or the module that runs now.

    M2RAY_COMMIT names the commit where the tree that runs has no history of its own.
    """
    document = {
        "title": title,
        "command": command or shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": os.environ.get("M2RAY_COMMIT") or _head() or "unknown",
        "versions": {package: version(package) for package in ("torch", "transformers", "ray", "pyarrow")}
        | {"python": platform.python_version()}
        | ({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(_line(row))
    return path


def _head() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=False).stdout.strip()


def render() -> None:
    """README.md from results/*.json: a table of contents, and a section a file."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    lines = [
        "# Benchmarks",
        "",
        (FOLDER / "about.md").read_text(encoding="utf-8").strip(),
        "",
        "| what | machine | date |",
        "|---|---|---|",
    ]
    lines += [f"| [{each['title']}](#{_anchor(each['title'])}) | {each['machine']} | {each['date']} |" for each in documents] + [""]
    for document in documents:
        versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
        lines += [f"## {document['title']}", "", f"`{document['command']}`", ""]
        lines += [f"{document['machine']} · {document['date']} · commit {document['commit']} · {versions}", ""]
        lines += ["| what | measured | baseline in the same run | ratio | target | note |", "|---|---|---|---|---|---|"]
        lines += [_line(Row(**row)) for row in document["rows"]]
        lines.append("")
    (FOLDER / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _anchor(title: str) -> str:
    """Of a section, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _line(row: Row) -> str:
    baseline = "" if row.baseline is None else f"{row.baseline_is} {row.baseline:,.4g} {row.unit}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    return f"| {row.what} | {row.value:,.4g} {row.unit} | {baseline} | {ratio} | {row.target} | {row.note} |"


if __name__ == "__main__":
    render()
