"""What a pass of some tokens through a device's layers takes: computing, unpacking, and waiting for layers that are brought."""

from collections.abc import Iterable

from m2ray.batches import LayerSpan
from m2ray.planning.demand import Demand
from m2ray.planning.devices import DevicePlan
from m2ray.planning.hardware import GPU_MODELS, find_gpu_model
from m2ray.planning.shape import ModelShape
from m2ray.tensor_rows import TensorRow

SUSTAINED_SHARE = {False: 0.22, True: 0.49}
"""Of the peak bfloat16 operations, not compiled and compiled: two for each weight that a token meets, on an H200 with real-size MiniMax-M2 layers,
8 x 2048 tokens, grouped experts, 23.7 ms a layer, and 10.7 with m2ray's kernels (benchmarks/results/gpu_stage_h200.json, layers_on_gpu_minimax-m2.json)."""

SUSTAINED_SHARE_DENSE = {False: 0.39, True: 0.6}
"""The same of layers without experts. Compiled: Llama-8B's and Llama-70B's widths on an H200, 8 x 2048 tokens, 11.9 and 43.5 ms a layer, which is 0.61 and 0.65
(benchmarks/results/layers_on_gpu_llama-*.json); a plan of Llama-70B's with 0.57 was 0.91 of the rate that a run reached. Not compiled: guessed."""

FLOAT8_GAIN = {False: 0.97, True: 1.38}
"""How many times as fast as in bfloat16 layers are whose products are FP8, not compiled and compiled: the slower of two shapes of MiniMax-M2's layers
on an H200 (benchmarks/results/float8_on_gpu.json, layers_on_gpu_minimax-m2.json). Layers without experts were not measured."""

COPY_BYTES_PER_S = 51 * 2**30
"""Between one GPU and pinned host memory, either way, measured on an H200 behind PCIe 5."""


def active_elements(rows: Iterable[TensorRow], shape: ModelShape) -> float:
    """Weights that one token is multiplied with: of a mixture's experts, those that are chosen."""
    chosen = shape.experts_per_token / shape.num_experts if shape.num_experts else 1.0
    return sum(
        row.num_elements * (chosen if len(row.shape) == 3 and row.shape[0] == shape.num_experts else 1.0)
        for row in rows
        if row.role == "layer"
    )


def computing_s(demand: Demand, placed: DevicePlan) -> float | None:
    """Of one token through all layers of a device, as measured, or estimated by the GPU's name; None where neither is known."""
    rate = _operations_per_s(demand, placed)
    return None if rate is None else 2 * active_elements(demand.rows(placed.held), demand.shape) / rate


def pass_s(demand: Demand, placed: DevicePlan, tokens: float, *, with_bringing: bool = True, slowed: float = 1.0) -> float | None:
    """Of so many tokens through all layers of a device, each of which is unpacked and brought once; None where computing is not known.

    A layer comes while the one before it runs, so the slower of the two counts; without `with_bringing`, running alone. `slowed` is how much
    longer running takes than in micro-batches as they were measured.
    """
    computing = computing_s(demand, placed)
    if computing is None:
        return None
    running_s = slowed * computing * tokens / len(placed.held)
    return sum(
        max(running_s + _unpacking_s(demand, placed, layer), _bringing_s(demand, placed, layer) if with_bringing else 0.0)
        for layer in _layers(placed.held)
    )


def bringing_s(demand: Demand, placed: DevicePlan) -> float:
    """Of all layers of a device that are not kept on it, once."""
    return sum(_bringing_s(demand, placed, layer) for layer in _layers(placed.held))


def _layers(span: LayerSpan) -> range:
    return range(span.start, span.stop)


def _unpacking_s(demand: Demand, placed: DevicePlan, layer: int) -> float:
    model = find_gpu_model(placed.device.gpu.name) if placed.device.gpu else None
    if model is None or placed.residency.get(layer, "gpu") == "gpu":
        return 0.0
    return demand.unpacking_bytes[layer] / GPU_MODELS[model].memory_bytes_per_s


def _bringing_s(demand: Demand, placed: DevicePlan, layer: int) -> float:
    """A disk counts as its profile says, else as the bus that it comes by."""
    place, profile = placed.residency.get(layer, "gpu"), demand.assumed.profile
    if place in ("gpu", "gpu_packed") or (place == "host" and placed.device.gpu is None):
        return 0.0
    bus = COPY_BYTES_PER_S if profile is None or profile.copy_bytes_per_s is None else profile.copy_bytes_per_s
    disk = bus if profile is None or profile.read_bytes_per_s is None else min(bus, profile.read_bytes_per_s)
    return demand.packed_bytes[layer] / (bus if place == "host" else disk)


def _operations_per_s(demand: Demand, placed: DevicePlan) -> float | None:
    compiled = demand.options.compile
    if demand.assumed.profile:
        return demand.assumed.profile.operations_per_s(compiled=compiled)
    model = find_gpu_model(placed.device.gpu.name) if placed.device.gpu else None
    share = SUSTAINED_SHARE if demand.shape.num_experts else SUSTAINED_SHARE_DENSE
    gain = FLOAT8_GAIN[compiled] if demand.options.compute_dtype == "float8" else 1.0
    return None if model is None else GPU_MODELS[model].bf16_flops * share[compiled] * gain
