"""The plan: MiniMax-M2's exact bytes, layouts over clusters, what helps when it does not fit, and output against the writer's own files."""

import itertools
import json
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from rich.console import Console

from m2ray.activations.schema import encode_tokens
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.batches import TOKEN_ROW, Column, LayerSpan, PartSpec, PromptStats
from m2ray.config import ExtractConfig
from m2ray.errors import ClusterError, ConfigError
from m2ray.options import PromptOptions
from m2ray.planning.demand import Assumptions, Demand
from m2ray.planning.devices import HOST_SHARE
from m2ray.planning.hardware import Cluster, Gpu, Node, parse_gpus
from m2ray.planning.layout import render
from m2ray.planning.memory import PIECE_BYTES, PIECES, READERS_A_CORE_BYTES, READERS_BYTES, STAGING_BYTES
from m2ray.planning.output import part_bytes, plan_output
from m2ray.planning.passes import active_elements, pass_s
from m2ray.planning.plan import Plan, most_replicas, plan_run
from m2ray.planning.report import to_json
from m2ray.planning.residency import shared_layers
from m2ray.planning.resolve import resolve
from m2ray.planning.shape import ModelShape
from m2ray.sizes import bytes_in_words, parse_max_memory
from m2ray.statistics import contribution_bytes, widths
from m2ray.storage import open_store
from m2ray.tensor_rows import TensorRow, TensorTable

GB = 10**9
SHAPE = ModelShape(3072, num_heads=48, num_kv_heads=8, head_dim=128, num_experts=256, experts_per_token=8, expert_size=1536)


def scaled(rows: int, columns: int) -> int:
    """FP8 bytes of a matrix with a float32 scale a block of 128 x 128."""
    return rows * columns + -(-rows // 128) * -(-columns // 128) * 4


def m2_rows(layer: int) -> list[TensorRow]:
    """One decoder layer of MiniMax-M2, as its FP8 checkpoint stores it."""

    def row(name: str, shape: tuple[int, ...], disk_bytes: int, *, itemsize_bytes: int | None = None) -> TensorRow:
        is_plain = disk_bytes == prod(shape) * (itemsize_bytes or 2)
        lies = {"lies_as": "float32" if itemsize_bytes else "bfloat16"} if is_plain else {"method": "FP8 in blocks of 128 x 128"}
        return TensorRow(f"layers.{layer}.{name}", "layer", layer, shape, itemsize_bytes, disk_bytes, (f"{layer}.{name}",), **lies)

    return [
        row("q", (6144, 3072), scaled(6144, 3072)),
        row("k", (1024, 3072), scaled(1024, 3072)),
        row("v", (1024, 3072), scaled(1024, 3072)),
        row("o", (3072, 6144), scaled(3072, 6144)),
        row("q_norm", (6144,), 2 * 6144),
        row("k_norm", (1024,), 2 * 1024),
        row("input_norm", (3072,), 2 * 3072),
        row("attention_norm", (3072,), 2 * 3072),
        row("gate", (256, 3072), 4 * 256 * 3072, itemsize_bytes=4),
        row("bias", (256,), 4 * 256, itemsize_bytes=4),
        row("gate_up", (256, 3072, 3072), 512 * scaled(1536, 3072)),
        row("down", (256, 3072, 1536), 256 * scaled(3072, 1536)),
    ]


def m2_table(num_layers: int = 62) -> TensorTable:
    embedding = 200064 * 3072
    return TensorTable(
        num_layers,
        3072,
        (
            TensorRow("embed", "embedding", None, (200064, 3072), False, 2 * embedding, ("embed",)),
            *(row for layer in range(num_layers) for row in m2_rows(layer)),
            TensorRow("norm", "final_norm", None, (3072,), False, 2 * 3072, ("norm",)),
            TensorRow("head", "head", None, (200064, 3072), False, 2 * embedding, ("head",)),
        ),
    )


def residuals(num_layers: int = 62) -> tuple[PartSpec, ...]:
    return tuple(PartSpec.of("residual", layer, "bfloat16", 3072) for layer in range(num_layers))


def demand(num_layers: int = 62, **options) -> Demand:
    """MiniMax-M2, all residuals; `options` of RunOptions and of Assumptions alike."""
    assumed = Assumptions(**{name: options.pop(name) for name in list(options) if name in Assumptions.__annotations__})
    config, table = ExtractConfig(model="m", prompts="p", output="o", compile=False), m2_table(num_layers)
    return Demand(table, SHAPE, replace(resolve(config, PromptOptions.of(config, 1), table, SHAPE), **options), assumed)


def plan(gpus: str | Cluster, num_layers: int = 62, prompts: PromptStats | None = None, **options) -> Plan:
    return plan_run(demand(num_layers, **options), parse_gpus(gpus) if isinstance(gpus, str) else gpus, prompts)


def spans(planned: Plan) -> list[str | None]:
    return [str(gpu.span).removeprefix("layers ") if gpu.span else None for gpu in planned.gpus]


# -- weights --------------------------------------------------------------------------------------------------------------


def test_minimax_m2_to_the_byte():
    weights = plan("8xH200").weights
    assert weights.disk_bytes == 230_121_630_720
    assert weights.parameters == 228_689_764_864
    assert weights.compute_bytes == 457_379_529_728
    assert set(weights.layer_bytes) == {7_337_437_696 + 2 * (256 * 3072 + 256)}
    assert weights.head_disk_bytes == weights.embedding_bytes == 1_229_193_216
    assert weights.loaded_bytes == sum(weights.layer_bytes) + weights.embedding_bytes


def test_what_is_loaded_is_what_the_gpus_hold():
    planned = plan("8xA100-80GB")
    assert sum(gpu.memory.running["weights"] for gpu in planned.gpus) == planned.weights.loaded_bytes
    assert plan("8xA100-80GB", parts=residuals(6)).weights.loaded_bytes == 6 * 7_339_011_072 + 1_229_193_216


def test_the_final_norm_is_loaded_for_its_own_site_only():
    with_norm = plan("8xH200", parts=(PartSpec.of("final_norm", None, "bfloat16", 3072),))
    assert with_norm.demand.num_layers == 62
    assert with_norm.weights.loaded_bytes == plan("8xH200").weights.loaded_bytes + 2 * 3072
    assert [bool(gpu.memory.running["capture"]) for gpu in with_norm.gpus] == [False] * 7 + [True]


def test_captured_rows_of_three_layers_are_planned_whatever_their_sites():
    every = tuple(range(62))
    beside = tuple(PartSpec.of(site, layer, "bfloat16", 3072) for site in ("attention", "mlp") for layer in every)
    alone, planned = (plan("8xH200", parts=parts) for parts in (residuals(), (*residuals(), *beside)))
    tokens = alone.demand.workload.padded_tokens
    assert alone.gpus[3].memory.running["capture"] == 3 * tokens * (6144 + 4), "with their CRCs"
    assert planned.gpus[3].memory.running["capture"] == 3 * planned.demand.workload.padded_tokens * 3 * (6144 + 4)


def test_what_sites_within_a_layer_keep_until_it_has_run_is_planned():
    every = tuple(range(62))
    within = tuple(PartSpec.of(site, layer, "bfloat16", 3072) for site in ("attention", "mlp") for layer in every)
    alone, beside = (demand(parts=parts).workload for parts in (residuals(), residuals() + within[61:]))
    assert beside.transient_bytes - alone.transient_bytes == 2 * alone.padded_tokens * 3072 * 2
    counting, not_counting = summing("experts").workload, summing("moments").workload
    assert counting.transient_bytes - not_counting.transient_bytes == counting.padded_tokens * 256 * 4, "a router that is only counted too"


# -- does it fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "fits"),
    [("8xA100-80GB", True), ("8xA100-40GB", False), ("4xH100-80GB", False), ("1xH200", False), ("2xH200", False), ("8xH200", True)],
)
def test_the_guides_gpus(gpus, fits):
    planned = plan(gpus, weights="bf16")
    assert planned.fits is fits
    assert (planned.short_by_bytes == 0) is fits
    assert bool(planned.stages) is fits


def test_no_gpu_is_planned_above_what_may_be_used():
    for gpus in ("8xA100-80GB", "7xH100-80GB", "4xH200", "2 nodes of 8xL40S", "2xH200", "4xH100-80GB"):
        planned = plan(gpus)
        assert planned.fits
        assert all(gpu.memory.peak_bytes <= gpu.device.usable_bytes for gpu in planned.gpus)


def test_a_gpu_with_the_whole_model_hands_nothing_on():
    """One whose layers end before the model's gives what leaves them, though nobody takes it."""
    handing = {
        (gpus, num_layers): ["hidden_states" in gpu.memory.running for gpu in plan(gpus, num_layers=num_layers).gpus]
        for gpus, num_layers in (("1xH200", 12), ("2xH200", 12))
    }
    assert handing == {("1xH200", 12): [False], ("2xH200", 12): [True, True]}
    first = tuple(part for part in demand(12).options.parts if (part.layer or 0) < 6)
    assert "hidden_states" in plan("1xH200", num_layers=12, parts=first).gpus[0].memory.running


def test_short_by_is_what_one_more_gpu_would_have_to_hold():
    """The weights without room, counted again from the layers that do fit."""
    planned = plan("1xH200", weights="bf16")
    overhead_bytes = sum(planned.demand.overhead.values()) - planned.demand.overhead["hidden_states"]  # one GPU hands nothing on
    layers = (143_771 * 2**20 - overhead_bytes - 1_229_193_216) // READY
    assert planned.short_by_bytes == (62 - layers) * READY
    packed = (143_771 * 2**20 - overhead_bytes - 1_229_193_216 - UNPACKED) // PACKED
    assert plan("1xH200").short_by_bytes == (62 - packed) * PACKED


def test_every_remedy_is_enough_and_no_more_than_needed():
    planned = plan("6xH100-80GB", batch_tokens=65_536, weights="bf16")
    remedies = {remedy.option: remedy.value for remedy in planned.remedies}
    assert {"batch_tokens", "gpus"} <= remedies.keys()
    assert plan("6xH100-80GB", batch_tokens=remedies["batch_tokens"], weights="bf16").fits
    with pytest.raises(ClusterError, match="It fits with batch_tokens = .* It fits on "):
        planned.require_fit()
    with pytest.raises(ClusterError, match='too little. It fits with weights = "packed". It fits on '):
        planned.require_fit(has_begun=True)  # a run that has begun keeps its row options
    assert not plan("6xH100-80GB", batch_tokens=remedies["batch_tokens"] + 256, weights="bf16").fits
    assert plan(f"{remedies['gpus']}xH100-80GB", batch_tokens=65_536, weights="bf16").fits
    assert not plan(f"{remedies['gpus'] - 1}xH100-80GB", batch_tokens=65_536, weights="bf16").fits


# -- where weights live ---------------------------------------------------------------------------------------------------

READY = 7_339_011_072
PACKED, UNPACKED = m2_table(1).packed_bytes()[0], m2_table(1).unpacked_bytes("bfloat16")[0]


def offloading(host_free_bytes: int, disk_free_bytes: int | None = None, *, disk_in_memory: bool = False, gpus: int = 1, **options) -> Plan:
    """MiniMax-M2 on H200s of one node, with so much free in its memory and on its disk."""
    on_node = tuple(Gpu(index, "NVIDIA H200", 143_771 * 2**20, 143_771 * 2**20) for index in range(gpus))
    disk = {"disk_free_bytes": disk_free_bytes, "disk_in_memory": disk_in_memory}
    return plan(Cluster((Node("a", on_node, host_bytes=2000 * GB, host_free_bytes=host_free_bytes, **disk),)), **options)


def places(planned: Plan) -> dict[str, int]:
    """How many layers live where."""
    return Counter(gpu.residency.get(layer, "gpu") for gpu in planned.gpus if gpu.span for layer in range(gpu.span.start, gpu.span.stop))


def test_weights_are_ready_where_all_fits_and_else_packed():
    assert places(plan("8xH200", weights="auto")) == {"gpu": 62}
    packed = plan("2xH200")
    assert packed.fits
    assert packed.demand.options.weights == "auto"
    for gpu in packed.gpus:
        memory = gpu.memory.running
        ready = [layer for layer in range(gpu.span.start, gpu.span.stop) if layer not in gpu.residency]
        assert memory["packed_weights"] == PACKED * len(gpu.residency)
        assert memory["workspace"] == UNPACKED
        assert memory["weights"] == READY * len(ready) + (1_229_193_216 if gpu.span.start == 0 else 0)
        assert memory["wave"] == gpu.wave_tokens * 6144 * (2 if gpu.span.start else 1)
        assert gpu.memory.peak_bytes <= gpu.device.usable_bytes < gpu.memory.peak_bytes + READY - PACKED, "one more ready has no room"
    assert places(plan("2xH200", weights="packed")) == {"gpu_packed": 62}
    assert not plan("2xH200", weights="bf16").fits
    assert {remedy.option: remedy.value for remedy in plan("2xH200", weights="bf16").remedies}["weights"] == "packed"
    assert f"{PACKED:,}  packed, where it is not ready" in drawn(packed)
    assert "packed, where" not in drawn(plan("8xH200"))


def test_the_refusal_of_packed_weights_offers_what_would_fit():
    """One layer takes less ready than packed with what it is unpacked into."""

    def offered(mb: int, num_layers: int) -> dict[str, str | int]:
        refused = plan("1xH200", num_layers, weights="packed", max_memory=parse_max_memory(f"{mb}MB"))
        assert not refused.fits
        return {remedy.option: remedy.value for remedy in refused.remedies}

    ready_mb = plan("1xH200", 1, weights="bf16").gpus[0].memory.peak_bytes // 10**6 + 1
    assert offered(ready_mb, 1)["weights"] == "auto"
    assert offered(40_000, 62)["offload"] == "cpu"


def test_four_bits_take_longer_to_unpack_than_eight():
    """As one H200 did: a layer of MiniMax-M2's experts in 3.3 ms of FP8, 5.4 of MXFP4 and 17 of AWQ."""

    def packed_as(method: str, bits: int) -> float:
        rows = tuple(
            replace(row, method=method, disk_bytes=int(row.num_elements * bits / 8)) if row.method else row for row in m2_table(2).rows
        )
        asked = replace(demand(2, weights="packed", compile=True), table=replace(m2_table(2), rows=rows))
        (placed,) = plan_run(asked, parse_gpus("1xH200")).placed
        ready = replace(placed, residency={})
        return (pass_s(asked, placed, 16_384) - pass_s(asked, ready, 16_384)) / 2 * 1e3

    times_ms = [
        packed_as(*each) for each in (("FP8 in blocks of 128 x 128", 8), ("MXFP4 in groups of 32", 4.25), ("AWQ, INT4 in groups", 4.15))
    ]
    assert times_ms == pytest.approx([3.3, 5.4, 17], rel=0.1)


def test_a_checkpoint_that_is_not_quantised_is_not_packed():
    rows = tuple(
        replace(row, method="", lies_as="float32" if row.itemsize_bytes else "bfloat16", disk_bytes=row.compute_bytes(2))
        for row in m2_table(4).rows
    )
    table, config = replace(m2_table(4), rows=rows), ExtractConfig(model="m", prompts="p", output="o", weights="packed")
    with pytest.raises(ConfigError, match="no weights of this checkpoint are quantised"):
        resolve(config, PromptOptions.of(config, 1), table, SHAPE)
    small = parse_max_memory("30GB")
    streamed = plan_run(replace(demand(4, offload="cpu", max_memory=small), table=table), parse_gpus("1xH200"))
    memory = streamed.gpus[0].memory.running
    assert places(streamed)["host"] in (3, 4)
    assert memory["landing_buffers"] == 2 * table.packed_bytes()[0]
    assert not {"workspace", "packed_weights"} & memory.keys(), "what lies there as it is computed is unpacked nowhere"


def test_what_finds_no_room_is_brought_from_host_memory():
    assert "offload" in [remedy.option for remedy in offloading(1000 * GB).remedies]
    planned = offloading(1000 * GB, offload="cpu")
    assert planned.fits
    (gpu,) = planned.gpus
    assert list(places(planned)) == ["gpu_packed", "host"], "none ready while others are brought"
    assert gpu.memory.running["landing_buffers"] == 2 * PACKED
    assert gpu.memory.peak_bytes <= gpu.device.usable_bytes < gpu.memory.peak_bytes + PACKED
    assert planned.stages[0].host.running["packed_layers"] == PACKED * places(planned)["host"]
    ready = offloading(1000 * GB, offload="cpu", weights="bf16")
    assert places(ready)["gpu"] + places(ready)["host"] == 62
    assert ready.gpus[0].memory.running["workspace"] == UNPACKED
    assert places(plan("8xH200", offload="cpu")) == {"gpu": 62}, "nothing is moved that fits"
    assert places(plan("2xH200", offload="cpu")).keys() == {"gpu", "gpu_packed"}


def test_the_host_is_filled_before_files_are_read_each_time():
    """GPUs first, then host memory, then files; nothing twice, nothing forgotten, and both GPUs wait about alike."""
    planned = offloading(60 * GB, gpus=2, offload="auto", weights="bf16")
    assert planned.fits
    (node,) = planned.nodes
    assert sum(places(planned).values()) == 62
    assert places(planned)["checkpoint"]
    for gpu in planned.gpus:
        order = [gpu.residency.get(layer, "gpu") for layer in range(gpu.span.start, gpu.span.stop)]
        assert order == sorted(order, key=("gpu", "host", "checkpoint").index)
    in_files = [list(gpu.residency.values()).count("checkpoint") for gpu in planned.gpus]
    assert abs(in_files[0] - in_files[1]) <= 1
    assert node.host_bytes <= 0.9 * 60 * GB < node.host_bytes + PACKED
    assert node.disk_bytes == 0, "they are read from the checkpoint itself"
    assert not places(offloading(1000 * GB, offload="auto")).get("checkpoint")
    assert not places(offloading(1000 * GB, offload="disk")).get("host")
    assert [each.resource for each in offloading(30 * GB, offload="cpu").shortages] == ["host_memory"]


def test_a_folder_for_copies_needs_room_and_a_disk():
    copied = offloading(60 * GB, 500 * GB, offload="disk", offload_folder="/scratch")
    assert copied.nodes[0].disk_bytes == PACKED * places(copied)["checkpoint"]
    short = offloading(60 * GB, 50 * GB, offload="disk", offload_folder="/scratch")
    assert [(each.resource, each.where) for each in short.shortages] == [("disk", "a")]
    assert short.short_by_bytes == short.nodes[0].disk_bytes - 50 * GB
    assert offloading(60 * GB, None, offload="disk", offload_folder="/scratch").fits, "what is not known is not refused"
    with pytest.raises(ConfigError, match=r"copied into memory.*tmpfs.*node a.*Set it to a folder on a disk"):
        offloading(60 * GB, 500 * GB, disk_in_memory=True, offload="disk", offload_folder="/scratch")
    assert offloading(60 * GB, 500 * GB, disk_in_memory=True, offload="disk").fits, "none is copied"
    for offload in ("none", "cpu"):
        with pytest.raises(ConfigError, match="puts nothing there"):
            ExtractConfig.validated({"model": "m", "prompts": "p", "output": "o", "offload": offload, "offload_folder": "/scratch"})


def test_files_are_a_remedy_where_host_memory_is_none():
    def offered(planned: Plan) -> list[str | int]:
        return [remedy.value for remedy in planned.remedies if remedy.option == "offload"]

    assert offered(offloading(500 * GB)) == ["cpu"]
    assert offered(offloading(60 * GB)) == ["auto"]
    assert offered(offloading(60 * GB, offload="cpu")) == ["auto"]
    assert offered(offloading(3 * GB)) == []
    text = next(remedy.text for remedy in offloading(60 * GB).remedies if remedy.option == "offload")
    assert re.search(r"bytes of layers are brought in turn, [0-9,]+ of these from files", text)


# -- waves ----------------------------------------------------------------------------------------------------------------


def test_unpacking_costs_less_the_larger_the_wave():
    """On one H200: 0.77 of the speed of ready layers at 16,384 tokens, 0.87, 0.93 and 0.97 at twice as many each time."""
    ready, packed = (demand(6, weights=weights, compile=True) for weights in ("bf16", "packed"))
    on = parse_gpus("1xH200")
    (is_ready,), (is_packed,) = (plan_run(asked, on).placed for asked in (ready, packed))
    shares = [pass_s(ready, is_ready, tokens) / pass_s(packed, is_packed, tokens) for tokens in (16_384, 32_768, 65_536, 131_072)]
    assert shares == pytest.approx([0.77, 0.87, 0.93, 0.97], abs=0.01)
    assert plan_run(packed, on).wave == (131_072, "")
    assert plan_run(ready, on).wave == (0, "")


def test_a_wave_hides_what_is_brought():
    """A packed layer of 3.7 GB comes over the bus in 67 ms, in which an H200 computes some 103,000 tokens of one."""
    planned = offloading(1000 * GB, offload="cpu", compile=True)
    assert planned.wave == (131_072, "")
    assert planned.limiting_resource == "computation"
    assert "offload" not in planned.rates.limits
    assert planned.rates.tokens_per_s == pytest.approx(23_800, rel=0.03)
    short = offloading(1000 * GB, offload="cpu", compile=True, in_flight_bytes=2 * 32_768 * 6144)
    assert short.wave == (32_768, "in_flight")
    assert short.limiting_resource == "offload"
    assert short.rates.limits["offload"] < 0.6 * planned.rates.tokens_per_s
    assert "in_flight has no room for them" in " ".join(drawn(short).split())
    assert "offload" not in plan("8xH200", offload="cpu").rates.limits


def test_all_that_a_chain_has_between_its_stages_stays_within_in_flight():
    for gpus, in_flight_bytes in itertools.product(("2xH200", "4xH100-80GB"), (4 << 30, 1 << 30, 1 << 28)):
        planned = plan(gpus, in_flight_bytes=in_flight_bytes)
        assert (len(planned.stages) + 1) * planned.wave.tokens * 6144 <= in_flight_bytes
        assert planned.nodes[0].shm_bytes <= in_flight_bytes
        assert {gpu.wave_tokens for gpu in planned.gpus} == {planned.wave.tokens}


def test_a_wave_is_no_larger_than_the_prompts_and_fills_a_chain():
    few, more = (replace(PROMPTS, padded_tokens=tokens, tokens=tokens, micro_batches=tokens // 16_384) for tokens in (60_000, 1_200_000))
    waves = [plan("2xH200", compile=True, prompts=prompts).wave.tokens for prompts in (few, more, None)]
    assert waves[0] == 0 < waves[1] < waves[2] == 131_072
    unfilled = PromptStats(sequences=24, tokens=192, padded_tokens=192, longest_tokens=8, shards=3, micro_batches=3)
    on_cpu = {"max_memory": parse_max_memory("24GB"), "offload": "disk", "prompts": unfilled}
    assert cpu_machine(64 * GB, **on_cpu).wave.tokens == 2048, "of three micro-batches, each a shard of its own"


def test_stages_whose_layers_are_ready_take_no_waves():
    """A small GPU beside a large one: one packs, the other need not."""
    planned = plan("2xH200", num_layers=30, max_memory=parse_max_memory("0:60GB,1:140GB"), device_map="sequential")
    assert [gpu.wave_tokens > 0 for gpu in planned.gpus] == [bool(gpu.residency) for gpu in planned.gpus]


def cpu_machine(host_bytes: int, **options) -> Plan:
    return plan(Cluster((cpu_node(host_bytes=host_bytes),)), num_layers=4, batch_tokens=1024, **options)


def test_without_gpus_layers_that_find_no_room_in_memory_are_read_from_files():
    ready = cpu_machine(64 * GB)
    assert (ready.placed[0].residency, ready.wave.tokens) == ({}, 0)
    packed = cpu_machine(36 * GB)
    assert packed.fits
    assert set(packed.placed[0].residency.values()) == {"host"}, "packed in memory"
    staging = [each.stages[0].host.loading["staging"] for each in (ready, packed, cpu_machine(36 * GB, weights="packed"))]
    readers_bytes, embedding_bytes = READERS_A_CORE_BYTES * 8, PIECES["plain"] * PIECE_BYTES
    assert staging == [STAGING_BYTES["host"], STAGING_BYTES["host"] + readers_bytes, embedding_bytes + readers_bytes], "some ready; none"
    limited = cpu_machine(64 * GB, max_memory=parse_max_memory("24GB"), offload="disk")
    assert limited.fits
    assert "checkpoint" in limited.placed[0].residency.values()
    assert limited.stages[0].host.peak_bytes <= 24 * GB
    assert limited.wave.tokens > 1024
    refused = cpu_machine(64 * GB, max_memory=parse_max_memory("24GB"))
    assert [(each.resource, each.where) for each in refused.shortages] == [("host_memory", "what max_memory leaves to all stages together")]
    assert {"max_memory", "offload"} <= {remedy.option for remedy in refused.remedies}


def test_room_for_a_wave_drives_no_layer_out_of_the_memory_of_a_machine_without_gpus():
    """Where all layers just find room packed, a micro-batch at a time is read from memory, and a wave of them would be from files."""
    least_mb = bisect_left(range(36_000), x=True, lo=1, key=lambda mb: cpu_machine(64 * GB, max_memory=parse_max_memory(f"{mb}MB")).fits)
    planned = cpu_machine(64 * GB, max_memory=parse_max_memory(f"{least_mb}MB"), offload="disk")
    assert set(planned.placed[0].residency.values()) == {"host"}
    assert planned.wave == (0, "memory")
    assert planned.stages[0].host.peak_bytes <= least_mb * 10**6


@pytest.mark.parametrize("batch_tokens", [256, "auto"])
@pytest.mark.parametrize(("layers", "num_layers"), [("0", 1), ("all", 60)])
def test_without_gpus_no_more_rows_wait_for_the_store_than_those_of_few_micro_batches(layers, num_layers, batch_tokens):
    config = ExtractConfig(model="m", prompts="p", output="o", layers=layers, batch_tokens=batch_tokens)
    options = resolve(config, PromptOptions.of(config, 1), m2_table(60), SHAPE, Cluster((cpu_node(),)))
    assert options.writer_queue_bytes == min(8 * 32 << 20, 4 * options.batch_tokens * num_layers * 6144)


def test_what_is_short_is_what_the_most_frugal_way_lacks():
    """Of one layer, which packed in memory takes less than what it takes to read it from files."""
    on = Cluster((cpu_node(host_bytes=64 * GB),))

    def limited(mb: int) -> Plan:
        return plan(on, num_layers=1, batch_tokens=1024, weights="packed", offload="disk", max_memory=parse_max_memory(f"{mb}MB"))

    least_mb = bisect_left(range(36_000), x=True, lo=1, key=lambda mb: limited(mb).fits)
    assert 0 < limited(least_mb - 1).short_by_bytes <= 10**6


def test_remedies_for_limits_and_for_float32():
    limited = plan("8xA100-80GB", max_memory=parse_max_memory("40GB"))
    assert next(remedy.option for remedy in limited.remedies) == "max_memory"
    assert "compute_dtype" in [remedy.option for remedy in plan("8xA100-80GB", compute_dtype="float32", weights="bf16").remedies]
    assert plan("8xA100-80GB").remedies == ()


def test_remedies_without_max_memory_count_the_gpus_that_it_left_out():
    left_out = plan("8xH200", max_memory=parse_max_memory("0:60GB,1:60GB,2:40GB"))
    assert left_out.remedies[0].text == "It fits without max_memory."
    more = next(remedy for remedy in left_out.remedies if remedy.option == "gpus")
    assert "of which 60,000,000,000 bytes each may be used" in more.text


def cpu_node(name: str = "a", **changed) -> Node:
    return Node(name, **{"cpus": 8, "host_bytes": 64 * GB, "shm_bytes": 32 * GB, **changed})


def test_remedies_for_host_memory():
    """Transient memory, hidden states and captured rows go with the micro-batch; weights go to more nodes."""
    cluster = Cluster((cpu_node(host_bytes=38 * GB),))
    short = plan(cluster, num_layers=4, weights="bf16")
    assert [shortage.resource for shortage in short.shortages] == ["host_memory"]
    remedies = {remedy.option: remedy.value for remedy in short.remedies}
    assert plan(cluster, num_layers=4, weights="bf16", batch_tokens=remedies["batch_tokens"]).fits
    assert not plan(cluster, num_layers=4, weights="bf16", batch_tokens=remedies["batch_tokens"] + 256).fits
    wider = Cluster(tuple(cpu_node(str(number), host_bytes=38 * GB) for number in range(remedies["nodes"])))
    assert plan(wider, num_layers=4, stages=remedies["nodes"]).fits


def test_remedies_for_shared_memory_and_disk():
    small = Cluster((cpu_node(host_bytes=200 * GB, shm_bytes=GB // 2),))
    short = plan(small, num_layers=4, stages=4)
    assert [shortage.resource for shortage in short.shortages] == ["shared_memory"]
    (in_flight,) = (remedy.value for remedy in short.remedies if remedy.option == "in_flight")
    assert plan(small, num_layers=4, stages=4, in_flight_bytes=in_flight).fits
    needed_bytes = plan("8xH200", prompts=PROMPTS).output.disk_bytes
    full = plan("8xH200", prompts=PROMPTS, disk_free_bytes=int(0.8 * needed_bytes))
    assert [remedy.option for remedy in full.remedies] == ["compression", "layers", "output"]
    assert plan("8xH200", prompts=PROMPTS, disk_free_bytes=int(0.8 * needed_bytes), compression="planes").fits


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
def test_long_prompts_count_and_the_length_that_fits_is_told(attn):
    """32k tokens as one prompt: eager attention needs many times the memory, the others no more than for short prompts."""

    def planned(longest_tokens: int) -> Plan:
        long = demand(batch_tokens=32_768, longest_tokens=longest_tokens, attn_implementation=attn)
        return plan_run(long, parse_gpus("8xH200"))

    assert planned(512).fits
    assert planned(32_768).fits is (attn != "eager")
    if attn == "eager":
        (told,) = [remedy.value for remedy in planned(32_768).remedies if remedy.option == "max_length"]
        assert planned(told).fits
        assert not planned(told + 256).fits


def test_long_prompts_count_where_layers_are_offloaded():
    """A GPU's peak stays below what may be used, and what a long prompt takes is taken from the layers that are kept there."""
    short, long = (offloading(1000 * GB, offload="cpu", longest_tokens=length) for length in (512, 65_536))
    assert short.fits
    assert long.fits
    assert all(gpu.memory.peak_bytes <= gpu.device.usable_bytes for planned in (short, long) for gpu in planned.gpus)
    assert long.gpus[0].memory.running["transient"] == SHAPE.transient_bytes(65_536, 65_536, 2)
    assert places(long)["host"] > places(short)["host"]


def test_a_sequence_longer_than_a_micro_batch_sets_its_size():
    longer = plan("8xA100-80GB", longest_tokens=40_000)
    assert longer.gpus[0].memory.running["transient"] == SHAPE.transient_bytes(40_000, 40_000, 2)


def test_flash_attention_needs_gpus_and_its_package_on_every_node():
    flash = demand(num_layers=6, attn_implementation="flash_attention_2")
    gpus = tuple(Gpu(index, "NVIDIA H200", 150 * GB, 150 * GB) for index in range(2))
    lacking, equipped = ({"torch": "2.11"} | more for more in ({}, {"flash-attn": "2.8.3"}))
    assert plan_run(flash, parse_gpus("4xH200")).fits, "what is not known is left to the stage"
    assert plan_run(flash, Cluster((Node("a", gpus, versions=equipped),))).fits
    with pytest.raises(ClusterError, match=r"(?s)flash-attn is not installed on node a.*flash-attn is not installed on node c"):
        plan_run(flash, Cluster(tuple(Node(name, gpus, versions=equipped if name == "b" else lacking) for name in "abc")))
    with pytest.raises(ClusterError, match="needs GPUs, and there are none"):
        plan_run(flash, Cluster((Node("a", cpus=8),)))


# -- layouts --------------------------------------------------------------------------------------------------------------


def test_balanced_over_eight():
    assert spans(plan("8xA100-80GB")) == ["0-6", "7-13", "14-21", "22-29", "30-37", "38-45", "46-53", "54-61"]


def test_a_number_of_stages_is_one_of_stages_with_layers():
    cpu = Cluster((Node("a", cpus=8),))
    planned = plan(cpu, num_layers=6, device_map="balanced_low_0", stages=3)
    assert [str(stage.span) for stage in planned.stages] == ["layers 0-0", "layers 1-2", "layers 3-5"]


def test_other_maps():
    assert spans(plan("8xH200", device_map="balanced_low_0"))[0] is None
    assert spans(plan("8xH200", device_map="balanced_low_0", stages=8))[0] == "0-0"
    assert spans(plan("8xH200", device_map="balanced_low_0", stages=4, gpus_per_stage=2))[:2] == [None, "0-7"]
    filled = spans(plan("8xH200", device_map="sequential"))
    assert filled[:3] == ["0-18", "19-37", "38-56"]
    assert filled[4:] == [None] * 4
    assert spans(plan("8xH200", num_layers=10, device_map="cuda:0")) == ["0-9"]
    with pytest.raises(ConfigError, match="diagonal"):
        plan("8xH200", device_map="diagonal")
    with pytest.raises(ClusterError, match="cuda:8"):
        plan("8xH200", device_map="cuda:8")
    with pytest.raises(ConfigError, match="one GPU"):
        plan("8xH200", device_map="cuda:0", stages=2)


def test_max_memory_leaves_gpus_out_and_lowers_others():
    planned = plan("8xH200", num_layers=12, max_memory=parse_max_memory("0:60GB,1:60GB,2:40GB"))
    assert [(gpu.device.gpu.index, gpu.device.usable_bytes) for gpu in planned.gpus] == [(0, 60 * GB), (1, 60 * GB), (2, 40 * GB)]
    assert planned.fits
    assert all(gpu.memory.peak_bytes <= gpu.device.usable_bytes for gpu in planned.gpus)


def test_a_stage_of_two_gpus_has_one_span_over_both():
    planned = plan("8xA100-80GB", gpus_per_stage=2)
    assert [(stage.stage, str(stage.span)) for stage in planned.stages] == [
        (0, "layers 0-13"),
        (1, "layers 14-29"),
        (2, "layers 30-45"),
        (3, "layers 46-61"),
    ]
    assert [gpu.stage for gpu in planned.gpus] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_two_replicas_of_twelve_on_three_nodes_cross_once_each():
    planned = plan("3 nodes of 8xH100-80GB", stages=12, replicas=2)
    for replica in (0, 1):
        nodes = [stage.node for stage in planned.stages if stage.replica == replica]
        assert len(nodes) == 12
        assert sum(a != b for a, b in itertools.pairwise(nodes)) == 1
    assert len({(gpu.device.node.name, gpu.device.gpu.index) for gpu in planned.gpus}) == 24


def test_a_chain_takes_the_smallest_node_that_holds_it():
    planned = plan("4xH200, 8xH200", stages=4)
    assert {stage.node for stage in planned.stages} == {"node-0"}
    assert {stage.node for stage in plan("8xH200, 4xH200", stages=6).stages} == {"node-0"}


def test_too_few_gpus_is_said_in_numbers():
    with pytest.raises(ClusterError, match=r"2 x 12 stages need 1 GPU each\. .*8 on node-0, 8 on node-1: 8 too few\. Set stages = 8,"):
        plan("2 nodes of 8xH200", stages=12, replicas=2)
    with pytest.raises(ClusterError, match=r"8 too few\. Ask for fewer,"):
        plan("16xH200", replicas=24)
    with pytest.raises(ConfigError, match="3 stages of 1 GPU cannot share 2 layers"):
        plan("8xH200", num_layers=2, stages=3)


def test_more_gpus_than_layers_leave_some_free():
    assert len(plan("8xH200", num_layers=3).gpus) == 3


def test_of_layers_that_replicas_have_in_host_memory_a_node_has_one_copy():
    asked = {"num_layers": 12, "max_memory": parse_max_memory("30GB"), "replicas": 2}
    both, one = plan("2xH200", offload="cpu", **asked), plan("1xH200", offload="cpu", **asked | {"replicas": 1})
    brought = [layer for layer, place in one.placed[0].residency.items() if place == "host"]
    copy_bytes = sum(both.demand.packed_bytes[layer] for layer in brought)
    assert len(brought) > 4
    assert both.nodes[0].host_bytes == 2 * one.nodes[0].host_bytes - copy_bytes
    assert [shared_layers(each, both.placed) for each in both.placed] == [frozenset(brought)] * 2
    assert not shared_layers(one.placed[0], one.placed)
    apart = plan("2 nodes of 1xH200", offload="cpu", **asked)
    assert not any(shared_layers(each, apart.placed) for each in apart.placed), "on two nodes"

    # Room for one copy, and not for two.
    host_bytes = int((both.nodes[0].host_bytes + 2 * READERS_BYTES) / HOST_SHARE) + 1
    node = Node("here", parse_gpus("2xH200").nodes[0].gpus, host_bytes=host_bytes)
    filled = plan(Cluster((node,)), offload="auto", **asked)
    assert [list(each.residency.values()).count("checkpoint") for each in filled.placed] == [0, 0]


def test_auto_replicas_are_as_many_as_fit():
    assert most_replicas(demand(), parse_gpus("8xH200")) == 2
    assert most_replicas(demand(), parse_gpus("8xA100-80GB")) == 1
    assert most_replicas(demand(num_layers=4), parse_gpus("8xH200")) == 8
    assert plan("8xH200", replicas=2).fits
    assert not plan("8xH200", replicas=3, weights="bf16").fits
    crowded = replace(parse_gpus("8xH200").nodes[0], host_bytes=24 * GB)
    assert most_replicas(demand(num_layers=4), Cluster((crowded,))) < 8, "host memory counts too"


def test_without_gpus_everything_is_host_memory():
    cluster = Cluster((Node("a", cpus=8, host_bytes=64 * GB, shm_bytes=32 * GB), Node("b", cpus=8, host_bytes=8 * GB, shm_bytes=GB)))
    planned = plan(cluster, num_layers=4, stages=4)
    assert [stage.node for stage in planned.stages] == ["a", "a", "b", "b"]
    assert planned.stages[0].host.running["weights"] == 7_339_011_072 + 1_229_193_216
    assert [(shortage.resource, shortage.where) for shortage in planned.shortages] == [("host_memory", "b"), ("shared_memory", "b")]
    assert planned.short_by_bytes == planned.shortages[0].short_by_bytes == planned.nodes[1].host_bytes - 8 * GB
    assert planned.limiting_resource == "host_memory"


def test_busy_hosts_count_with_what_is_free():
    gpus = tuple(Gpu(index, "NVIDIA H200", 150 * GB, 150 * GB) for index in range(8))
    node = Node("a", gpus, host_bytes=1000 * GB, host_free_bytes=30 * GB, shm_bytes=500 * GB)
    assert [shortage.resource for shortage in plan(Cluster((node,))).shortages] == ["host_memory"]
    assert plan(Cluster((replace(node, host_free_bytes=900 * GB),))).fits


# -- output and speed -----------------------------------------------------------------------------------------------------

PROMPTS = PromptStats(sequences=100, tokens=20_000, padded_tokens=25_000, longest_tokens=900, shards=3, micro_batches=5)


@pytest.mark.parametrize("is_natural", [True, False])
@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("row_groups", "rows", "length", "vocabulary"),
    [(1, 300, 30, 2000), (40, 50, 25, 2000), (4, 2000, 100, 200_000), (2, 8000, 500, 30_000)],
)
def test_output_bytes_are_within_two_percent_of_the_writers(tmp_path, width, dtype, row_groups, rows, length, vocabulary, is_natural):
    rng = np.random.default_rng(0)
    spec = PartSpec.of("residual", 3, dtype, width)
    metadata = {"run_id": "0" * 32, "model_type": "minimax_m2", "num_layers": "62", "model_digest": "0" * 32, "tokenizer_digest": "0" * 32}
    writer = PartWriter(open_store(str(tmp_path)), spec, metadata, 0, "0123456789ab")
    for group in range(row_groups):
        tokens = np.empty(rows, TOKEN_ROW)
        tokens["sequence_id"] = 1000 * group + np.arange(rows) // length
        tokens["position"] = np.arange(rows) % length
        tokens["token_id"] = np.minimum(rng.zipf(1.2, rows), vocabulary) - 1 if is_natural else rng.integers(0, vocabulary, rows)
        bits = rng.integers(0, 256, (rows, width * (2 if dtype == "bfloat16" else 4)), dtype=np.uint8)
        writer.append(encode_tokens(tokens), [bits])
    writer.seal()
    writer.finish("0" * 32)
    assert part_bytes(spec, row_groups * rows, row_groups) == pytest.approx(writer.receipt.num_bytes, rel=0.02)


@pytest.mark.parametrize("chosen", [1, 4, 16])
def test_the_bytes_of_few_chosen_tokens_are_not_below_the_writers(tmp_path, chosen):
    """Of the last tokens of each sequence, whose ids have all not come yet; of rows as narrow as a router's."""
    rng, writer_of = np.random.default_rng(0), open_store(str(tmp_path))
    columns = (Column("expert_ids", "int16", 8), Column("expert_weights", "float32", 8))
    writer = PartWriter(writer_of, PartSpec("router_topk", 3, columns), {"run_id": "0" * 32}, 0, "0123456789ab")
    for group in range(20):
        tokens = np.empty(15 * chosen, TOKEN_ROW)
        tokens["sequence_id"] = np.repeat(1000 * group + 37 * np.arange(15), chosen)
        tokens["position"] = np.repeat(rng.integers(20, 200, 15), chosen) + np.tile(np.arange(chosen), 15)
        tokens["token_id"] = rng.integers(0, 50_000, len(tokens))
        writer.append(encode_tokens(tokens), [rng.integers(0, 256, (len(tokens), width), dtype=np.uint8) for width in (16, 32)])
    writer.seal()
    writer.finish("0" * 32)
    planned = part_bytes(writer.spec, 300 * chosen, 20, sequences=300)
    assert writer.receipt.num_bytes <= planned <= 1.05 * writer.receipt.num_bytes


def test_output_of_a_run():
    output = plan_output(residuals(), PROMPTS, price_per_gb_month=0.02)
    assert output.files == 62 * 3
    assert output.num_bytes == sum(output.by_part.values()) == 62 * part_bytes(residuals()[0], 20_000, 5, 3)
    assert PROMPTS.padding_waste == pytest.approx(0.2)
    assert output.cost_a_month == pytest.approx(output.disk_bytes * 0.02 / 1e9)
    assert output.disk_bytes > output.num_bytes
    assert plan_output(residuals(), PROMPTS, None).cost_a_month is None


def test_a_disk_too_small_is_a_shortage():
    full = plan("8xH200", prompts=PROMPTS, disk_free_bytes=GB)
    assert [shortage.resource for shortage in full.shortages] == ["disk"]
    assert full.short_by_bytes == full.output.disk_bytes - GB
    assert plan("8xH200", prompts=PROMPTS, disk_free_bytes=1000 * GB).fits


def test_active_weights_of_minimax_m2():
    rows = plan("8xH200").demand.rows(LayerSpan(0, 62))
    assert active_elements(rows, SHAPE) == pytest.approx(9.8e9, rel=0.02)  # 11.0e9 with embedding and head


def test_the_slowest_resource_limits_the_run():
    stated = plan("8xH200", prompts=PROMPTS, tokens_per_s=1000.0)
    assert stated.rates.is_stated
    assert stated.rates.store_bytes_per_s == pytest.approx(1000 * 62 * (6144 + 4.5))
    assert (stated.limiting_resource, stated.rates.duration_s) == ("computation", 20.0)
    in_planes = plan("8xH200", prompts=PROMPTS, tokens_per_s=1000.0, compression="planes")
    assert in_planes.rates.store_bytes_per_s == pytest.approx(1000 * 62 * (0.71 * 6144 + 4.5))
    slow_store = plan("8xH200", tokens_per_s=1000.0, store_bytes_per_s=1e6)
    assert slow_store.limiting_resource == "store"
    assert slow_store.rates.limits["store"] == pytest.approx(1e6 / 62 / (6144 + 4.5))
    assert plan("8xH200", tokens_per_s=1e9).limiting_resource == "device_to_host_copy"
    assert plan("1xH200").limiting_resource == "gpu_memory"


def test_estimated_speed_follows_layout_and_padding():
    one = plan("8xH200").rates.tokens_per_s
    assert plan("8xH200", device_map="sequential").rates.tokens_per_s == pytest.approx(one * 8 / 19)  # 19 layers on the second GPU
    assert plan("8xH200", replicas=2).rates.tokens_per_s == pytest.approx(one, rel=0.15)
    assert plan("8xH200", gpus_per_stage=2).rates.tokens_per_s == pytest.approx(one / 2, rel=0.15)
    full = replace(PROMPTS, tokens=65_536, padded_tokens=5 * 16_384, micro_batches=5)
    assert plan("8xH200", prompts=full).rates.tokens_per_s == pytest.approx(0.8 * one)
    unknown = Cluster((Node("a", tuple(Gpu(index, "Unheard Of", 150 * GB, 150 * GB) for index in range(8))),))
    assert plan(unknown).rates.tokens_per_s is None
    assert plan(unknown).limiting_resource is None


# -- how it is told -------------------------------------------------------------------------------------------------------


def test_json_holds_the_plan_in_plain_values():
    told = json.loads(json.dumps(to_json(plan("2 nodes of 4xH200", prompts=PROMPTS, replicas=2))))
    assert told["fits"] is True
    assert told["short_by_bytes"] == 0
    assert told["weights"]["disk_bytes"] == 230_121_630_720
    assert [gpu["layers"] for gpu in told["gpus"][:4]] == [[0, 14], [15, 29], [30, 45], [46, 61]]
    assert told["gpus"][0]["peak_bytes"] == sum(told["gpus"][0]["running"].values())
    assert told["output"]["by_part"][7]["layer"] == 7
    assert told["cluster"][1]["gpus"][3]["name"] == "H200-141GB"
    lacking = json.loads(json.dumps(to_json(plan("1xH200"))))
    assert lacking["fits"] is False
    assert lacking["short_by_bytes"] == plan("1xH200").short_by_bytes
    assert lacking["output"] is None
    assert lacking["remedies"][0]["option"] == "gpus"


def drawn(planned: Plan) -> str:
    console = Console(width=120, record=True, file=None, quiet=False, color_system=None)
    with console.capture() as capture:
        console.print(render(planned, 120))
    return capture.get()


def test_the_picture_shows_layers_on_gpus_on_nodes():
    text = drawn(plan("2 nodes of 8xH200", stages=9, prompts=PROMPTS, tokens_per_s=500.0, price_per_gb_month=0.02))
    lines = text.splitlines()
    assert "It fits" in lines[0]
    first, second = (next(number for number, line in enumerate(lines) if line.startswith(name)) for name in ("node-0", "node-1"))
    assert sum("H200-141GB" in line for line in lines[first:second]) == 8
    assert sum("not used" in line for line in lines[second:]) == 7
    assert "457,379,529,728" in text
    assert "20,000 tokens of 100 prompts; padding 20.0%" in text
    assert "a month at 0.02 a GB" in text


def test_the_picture_says_what_is_missing_and_what_helps():
    text = drawn(plan("6xH100-80GB", batch_tokens=65_536, weights="bf16"))
    assert "It does not fit" in text
    assert f"{plan('6xH100-80GB', batch_tokens=65_536).short_by_bytes:,} bytes short" in text
    assert "It fits with batch_tokens =" in text


def test_the_picture_tells_what_makes_up_each_peak():
    planned = offloading(1000 * GB, offload="cpu")
    lines = drawn(planned).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("GPU memory by stage, GB"))
    row = next(line for line in lines[first:] if line.startswith("0 ")).split()
    memory = planned.gpus[0].memory
    ready, packed, workspace, landing, *others = memory.running.values()
    items = (ready + packed, workspace + landing, *others, memory.peak_bytes, sum(memory.loading.values()))
    assert row[1:] == [f"{num_bytes / 1e9:.2f}" for num_bytes in items]
    host = next(number for number, line in enumerate(lines) if line.startswith("host memory by stage, GB"))
    assert f"{planned.stages[0].host.running['packed_layers'] / 1e9:.2f}" in "".join(lines[host:])
    assert any(line.startswith("2-7 ") for line in drawn(plan("8xH200")).splitlines()), "neighbours that hold the same share a line"


def test_the_picture_tells_where_layers_live_that_are_not_ready():
    planned = offloading(60 * GB, offload="auto")
    text = drawn(planned)
    for place, words in (("host", "packed in host memory, copied in turn"), ("checkpoint", "packed in files, read in turn")):
        assert re.search(rf"{PACKED * places(planned)[place]:,} +{words}", text)
    last = places(planned)["gpu_packed"] - 1
    assert f"stage 0: layers 0-{last} packed on the GPU; {last + 1}-" in text
    assert (
        f"waves of {planned.wave.tokens:,} tokens, {planned.wave.tokens // 16_384} micro-batches, go through a layer before the next"
        in text
    )
    assert "offloaded" not in drawn(plan("8xH200", offload="disk"))
    assert "waves" not in drawn(plan("8xH200", offload="disk"))


def test_the_picture_says_that_a_limit_leaves_prompts_out():
    limited = replace(demand().options.prompts, limit=1000)
    said = "limit = 1,000: what comes after so many rows of the prompts is left out"
    assert said in drawn(plan_run(demand().asking(prompts=limited), parse_gpus("8xH200"), PROMPTS))
    assert "limit =" not in drawn(plan("8xH200", prompts=PROMPTS))


def test_the_picture_names_the_columns_that_are_kept():
    keeping = replace(demand().options.prompts, keep_columns=("label", "topic"))
    assert "kept in sequences/: label, topic" in drawn(plan_run(demand().asking(prompts=keeping), parse_gpus("8xH200"), PROMPTS))
    assert "kept in" not in drawn(plan("8xH200", prompts=PROMPTS))


def test_bars_keep_their_length():
    for gpus in ("8xA100-80GB", "7xH100-80GB", "2 nodes of 8xL40S"):
        bars = {sum(line.count(shade) for shade in "█▓▒░") for line in drawn(plan(gpus)).splitlines() if "GB" in line and "░" in line}
        assert bars == {24}


def test_sizes_for_people():
    assert [bytes_in_words(number) for number in (0, 999, 1500, 457_379_529_728, 15e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "457.4 GB",
        "15.0 TB",
    ]


# -- statistics -------------------------------------------------------------------------------------------------------

COVARIANCE = 3072**2


def summing(text: str, num_layers: int = 62, **options) -> Demand:
    """MiniMax-M2 whose statistics are asked for; all its layers have a router."""
    table = replace(m2_table(num_layers), num_experts=256, experts_per_token=8, layers_of={"router_topk": tuple(range(num_layers))})
    config = ExtractConfig(model="m", prompts="p", output="o", statistics=text, **options)
    return Demand(table, SHAPE, resolve(config, PromptOptions.of(config, 1), table, SHAPE))


def test_statistics_are_kept_beside_rows_unless_it_is_said_otherwise() -> None:
    beside, alone, rows = summing("moments").options, summing("moments", keep="statistics").options, demand().options
    assert (beside.keep, alone.keep, rows.keep) == ("both", "statistics", "rows")
    assert (len(beside.parts), alone.parts, rows.statistics) == (62, (), {})
    assert beside.captured == alone.captured == rows.captured
    assert beside.row_options()["statistics"] == {"moments": {"residual": tuple(range(62))}}
    assert (summing("experts:3", layers="0-5").num_layers, summing("experts:3", layers="0-5", keep="statistics").num_layers) == (6, 4)


def test_numbers_of_experts_have_no_means() -> None:
    assert summing("moments", tokens="mean").options.statistics
    with pytest.raises(ConfigError, match="router_topk has numbers of experts"):
        summing("experts", tokens="mean")


def test_experts_are_counted_up_to_the_last_layer_that_is_run() -> None:
    assert summing("experts", layers="0-5").options.statistics == {"experts": {"router_topk": tuple(range(6))}}
    with pytest.raises(ConfigError, match="layer 9"):
        summing("experts:9", layers="0-5")


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("moments, norms", 32_768, 32_768), ("covariance", 600_000, 700_000), ("covariance:20", 32_768, 32_768), ("experts", 32_768, 300_000)],
)
def test_shards_of_statistics_alone_grow_until_what_they_leave_is_little(text: str, least: int, most: int) -> None:
    alone = summing(text, keep="statistics")
    tokens = alone.options.shard_tokens
    assert least <= tokens <= most
    assert summing(text).options.shard_tokens == 32_768
    left = sum(contribution_bytes(kinds, width) for kinds, width in widths(alone.options.statistics, alone.options.of_statistics, 256))
    assert left <= 0.01 * tokens * 62 * 2 * 3072


def test_statistics_are_planned_for_on_gpu_host_and_disk() -> None:
    asked = summing("covariance:20", keep="statistics")
    planned, without = plan_run(asked, parse_gpus("8xH200"), PROMPTS), plan("8xH200", prompts=PROMPTS)
    holder = next(gpu for gpu in planned.gpus if gpu.span and 20 in gpu.span)
    other = next(gpu for gpu in planned.gpus if gpu.span and 20 not in gpu.span)
    assert 5 * 4 * COVARIANCE <= holder.memory.running["statistics"] <= 12 * 4 * COVARIANCE
    assert "statistics" not in other.memory.running
    stage = next(each for each in planned.stages if 20 in each.span)
    assert 3 * 8 * COVARIANCE <= stage.host.running["statistics"] <= 12 * 8 * COVARIANCE
    assert planned.output.num_bytes == 0
    assert 4 * COVARIANCE <= planned.output.statistics_bytes <= 4.1 * COVARIANCE
    assert planned.output.disk_bytes < without.output.disk_bytes / 10


def test_statistics_without_covariances_are_less_than_a_megabyte_a_layer() -> None:
    asked = summing("moments, norms, experts", keep="statistics")
    assert plan_run(asked, parse_gpus("8xH200"), PROMPTS).output.statistics_bytes < 62 * 1e6


def test_float8_is_planned_packed_and_refused_where_gpus_have_no_fp8() -> None:
    table = m2_table()
    kept = replace(table, rows=tuple(replace(row, lies_as="float8_e4m3fn") if row.method else row for row in table.rows))
    asked = replace(demand(compute_dtype="float8"), table=kept)
    found = plan_run(asked, parse_gpus("4xH100-80GB"))
    assert found.fits
    assert not any(each.residency for each in found.placed), "nothing has to be unpacked"
    assert set(found.weights.layer_bytes) == {sum(row.disk_bytes for row in m2_rows(0))}
    assert found.weights.compute_bytes == 227_466_488_832 + 2 * sum(row.num_elements for row in kept.rows if not row.stays_packed)
    beside = replace(kept, rows=tuple(replace(row, lies_as="") if "norm" in row.name else row for row in kept.rows))
    brought = plan_run(replace(asked.asking(offload="cpu"), table=beside), parse_gpus("1xH100-80GB"), PROMPTS)
    assert brought.rates.duration_s, "what little of a layer that is brought is converted takes time too"
    for gpus, why in (("8xA100-80GB", "A100-80GB multiplies none"), ("8xA6000", "A6000-48GB multiplies none")):
        with pytest.raises(ClusterError, match=f'compute_dtype = "float8" needs GPUs that multiply FP8 .*{why}'):
            plan_run(asked, parse_gpus(gpus))
    with pytest.raises(ClusterError, match=r"2 problems.*\n.*flash_attention_2.*\n(.*\n)*.*FP8.*there are none"):
        plan_run(asked.asking(attn_implementation="flash_attention_2"), Cluster((Node("cpu", host_bytes=10**12, host_free_bytes=10**12),)))
