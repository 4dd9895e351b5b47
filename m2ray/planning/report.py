"""A plan as JSON: keys that scripts may rely on. docs/planning.md lists them; a key may be added, none changes its meaning."""

from dataclasses import asdict
from typing import Any

from m2ray.batches import LayerSpan
from m2ray.planning.devices import DevicePlan
from m2ray.planning.hardware import Cluster
from m2ray.planning.memory import Memory
from m2ray.planning.placing import StagePlan
from m2ray.planning.plan import Plan
from m2ray.planning.residency import runs

FORMAT_VERSION = 1


def to_json(plan: Plan) -> dict[str, Any]:
    """The whole plan in plain values. Sizes are bytes, spans [first layer, last layer] with both ends in."""
    options = plan.demand.options
    return {
        "format_version": FORMAT_VERSION,
        "fits": plan.fits,
        "short_by_bytes": plan.short_by_bytes,
        "limiting_resource": plan.limiting_resource,
        "shortages": [asdict(shortage) for shortage in plan.shortages],
        "remedies": [asdict(remedy) for remedy in plan.remedies],
        "model": {
            "num_layers": plan.demand.table.num_layers,
            "layers_run": plan.demand.num_layers,
            "hidden_size": plan.demand.table.hidden_size,
        },
        "options": {
            "sites": [{"site": site, "layers": list(layers)} for site, layers in options.sites.items()],
            "compute_dtype": options.compute_dtype,
            "store_dtype": options.store_dtype,
            "batch_tokens": options.batch_tokens,
            "longest_tokens": plan.demand.workload.longest_tokens,
            "device_map": options.device_map,
            "replicas": options.replicas,
            "gpus_per_stage": options.gpus_per_stage,
            "weights": options.weights,
            "offload": options.offload,
            "in_flight_bytes": options.in_flight_bytes,
            "writer_queue_bytes": options.writer_queue_bytes,
            "compression": options.compression,
        },
        "weights": {
            **asdict(plan.weights),
            "layer_bytes": list(plan.weights.layer_bytes),
            "packed_layer_bytes": list(plan.demand.packed_bytes),
            "layouts": _layouts(plan),
        },
        "cluster": _cluster(plan.cluster),
        "wave": {"tokens": plan.wave.tokens, "forced_by": plan.wave.forced_by or None},
        "gpus": [_gpu(gpu) for gpu in plan.gpus],
        "stages": [_stage(plan, stage) for stage in plan.stages],
        "nodes": [asdict(node) for node in plan.nodes],
        "output": _output(plan),
        "rates": {**asdict(plan.rates), "limits": dict(plan.rates.limits)},
    }


def _layouts(plan: Plan) -> list[dict[str, Any]]:
    layouts = plan.weights.layouts.items()
    return [{"name": name or "not quantised", "disk_bytes": on_disk, "compute_bytes": computed} for name, (on_disk, computed) in layouts]


def _output(plan: Plan) -> dict[str, Any] | None:
    if plan.output is None or plan.prompts is None:
        return None
    prompts = {name: getattr(plan.prompts, name) for name in ("sequences", "tokens", "padding_waste")}
    by_part = [
        {"site": part.site, "layer": part.layer, "files": plan.prompts.shards, "num_bytes": num_bytes}
        for part, num_bytes in plan.output.by_part.items()
    ]
    by_site = [
        {"site": site, "num_bytes": sum(num_bytes for part, num_bytes in plan.output.by_part.items() if part.site == site)}
        for site in plan.demand.options.sites
    ]
    return {**prompts, **vars(plan.output), "by_part": by_part, "by_site": by_site}


def _cluster(cluster: Cluster) -> list[dict[str, Any]]:
    return [{**asdict(node), "gpus": [asdict(gpu) for gpu in node.gpus], "versions": dict(node.versions)} for node in cluster.nodes]


def _gpu(planned: DevicePlan) -> dict[str, Any]:
    gpu = planned.device.gpu
    assert gpu is not None
    return {
        "replica": planned.replica,
        "stage": planned.stage,
        "node": planned.device.node.name,
        "index": gpu.index,
        "name": gpu.name,
        "total_bytes": gpu.total_bytes,
        "usable_bytes": planned.device.usable_bytes,
        "layers": _span(planned.span),
        "residency": _residency(planned),
        "wave_tokens": planned.wave_tokens,
        **_memory(planned.memory),
    }


def _residency(planned: DevicePlan) -> list[dict[str, Any]]:
    return (
        []
        if planned.span is None
        else [{"layers": _span(layers), "place": place} for layers, place in runs(planned.span, planned.residency)]
    )


def _stage(plan: Plan, planned: StagePlan) -> dict[str, Any]:
    devices = [each for each in plan.placed if (each.replica, each.stage) == (planned.replica, planned.stage)]
    return {
        "replica": planned.replica,
        "stage": planned.stage,
        "node": planned.node,
        "layers": _span(planned.span),
        "residency": [run for each in devices for run in _residency(each)],
        "host": _memory(planned.host),
    }


def _memory(memory: Memory) -> dict[str, Any]:
    return {"peak_bytes": memory.peak_bytes, "running": dict(memory.running), "loading": dict(memory.loading)}


def _span(span: LayerSpan | None) -> list[int] | None:
    return None if span is None else [span.start, span.stop - 1]
