"""The account of a run: lines for people at its start, after loading and at its end, and `report.json`. Pure values in and out.

docs/planning.md lists the keys of `report.json`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from m2ray.batches import LayerSpan
from m2ray.planning.devices import DevicePlan
from m2ray.planning.layout import size
from m2ray.planning.plan import Plan
from m2ray.planning.residency import layers_in

FORMAT_VERSION = 1
REPORT = "report.json"

Limit = Literal["computation", "device_to_host_copy", "encoder", "store", "filling_the_chain"]

_IDLE_SHARE = 0.5
"""Of the loaded time: a chain whose busiest stage waits longer than that has too few micro-batches to fill it."""


@dataclass(frozen=True)
class GpuMeasured:
    """One GPU of a stage, as torch's allocator says: right after loading, and at its peak since the start.

    `used_bytes`: what the driver says is taken on it, context and other processes counted, when it was last asked.
    """

    index: int
    name: str
    total_bytes: int
    loaded_allocated_bytes: int
    loaded_reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class StageMeasured:
    """One stage at its end. Seconds are sums over its micro-batches; bytes are of this run, not of those it went on with.

    Attributes:
        replica, stage: its place, as in DevicePlan.
        gpus: in the order of its span; none on a CPU.
        read_bytes, load_s: of the checkpoint; from the call to the last tensor in place.
        parameter_bytes: in memory.
        tokens, padded_tokens: real ones, and computed ones.
        compute_s: layers and selection, by the device's own clock. wait_s: the rest of the time from the first micro-batch on, mostly
            for hidden states of the stage before. copy_s: captured rows from GPU to host, as far as the layers were done before.
        write_wait_s: for room in the writer's queue; two micro-batches later the computation stands still.
        write_s: that the writer's threads spent on encoding and storing, beside the computation. store_s: what of it the store took.
        sends_by: how hidden states went to the next stage, "cuda_ipc" or "object_store"; empty where there is none.
    """

    replica: int
    stage: int
    node: str
    span: LayerSpan
    gpus: tuple[GpuMeasured, ...]
    read_bytes: int
    load_s: float
    parameter_bytes: int
    micro_batches: int
    tokens: int
    padded_tokens: int
    compute_s: float
    wait_s: float
    copy_s: float
    write_wait_s: float
    write_s: float
    store_s: float
    written_bytes: int
    peak_rss_bytes: int
    sends_by: str = ""


@dataclass(frozen=True)
class RunMeasured:
    """The run as the driver saw it, of its own shards alone.

    `extract_s` is from the first micro-batch to the last commit; `tokens` are real ones; `output_bytes` are those of the committed parts:
    what was written for attempts that failed is among the stages' `written_bytes` alone.
    """

    run_id: str
    load_s: float
    extract_s: float
    tokens: int
    output_bytes: int
    stages: tuple[StageMeasured, ...]

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.extract_s if self.extract_s > 0 else None

    @property
    def padding_waste(self) -> float:
        """Share of the computed tokens that were padding."""
        computed = sum(stage.padded_tokens for stage in self.stages)
        return 1 - sum(stage.tokens for stage in self.stages) / computed if computed else 0.0


def start_lines(plan: Plan) -> list[str]:
    """What was found and how the layers lie on it."""
    lines = []
    for node in plan.cluster.nodes:
        names = [gpu.name for gpu in node.gpus]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"
        lines.append(f"{node.name}: {kinds}")
    if not plan.gpus:
        return lines + [
            f"replica {stage.replica} stage {stage.stage} on {stage.node}: {stage.span}, {size(stage.host.peak_bytes)} at its peak"
            for stage in plan.stages
        ]
    for planned in plan.gpus:
        if planned.span is not None:
            weights = size(planned.memory.running["weights"])
            outside = [(layers_in(planned.residency, "host"), "in host memory"), (layers_in(planned.residency, "disk"), "on disk")]
            kept = "".join(f", {layers} {where}" for layers, where in outside if layers)
            lines.append(f"{_place(planned)}: {planned.span}, {weights} of weights{kept}, {size(planned.memory.peak_bytes)} at its peak")
    return lines


def loaded_lines(plan: Plan, stages: Sequence[StageMeasured]) -> list[str]:
    """Allocated and reserved bytes by GPU against the plan, and how fast each stage read."""
    lines = []
    for stage in stages:
        rate = stage.read_bytes / stage.load_s / 1e6 if stage.load_s > 0 else 0.0
        lines.append(
            f"replica {stage.replica} stage {stage.stage}: {size(stage.read_bytes)} read in {stage.load_s:.1f} s, {rate:,.0f} MB/s; "
            f"{size(stage.parameter_bytes)} of parameters"
        )
        for planned, gpu in zip(_planned(plan, stage), stage.gpus, strict=True):
            weights = planned.memory.running["weights"]
            lines.append(
                f"  GPU {gpu.index}: allocated {size(gpu.loaded_allocated_bytes)}, reserved {size(gpu.loaded_reserved_bytes)}; "
                f"planned {size(weights)} of weights"
            )
    return lines


def summary_lines(plan: Plan, run: RunMeasured) -> list[str]:
    """The end of a run in a few lines."""
    if run.tokens_per_s is None or not run.stages:
        return ["Nothing was extracted: every shard was there."]
    written_bytes = sum(stage.written_bytes for stage in run.stages)
    planned = "" if plan.rates.tokens_per_s is None else f" (planned {plan.rates.tokens_per_s:,.0f})"
    planned_output = "" if plan.output is None else f" (planned {size(plan.output.num_bytes)})"
    lines = [
        (
            f"{run.tokens:,} tokens in {run.extract_s:.1f} s: {run.tokens_per_s:,.0f} tokens/s{planned}, "
            f"padding {run.padding_waste:.1%}; loading took {run.load_s:.1f} s"
        ),
        f"{size(run.output_bytes)} of output{planned_output}, {size(written_bytes / run.extract_s)}/s written",
    ]
    for stage in run.stages:
        lines.append(
            f"  stage {stage.replica}.{stage.stage} {stage.span}: compute {stage.compute_s:.1f} s, wait {stage.wait_s:.1f} s, "
            f"copy {stage.copy_s:.1f} s, blocked by the writer {stage.write_wait_s:.1f} s, "
            f"encode {stage.write_s - stage.store_s:.1f} s, store {stage.store_s:.1f} s"
        )
        lines += [
            f"    GPU {gpu.index}: peak {size(gpu.peak_reserved_bytes)}, planned {size(planned_gpu.memory.peak_bytes)}"
            for planned_gpu, gpu in zip(_planned(plan, stage), stage.gpus, strict=True)
        ]
    limit = limiting(run)
    return [*lines, f"What limited the run: {limit.replace('_', ' ')}"] if limit else lines


def limiting(run: RunMeasured) -> Limit | None:
    """The resource that limited the run: what its busiest stage spent most time on, unless even that one mostly waited.

    Where that is the writer's full queue, it is what the writer's threads spent more time on: encoding, or the store.
    """
    stages = [stage for stage in run.stages if stage.micro_batches]
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


def build_report(plan: Plan, run: RunMeasured) -> dict[str, Any]:
    """`report.json`: plan against measured, in plain values."""
    planned_output = plan.output
    return {
        "format_version": FORMAT_VERSION,
        "run_id": run.run_id,
        "load_s": run.load_s,
        "extract_s": run.extract_s,
        "tokens": run.tokens,
        "tokens_per_s": {"planned": plan.rates.tokens_per_s, "measured": run.tokens_per_s},
        "padding_waste": {"planned": plan.prompts.padding_waste if plan.prompts else None, "measured": run.padding_waste},
        "parameter_bytes": {
            "planned": sum(_planned_weights(plan, stage) for stage in run.stages),
            "measured": sum(stage.parameter_bytes for stage in run.stages),
        },
        "output_bytes": {
            "planned": planned_output.num_bytes if planned_output else None,
            "measured": run.output_bytes,
        },
        "limiting_resource": {"planned": plan.limiting_resource, "measured": limiting(run)},
        "stages": [_stage(plan, stage) for stage in run.stages],
    }


def _stage(plan: Plan, stage: StageMeasured) -> dict[str, Any]:
    record = asdict(stage)
    record["span"] = [stage.span.start, stage.span.stop - 1]
    record["layers"] = record.pop("span")
    record["planned_host_bytes"] = next(
        (each.host.peak_bytes for each in plan.stages if (each.replica, each.stage) == (stage.replica, stage.stage)), None
    )
    record["gpus"] = [
        {**asdict(gpu), "planned_peak_bytes": planned.memory.peak_bytes, "planned_weights_bytes": planned.memory.running["weights"]}
        for planned, gpu in zip(_planned(plan, stage), stage.gpus, strict=True)
    ]
    return record


def _planned(plan: Plan, stage: StageMeasured) -> list[DevicePlan]:
    """The GPUs that the plan gave to a stage, in the order of its span; none without GPUs. Those without layers are not the stage's."""
    if not stage.gpus:
        return []
    return [gpu for gpu in plan.gpus if (gpu.replica, gpu.stage) == (stage.replica, stage.stage) and gpu.span is not None]


def _planned_weights(plan: Plan, stage: StageMeasured) -> int:
    rows = plan.demand.rows(stage.span)
    return sum(row.compute_bytes(plan.demand.itemsize_bytes) for row in rows)


def _place(planned: DevicePlan) -> str:
    gpu = planned.device.gpu
    index = "" if gpu is None else f" GPU {gpu.index}"
    return f"replica {planned.replica} stage {planned.stage} on {planned.device.node.name}{index}"
