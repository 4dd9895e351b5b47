"""Statistics of captured rows: which kinds there are, of which sites and layers they are taken, and how large they are.

`moments`, `norms` and `covariance` are of every site of hidden width that a run captures, `experts` of the router's choices.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from m2ray.batches import PartSpec
from m2ray.errors import ConfigError, raise_all
from m2ray.option_text import parse_layers
from m2ray.sites import SITES

Kind = Literal["moments", "norms", "covariance", "experts"]

Asked = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Kind -> site -> the layers, ascending; none of a site of the whole model. job.json has it so."""

Place = tuple[str, int | None]
"""A site and a layer; None of a site of the whole model."""

STATISTICS = "statistics"
"""What a receipt of a shard's statistics has in the place of a site: it is of all those that one stage has."""

ROUTER = "router_topk"
"""The site that `experts` counts. It is captured for it, also where none of its rows are kept."""

NORM_BINS = 8192
"""A row's norm as float32 falls into the bin that its bits name without the last 18: an octave has 32, each 1/32 of its lower end wide.
No logarithm is rounded on the way, so a count is the same on every device that gives the same norm."""

NORM_SHIFT = 18

PIECE_ROWS = 1024
"""Rows of a micro-batch that are added up in float32. Their sums keep about seven digits whichever way a device adds."""

ROWS_AT_ONCE = 4 * PIECE_ROWS
"""Rows that are float32 at one time."""

PAIRS_AT_ONCE = 1 << 19
"""Of experts that rows have chosen, laid out at one time to be counted."""

_FILLED_BINS = 256
"""Of norms: eight octaves of them."""


def norm_edges() -> npt.NDArray[np.float64]:
    """Where the bins of norms begin and end: float64 [NORM_BINS + 1], ascending up to infinity. Bin b holds [edge b, edge b + 1)."""
    bits = np.minimum(np.arange(NORM_BINS + 1, dtype=np.uint32) << NORM_SHIFT, np.float32(np.inf).view(np.uint32))
    edges: npt.NDArray[np.float64] = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return edges


def statistics_of_run(text: str | None, parts: Sequence[PartSpec], router_layers: Sequence[int], num_layers: int) -> Asked:
    """What `statistics` asks for: "moments:all, norms:all, experts:all, covariance:20,30". A kind without layers is of all.

    Args:
        text: the option; None asks for nothing.
        parts: what the run captures at its sites, whether rows of it are kept or not.
        router_layers: those that choose experts.
        num_layers: of the model.

    Raises:
        ConfigError: all at once: a kind that is none or comes twice, layers that are none, or of which nothing of the kind is captured.
    """
    problems: list[ConfigError] = []
    asked: dict[str, dict[str, tuple[int, ...]]] = {}
    for kind, layers in _pieces(text, problems) if text is not None else ():
        try:
            asked[kind] = _sites_of(text or "", kind, layers, parts, router_layers, num_layers)
        except ConfigError as problem:
            problems.append(problem)
    raise_all(problems)
    return {kind: asked[kind] for kind in get_args(Kind) if kind in asked}


def _pieces(text: str, problems: list[ConfigError]) -> Iterable[tuple[str, str]]:
    """Each kind with its layers as they are written. A piece that begins with a digit belongs to the kind before."""
    found: dict[str, list[str]] = {}
    kind = ""
    for piece in filter(None, map(str.strip, text.split(","))):
        named = re.fullmatch(r"([^:\d\s][^:]*?)\s*(?::\s*(.*))?", piece)
        if named is None and kind:
            found[kind].append(piece)
            continue
        kind, layers = (named[1], named[2]) if named else (piece, None)
        if kind not in get_args(Kind):
            problems.append(ConfigError(f"statistics = {text!r}: there is no {kind!r}.", f"There are: {', '.join(get_args(Kind))}."))
        elif kind in found:
            problems.append(ConfigError(f"statistics = {text!r}: {kind} comes twice.", f'Write "{kind}:20,30" once.'))
        found[kind] = ["all" if layers is None else layers]
    if not found and not problems:
        problems.append(ConfigError(f"statistics = {text!r} names none.", f"There are: {', '.join(get_args(Kind))}."))
    return [(kind, ",".join(pieces)) for kind, pieces in found.items() if kind in get_args(Kind)]


def _sites_of(
    text: str, kind: str, layers: str, parts: Sequence[PartSpec], router_layers: Sequence[int], num_layers: int
) -> dict[str, tuple[int, ...]]:
    """The sites and layers of which a kind is taken."""
    has: list[Place] = [(part.site, part.layer) for part in parts if SITES[part.site].columns[0][2] == "hidden_size"]
    if kind == "experts":
        has = [(ROUTER, layer) for layer in router_layers]
    chosen: set[int | None] = {layer for _, layer in has}
    if layers != "all":
        try:
            chosen = set(parse_layers(layers, num_layers))
        except ConfigError as problem:
            raise ConfigError(f"statistics = {text!r}, {kind}: {problem.what.partition(': ')[2]}", problem.remedy) from problem
    absent = sorted({layer for layer in chosen if layer is not None} - {layer for _, layer in has})
    if absent or not has:
        of = "chooses experts" if kind == "experts" else "is captured at a site of hidden width"
        which = f"nothing of layer {', '.join(map(str, absent))}" if absent else "nothing"
        remedy = "Leave it out, or capture a later layer." if kind == "experts" else "Leave it out, or add to sites and layers."
        raise ConfigError(f"statistics = {text!r}, {kind}: {which} {of}.", remedy)
    return {
        site: tuple(sorted(layer for at, layer in has if at == site and layer is not None and layer in chosen))
        for site in dict.fromkeys(site for site, layer in has if layer in chosen)
    }


def places(asked: Asked) -> dict[Place, frozenset[str]]:
    """The kinds that are taken at each place. Where there is a covariance there are moments, whose mean it needs."""
    found: dict[Place, set[str]] = {}
    for kind, sites in asked.items():
        for site, layers in sites.items():
            for layer in layers or (None,):
                found.setdefault((site, layer), set()).update((kind, "moments") if kind == "covariance" else (kind,))
    return {place: frozenset(kinds) for place, kinds in found.items()}


def statistic_sites(asked: Asked) -> dict[str, tuple[int, ...]]:
    """The sites that are captured for statistics, with their layers."""
    found = places(asked)
    return {name: tuple(sorted(layer for site, layer in found if site == name and layer is not None)) for name, _ in found}


def widths(asked: Asked, parts: Iterable[PartSpec], num_experts: int) -> Iterator[tuple[frozenset[str], int]]:
    """The kinds that are taken of each of these parts, and how wide its statistics are: as a row, or as there are experts."""
    kinds_at = places(asked)
    for part in parts:
        kinds = kinds_at.get((part.site, part.layer), frozenset())
        if kinds:
            yield kinds, num_experts if "experts" in kinds else part.columns[0].width


# -- sizes ----------------------------------------------------------------------------------------------------------------


def contribution_bytes(kinds: frozenset[str], width: int) -> int:
    """What a shard leaves of one place, about; `width` is that of a row, or the number of experts where they are counted."""
    sizes = {"moments": 32 * width, "norms": 16 * _FILLED_BINS, "covariance": 4 * width**2, "experts": 4 * width**2}
    return sum(sizes[kind] for kind in kinds)


def merged_bytes(kinds: frozenset[str], width: int) -> int:
    """What `statistics/` holds of one place, at most: of pairs of experts each is a row."""
    sizes = {"moments": 28 * width, "norms": 24 * _FILLED_BINS, "covariance": 4 * width**2 + 8 * width, "experts": 4 * width**2}
    return sum(sizes[kind] for kind in kinds)


def device_bytes(kinds: frozenset[str], width: int, rows: int) -> int:
    """What taking the statistics of so many rows of one place allocates on their device, the results among it."""
    piece, at_once = min(rows, PIECE_ROWS) * width, min(rows, ROWS_AT_ONCE) * width
    sizes = {
        "moments": 8 * at_once + 128 * width,
        "norms": 8 * piece + 4 * NORM_BINS,
        "covariance": 12 * piece + 16 * width**2,
        "experts": 20 * PAIRS_AT_ONCE + 12 * width**2,
    }
    return max((sizes[kind] for kind in kinds), default=0) + micro_batch_bytes(kinds, width)


def micro_batch_bytes(kinds: frozenset[str], width: int) -> int:
    """What one micro-batch leaves of one place."""
    sizes = {"moments": 32 * width, "norms": 4 * NORM_BINS, "covariance": 4 * width**2, "experts": 4 * width**2}
    return sum(sizes[kind] for kind in kinds)


def shard_bytes(kinds: frozenset[str], width: int) -> int:
    """What a stage holds of one place while a shard goes through it: sums in float64 and int64."""
    sizes = {"moments": 32 * width, "norms": 8 * NORM_BINS, "covariance": 8 * width**2, "experts": 8 * width**2}
    return sum(sizes[kind] for kind in kinds)
