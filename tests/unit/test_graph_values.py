"""Values of torch.compile's graphs, held against patterns."""

from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from m2ray.model.graph_values import matches, norm_of

ADD, MUL, CAT = torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.cat.default


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ((ADD, "one", "other"), ["a", "b"]),
        ((ADD, "one", "one"), None),
        ((MUL, "one", "other"), None),
        ((ADD, "one"), None),
        ((CAT, [(ADD, "one", "other"), "one"], 1), None),
    ],
)
def test_a_name_stands_for_one_value(pattern: Any, named: list[str] | None) -> None:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    found: dict[str, Any] = {}
    assert matches(pattern, graph.call_function(ADD, (a, b)), found) == (named is not None)
    assert named is None or [found[name].name for name in ("one", "other")] == named


def test_all_else_has_to_be_the_same() -> None:
    """Lists of another length, numbers of another kind, and what is given by name: none of it is left out of sight."""
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    sums = graph.call_function(ADD, (a, b))
    joined = graph.call_function(CAT, ([sums, a], 1))
    assert matches((CAT, [(ADD, "one", "other"), "one"], 1), joined, {})
    for pattern in ((CAT, [(ADD, "one", "other"), "other"], 1), (CAT, [(ADD, "one", "other")], 1), (CAT, [sums, a], True)):
        assert not matches(pattern, joined, {})
    assert not matches((ADD, "one", "other"), graph.call_function(ADD, (a, b), {"alpha": 2}), {})


@pytest.mark.parametrize(("shape", "axis", "is_norm"), [((6,), -1, True), ((1,), -1, False), ((4, 6), -1, False), ((6,), 1, False)])
def test_a_norm_has_a_weight_for_each_value_of_the_last_axis(shape: tuple[int, ...], axis: int, is_norm: bool) -> None:  # noqa: FBT001 - a parameter of pytest
    def forward(given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = given.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(axis, keepdim=True) + 1e-6)).bfloat16()

    module = make_fx(forward, decomposition_table=select_decomp_table())(torch.randn(2, 4, 6).bfloat16(), torch.randn(shape).bfloat16())
    (result,) = module.graph.output_node().all_input_nodes
    norm = norm_of(result)
    assert (norm is not None) == is_norm
    if norm:
        assert isinstance(norm.given, Node)
        assert (norm.given.name, norm.weight.name, norm.epsilon) == ("given_1", "weight_1", 1e-6)
