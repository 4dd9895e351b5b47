"""Matplotlib's figures as SVG inside the page: in the page's colours, light and dark, with a title and a description for those who hear it."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

from markupsafe import Markup

from m2ray.extras import naming_extras

Draw = Callable[[Any], object]
"""Takes matplotlib's axes."""

INK, GRID = "#0a0b0c", "#0a0b0d"
COLOURS = ("#0a0b10", "#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14")
"""Stand for the colours of page.css, which takes others where it is dark."""

SHADES = "viridis"
"""Of heatmaps: as light and dark on white as on black, and told apart by those who see no red or green."""

_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", **{colour: f"var(--series-{number})" for number, colour in enumerate(COLOURS)}}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "m2ray",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"#([\w-]+)")


def require_matplotlib() -> None:
    """Raise MissingPackageError where matplotlib is not installed."""
    with naming_extras():
        import matplotlib as mpl  # noqa: F401


def drawn(name: str, title: str, description: str, draw: Draw, height: float = 3.4) -> Markup:
    """A figure that `draw` fills, 8 wide and `height` inches high.

    Args:
        name: of the figure, unlike that of any other on the page.
        title, description: what is drawn, and what one sees there, in words.
        draw: what draws it.
        height: inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Only the layout is reckoned by matplotlib's own font; the words are drawn by the browser's.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = Figure(figsize=(8, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, title, description)


def _inline(data: bytes, name: str, title: str, description: str) -> Markup:
    root = ET.fromstring(data)  # noqa: S314 - matplotlib's own output
    for above in root.iter():
        for each in [each for each in above if each.tag == f"{{{_SVG}}}metadata"]:
            above.remove(each)
    _rename(root, name)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for place, (tag, words) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        element.text = words
        root.insert(place, element)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    svg = ET.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)  # noqa: S704 - an XML library has escaped what it holds


def _rename(root: ET.Element, name: str) -> None:
    """Give what is referred to a name of this figure's own; several figures are on one page. Other names go."""
    values = [value for each in root.iter() for value in each.attrib.values() if "#" in value and not value.startswith("data:")]
    used = {found for value in values for found in _REFERENCE.findall(value)}
    for each in root.iter():
        if each.get("id") is not None and each.get("id") not in used:
            del each.attrib["id"]
        for key, value in each.attrib.items():
            if key == "id":
                each.set(key, f"{name}-{value}")
            elif value.startswith("#") or "url(#" in value:
                each.set(key, value.replace("#", f"#{name}-"))
