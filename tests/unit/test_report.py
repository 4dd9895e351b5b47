"""report.json and the lines beside it, from a plan of two stages and measurements made up for them."""

import json
from dataclasses import replace

import pytest

from m2ray.batches import LayerSpan, PromptStats
from m2ray.chain.report import build_report, limiting, loaded_lines, start_lines, summary_lines
from m2ray.chain.status import GpuStatus, RunStatus, StageStatus
from m2ray.config import ExtractConfig
from m2ray.options import PromptOptions
from m2ray.planning.demand import Assumptions, Demand
from m2ray.planning.hardware import parse_gpus
from m2ray.planning.plan import Plan, plan_run
from m2ray.planning.resolve import resolve
from m2ray.planning.shape import ModelShape
from m2ray.tensor_rows import TensorRow, TensorTable

GB = 10**9


@pytest.fixture(scope="module")
def plan() -> Plan:
    rows = [TensorRow("embed", "embedding", None, (1000, 64), False, 128_000, ("embed",))]
    rows += [TensorRow(f"w{layer}", "layer", layer, (5 * GB,), False, 10 * GB, (f"w{layer}",)) for layer in range(4)]
    table = TensorTable(4, 64, tuple(rows))
    shape, cluster = ModelShape(64, 4, 4, 16, 256), parse_gpus("2xA100-80GB")
    config = ExtractConfig(model="m", prompts="p", output="o", compile=False)
    options = resolve(config, PromptOptions.of(config, 1), table, shape, cluster, Assumptions())
    return plan_run(Demand(table, shape, options), cluster, PromptStats(10, 900, 1000, 100, 1, 2))


MEASURED = {
    "read_bytes": 20 * GB,
    "load_s": 10.0,
    "micro_batches": 2,
    "tokens": 900,
    "padded_tokens": 1000,
    "compute_s": 6.0,
    "wait_s": 1.0,
    "copy_s": 0.5,
    "write_wait_s": 0.25,
    "write_s": 3.0,
    "store_s": 2.0,
    "written_bytes": 230_000,
    "peak_rss_bytes": GB,
}


def stage(number: int, span: LayerSpan, parameter_bytes: int) -> StageStatus:
    gpu = GpuStatus(number, "A100-80GB", 80 * GB, 20 * GB, 21 * GB, 23 * GB, 24 * GB, 25 * GB)
    return StageStatus(span, "node-0", "cuda:0", parameter_bytes=parameter_bytes, gpus=(gpu,), **MEASURED)


@pytest.fixture
def run(plan: Plan) -> RunStatus:
    stages = (stage(0, LayerSpan(0, 2), 20 * GB + 128_000), stage(1, LayerSpan(2, 4), 20 * GB))
    return RunStatus(1, 1, 900, 0, 900, 10.0, 9.0, 457_000, tuple(zip(plan.stages, stages, strict=True)))


def test_the_report_sets_plan_against_measured(plan: Plan, run: RunStatus) -> None:
    report = build_report(plan, "run", run)
    assert json.loads(json.dumps(report)) == report, "plain values only"
    assert report["parameter_bytes"] == {"planned": 40 * GB + 128_000, "measured": 40 * GB + 128_000}
    assert report["tokens_per_s"]["measured"] == 100
    assert report["padding_waste"] == {"planned": pytest.approx(0.1), "measured": pytest.approx(0.1)}
    assert report["output_bytes"] == {"planned": plan.output.num_bytes, "measured": 457_000}
    assert [one["layers"] for one in report["stages"]] == [[0, 1], [2, 3]]
    assert report["stages"][1]["gpus"][0]["planned_peak_bytes"] == plan.gpus[1].memory.peak_bytes
    assert report["stages"][0]["compute_s"] == 6.0


@pytest.mark.parametrize(
    ("changed", "limit"),
    [
        ({}, "computation"),
        ({"write_wait_s": 7.0}, "store"),
        ({"write_wait_s": 7.0, "store_s": 1.0}, "encoder"),
        ({"copy_s": 7.0}, "device_to_host_copy"),
        ({"wait_s": 50.0, "compute_s": 7.0}, "filling_the_chain"),
    ],
)
def test_the_busiest_stage_tells_what_limited_the_run(run: RunStatus, changed: dict[str, float], limit: str) -> None:
    first, (planned, last) = run.stages
    assert limiting(replace(run, stages=(first, (planned, replace(last, **changed))))) == limit


def test_lines_at_the_start_after_loading_and_at_the_end(plan: Plan, run: RunStatus) -> None:
    assert start_lines(plan)[0] == "node-0: 2 x A100-80GB"
    assert "stage 1 on node-0 GPU 1: layers 2-3, 20.0 GB of weights" in start_lines(plan)[3]
    assert start_lines(plan)[1] == "stages 2, batch_tokens 32,768"
    loaded = "\n".join(loaded_lines(plan, run.stages))
    assert "20.0 GB read in 10.0 s, 2,000 MB/s" in loaded
    assert "allocated 20.0 GB, reserved 21.0 GB; planned 20.0 GB" in loaded
    summary = summary_lines(plan, run)
    assert "100 tokens/s" in summary[0]
    assert "padding 10.0%" in summary[0]
    assert "457.0 kB of output (planned 4" in summary[1]
    assert summary[-1] == "What limited the run: computation"


def test_a_run_with_nothing_left_to_do(plan: Plan) -> None:
    nothing = RunStatus(1, 1, 0, 900, 900, 0.0, 0.0, 0, ())
    assert summary_lines(plan, nothing) == ["Nothing was extracted: every shard was there."]
    assert build_report(plan, "run", nothing)["tokens_per_s"]["measured"] is None


def test_what_rows_in_8_bits_lost_is_told_by_layer_over_all_stages(plan: Plan, run: RunStatus) -> None:
    assert build_report(plan, "r", run)["eight_bit_losses"] == []
    losses = [(("mlp", 1, 1.0, 400.0), ("final_norm", None, 0.0, 0.0)), (("mlp", 1, 3.0, 1200.0), ("residual", 2, 1.0, 10_000.0))]
    stages = tuple((planned, replace(stage, losses=lost)) for (planned, stage), lost in zip(run.stages, losses, strict=True))
    of_8_bits = replace(run, stages=stages)
    assert build_report(plan, "r", of_8_bits)["eight_bit_losses"] == [
        {"site": "mlp", "layer": 1, "share": 0.05},
        {"site": "final_norm", "layer": None, "share": 0.0},
        {"site": "residual", "layer": 2, "share": 0.01},
    ]
    assert any("by at most 5.00% of their values (root mean square, mlp of layer 1)" in line for line in summary_lines(plan, of_8_bits))
    assert "losses" not in build_report(plan, "r", of_8_bits)["stages"][0]
