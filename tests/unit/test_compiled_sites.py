"""All sites of compiled layers, on a CPU. In a file of its own, since torch takes its time."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch._dynamo.utils import counters

from m2ray.batches import LayerSpan, MicroBatch
from m2ray.chain.standing_stages import of_any_sites
from m2ray.model.boundary import Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.sites import asked_sites
from tests.reference import make_minimax, micro_batch_of


def test_compiled_layers_show_every_site_within_rounding_from_one_graph(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_minimax(tmp_path / "model", "fp8")
    micro_batch = micro_batch_of((150, 70), 96)
    eager = load_stage(StageSpec(str(folder), LayerSpan(0, 7), "float32", "auto", "cpu", 1, with_final_norm=True), lambda *_: None)
    expected = taken(eager, micro_batch)
    torch._dynamo.reset()
    counters.clear()
    boundary: Boundary | None = None
    for ends in ((0, 3), (3, 7)):
        spec = StageSpec(str(folder), LayerSpan(*ends), "float32", "auto", "cpu", 1, compile=True, with_final_norm=True)
        stage = load_stage(spec, lambda *_: None)
        incoming = boundary
        found = taken(stage, micro_batch, incoming)
        boundary = stage.forward(micro_batch, incoming).boundary
        for key, columns in found.items():
            for pair in zip(columns, expected[key], strict=True):
                # The same experts with the same weights, in whatever order.
                ours, theirs = map(np.sort, pair) if key[0] == "router_topk" else pair
                assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(theirs).max()), key
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    stage.begin(CaptureSpec({"mlp": (4,), "router_topk": (6,)}, "float32"))
    again = stage.forward(micro_batch, incoming).captured
    assert [(each.site, each.layer) for each in again] == [("mlp", 4), ("router_topk", 6)]
    assert np.abs(again[0].columns[0].view(np.float32) - found["mlp", 4][0]).max() < 1e-3
    assert counters["stats"]["unique_graphs"] == 2, "other sites are another graph"
    assert_right_past_the_limit(stage, micro_batch, incoming, expected, caplog)


def assert_right_past_the_limit(
    stage: Stage, micro_batch: MicroBatch, incoming: Any, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Where torch compiles no more variants, a layer is computed as without, and that is said."""
    logging.getLogger("torch._dynamo.convert_frame").addHandler(caplog.handler)  # torch's loggers tell pytest's nothing
    with torch._dynamo.config.patch(recompile_limit=2):  # type: ignore[no-untyped-call]
        stage.begin(CaptureSpec({"attention": (4,)}, "float32"))
        (found,) = stage.forward(micro_batch, incoming).captured
    assert np.abs(found.columns[0].view(np.float32) - expected["attention", 4][0]).max() < 1e-4
    assert counters["stats"]["unique_graphs"] == 2
    logging.getLogger("torch._dynamo.convert_frame").removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "torch has compiled 2 variants of 'forward" in said[0]
    stage.begin(CaptureSpec({"mlp": (4,)}, "float32"))
    assert np.abs(stage.forward(micro_batch, incoming).captured[0].columns[0].view(np.float32) - expected["mlp", 4][0]).max() < 1e-4


def test_the_layers_of_a_chain_that_stays_are_one_graph_for_any_sites(tmp_path: Path) -> None:
    folder, micro_batch = make_minimax(tmp_path / "model", "bf16"), micro_batch_of((150, 70), 96)
    specs = [StageSpec(str(folder), LayerSpan(0, 2), "float32", "auto", "cpu", 1, compile=True)]
    torch._dynamo.reset()
    counters.clear()
    ((spec,),) = of_any_sites([specs])
    stage = load_stage(spec, lambda *_: None)
    rows = []
    for sites in ("residual", "residual, mlp", "attention, residual", "router_topk, mlp_in, residual"):
        stage.begin(CaptureSpec(asked_sites(sites, "all", 2), "float32"))
        captured = stage.forward(micro_batch, None).captured
        assert {each.site for each in captured} == set(sites.split(", "))
        rows.append(next(each.columns[0].tobytes() for each in captured if (each.site, each.layer) == ("residual", 1)))
    assert len(set(rows)) == 1, "what else is asked for does not change a row"
    assert counters["stats"]["unique_graphs"] == 1


def taken(stage: Stage, micro_batch: MicroBatch, incoming: Boundary | None = None) -> dict[tuple[str, int | None], list[npt.NDArray[Any]]]:
    """All that a stage has, [N, W] a column."""
    stage.begin(CaptureSpec(stage._decoder.site_layers, "float32"))
    captured = stage.forward(micro_batch, incoming).captured
    return {
        (each.site, each.layer): [values.view(np.dtype(column.dtype)) for values, column in zip(each.columns, part.columns, strict=True)]
        for each, part in zip(captured, stage.parts, strict=True)
    }
