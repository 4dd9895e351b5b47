"""Compiled layers of a mixture of experts, on a CPU. In a file of its own, since torch takes its time."""

from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from tests.reference import chain_rows, load_chain, load_reference, make_minimax, micro_batch_of, reference_rows


def test_compiled_experts_are_within_rounding_and_one_graph(tmp_path: Path) -> None:
    folder = make_minimax(tmp_path / "model", "fp8")
    torch._dynamo.reset()
    counters.clear()
    stages = load_chain(folder, (0, 3, 7), "float32")
    for stage in stages:
        stage._decoder.compile_layers()
    micro_batch = micro_batch_of((150, 70), 96)
    expected = reference_rows(load_reference(folder, torch.float32), micro_batch)
    for layer, rows in enumerate(chain_rows(stages, micro_batch)):
        assert ((rows - expected[layer]).norm(dim=1) / expected[layer].norm(dim=1)).max() < 1e-5, layer
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_experts_are_given_is_computed_once(tmp_path: Path) -> None:
    """torch.compile leaves hidden states, experts and their weights in memory before it gathers by them."""
    torch._dynamo.reset()
    (stage,) = load_chain(make_minimax(tmp_path / "model", "fp8"), (0, 1), "float32")
    stage._decoder.compile_layers()
    _, (code,) = run_and_get_code(stage.forward, micro_batch_of((150, 70), 96), None)
    assert code.count("torch.ops.m2ray.written_out.default(") == 3
