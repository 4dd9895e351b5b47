"""From a plan to what each stage of a chain loads."""

from collections.abc import Iterator, Mapping

from m2ray.batches import LayerSpan
from m2ray.model.stage import StageSpec
from m2ray.planning.plan import Plan


def stage_specs(plan: Plan, replica: int, model_url: str, model_files: Mapping[str, str]) -> Iterator[list[StageSpec]]:
    """What each stage of a replica holds: one spec a device.

    Args:
        model_url: the checkpoint's folder or URL.
        model_files: those that are needed, with their digests (`Checkpoint.digests`).
    """
    for stage in plan.stages:
        if stage.replica == replica:
            yield list(_specs(plan, replica, stage.stage, stage.span, model_url, model_files))


def _specs(plan: Plan, replica: int, stage: int, span: LayerSpan, model_url: str, model_files: Mapping[str, str]) -> Iterator[StageSpec]:
    """What each device of a stage holds. `cuda:N` counts the GPUs that the stage's process sees, in the order of the plan."""
    options = plan.demand.options
    gpus = [gpu for gpu in plan.gpus if (gpu.replica, gpu.stage) == (replica, stage)]
    spans = [(f"cuda:{number}", gpu.span, gpu.residency) for number, gpu in enumerate(gpus) if gpu.span is not None] or [("cpu", span, {})]
    for device, on_device, residency in spans:
        yield StageSpec(
            model_url=model_url,
            span=on_device,
            compute_dtype=options.compute_dtype,
            attn_implementation=options.attn_implementation,
            device=device,
            threads=options.threads_per_stage,
            compile=options.compile,
            residency=residency,
            offload_folder=options.offload_path,
            with_final_norm=plan.demand.with_final_norm,
            model_files=model_files,
        )
