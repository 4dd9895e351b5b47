"""m2ray.plan: what a run needs and whether it fits, called from Python."""

from contextlib import ExitStack
from os import PathLike
from typing import Unpack

from m2ray.api.options import PlanOptions, as_written, documented
from m2ray.cli.plan import PlanConfig, make_plan
from m2ray.planning.plan import Plan
from m2ray.prompts.in_memory import Prompts, as_file
from m2ray.storage import looking


@documented(PlanConfig)
def plan(
    *,
    model: str | PathLike[str],
    prompts: Prompts | None = None,
    output: str | PathLike[str] | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Say whether a model fits on a cluster, how it would lie there, and what the run would write.

    Needs the model's config.json and, if it is there, its index; no weights, no GPU, no Ray. The options are those of `m2ray plan`, `prompts`
    as `m2ray.extract` takes them. The plan shows itself as text and in a notebook; `fits`, `remedies` and `output` are what most ask for.

    Raises:
        M2rayError: options, model or prompts are wrong. A plan that does not fit is no error.
    """
    with ExitStack() as stack:
        source = None if prompts is None else stack.enter_context(as_file(prompts))
        stack.enter_context(looking())
        config = PlanConfig.validated(as_written({"model": model, "prompts": source, "output": output, **options}))
        return make_plan(config)[0]
