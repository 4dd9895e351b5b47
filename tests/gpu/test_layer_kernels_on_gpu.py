"""The kernels of compiled layers on a GPU: proved there, and used by the layers they are for."""

from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from m2ray.batches import LayerSpan
from m2ray.model import causal_attention, expert_products, experts, rotary, router_product, routing
from m2ray.model.stage import StageSpec, load_stage
from tests.reference import make_minimax, micro_batch_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda:0")
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability(0)[0] == 9


def test_they_are_proved_here() -> None:
    assert experts.has_kernels(GPU)
    assert routing.has_kernel(GPU)
    assert rotary.has_kernel(GPU)
    of_hopper = expert_products.has_kernels(GPU), causal_attention.has_kernel(GPU), router_product.has_kernel(GPU)
    assert of_hopper == (IS_HOPPER, IS_HOPPER, IS_HOPPER)


def drawn(num_sequences: int, length: int, width: int, out_width: int) -> list[torch.Tensor]:
    generator = torch.Generator(GPU).manual_seed(length)
    shared = 2 if width == out_width else 6
    return [
        torch.randn((num_sequences, length, heads, each), generator=generator, device=GPU).bfloat16()
        for heads, each in ((6, width), (shared, width), (shared, out_width))
    ]


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of Hopper's kind")
@pytest.mark.parametrize(("width", "out_width"), causal_attention._WIDTHS)
def test_attention_ends_with_each_sequence(width: int, out_width: int) -> None:
    """Behind one sequence lies the next: no row is of both, even where the next one's values are none."""
    for length in (1, 63, 64, 65, 128, 300):
        whole = drawn(3, length, width, out_width)
        alone = torch.cat([causal_attention.causal_attention(*(each[place : place + 1] for each in whole), None) for place in range(3)])
        assert torch.equal(causal_attention.causal_attention(*whole, None), alone)
        for each in whole[1:]:
            each[1] = torch.nan
        assert torch.equal(causal_attention.causal_attention(*whole, None)[::2], alone[::2])


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of Hopper's kind")
@pytest.mark.parametrize(("width", "out_width"), causal_attention._WIDTHS)
def test_attention_is_the_same_whichever_program_makes_it(width: int, out_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles a program, in one section or in many; queries of which a head's lie end to end, values beside keys that a projection has left there."""
    query, key, value = drawn(1, 700, width, out_width)
    beside = torch.cat([value, value], 3)[..., out_width:]
    expected = causal_attention.causal_attention(query, key, value, None)
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(causal_attention.causal_attention(turned, key, beside, None), expected)
    for cached_bytes in (1, 7 * 2**20, 2**40):
        monkeypatch.setattr(causal_attention, "_CACHED_BYTES", cached_bytes)
        found = causal_attention.causal_attention(*(each.expand(60, -1, -1, -1) for each in (query, key, value)), None)
        assert torch.equal(found, expected.expand_as(found))


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 8, 1024), (129, 128, 2048), (1000, 256, 3072), (300, 384, 7168)])
def test_a_routers_product_is_nearer_to_float64s_than_torchs(rows: int, columns: int, width: int) -> None:
    """Rows and columns that are less than a tile, and more; values of one sign, whose sums tensor cores would cut off. Values of 22 bits have an error
    of about 2e-7 of what is summed, which a product of a single row may be better than by chance.
    """
    if not IS_HOPPER:
        pytest.skip("needs a GPU of Hopper's kind")
    generator = torch.Generator(GPU).manual_seed(rows)
    hidden_NH = torch.randn((rows, width), generator=generator, device=GPU)
    weight_EH = torch.randn((columns, width), generator=generator, device=GPU) / width**0.5
    for given_NH in (hidden_NH, hidden_NH.abs()):
        exact_NE = given_NH.double() @ weight_EH.double().T
        found, plain = (
            float((each - exact_NE).norm()) for each in (router_product.router_logits(given_NH, weight_EH), given_NH @ weight_EH.T)
        )
        assert found <= max(plain, 3e-7 * float(exact_NE.norm())), (found, plain)


def test_compiled_layers_use_them(tmp_path: Path) -> None:
    torch._dynamo.reset()
    folder = make_minimax(tmp_path / "model", "fp8")
    stage = load_stage(StageSpec(str(folder), LayerSpan(0, 1), "bfloat16", "auto", "cuda:0", None), lambda *_: None)
    stage._decoder.compile_layers()
    _, (code,) = run_and_get_code(stage.forward, micro_batch_of((150, 70), 96), None)
    assert "torch.ops.m2ray.add_rows" in code
    assert "torch.ops.m2ray.largest" in code
    assert code.count("torch.ops.m2ray.turned_heads.default(") == 2
    assert "torch.ops.m2ray.router_logits" not in code, "its rows are short"
    assert "torch.ops.m2ray.written_out" not in code
