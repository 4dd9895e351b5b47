"""The sites: what can be captured, at each decoder layer or once for the whole model. A run's parts follow from this table."""

from collections.abc import Iterable, Sequence
from typing import Literal

from m2ray.batches import LayerSpan, PartSpec

Holder = Literal["its_layer", "first_layer", "last_layer"]

SITES: dict[str, Holder] = {"residual": "its_layer", "embedding": "first_layer", "final_norm": "last_layer"}
"""Which layer's stage captures a site. `residual` of layer i is the output of decoder layer i, before the final norm; the model-wide
`embedding` and `final_norm` are planned for, and not offered yet (ExtractConfig.sites)."""


def parts_of_run(site: str, layers: Sequence[int], store_dtype: str, hidden_size: int) -> tuple[PartSpec, ...]:
    """What every shard of a run consists of, in order: a part for each layer, of hidden width."""
    return tuple(PartSpec(site, layer, store_dtype, hidden_size) for layer in layers)


def capturing_layer(part: PartSpec, num_layers: int) -> int:
    """The layer whose stage captures a part, of a model of `num_layers`."""
    if part.layer is not None:
        return part.layer
    return 0 if SITES[part.site] == "first_layer" else num_layers - 1


def parts_of_span(parts: Iterable[PartSpec], span: LayerSpan, num_layers: int) -> tuple[PartSpec, ...]:
    """Those of a run's parts that a stage of `span` captures, of a model of `num_layers`."""
    return tuple(part for part in parts if capturing_layer(part, num_layers) in span)
