"""Holds a Chinese page against the English one that it translates, block by block, by what needs no Chinese.

Blocks are headings, paragraphs, list items, table rows and fenced code, in the English order. Of each are compared its kind, its code, its
numbers with their units, its identifiers and where its links lead; of a row all that cell by cell; of fenced code every line but for comments.
"""

import re
from calendar import month_name
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from posixpath import dirname, join, normpath

ROOT = Path(__file__).parents[2]
TERMS = "docs/zh/terms.md"
PAGES = {"README.md": "README.zh.md"} | {
    f"docs/{name}.md": f"docs/zh/{name}.md" for name in ("migrating", "planning", "prompts", "operations")
}
MONTHS = list(month_name)[1:]
UNITS = {
    "second": "s",
    "seconds": "s",
    "秒": "s",
    "毫秒": "ms",
    "minutes": "min",
    "分钟": "min",
    "hours": "h",
    "小时": "h",
    "byte": "bytes",
    "字节": "bytes",
}
CODE = re.compile(r"``(.+?)``|`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(\d+(?:,\d{3})*(?:\.\d+)?)"
    r"(?:\s?([kMGT]i?B(?:/s)?|%|TFLOP/s|(?:ms|s|seconds?|minutes|hours|bytes?)(?![A-Za-z])|毫秒|秒|分钟|小时|字节))?"
)
IDENTIFIER = re.compile(r"(?<![A-Za-z0-9_])(?:--[a-z][a-z-]+|[A-Za-z]+_[A-Za-z_0-9]+)")

Facts = frozenset[str]
Compared = tuple[str, tuple[str, ...], tuple[Facts, ...]]  # the kind, lines of code, and the facts of each cell; prose is one cell


@dataclass(frozen=True)
class Block:
    """What stands between two blank lines, or a list item, a row or fenced code; `line` counts from 1."""

    kind: str
    line: int
    text: str

    @property
    def said(self) -> str:
        """Its beginning, for a message."""
        return " ".join(self.text.split())[:70]

    @property
    def end(self) -> int:
        """Its last line."""
        return self.line + self.text.count("\n") + (2 if self.kind == "code" else 0)


def blocks(text: str) -> list[Block]:
    """The blocks of a page of Markdown, in order."""
    found: list[Block] = []
    fence = grows = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            fence, grows = not fence, False
            if fence:
                found.append(Block("code", number, ""))
        elif fence or (grows and line.strip() and not re.match(r"\s*(-|\d+\.|#+|\|)( |-|$)", line)):
            found[-1] = Block(found[-1].kind, found[-1].line, f"{found[-1].text}\n{line.strip()}".lstrip("\n"))
        elif not line.strip():
            grows = False
        else:
            kind = kind_of(line)
            found.append(Block(kind, number, re.sub(r"^\s*(-|\d+\.) ", "", line).strip()))
            grows = kind in {"paragraph", "list item"}
    return found


def kind_of(line: str) -> str:
    if heading := re.match(r"#+ ", line):
        return f"heading of level {len(heading[0]) - 1}"
    if line.startswith("|"):
        return "table row"
    return "list item" if re.match(r"\s*(-|\d+\.) ", line) else "paragraph"


@cache
def anchors(page: str) -> list[str]:
    """Of each heading of a page, in order, as GitHub makes them: a second one of the same words ends in -1."""
    titles = [block.text.lstrip("# ") for block in blocks((ROOT / page).read_text(encoding="utf-8")) if block.kind.startswith("heading")]
    found = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return [f"{anchor}-{before}" if (before := found[:place].count(anchor)) else anchor for place, anchor in enumerate(found)]


def leads_to(page: str, target: str) -> tuple[str, str]:
    """Path from the root and anchor of a link on `page`; a URL is its own path."""
    if "://" in target:
        return target, ""
    path, _, anchor = target.partition("#")
    return (normpath(join(dirname(page), path)) if path else page), anchor


def wanted(path: str, anchor: str) -> tuple[str, str]:
    """Where the Chinese page has to lead for an English link: to the Chinese page, where there is one, and the heading at the same place."""
    if path not in PAGES:
        return path, anchor
    return PAGES[path], dict(zip(anchors(path), anchors(PAGES[path]), strict=False)).get(anchor, anchor)


def links(page: str, text: str) -> set[str]:
    """Where links lead, of an English page as the Chinese one should; without the heading, while both languages of the target differ in headings."""
    found = [leads_to(page, target) for target in LINK.findall(CODE.sub("", text))]
    if page in PAGES:
        found = [wanted(path, anchor) for path, anchor in found if path not in PAGES.values()]
    uneven = {copy for source, copy in PAGES.items() if len(anchors(source)) != len(anchors(copy))}
    return {f"link to {path}{f'#{anchor}' if anchor and path not in uneven else ''}" for path, anchor in found}


def facts(page: str, text: str) -> Facts:
    """What of some prose has to be the same in both languages."""
    code = {f"`{' '.join((double or single).split())}`" for double, single in CODE.findall(text)}
    prose = LINK.sub("]", CODE.sub(" ", text))
    prose = re.sub(rf"(?<=\d )({'|'.join(MONTHS)})", lambda month: str(MONTHS.index(month[0]) + 1), prose)
    numbers = {f"{number} {UNITS.get(unit, unit)}".strip() for number, unit in NUMBER.findall(prose)}
    return frozenset(code | numbers | set(IDENTIFIER.findall(prose)) | links(page, text))


def compared(page: str, block: Block) -> Compared:
    """What of a block has to be the same in both languages; equal ones are translations of each other."""
    if block.kind == "code":
        return block.kind, tuple(re.sub(r"(^|\s+)# .*", "", line) for line in block.text.splitlines()), ()
    cells = re.split(r"(?<!\\)\|", block.text)[1:-1] if block.kind == "table row" else [block.text]
    return block.kind, (), tuple(facts(page, cell) for cell in cells)


def differences(english: str, chinese: str, english_text: str, chinese_text: str) -> list[str]:
    """What the Chinese page lacks or has too much, each as a sentence that says where and what to do without Chinese.

    `english` and `chinese` are the pages' paths from the root. The line under the Chinese title, with the links to the English page and to
    the terms, is the Chinese page's own.
    """
    sources, copies = blocks(english_text), blocks(chinese_text)
    del copies[1:2]
    before, after = [compared(english, block) for block in sources], [compared(chinese, block) for block in copies]
    found: list[str] = []
    for a, b, c, d in unequal(before, after):
        pairs = {a + i: c + j for i, j in paired(before[a:b], after[c:d])}
        found += [differs(english, chinese, sources[i], copies[j], before[i][2], after[j][2]) for i, j in pairs.items()]
        lacking, surplus = [sources[i] for i in range(a, b) if i not in pairs], [copies[j] for j in range(c, d) if j not in pairs.values()]
        if lacking:
            found.append(
                f"{english} has {placed(lacking)} without its like in {chinese}, where it belongs below line {copies[c - 1].end if c else 1}: "
                f"copy it there in English if you know no Chinese, and say so in the commit; it will be translated."
            )
        if surplus:
            found.append(f"{chinese} has {placed(surplus)} without its like in {english}: delete it, or move it as there.")
    return found


def unequal(before: list[Compared], after: list[Compared]) -> Iterator[tuple[int, int, int, int]]:
    """Ranges of the English and of the Chinese blocks that are not each other's translation: first and end there, first and end here."""
    for what, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        up = moved_up(before, a, b) if what == "delete" else moved_up(after, c, d) if what == "insert" else 0
        if what != "equal":
            yield a - up, b - up, c - up, d - up


def moved_up(among: list[Compared], start: int, end: int) -> int:
    """How many blocks further up a new section may as well begin, so that it begins with its own heading instead of below the next one's."""
    up = 0
    while up < start and among[start - up - 1] == among[end - up - 1]:
        up += 1
        if among[start - up][0].startswith("heading"):
            return up
    return 0


def placed(found: list[Block]) -> str:
    first, last = found[0], found[-1]
    return f"{first.kind} {first.said!r} (line {first.line})" if first == last else f"lines {first.line} to {last.end} ({first.said!r} ...)"


def paired(before: list[Compared], after: list[Compared]) -> list[tuple[int, int]]:
    """Which of some English blocks each Chinese one translates, by place: the next of its kind, or a later one that shares more facts with it."""
    if [block[0] for block in before] == [block[0] for block in after]:
        return [(place, place) for place in range(len(before))]
    found: list[tuple[int, int]] = []
    for place, (kind, _, cells) in enumerate(after):
        left = [i for i in range(found[-1][0] + 1 if found else 0, len(before)) if before[i][0] == kind]
        if left:
            held = frozenset[str]().union(*cells)
            found.append((max(left, key=lambda i: len(held & frozenset[str]().union(*before[i][2]))), place))
    return found


def differs(english: str, chinese: str, source: Block, copy: Block, before: tuple[Facts, ...], after: tuple[Facts, ...]) -> str:
    where = f"{chinese}:{copy.line} translates {english}:{source.line} ({source.said!r}). "
    if source.kind == "code":
        return f"{where}Code is the same but for comments: copy the English block there."
    if len(before) != len(after):
        return f"{where}The English row has {len(before)} cells, the Chinese one {len(after)}: give it as many."
    said = []
    for cell, (wanted, is_there) in enumerate(zip(before, after, strict=True), 1):
        place = f"in cell {cell} " if len(before) > 1 else ""
        said += [f"{place}it lacks {fact}" for fact in sorted(wanted - is_there)]
        said += [f"{place}it has {fact}, which the English has not" for fact in sorted(is_there - wanted)]
    return f"{where}{'; '.join(said)}: put it right in the Chinese line, where such things are written as in English."
