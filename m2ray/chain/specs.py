"""From a plan to what each stage of a chain loads."""

from collections.abc import Iterator, Mapping

from m2ray.model.stage import StageSpec
from m2ray.planning.plan import Plan
from m2ray.planning.residency import shared_layers


def stage_specs(plan: Plan, replica: int, model_url: str, model_files: Mapping[str, str]) -> Iterator[list[StageSpec]]:
    """What each stage of a replica holds: one spec a device.

    Args:
        model_url: the checkpoint's folder or URL.
        model_files: those that are needed, with their digests (`Checkpoint.digests`).
    """
    for stage in plan.stages:
        if stage.replica == replica:
            yield list(_specs(plan, replica, stage.stage, model_url, model_files))


def _specs(plan: Plan, replica: int, stage: int, model_url: str, model_files: Mapping[str, str]) -> Iterator[StageSpec]:
    """What each device of a stage holds. `cuda:N` counts the GPUs that the stage's process sees, in the order of the plan."""
    options = plan.demand.options
    size = options.gpus_per_stage
    for planned in plan.placed:
        if (planned.replica, planned.stage) != (replica, stage):
            continue
        device = f"cuda:{planned.place % size}" if planned.device.gpu else "cpu"
        yield StageSpec(
            model_url=model_url,
            span=planned.held,
            compute_dtype=options.compute_dtype,
            attn_implementation=options.attn_implementation,
            device=device,
            threads=options.threads_per_stage,
            compile=options.compile,
            residency=planned.residency,
            offload_folder=options.offload_path,
            shared=shared_layers(planned, plan.placed),
            wave_tokens=planned.wave_tokens,
            with_final_norm=plan.demand.with_final_norm,
            model_files=model_files,
        )
