"""What is taken of a span's micro-batches: a job's, the same for all of them, or a request's."""

from collections.abc import Iterator, Mapping, Sequence

from m2ray.batches import PartSpec
from m2ray.errors import ConfigError, raise_all
from m2ray.model.boundary import row_width
from m2ray.model.capture import CaptureSpec
from m2ray.model.decoder import DecoderSpan
from m2ray.model.eight_bits import Encoder
from m2ray.model.site_table import refused_sites
from m2ray.model.statistics import Statistics
from m2ray.selection import Selection
from m2ray.sites import parts_of_run, parts_of_span
from m2ray.statistics import Place, places, statistic_sites


class Taking:
    """What is taken of each micro-batch.

    Attributes:
        parts: whose rows each capture holds, in order.
        statistics: the sites and layers of which it holds statistics, with their kinds.
        encoder: knows what rows in 8 bits have lost.
        places: the sites and layers that are looked at.
        with_crcs: as in CaptureSpec.
    """

    def __init__(
        self,
        parts: tuple[PartSpec, ...],
        counted: Mapping[PartSpec, frozenset[str]],
        selection: Selection,
        num_experts: int,
        *,
        with_crcs: bool,
    ) -> None:
        """`counted`: the parts that statistics are taken of, with the kinds. `num_experts`: of a layer with a router."""
        self.parts = parts
        self.with_crcs = with_crcs
        self.statistics: Mapping[Place, frozenset[str]] = {(part.site, part.layer): kinds for part, kinds in counted.items()}
        self.selection = selection
        self.encoder = Encoder()
        self.counting = Statistics(counted, num_experts)
        self.places = {(part.site, part.layer) for part in (*parts, *counted)}


def taking_of(decoder: DecoderSpan, capture: CaptureSpec) -> Taking:
    """What `capture` asks for of the span's layers.

    Raises:
        ConfigError: the model has no such site or no such layer, a layer lacks the site, or the final norm was not loaded.
    """
    of_statistics, kinds = statistic_sites(capture.statistics), places(capture.statistics)
    layers_of = {site: {*capture.sites.get(site, ()), *of_statistics.get(site, ())} for site in {**capture.sites, **of_statistics}}
    raise_all([problem for site, layers in layers_of.items() for problem in _why_not(decoder, site, sorted(layers))])
    counted = {part: kinds[part.site, part.layer] for part in _parts(decoder, of_statistics, capture.store_dtype)}
    parts = _parts(decoder, capture.sites, capture.store_dtype)
    return Taking(parts, counted, capture.selection, decoder.experts[0], with_crcs=capture.with_crcs)


def _parts(decoder: DecoderSpan, asked: Mapping[str, tuple[int, ...]], store_dtype: str) -> tuple[PartSpec, ...]:
    """Those of a job's parts that are of the span."""
    config = decoder.skeleton.config
    of_the_job = parts_of_run(asked, store_dtype, row_width(config), *decoder.experts)
    return parts_of_span(of_the_job, decoder.span, config.num_hidden_layers)


def _why_not(decoder: DecoderSpan, site: str, layers: Sequence[int]) -> Iterator[ConfigError]:
    config, there = decoder.skeleton.config, decoder.site_layers
    if site not in there:
        why = refused_sites(config).get(site)
        yield ConfigError(f"sites = {site!r}: a {config.model_type} has no such site{f': {why}' if why else ''}.")
    elif outside := [layer for layer in layers if layer >= config.num_hidden_layers]:
        yield ConfigError(f"Captured layers {outside}: the model has layers 0 to {config.num_hidden_layers - 1}.")
    elif lacking := sorted(set(layers) - set(there[site])):
        yield ConfigError(f"sites = {site!r}: layers {lacking} have no such site.")
    elif site == "final_norm" and decoder.span.stop == config.num_hidden_layers and not decoder.with_final_norm:
        yield ConfigError(f"sites = {site!r}: the stage has not loaded the final norm.")
