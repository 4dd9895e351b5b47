"""The few pieces of HTML that the page is made of. Whatever text comes from outside is escaped here."""

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from m2ray.errors import shown

_LONGEST = 300
"""Characters of a text from outside; what is longer loses its end."""

Cell = str | Markup


def text(value: object) -> Markup:
    """A value as text of the page: control characters and marks that turn the direction of writing as escapes, and no markup."""
    if isinstance(value, Markup):
        return value
    words = shown(str(value))
    return Markup.escape(words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ...")


def paragraph(*sentences: object) -> Markup:
    """Sentences as one paragraph."""
    return Markup("<p>{}</p>\n").format(Markup(" ").join(map(text, sentences)))


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]], kind: str = "") -> Markup:
    """A table whose first column names its rows. Its frame scrolls by itself, with the keyboard too. `kind` is a class for the style."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(text(each)) for each in headings)
    body = Markup("").join(map(_row, rows))
    return Markup(
        '<div class="frame" role="region" tabindex="0" aria-label="{0}"><table class="{1}"><caption>{0}</caption>\n'
        "<thead><tr>{2}</tr></thead>\n<tbody>\n{3}</tbody></table></div>\n"
    ).format(text(caption), kind, head, body)


def _row(cells: Sequence[Cell]) -> Markup:
    first, *others = cells
    row = Markup("").join(each if each.startswith("<td") else Markup("<td>{}</td>").format(each) for each in map(text, others))
    return Markup('<tr><th scope="row">{}</th>{}</tr>\n').format(text(first), row)


def figure(svg: Markup, caption: str, numbers: Markup) -> Markup:
    """A drawing with its caption and, folded, the table of its numbers."""
    return Markup(
        '<figure><div class="frame" role="region" tabindex="0" aria-label="{0}">{1}</div><figcaption>{0}</figcaption>\n'
        "<details><summary>The same as a table</summary>\n{2}</details></figure>\n"
    ).format(text(caption), svg, numbers)


def section(name: str, title: str, *blocks: Markup) -> Markup:
    """A part of the page; `name` is where a link to it goes."""
    return Markup('<section id="{0}" aria-labelledby="{0}-title"><h2 id="{0}-title">{1}</h2>\n{2}</section>\n').format(
        name, text(title), Markup("").join(blocks)
    )
