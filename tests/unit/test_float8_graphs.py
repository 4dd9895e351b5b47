"""What rounds to FP8 in compiled layers on a GPU, by one operation where torch.compile's graph has two: on a CPU, by torch's own steps."""

from pathlib import Path

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from m2ray.batches import LayerSpan
from m2ray.model import stage as stage_module
from m2ray.model.causal_attention import causal_attention
from m2ray.model.float8 import attention, modules, norms
from m2ray.model.float8.rounding import round_rows, share_rounded
from m2ray.model.stage import StageSpec, load_stage
from tests.compiled_graph import graphs_of
from tests.float8 import make_float8


def test_what_several_projections_take_is_rounded_once() -> None:
    def both(hidden_BTW: torch.Tensor) -> list[torch.Tensor]:
        others = [round_rows(each.reshape(-1, 256)) for each in (hidden_BTW, hidden_BTW, hidden_BTW * 2)]
        return [each for pair in (*others, round_rows(hidden_BTW.reshape(-1, 128))) for each in pair]

    hidden_BTW = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    module = make_fx(both)(hidden_BTW)
    share_rounded(module.graph)
    module.recompile()
    assert module.code.count("m2ray.round_float8") == 3
    assert all(torch.equal(*pair) for pair in zip(module(hidden_BTW), both(hidden_BTW), strict=True))


@pytest.mark.parametrize(
    ("kind", "number"),
    [("", 1), ("sum", 1), ("router", 1), ("shown", 0), ("scaled", 0), ("computed", 0), ("broadcast", 0)],
)
def test_a_norm_and_its_rounding_are_one_operation(kind: str, number: int) -> None:
    """Of a stream, of its sum with a product, with a router beside; not where something else is given what is normed, or the stream is computed."""

    def forward(stream_BTH: torch.Tensor, weight_H: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if kind in ("sum", "router", "broadcast"):
            stream_BTH = stream_BTH + (mixed @ mixed.T @ mixed).view(-1, 10, 256)
        wide_BTH = (stream_BTH * 2 if kind == "computed" else stream_BTH).float()
        scaled_BTH = (wide_BTH * torch.rsqrt(wide_BTH.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
        normed_BTH = (weight_H * 2 if kind == "scaled" else weight_H) * scaled_BTH
        router = [normed_BTH.view(-1, 256).float()] if kind == "router" else [normed_BTH] if kind == "shown" else []
        return *round_rows(normed_BTH.view(-1, 256)), *router

    generator = torch.Generator().manual_seed(0)
    shapes = (2, 10, 256), (256,), ((10 if kind == "broadcast" else 20), 256)
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    module = make_fx(forward, decomposition_table=select_decomp_table())(*given)
    norms.replace_norm(module.graph)
    module.graph.lint()
    module.recompile()
    assert [module.code.count(f"ops.{name}.default(") for name in ("m2ray.normed_float8", "m2ray.round_float8", "aten.rsqrt")] == [
        number,
        1 - number,
        1 - number,
    ]
    found, expected = module(*given), forward(*given)
    rows, of_own = (values.float() * scales.repeat_interleave(128, 1) for values, scales in (found[:2], expected[:2]))
    assert (rows - of_own).norm() < 0.03 * of_own.norm()  # transformers' steps are rounded one by one; a step of FP8 is up to an eighth
    for each, of_own in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(each, of_own, rtol=0.02, atol=0.03)


def test_both_norms_of_a_layer_are_found_in_what_torch_compile_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "has_kernels", lambda _: True)
    monkeypatch.setattr(modules, "has_gated", lambda _: True)
    monkeypatch.setattr(stage_module, "require_gpu", lambda _: None)
    stage = load_stage(
        StageSpec(str(make_float8(tmp_path / "model", "minimax_m2")), LayerSpan(0, 1), "float8", "auto", "cpu", 1), lambda *_: None
    )
    names = "m2ray.normed_float8", "m2ray.round_float8", "aten.rsqrt"
    graphs = graphs_of(stage, [share_rounded, norms.replace_norm], monkeypatch)
    found = [[sum(str(node.target) == f"{name}.default" for node in graph.nodes) for name in names] for graph in graphs]
    assert found == [[2, 1, 2]] * 2, "what leaves attention is rounded by itself; queries and keys have norms of their own"


def test_a_norm_that_is_rounded_otherwise_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert norms._problem(torch.device("cpu")) == ""
    own = norms.normed_float8
    for spoilt, problem in (
        (lambda values, scales, wide: (values, scales, wide.bfloat16().float()), "are not those of torch"),
        (lambda values, scales, wide: (values, scales.roll(1, 1), wide), "rounds norms otherwise"),
        (lambda values, scales, wide: (values, scales * torch.nan, wide), "rounds norms otherwise"),
    ):
        monkeypatch.setattr(norms, "normed_float8", lambda *given, is_wide, spoilt=spoilt: spoilt(*own(*given, is_wide=is_wide)))
        assert problem in norms._problem(torch.device("cpu"))


@pytest.mark.parametrize(("kind", "number"), [("", 1), ("shown", 0), ("narrow", 0)])
def test_attention_and_its_rounding_are_one_operation(kind: str, number: int) -> None:
    """Not where its sums are wanted in bfloat16 too, or a head's are no block."""
    heads, width = (6, 64) if kind == "narrow" else (3, 128)

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        summed_BTH = causal_attention(query, key, value, 0.1).view(2, 9, -1)
        return *round_rows(summed_BTH.view(-1, 384)), *([summed_BTH] if kind == "shown" else [])

    generator = torch.Generator().manual_seed(0)
    given = [torch.randn((2, 9, each, width), generator=generator).bfloat16() for each in (heads, heads, heads)]
    module = make_fx(forward)(*given)
    attention.replace_rounded(module.graph)
    module.graph.lint()
    module.recompile()
    names = "m2ray.causal_attention_float8", "m2ray.causal_attention", "m2ray.round_float8"
    assert [module.code.count(f"ops.{name}.default(") for name in names] == [number, 1 - number, 1 - number]
    assert all(torch.equal(*pair) for pair in zip(module(*given), forward(*given), strict=True))


def test_attention_that_is_rounded_otherwise_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention._problem(torch.device("cpu")) == ""
    own = attention.causal_attention_float8
    monkeypatch.setattr(attention, "causal_attention_float8", lambda *given: (own(*given)[0], own(*given)[1].roll(1, 1)))
    assert "are not those of torch" in attention._problem(torch.device("cpu"))
