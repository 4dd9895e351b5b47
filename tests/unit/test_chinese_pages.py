"""The Chinese pages say what the English ones do, as far as commands, tables, figures and links tell; links of all pages lead somewhere."""

import re

import pytest
from pydantic_core import PydanticUndefined

from m2ray.config import ExtractConfig
from m2ray.option_types import legal_values
from tests.unit.chinese_pages import LINK, PAGES, ROOT, TERMS, anchors, blocks, differences, leads_to

EVERY_PAGE = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "docs/decisions", "docs/zh", "benchmarks", "cluster", "findings")
    for path in (ROOT / folder).glob("*.md")
)
ENGLISH = "# Title\n\nA stage takes 7.3 GB by 26 November 2026, [more](stores.md).\n\n| `a_b` | 3 s |\n\n```\nm2ray plan  # why\n```\n\n- one, 5 s\n\n## End\n"
CHINESE = "# 标题\n\n[x](y)\n\n到 2026 年 11 月 26 日，一个阶段占 7.3 GB，[详见](../stores.md)。\n\n| `a_b` | 3 秒 |\n\n```\nm2ray plan  # 原因\n```\n\n- 一，5 秒\n\n## 尾\n"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("english", PAGES)
def test_the_page_has_the_commands_tables_and_figures_of_the_english_one(english: str) -> None:
    found = differences(english, PAGES[english], read(english), read(PAGES[english]))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(read(page)):
        path, anchor = leads_to(page, target)
        if "://" in path:
            continue
        assert (ROOT / path).exists(), f"{page} links to {target}, and no file {path} is there"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}; the headings of {path} are {anchors(path)}"


@pytest.mark.parametrize("english", PAGES)
def test_both_languages_name_each_other(english: str) -> None:
    under_the_title = blocks(read(PAGES[english]))[1].text
    assert [leads_to(PAGES[english], target)[0] for target in LINK.findall(under_the_title)] == [english, TERMS]
    first_lines = "".join(read("README.md").splitlines(keepends=True)[:5])
    assert "](README.zh.md)" in first_lines


def test_the_options_table_is_true() -> None:
    lines = iter(read("README.zh.md").splitlines())
    for name, field in ExtractConfig.model_fields.items():
        default = "" if field.default is PydanticUndefined else f"`{'' if field.default is None else field.default}`".replace("``", "")
        values = legal_values(field.annotation)
        listed = "" if any(value.isupper() for value in values) else f"{', '.join(values)}。"
        row = f"| `{name}` | {default} | {listed}"
        assert any(line.startswith(row) for line in lines), (
            f"README.zh.md lacks a row, or has it in another place: {row}... ({field.description})"
        )


def test_every_term_is_used() -> None:
    pages = "".join(read(page) for page in PAGES.values())
    terms = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", read(TERMS), re.MULTILINE)[1:]
    assert len(terms) > 20
    assert [term for term, chinese in terms if chinese not in pages] == []


def found(change: str, by: str) -> str:
    assert change in ENGLISH
    return "\n".join(differences("docs/planning.md", "docs/zh/planning.md", ENGLISH.replace(change, by), CHINESE))


def test_a_translation_is_equal() -> None:
    assert found("one", "two") == ""


@pytest.mark.parametrize(
    ("change", "by", "said"),
    [
        ("7.3 GB", "7.4 GB", ["docs/zh/planning.md:5", "it lacks 7.4 GB", "it has 7.3 GB"]),
        ("7.3 GB", "7.3 MB", ["it lacks 7.3 MB"]),
        ("26 November", "27 November", ["it lacks 27;"]),
        ("stores.md", "export.md", ["it lacks link to docs/export.md"]),
        ("`a_b`", "`a_c`", ["docs/zh/planning.md:7", "in cell 1 it lacks `a_c`"]),
        ("3 s", "3 minutes", ["in cell 2 it lacks 3 min"]),
        ("3 s |", "3 s | |", ["The English row has 3 cells, the Chinese one 2"]),
        ("m2ray plan", "m2ray bench", ["docs/zh/planning.md:9", "copy the English block"]),
        ("- one, 5 s", "- one, 5 s\n- another", ["docs/planning.md has list item 'another' (line 12) without", "below line 13"]),
        (
            "- one, 5 s",
            "- one, 6 s\n- another",
            ["zh/planning.md:13 translates docs/planning.md:11", "it lacks 6 s", "has list item 'another' (line 12)"],
        ),
        (
            "- one, 5 s",
            "- new, 8 s\n- one, 5 s of 7 s",
            ["has list item 'new, 8 s' (line 11)", "docs/planning.md:12 ('one, 5 s", "it lacks 7 s:"],
        ),
        ("## End", "## New\n\nWords.\n\n## End", ["lines 13 to 15 ('## New' ...)", "below line 13"]),
        ("- one, 5 s", "", ["docs/zh/planning.md has list item '一，5 秒' (line 13) without its like", "delete it"]),
        ("# Title", "## Title", ["has heading of level 2"]),
    ],
)
def test_what_the_translation_lacks_is_said(change: str, by: str, said: list[str]) -> None:
    message = found(change, by)
    assert [part for part in said if part not in message] == [], message
