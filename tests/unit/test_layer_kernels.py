"""What stands in for torch's steps in compiled layers on a GPU, on a CPU: torch's own steps stand for the kernels there."""

from operator import getitem

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from transformers import MiniMaxM2Config, Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2Experts, MiniMaxM2TopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from m2ray.model import causal_attention, expert_products, expert_sums, experts, router_product, routing
from m2ray.model.faster_graph import FasterGraph

CPU = torch.device("cpu")
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
SIZES = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts_per_tok": 3}


@pytest.fixture(autouse=True)
def drawn() -> None:
    torch.manual_seed(0)


def made(of: type[nn.Module], config: object) -> nn.Module:
    config._experts_implementation = "grouped_mm"  # type: ignore[attr-defined]
    module = of(config).bfloat16().requires_grad_(False)
    for weight in module.parameters():
        weight.normal_(0, 0.2)
    return module


def test_experts_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "has_kernels", lambda _: True)
    for has_products, of, config in (
        (True, MiniMaxM2Experts, MiniMaxM2Config(num_local_experts=9, **SIZES)),
        (False, MiniMaxM2Experts, MiniMaxM2Config(num_local_experts=9, **SIZES)),
        (False, Qwen3MoeExperts, Qwen3MoeConfig(num_experts=9, **SIZES)),
    ):
        module = made(of, config)
        hidden_NH, weights_NK = torch.randn(50, 64).bfloat16(), torch.rand(50, 3)
        chosen_NK = torch.rand(50, 8).topk(3).indices  # the ninth is nobody's
        expected_NH = grouped_mm_experts_forward(module, hidden_NH, chosen_NK, weights_NK)
        assert experts.use_kernels(module, CPU)
        assert module.config._experts_implementation == experts.NAME
        module.m2ray_products = has_products
        found_NH = module(hidden_NH, chosen_NK, weights_NK)
        assert (found_NH - expected_NH).float().norm() < 0.01 * expected_NH.float().norm()
        assert has_products or torch.equal(found_NH, expected_NH)


def test_experts_that_add_biases_or_compute_in_float32_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "has_kernels", lambda _: True)
    module = made(MiniMaxM2Experts, MiniMaxM2Config(num_local_experts=4, **SIZES))
    assert not experts.use_kernels(module.float(), CPU)
    module.bfloat16().has_bias = True
    assert not experts.use_kernels(module, CPU)


def test_experts_that_share_a_choice_without_fitting_it_are_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One configuration is all layers': to choose for one chooses for all."""
    monkeypatch.setattr(experts, "has_kernels", lambda _: True)
    module = made(MiniMaxM2Experts, MiniMaxM2Config(num_local_experts=9, **SIZES))
    other = made(MiniMaxM2Experts, module.config).float()
    assert experts.use_kernels(module, CPU)
    assert not experts.use_kernels(other, CPU)
    hidden_NH, chosen_NK, weights_NK = torch.randn(20, 64), torch.rand(20, 9).topk(3).indices, torch.rand(20, 3)
    assert torch.equal(other(hidden_NH, chosen_NK, weights_NK), grouped_mm_experts_forward(other, hidden_NH, chosen_NK, weights_NK))


def test_what_comes_in_float32_is_rounded_for_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, and what a family's own gate makes."""
    monkeypatch.setattr(experts, "has_kernels", lambda _: True)
    module = made(MiniMaxM2Experts, MiniMaxM2Config(num_local_experts=9, **SIZES))
    assert experts.use_kernels(module, CPU)
    apply_gate = module._apply_gate
    module._apply_gate = lambda both_RI: apply_gate(both_RI.float())
    hidden_NH, chosen_NK, weights_NK = torch.randn(20, 64), torch.rand(20, 9).topk(3).indices, torch.rand(20, 3)
    expected_NH = grouped_mm_experts_forward(module, hidden_NH, chosen_NK, weights_NK)
    for has_products in (True, False):
        module.m2ray_products = has_products
        found_NH = module(hidden_NH, chosen_NK, weights_NK)
        assert found_NH.dtype == torch.float32
        assert (found_NH - expected_NH).norm() < 0.01 * expected_NH.norm()


def test_a_kernel_that_makes_no_numbers_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert causal_attention._problem(CPU) == expert_products._problem(CPU) == router_product._problem(CPU) == ""
    monkeypatch.setattr(causal_attention, "causal_attention", lambda query, *_: torch.full_like(query[..., :1], torch.nan))
    assert "further off" in causal_attention._problem(CPU)
    gated_rows = expert_products.gated_rows
    monkeypatch.setattr(expert_products, "gated_rows", lambda *given: gated_rows(*given) * torch.nan)
    assert "what is gated" in expert_products._problem(CPU)
    monkeypatch.setattr(router_product, "router_logits", lambda hidden_NH, weight_EH: (hidden_NH @ weight_EH.T).bfloat16().float())
    assert "further off" in router_product._problem(CPU)


def test_layers_that_are_loaded_later_have_the_graphs_of_those_before() -> None:
    both = {FasterGraph((routing.replace_choice,)), FasterGraph((routing.replace_choice,))}
    assert len(both) == 1
    assert FasterGraph((causal_attention.replace_attention,)) not in both


class Router(nn.Module):
    """MiniMax-M2's, behind a norm's last step."""

    def __init__(self) -> None:
        super().__init__()
        self.router = MiniMaxM2TopKRouter(MiniMaxM2Config(num_local_experts=16, **SIZES | {"hidden_size": 1024})).requires_grad_(False)
        self.router.weight.normal_()
        self.bias_E = torch.rand(16)

    def forward(self, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.router(hidden_NH * 2, self.bias_E)  # type: ignore[no-any-return]


def test_a_compiled_router_chooses_the_same_experts() -> None:
    layer, hidden_NH = Router(), torch.randn(40, 1024).bfloat16() / 8
    graph_module = make_fx(layer, decomposition_table=select_decomp_table())(hidden_NH)
    routing.replace_choice(graph_module.graph)
    router_product.replace_product(graph_module.graph)
    graph_module.recompile()
    assert "m2ray.largest" in graph_module.code
    assert "m2ray.router_logits" in graph_module.code
    assert "aten.mm" not in graph_module.code
    (logits_NE, weights_NK, chosen_NK), expected = graph_module(hidden_NH), layer(hidden_NH)
    torch.testing.assert_close(logits_NE, expected[0])
    order_NK, expected_order_NK = chosen_NK.argsort(), expected[2].argsort()
    assert torch.equal(chosen_NK.gather(1, order_NK), expected[2].gather(1, expected_order_NK))
    torch.testing.assert_close(weights_NK.gather(1, order_NK), expected[1].gather(1, expected_order_NK))


@pytest.mark.parametrize(("arguments", "named"), [((2, -1, False), {}), ((2,), {"largest": False}), ((2, 0), {}), ((17,), {})])
def test_other_choices_are_left_to_torch(arguments: tuple[object, ...], named: dict[str, bool]) -> None:
    """The smallest, along another axis, of too many."""
    graph = Graph()
    scores = graph.placeholder("scores")
    scores.meta["val"] = torch.rand(4, 32)
    graph.output(graph.call_function(torch.ops.aten.topk.default, (scores, *arguments), named))
    routing.replace_choice(graph)
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)) == 1


@pytest.mark.parametrize(
    ("given", "dtype", "columns", "width"),
    [
        (torch.float32, torch.float32, 16, 1024),
        (torch.bfloat16, torch.bfloat16, 16, 1024),
        (torch.bfloat16, torch.float32, 600, 1024),
        (torch.bfloat16, torch.float32, 16, 1040),
        (torch.bfloat16, torch.float32, 16, 960),
    ],
)
def test_other_products_are_left_to_torch(given: torch.dtype, dtype: torch.dtype, columns: int, width: int) -> None:
    """Of a layer in float32, in bfloat16, with a wide weight, of rows that are no whole number of steps, and of short ones."""
    graph = Graph()
    hidden, weight = graph.placeholder("hidden"), graph.placeholder("weight")
    hidden.meta["val"], weight.meta["val"] = torch.empty((4, width), dtype=given), torch.empty((columns, width), dtype=dtype)
    converted = graph.call_function(torch.ops.prims.convert_element_type.default, (hidden, dtype))
    converted.meta["val"] = hidden.meta["val"].to(dtype)
    turned = graph.call_function(torch.ops.aten.permute.default, (weight, [1, 0]))
    product = graph.call_function(torch.ops.aten.mm.default, (hidden if given == torch.float32 else converted, turned))
    graph.output(product)
    router_product.replace_product(graph)
    assert product in graph.nodes


class Ending(nn.Module):
    """The end of a layer: experts' rows are summed, rounded, and added to the stream, itself a sum with a product; what is shared may come between."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, stream_BTH: torch.Tensor, mixed_NH: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        product_BTH = (mixed_NH @ mixed_NH.T @ mixed_NH).view(-1, *stream_BTH.shape[1:])
        stream_BTH = stream_BTH + (product_BTH * 2 if self.kind == "scaled" else product_BTH)
        sums_BTH = expert_sums.sum_rows(*given).to(stream_BTH.dtype).view(stream_BTH.shape)
        return stream_BTH + (sums_BTH + stream_BTH.flip(0) if self.kind == "shared" else sums_BTH)


@pytest.mark.parametrize("kind", ["", "shared", "scaled", "broadcast"])
def test_experts_are_added_to_what_leaves_the_layer(kind: str) -> None:
    """Rounded once, with both parts of the stream, as torch.compile does; a sum that is not the last, or a part that it computes or that is
    smaller, is left to it."""
    layer = Ending(kind)
    rows = torch.randn(30, 64).bfloat16(), torch.randperm(30).view(10, 3), torch.rand(10, 3)
    given = torch.randn(2, 5, 64).bfloat16(), torch.randn(5 if kind == "broadcast" else 10, 64).bfloat16() / 8, *rows
    graph_module = make_fx(layer, decomposition_table=select_decomp_table())(*given)
    expert_sums.replace_sum(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    assert ("m2ray.add_rows" in graph_module.code, "m2ray.sum_rows" in graph_module.code) == (not kind, bool(kind))
    if kind:
        assert torch.equal(graph_module(*given), layer(*given))
        return
    (stream_BTH, mixed_NH), (rows_RH, places_NK, weights_NK) = given[:2], rows
    stream_NH = stream_BTH.view(10, 64).float() + (mixed_NH @ mixed_NH.T @ mixed_NH).float()
    exact_NH = (stream_NH + (rows_RH[places_NK].float() * weights_NK[..., None]).sum(1)).bfloat16()
    assert (graph_module(*given).view(10, 64) != exact_NH).float().mean() < 0.01  # float32 sums in another order
    assert (layer(*given).view(10, 64) != exact_NH).float().mean() > 0.05


def test_attention_is_put_in_the_place_of_torchs() -> None:
    """As a compiled layer's graph has it: keys and values of fewer heads, values straight from their projection."""
    values = {"query": torch.randn(2, 6, 9, 64), "key": torch.randn(2, 2, 9, 64), "value": torch.randn(2, 9, 2, 64)}
    graph = Graph()
    query, key, projected = (graph.placeholder(name) for name in values)
    value = graph.call_function(torch.ops.aten.permute.default, (projected, [0, 2, 1, 3]))
    flash = graph.call_function(torch.ops.aten._scaled_dot_product_flash_attention.default, (query, key, value, 0.0, True), {"scale": 0.3})
    for node, tensor in zip((query, key, value), values.values(), strict=True):
        node.meta["val"] = (tensor if node is not value else tensor.transpose(1, 2)).bfloat16()
    turned = graph.call_function(torch.ops.aten.permute.default, (graph.call_function(getitem, (flash, 0)), [0, 2, 1, 3]))
    graph.output(graph.call_function(torch.ops.aten.clone.default, (turned,)))
    causal_attention.replace_attention(graph)
    module = GraphModule(nn.Module(), graph)
    assert module.code.count("aten.clone") == 2, "queries and keys; neither the values nor what comes out"
    expected = functional.scaled_dot_product_attention(
        values["query"], values["key"], values["value"].transpose(1, 2), is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(module(*values.values()), expected.transpose(1, 2))


def test_attention_is_put_in_the_place_of_torchs_for_keys_wider_than_values() -> None:
    """DeepSeek's, by torch's memory-efficient attention: its values lie beside a part of its keys, where a projection has left both."""
    values = {"query": torch.randn(2, 6, 9, 192), "key": torch.randn(2, 6, 9, 192), "projected": torch.randn(2, 9, 6, 256)}
    graph = Graph()
    query, key, projected = (graph.placeholder(name) for name in values)
    turned = graph.call_function(torch.ops.aten.permute.default, (projected, [0, 2, 1, 3]))
    value = graph.call_function(torch.ops.aten.slice.Tensor, (turned, 3, 128, 256))
    of_value = values["projected"].transpose(1, 2)[..., 128:]
    for node, tensor in zip((query, key, value), (values["query"], values["key"], of_value), strict=True):
        node.meta["val"] = tensor.to(torch.bfloat16)
    efficient = graph.call_function(EFFICIENT, (query, key, value, None, False, 0.0, True), {"scale": 0.3})
    graph.output(graph.call_function(getitem, (efficient, 0)))
    causal_attention.replace_attention(graph)
    module = GraphModule(nn.Module(), graph)
    assert module.code.count("aten.clone") == 2, "queries and keys"
    expected = functional.scaled_dot_product_attention(values["query"], values["key"], of_value, is_causal=True, scale=0.3)
    torch.testing.assert_close(module(*values.values()), expected)


@pytest.mark.parametrize(
    ("width", "arguments", "used"),
    [
        (192, (None, False, 0.0, False), 0),
        (192, (None, False), 0),
        (192, (None, False, 0.1, True), 0),
        (192, (None, True, 0.0, True), 1),
        (96, (None, False, 0.0, True), 0),
        (192, ("bias", False, 0.0, True), 0),
    ],
)
def test_other_memory_efficient_attention_is_left_to_torch(width: int, arguments: tuple[object, ...], used: int) -> None:
    """Not causal, with dropout, whose logarithms are asked for, of other widths, with something added to its scores."""
    graph = Graph()
    given = [graph.placeholder(name) for name in ("query", "key", "value")]
    for node, each in zip(given, (width, width, 128), strict=True):
        node.meta["val"] = torch.empty((2, 6, 9, each), dtype=torch.bfloat16)
    bias, *others = arguments
    efficient = graph.call_function(EFFICIENT, (*given, bias and graph.placeholder("bias"), *others))
    graph.output(graph.call_function(getitem, (efficient, used)))
    causal_attention.replace_attention(graph)
    assert efficient in graph.nodes


@pytest.mark.parametrize(
    ("width", "keys", "dtype", "arguments", "used"),
    [
        (64, 9, torch.bfloat16, (0.0, False), 0),
        (64, 9, torch.bfloat16, (), 0),
        (64, 9, torch.bfloat16, (0.1, True), 0),
        (96, 9, torch.bfloat16, (0.0, True), 0),
        (64, 10, torch.bfloat16, (0.0, True), 0),
        (64, 9, torch.float16, (0.0, True), 0),
        (64, 9, torch.bfloat16, (0.0, True), 1),
    ],
)
def test_other_attention_is_left_to_torch(width: int, keys: int, dtype: torch.dtype, arguments: tuple[object, ...], used: int) -> None:
    """Not causal, with dropout, of other heads, over more keys, in another dtype, or whose logarithms are asked for."""
    graph = Graph()
    given = [graph.placeholder(name) for name in ("query", "key", "value")]
    for node, length in zip(given, (9, keys, keys), strict=True):
        node.meta["val"] = torch.empty((2, 6, length, width), dtype=dtype)
    flash = graph.call_function(torch.ops.aten._scaled_dot_product_flash_attention.default, (*given, *arguments))
    graph.output(graph.call_function(getitem, (flash, used)))
    causal_attention.replace_attention(graph)
    assert flash in graph.nodes


def test_attention_copies_only_what_the_gpu_cannot_bring_by_blocks() -> None:
    """Blocks begin at a multiple of 16 bytes; a step of none would bring one position's for all."""
    whole = torch.zeros(2, 9, 6, 256, dtype=torch.bfloat16)
    for each in (whole, whole[..., 128:], whole.transpose(1, 2)):
        assert causal_attention._reachable(each) is each
    for each in (whole[..., 4:132], whole[..., ::2], whole.mT, whole[:, :, :1].expand(-1, -1, 6, -1)):
        assert causal_attention._reachable(each) is not each


def test_of_equal_scores_the_first_is_chosen() -> None:
    values, places = routing.largest(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 2)
    assert values.tolist() == [[3.0, 3.0]]
    assert places.tolist() == [[1, 2]]


def test_compiled_experts_serve_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph: an operation that takes a size for a number ties it to one, and each micro-batch would be compiled anew."""
    monkeypatch.setattr(experts, "has_kernels", lambda _: True)
    for has_products in (True, False):
        torch._dynamo.reset()
        module, counter = made(MiniMaxM2Experts, MiniMaxM2Config(num_local_experts=9, **SIZES)), CompileCounter()
        assert experts.use_kernels(module, CPU)
        module.m2ray_products = has_products
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        for number in (50, 7, 200):
            compiled(torch.randn(number, 64).bfloat16(), torch.rand(number, 8).topk(3).indices, torch.rand(number, 3))
        assert counter.frame_count == 1
