"""report.json and the lines beside it, from a plan of two stages and measurements made up for them."""

import json
from dataclasses import replace

import pytest

from m2ray.batches import LayerSpan, PartSpec, PromptStats, TensorRow, TensorTable
from m2ray.chain.report import GpuMeasured, RunMeasured, StageMeasured, build_report, limiting, loaded_lines, start_lines, summary_lines
from m2ray.planning.demand import Demand, PlanOptions
from m2ray.planning.hardware import parse_gpus
from m2ray.planning.memory import ModelShape
from m2ray.planning.plan import Plan, plan_run

GB = 10**9


@pytest.fixture(scope="module")
def plan() -> Plan:
    rows = [TensorRow("embed", "embedding", None, (1000, 64), False, 128_000, ("embed",))]
    rows += [TensorRow(f"w{layer}", "layer", layer, (5 * GB,), False, 10 * GB, (f"w{layer}",)) for layer in range(4)]
    table = TensorTable(4, 64, tuple(rows))
    options = PlanOptions(tuple(PartSpec("residual", layer, "bfloat16", 64) for layer in range(4)))
    return plan_run(Demand(table, ModelShape(64, 4, 4, 16, 256), options), parse_gpus("2xA100-80GB"), PromptStats(10, 900, 1000, 100, 1, 2))


def stage(number: int, span: LayerSpan, parameter_bytes: int, **changed) -> StageMeasured:
    gpu = GpuMeasured(number, "A100-80GB", 80 * GB, 20 * GB, 21 * GB, 23 * GB, 24 * GB, 25 * GB)
    measured = StageMeasured(
        0, number, "node-0", span, (gpu,), 20 * GB, 10.0, parameter_bytes, 2, 900, 1000, 6.0, 1.0, 0.5, 0.25, 3.0, 2.0, 230_000, GB
    )
    return replace(measured, **changed)


@pytest.fixture
def run() -> RunMeasured:
    stages = (stage(0, LayerSpan(0, 2), 20 * GB + 128_000), stage(1, LayerSpan(2, 4), 20 * GB))
    return RunMeasured("run", 10.0, 9.0, 900, 457_000, stages)


def test_the_report_sets_plan_against_measured(plan: Plan, run: RunMeasured) -> None:
    report = build_report(plan, run)
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
def test_the_busiest_stage_tells_what_limited_the_run(run: RunMeasured, changed: dict[str, float], limit: str) -> None:
    assert limiting(replace(run, stages=(run.stages[0], replace(run.stages[1], **changed)))) == limit


def test_lines_at_the_start_after_loading_and_at_the_end(plan: Plan, run: RunMeasured) -> None:
    assert start_lines(plan)[0] == "node-0: 2 x A100-80GB"
    assert "stage 1 on node-0 GPU 1: layers 2-3, 20.0 GB of weights" in start_lines(plan)[2]
    loaded = "\n".join(loaded_lines(plan, run.stages))
    assert "20.0 GB read in 10.0 s, 2,000 MB/s" in loaded
    assert "allocated 20.0 GB, reserved 21.0 GB; planned 20.0 GB" in loaded
    summary = summary_lines(plan, run)
    assert "100 tokens/s" in summary[0]
    assert "padding 10.0%" in summary[0]
    assert "457.0 kB of output (planned 4" in summary[1]
    assert summary[-1] == "What limited the run: computation"


def test_a_run_with_nothing_left_to_do(plan: Plan) -> None:
    nothing = RunMeasured("run", 0.0, 0.0, 0, 0, ())
    assert summary_lines(plan, nothing) == ["Nothing was extracted: every shard was there."]
    assert build_report(plan, nothing)["tokens_per_s"]["measured"] is None
