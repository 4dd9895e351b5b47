"""The sites: what can be captured, at each decoder layer or once for the whole model. A run's parts follow from this table."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from m2ray.batches import Column, LayerSpan, PartSpec

Holder = Literal["its_layer", "first_layer", "last_layer"]
Width = Literal["hidden_size", "num_experts", "experts_per_token"]


class Site(NamedTuple):
    """Which layer's stage captures a site, and its columns: name, dtype (None for the run's store dtype) and what its width is."""

    holder: Holder
    columns: tuple[tuple[str, str | None, Width], ...]

    @property
    def has_layers(self) -> bool:
        """Whether each layer has it, and not the model once."""
        return self.holder == "its_layer"

    @property
    def is_stored_as_asked(self) -> bool:
        """Whether the run's store dtype acts on it: those of hidden width."""
        return self.columns == _HIDDEN


_HIDDEN: tuple[tuple[str, str | None, Width], ...] = (("activation", None, "hidden_size"),)

SITES: Mapping[str, Site] = {
    "residual": Site("its_layer", _HIDDEN),
    "residual_mid": Site("its_layer", _HIDDEN),
    "attention": Site("its_layer", _HIDDEN),
    "mlp": Site("its_layer", _HIDDEN),
    "mlp_in": Site("its_layer", _HIDDEN),
    "router_logits": Site("its_layer", (("activation", "float32", "num_experts"),)),
    "router_topk": Site("its_layer", (("expert_ids", "int16", "experts_per_token"), ("expert_weights", "float32", "experts_per_token"))),
    "embedding": Site("first_layer", _HIDDEN),
    "final_norm": Site("last_layer", _HIDDEN),
}
"""What each is, as a point of the model's arithmetic, is in docs/numerics.md; where a family has it, in m2ray/model."""


def parts_of_run(
    sites: Mapping[str, tuple[int, ...]], store_dtype: str, hidden_size: int, num_experts: int = 0, experts_per_token: int = 0
) -> tuple[PartSpec, ...]:
    """What every shard of a run consists of, in order: a part for each layer of each site, or one for a site of the whole model.

    Args:
        sites: the layers of each site, ascending; those of a site of the whole model do not count.
        store_dtype: of the rows of hidden width.
        hidden_size, num_experts, experts_per_token: of the model.
    """
    widths = {"hidden_size": hidden_size, "num_experts": num_experts, "experts_per_token": experts_per_token}
    return tuple(
        PartSpec(site, layer, tuple(Column(name, dtype or store_dtype, widths[width]) for name, dtype, width in SITES[site].columns))
        for site, layers in sites.items()
        for layer in (layers if SITES[site].has_layers else (None,))
    )


def capturing_layer(part: PartSpec, num_layers: int) -> int:
    """The layer whose stage captures a part, of a model of `num_layers`."""
    if part.layer is not None:
        return part.layer
    return 0 if SITES[part.site].holder == "first_layer" else num_layers - 1


def parts_of_span(parts: Iterable[PartSpec], span: LayerSpan, num_layers: int) -> tuple[PartSpec, ...]:
    """Those of a run's parts that a stage of `span` captures, of a model of `num_layers`."""
    return tuple(part for part in parts if capturing_layer(part, num_layers) in span)
