"""The sites: what can be captured, at each decoder layer or once for the whole model. A run's parts follow from this table."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from m2ray.batches import Column, LayerSpan, PartSpec
from m2ray.errors import ConfigError, in_ranges, raise_all
from m2ray.option_text import parse_layers, parse_sites
from m2ray.tensor_rows import TensorTable

Width = Literal["hidden_size", "num_experts", "experts_per_token"]


class Site(NamedTuple):
    """Whether layers have it, each its own, or the model once; and its columns: name, dtype (None for the store dtype) and what its width is."""

    has_layers: bool
    columns: tuple[tuple[str, str | None, Width], ...]


BLOCK_CHANNELS = 128
"""Of a row whose store dtype has 8 bits: so many channels, one after the other, share a scale; the last block of a row may be shorter."""

EIGHT_BITS: Mapping[str, str] = {"float8": "float8_e4m3fn", "int8": "int8"}
"""The store dtypes of 8 bits, and torch's names of what is stored."""

_HIDDEN: tuple[tuple[str, str | None, Width], ...] = (("activation", None, "hidden_size"),)

SITES: Mapping[str, Site] = {
    "residual": Site(True, _HIDDEN),
    "residual_mid": Site(True, _HIDDEN),
    "attention": Site(True, _HIDDEN),
    "mlp": Site(True, _HIDDEN),
    "mlp_in": Site(True, _HIDDEN),
    "router_logits": Site(True, (("activation", "float32", "num_experts"),)),
    "router_topk": Site(True, (("expert_ids", "int16", "experts_per_token"), ("expert_weights", "float32", "experts_per_token"))),
    "embedding": Site(False, _HIDDEN),
    "final_norm": Site(False, _HIDDEN),
}
"""What each is, as a point of the model's arithmetic, is in docs/numerics.md; where a family has it, in m2ray/model."""


LayersOfSites = Mapping[str, tuple[int, ...]]
"""The layers at which each site is captured, ascending; none at sites of the whole model."""


def asked_sites(sites: str, layers: str, num_layers: int) -> LayersOfSites:
    """What the options `sites` and `layers` ask for, of a model of `num_layers`, in the order of SITES. Raises ConfigError, all problems at once."""
    asked: dict[str, tuple[int, ...]] = {}
    problems = []
    for site, own in parse_sites(sites).items():
        try:
            if own is not None and not SITES[site].has_layers:
                raise ConfigError(f"sites = {sites!r}: {site} is one for the whole model.", f'Write "{site}" without layers.')
            asked[site] = parse_layers(layers if own is None else own, num_layers) if SITES[site].has_layers else ()
        except ConfigError as problem:
            problems.append(problem)
    raise_all(problems)
    return {site: asked[site] for site in SITES if site in asked}


def present_sites(asked: LayersOfSites, table: TensorTable) -> LayersOfSites:
    """Those that the model has, each at those of its layers that have it. Raises ConfigError for every site that is left with none."""
    layers_of = {"residual": tuple(range(table.num_layers)), **table.layers_of}
    present: dict[str, tuple[int, ...]] = {}
    problems = []
    for site, layers in asked.items():
        having = layers_of.get(site)
        present[site] = tuple(layer for layer in layers if layer in (having or ()))
        if having is None:
            remedy = f"It has: {', '.join(layers_of)}."
            problems.append(ConfigError(f"sites: the model has no {site}.", remedy))
        elif layers and not present[site]:
            has = f"It is at layers {shown_layers(having)}."
            problems.append(ConfigError(f"sites: none of the layers {shown_layers(layers)} has {site}.", has))
    raise_all(problems)
    return present


def shown_layers(layers: Iterable[int]) -> str:
    """Ascending layers as the option `layers` names them: "0,7,20-61"."""
    return in_ranges(layers).replace(" ", "")


def parts_of_run(
    sites: LayersOfSites, store_dtype: str, hidden_size: int, num_experts: int = 0, experts_per_token: int = 0
) -> tuple[PartSpec, ...]:
    """What every shard of a run consists of, in order: a part for each layer of each site, or one for a site of the whole model.

    Args:
        sites: what is captured.
        store_dtype: of the rows of hidden width; those of 8 bits have a column `scale` beside `activation`.
        hidden_size, num_experts, experts_per_token: of the model.
    """
    widths: Mapping[Width, int] = {"hidden_size": hidden_size, "num_experts": num_experts, "experts_per_token": experts_per_token}
    return tuple(
        PartSpec(site, layer, tuple(_columns(SITES[site], store_dtype, widths)))
        for site, layers in sites.items()
        for layer in (layers if SITES[site].has_layers else (None,))
    )


def _columns(site: Site, store_dtype: str, widths: Mapping[Width, int]) -> Iterator[Column]:
    for name, dtype, width in site.columns:
        if dtype is None and store_dtype in EIGHT_BITS:
            yield Column(name, EIGHT_BITS[store_dtype], widths[width])
            yield Column("scale", "float32", -(-widths[width] // BLOCK_CHANNELS))
        else:
            yield Column(name, dtype or store_dtype, widths[width])


def sites_of(parts: Iterable[PartSpec]) -> LayersOfSites:
    """What is captured where parts are these."""
    sites: dict[str, tuple[int, ...]] = {}
    for part in parts:
        sites[part.site] = (*sites.get(part.site, ()), *(() if part.layer is None else (part.layer,)))
    return sites


def capturing_layer(site: str, layer: int | None, num_layers: int) -> int:
    """The layer whose stage captures a part, of a model of `num_layers`: its own, or the first or last for what is before or behind all layers."""
    if layer is not None:
        return layer
    return num_layers - 1 if site == "final_norm" else 0


def last_layer(sites: LayersOfSites, num_layers: int) -> int:
    """The last layer that is run of a model of `num_layers`, of which some site is asked for."""
    return max(capturing_layer(site, layer, num_layers) for site, layers in sites.items() for layer in (layers or (None,)))


def layers_run(parts: Iterable[PartSpec], num_layers: int) -> int:
    """How many layers of a model of `num_layers` a chain loads: up to the last whose stage captures something."""
    return 1 + max((capturing_layer(part.site, part.layer, num_layers) for part in parts), default=-1)


def parts_of_span(parts: Iterable[PartSpec], span: LayerSpan, num_layers: int) -> tuple[PartSpec, ...]:
    """Those of a run's parts that a stage of `span` captures, of a model of `num_layers`."""
    return tuple(part for part in parts if capturing_layer(part.site, part.layer, num_layers) in span)
