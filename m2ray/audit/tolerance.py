"""How far rows that were computed again may be from the run's: nothing where bits are promised, else what docs/numerics.md measured."""

from collections.abc import Mapping
from typing import Any

from m2ray.activations.job import JobRecord
from m2ray.audit.sample import Sample
from m2ray.batches import PartSpec
from m2ray.errors import NotInRunError
from m2ray.provenance import ROW_PACKAGES, cpu_kind, differences, versions
from m2ray.sites import capturing_layer

_A_LAYER: Mapping[str, tuple[float, int]] = {"float32": (1e-5, 32), "bfloat16": (6e-3, 1), "float16": (7.5e-4, 1)}
"""By compute dtype: a share of the row's norm, and for how many layers it holds; beyond them it grows in proportion to the depth."""

_ROUNDING: Mapping[str, float] = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7, "float8_e4m3fn": 2**-3, "int8": 0.09}
"""By what is stored: what rounding two rows that are all but equal can set between them, as a share of their norm. Of int8 that is twice half a
step in each of 128 channels of a block, whose largest value is 127 steps."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def bound(job: JobRecord, part: PartSpec) -> float:
    """The most by which a row may differ that was computed beside other prompts, in another cut of a matrix, or on another machine."""
    stored = part.columns[-1 if part.site == "router_topk" else 0].dtype
    rounded = stored != job.options["compute_dtype"]
    return computed(job, part, job.options["compute_dtype"]) + (_ROUNDING[stored] if rounded else 0.0)


def computed(job: JobRecord, part: PartSpec, compute_dtype: str) -> float:
    """The same of rows as they are computed in a dtype, before they are stored."""
    share, num_layers = _A_LAYER[compute_dtype]
    return share * max(1.0, (1 + capturing_layer(part.site, part.layer, job.model.num_layers)) / num_layers)


def require_reference(job: JobRecord) -> None:
    """Raise NotInRunError for rows of products in FP8: neither transformers' model nor bounds for their distance stand for them yet."""
    if job.options["compute_dtype"] not in _A_LAYER:
        raise NotInRunError(
            f"The run computed in {job.options['compute_dtype']}, and rows of that are not computed again by --sample.",
            'Leave --sample out, or audit a run of the same prompts with compute_dtype = "bfloat16": the cut into stages is the same.',
        )


def has_router(config: Any) -> bool:
    """Whether tokens choose experts: rounding may carry one over the edge of its choice, and its row is another one from there on."""
    return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)


def why_not_exact(job: JobRecord, sample: Sample) -> list[str]:
    """Why the recorded micro-batches need not give the same bits here; nothing where they have to."""
    reasons = [
        f"the rows were computed on {kind or 'an unknown kind of machine'}, and this is {cpu_kind()}"
        for kind in sorted(sample.computed_on, key=str)
        if kind != cpu_kind()
    ]
    differing = differences(job.versions, versions(), ROW_PACKAGES)
    reasons += [f"{package} is {here} here and was {there}" for package, (there, here) in differing.items()]
    if job.options.get("compile"):
        reasons.append("the run's layers were compiled")
    return reasons
