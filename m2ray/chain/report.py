"""The account of a run: lines for people at its start, after loading and at its end, and `report.json`. Pure values in and out.

docs/planning.md lists the keys of `report.json`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from m2ray.chain.status import GpuStatus, RunStatus, StageStatus
from m2ray.planning.devices import DevicePlan
from m2ray.planning.output import saved_bytes
from m2ray.planning.placing import StagePlan
from m2ray.planning.plan import Plan
from m2ray.planning.residency import runs
from m2ray.sizes import bytes_in_words

FORMAT_VERSION = 1
REPORT = "report.json"

Limit = Literal["computation", "device_to_host_copy", "encoder", "store", "filling_the_chain"]

_IDLE_SHARE = 0.5
"""Of the loaded time: a chain whose busiest stage waits longer than that has too few micro-batches to fill it."""


_NOT_REPORTED = (
    "span",
    "device",
    "node_id",
    "pid",
    "needed_bytes",
    "weights",
    "losses",
    "queued_bytes",
    "stored_parts",
    "silent_s",
    "warm_up_left",
)
"""Of a stage's status."""


def _decided(plan: Plan) -> str:
    """What became of the options that a user mostly leaves to "auto"."""
    options, stages = plan.demand.options, len(plan.stages) // plan.demand.options.replicas
    chains = f"{options.replicas} replicas of {stages} stages" if options.replicas > 1 else f"stages {stages}"
    threads = "" if plan.gpus else f", threads_per_stage {options.threads_per_stage}"
    return f"{chains}{threads}, batch_tokens {options.batch_tokens:,}"


def start_lines(plan: Plan) -> list[str]:
    """What was found and how the layers lie on it."""
    lines = []
    for node in plan.cluster.nodes:
        names = [gpu.name for gpu in node.gpus]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"
        lines.append(f"{node.name}: {kinds}")
    lines.append(_decided(plan))
    if not plan.gpus:
        return lines + [
            f"replica {stage.replica} stage {stage.stage} on {stage.node}: {stage.span}{_kept(planned)}, {bytes_in_words(stage.host.peak_bytes)} at its peak"
            for stage, planned in zip(plan.stages, plan.placed, strict=True)
        ]
    for planned in plan.gpus:
        if planned.span is not None:
            weights = bytes_in_words(planned.memory.weights_bytes)
            lines.append(
                f"{_place(planned)}: {planned.span}, {weights} of weights{_kept(planned)}, {bytes_in_words(planned.memory.peak_bytes)} at its peak"
            )
    return lines


_PLACES = {"gpu_packed": "packed", "host": "in host memory", "checkpoint": "in files"}


def _kept(planned: DevicePlan) -> str:
    """Where those of its layers are that are not ready, and its wave."""
    assert planned.span is not None
    places = _PLACES if planned.device.gpu else {**_PLACES, "host": "packed"}
    where = [f", {layers} {places[place]}" for layers, place in runs(planned.span, planned.residency) if place != "gpu"]
    return "".join([*where, f", waves of {planned.wave_tokens:,} tokens" if planned.wave_tokens else ""])


def loaded_lines(plan: Plan, stages: Sequence[tuple[StagePlan, StageStatus]]) -> list[str]:
    """Allocated and reserved bytes by GPU against the plan, and how fast each stage read."""
    lines = []
    for planned, stage in stages:
        rate = stage.read_bytes / stage.load_s / 1e6 if stage.load_s > 0 else 0.0
        lines.append(
            f"replica {planned.replica} stage {planned.stage}: {bytes_in_words(stage.read_bytes)} read in {stage.load_s:.1f} s, {rate:,.0f} MB/s; "
            f"{bytes_in_words(stage.parameter_bytes)} of parameters"
        )
        for planned_gpu, gpu in _gpus(plan, planned, stage):
            weights = planned_gpu.memory.weights_bytes
            lines.append(
                f"  GPU {gpu.index}: allocated {bytes_in_words(gpu.loaded_allocated_bytes)}, reserved {bytes_in_words(gpu.loaded_reserved_bytes)}; "
                f"planned {bytes_in_words(weights)} of weights"
            )
    return lines


def summary_lines(plan: Plan, run: RunStatus) -> list[str]:
    """The end of a run in a few lines."""
    if run.tokens_per_s is None or not run.stages:
        return ["Nothing was extracted: every shard was there."]
    planned = "" if plan.run_tokens_per_s is None else f" (planned {plan.run_tokens_per_s:,.0f})"
    planned_output = "" if plan.output is None else f" (planned {bytes_in_words(plan.output.num_bytes)})"
    lines = [
        (
            f"{run.tokens:,} tokens in {run.extract_s:.1f} s: {run.tokens_per_s:,.0f} tokens/s{planned}, "
            f"padding {run.padding_waste:.1%}; loading took {run.load_s:.1f} s"
        ),
    ]
    if run.output_bytes:
        lines.append(
            f"{bytes_in_words(run.output_bytes)} of output{planned_output}, {bytes_in_words(run.written_bytes / run.extract_s)}/s written"
        )
    if saved_bytes := _saved_bytes(plan, run):
        lines.append(f"{run.rows:,} rows in each site and layer: {bytes_in_words(saved_bytes)} less than of all tokens")
    for planned_stage, stage in run.stages:
        lines.append(
            f"  stage {planned_stage.replica}.{planned_stage.stage} {planned_stage.span}: compute {stage.compute_s:.1f} s, wait {stage.wait_s:.1f} s, "
            f"copy {stage.copy_s:.1f} s, blocked by the writer {stage.write_wait_s:.1f} s, "
            f"encode {stage.write_s - stage.store_s:.1f} s, store {stage.store_s:.1f} s"
        )
        lines += [
            f"    GPU {gpu.index}: peak {bytes_in_words(gpu.peak_reserved_bytes)}, planned {bytes_in_words(planned_gpu.memory.peak_bytes)}"
            for planned_gpu, gpu in _gpus(plan, planned_stage, stage)
        ]
    if lost := run.lost_shares:
        (site, layer), share = max(lost.items(), key=lambda each: each[1])
        where = site if layer is None else f"{site} of layer {layer}"
        lines.append(f"Rows in 8 bits differ from what was computed by at most {share:.2%} of their values (root mean square, {where})")
    limit = limiting(run)
    return [*lines, f"What limited the run: {limit.replace('_', ' ')}"] if limit else lines


def limiting(run: RunStatus) -> Limit | None:
    """The resource that limited the run: what its busiest stage spent most time on, unless even that one mostly waited.

    Where that is the writer's full queue, it is what the writer's threads spent more time on: encoding, or the store.
    """
    stages = [stage for stage in run.statuses if stage.micro_batches]
    if not stages:
        return None
    busiest = max(stages, key=lambda stage: stage.compute_s + stage.copy_s + stage.write_wait_s)
    spent: dict[Limit, float] = {
        "computation": busiest.compute_s,
        "device_to_host_copy": busiest.copy_s,
        "store" if 2 * busiest.store_s >= busiest.write_s else "encoder": busiest.write_wait_s,
    }
    if busiest.wait_s > _IDLE_SHARE * (busiest.wait_s + sum(spent.values())):
        return "filling_the_chain"
    return max(spent, key=lambda name: spent[name])


def build_report(plan: Plan, run_id: str, run: RunStatus) -> dict[str, Any]:
    """`report.json`: plan against measured, in plain values."""
    planned_output = plan.output
    return {
        "format_version": FORMAT_VERSION,
        "run_id": run_id,
        "load_s": run.load_s,
        "extract_s": run.extract_s,
        "tokens": run.tokens,
        "tokens_per_s": {"planned": plan.run_tokens_per_s, "measured": run.tokens_per_s},
        "padding_waste": {"planned": plan.prompts.padding_waste if plan.prompts else None, "measured": run.padding_waste},
        "parameter_bytes": {
            "planned": sum(_planned_weights(plan, planned) for planned, _ in run.stages),
            "measured": sum(stage.parameter_bytes for stage in run.statuses),
        },
        "output_bytes": {
            "planned": planned_output.num_bytes if planned_output else None,
            "measured": run.output_bytes,
        },
        "rows": {"planned": planned_output.rows if planned_output else None, "measured": run.rows},
        "saved_bytes": {
            "planned": planned_output.saved_bytes if planned_output else None,
            "measured": _saved_bytes(plan, run),
        },
        "limiting_resource": {"planned": plan.limiting_resource, "measured": limiting(run)},
        "eight_bit_losses": [{"site": site, "layer": layer, "share": share} for (site, layer), share in run.lost_shares.items()],
        "stages": [_stage(plan, planned, stage) for planned, stage in run.stages],
    }


def _saved_bytes(plan: Plan, run: RunStatus) -> int:
    """What the rows of the tokens that were not chosen would have taken."""
    options = plan.demand.options
    return saved_bytes(options.parts, run.row_tokens, run.rows, options.compression)


def _stage(plan: Plan, planned: StagePlan, stage: StageStatus) -> dict[str, Any]:
    return {
        "replica": planned.replica,
        "stage": planned.stage,
        "layers": [planned.span.start, planned.span.stop - 1],
        "planned_host_bytes": planned.host.peak_bytes,
        **{name: value for name, value in asdict(stage).items() if name not in _NOT_REPORTED},
        "gpus": [
            {**asdict(gpu), "planned_peak_bytes": memory.peak_bytes, "planned_weights_bytes": memory.weights_bytes}
            for memory, gpu in ((planned_gpu.memory, gpu) for planned_gpu, gpu in _gpus(plan, planned, stage))
        ],
    }


def _gpus(plan: Plan, planned: StagePlan, stage: StageStatus) -> list[tuple[DevicePlan, GpuStatus]]:
    """A stage's GPUs as planned and as they are, in the order of its span; none without GPUs. Those without layers are not the stage's."""
    if not stage.gpus:
        return []
    of_stage = [gpu for gpu in plan.gpus if (gpu.replica, gpu.stage) == (planned.replica, planned.stage) and gpu.span is not None]
    return list(zip(of_stage, stage.gpus, strict=True))


def _planned_weights(plan: Plan, planned: StagePlan) -> int:
    return sum(row.compute_bytes(plan.demand.itemsize_bytes) for row in plan.demand.rows(planned.span))


def _place(planned: DevicePlan) -> str:
    gpu = planned.device.gpu
    index = "" if gpu is None else f" GPU {gpu.index}"
    return f"replica {planned.replica} stage {planned.stage} on {planned.device.node.name}{index}"
