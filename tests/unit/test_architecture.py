"""docs/architecture.md's reading order names files that are there, no file of the package is in no room, and imports are told as they are enforced."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ORDER = re.findall(r"^\| (\d+) \| `([^`]+)` \|", PAGE, re.MULTILINE)
BESIDE = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`[^|]+) \|", PAGE.partition("Beside it")[2].partition("## ")[0], re.MULTILINE)))


def test_the_reading_order_counts_files_that_are_there() -> None:
    assert [int(number) for number, _ in ORDER] == list(range(1, len(ORDER) + 1))
    assert 25 <= len(ORDER) <= 35, "an hour's reading"
    assert [name for _, name in ORDER if not (ROOT / "m2ray" / name).is_file()] == []


def test_rooms_that_are_named_are_there() -> None:
    assert [name for name in BESIDE if not (ROOT / "m2ray" / name).exists()] == []
    rooms = re.findall(r"^  (?:  )?(\w+(?:/|\.py)) ", PAGE.partition("m2ray/\n")[2].partition("```")[0], re.MULTILINE)
    assert {f"{path.name}/" for path in (ROOT / "m2ray").iterdir() if (path / "__init__.py").exists()} <= set(rooms)


def test_every_file_is_in_the_order_or_in_a_room_beside_it() -> None:
    files = {path.relative_to(ROOT / "m2ray").as_posix() for path in (ROOT / "m2ray").rglob("*.py")}
    placed = {name for _, name in ORDER} | {file for file in files for room in BESIDE if file == room or file.startswith(room)}
    assert len(files) > 100
    assert sorted(files - placed) == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_imports_are_told_as_they_are_enforced(page: str) -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"][0]
    chain = re.search(r"^`?api > [^`.]*> errors`?", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert chain is not None
    told = [set(re.findall(r"\w+", rank)) - {"jobs"} for rank in chain[0].split(">")]
    assert told == [set(re.findall(r"\w+", rank)) for rank in contract["layers"]]
