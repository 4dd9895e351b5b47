"""The fast ways of unpacking on a CPU give the bits of each method's definition in plain torch: of every code, in pieces, wherever it is written."""

from collections.abc import Mapping

import pytest
import torch

from m2ray.model.quantization import awq, bytes_on_cpu, codes_on_cpu, gptq, groups, mxfp4, nvfp4, pack_quantized, scratch, shifts
from m2ray.model.quantization.nibbles import NibbleUnpack
from m2ray.model.quantization.scaling import Block, ScaledUnpack

E4M3, E8M0, BF16, F16 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.float16


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    return (
        torch.randint(0, 256, (num_bytes,), generator=torch.Generator().manual_seed(num_bytes), dtype=torch.uint8).view(dtype).view(shape)
    )


def scales(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, least: float = 1e-4) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 0.3 + least).to(dtype)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    is_nan = expected.isnan()
    assert torch.equal(is_nan, ours.isnan())
    assert torch.equal(*(torch.where(is_nan, 0, each.contiguous().view(torch.int16)) for each in (ours, expected)))


def test_memory_of_weights_begins_where_that_of_torch_would() -> None:
    kept = [scratch.fresh_tensor(dtype, 3, 5) for dtype in (BF16, E4M3, torch.float32) for _ in range(8)]
    assert all(each.data_ptr() % 64 == 0 and each.shape == (3, 5) and each.is_contiguous() for each in kept)
    assert scratch.fresh_tensor(BF16, 0, 5).shape == (0, 5)


def empty(shape: tuple[int, int], order: str) -> torch.Tensor:
    """Memory for a weight, along its rows or its columns."""
    return torch.empty(shape, dtype=BF16) if order == "rows" else torch.empty(shape[::-1], dtype=BF16).t()


def plain(values: torch.Tensor, scale: torch.Tensor, block: Block) -> torch.Tensor:
    tall, wide = block or values.shape
    factors = scale.float().reshape(-(-len(values) // tall), -1).repeat_interleave(tall, 0).repeat_interleave(wide, 1)
    return (values.float() * factors[: len(values), : values.shape[1]]).to(BF16)


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("cached", [100, 1 << 17])
@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((300, 256), (3, 2), (128, 128)),
        ((7, 64), (7, 1), (1, 64)),
        ((9, 96), (9, 3), (1, 32)),
        ((5, 48), (5, 2), (1, 24)),
        ((40, 12), (), None),
    ],
)
def test_fp8_by_shifts(
    shape: tuple[int, int], grid: tuple[int, ...], block: Block, cached: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shifts, "_MOST_SUBNORMAL", 1 << 30)
    monkeypatch.setattr(shifts, "_ELEMENTS_AT_ONCE", cached)
    values, into = drawn(shape).view(E4M3), empty(shape, order)
    for scale in (scales(grid), scales(grid).to(BF16)):
        assert shifts.can_write(values, scale.float().reshape(-1, grid[1] if grid else 1), block[1] if block else shape[1])
        ScaledUnpack(block).write({"values": values, "scale": scale}, into)  # with NaN among them
        assert_same(into, plain(values, scale, block))


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("cached", [100, 1 << 17])
@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2, torch.int8])
def test_bytes_of_one_scale_are_looked_up(dtype: torch.dtype, cached: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytes_on_cpu, "_TABLE_VALUES", 1)
    monkeypatch.setattr(bytes_on_cpu, "_VALUES_AT_ONCE", cached)
    values, scale, into = drawn((9, 40)).view(dtype), scales(()), empty((9, 40), order)
    assert bytes_on_cpu.can_look_up(values)
    assert not bytes_on_cpu.can_look_up(values[:, :39])
    ScaledUnpack(None).write({"values": values, "scale": scale}, into)  # with NaN among them
    assert_same(into, plain(values, scale, None))
    rounded = scale.to(F16)
    ScaledUnpack(None, in_scale_dtype=True).write({"values": values, "scale": rounded}, into)
    assert_same(into, (values.float() * rounded.float()).to(F16).float().to(BF16))


def test_fp8_goes_by_shifts_where_it_is_faster_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = (torch.randn((64, 64), generator=torch.Generator().manual_seed(1)) * 100).clamp(-448, 448).to(E4M3)
    assert shifts.can_write(trained, scales((64, 2)), 32)
    assert not shifts.can_write(drawn((64, 64)).view(E4M3), scales((64, 2)), 32), "a tenth is subnormal"
    assert not shifts.can_write(trained, torch.full((64, 1), 2.0**7), 64), "2^127"
    assert not shifts.can_write(trained, torch.full((64, 1), torch.nan), 64)
    assert not shifts.can_write(trained, scales((64, 2)), 40), "a block is cut short"
    monkeypatch.setattr(shifts, "is_exact", lambda: False)
    assert not shifts.can_write(trained, scales((64, 2)), 32)


METHODS: dict[str, tuple[NibbleUnpack, Mapping[str, torch.Tensor], tuple[int, int]]] = {
    "MXFP4": (mxfp4.COMPRESSED.unpacking(), {"values": drawn((9, 64)), "scale": drawn((9, 4))}, (9, 128)),
    "DeepSeek-V4": (mxfp4.DEEPSEEK_V4.unpacking(), {"values": drawn((9, 64), torch.int8), "scale": drawn((9, 4)).view(E8M0)}, (9, 128)),
    "gpt-oss": (mxfp4.GPT_OSS.unpacking(), {"values": drawn((9, 2, 16)), "scale": drawn((9, 2))}, (9, 64)),
    **{
        f"NVFP4 {number}": (
            method.unpacking(),
            {"values": drawn((9, 64)), "scale": drawn((9, 8)).view(E4M3), "tensor_scale": torch.tensor([0.37])},
            (9, 128),
        )
        for number, method in enumerate((nvfp4.MODELOPT, nvfp4.COMPRESSED))
    },
    **{
        f"INT4 {dtype} {group} {kind}": (
            pack_quantized.PackQuantized(group, is_symmetric=kind != "zeros", is_by_tensor=kind == "tensor").unpacking(),
            {
                "values": drawn((11, 15), torch.int32),
                "scale": scales((11, 120 // (group or 120)) if kind != "tensor" else (), dtype) * (-1 if kind == "rows" else 1),
                **({"zero_point": drawn((2, 120 // (group or 120)), torch.int32)} if kind == "zeros" else {}),
            },
            (11, 120),
        )
        for dtype in (BF16, F16)
        for group, kind in ((24, "groups"), (40, "groups"), (24, "zeros"), (None, "rows"), (None, "tensor"))
    },
    "AWQ": (
        awq.Awq(32).unpacking(),
        {"values": drawn((128, 34), torch.int32), "zero_point": drawn((4, 34), torch.int32), "scale": scales((4, 272), F16)},
        (128, 272),
    ),
    **{
        f"GPTQ {less}": (
            gptq.Gptq(32, zeros_one_less=less, in_order=True).unpacking(),
            {
                "values": drawn((16, 272), torch.int32),
                "zero_point": drawn((4, 34), torch.int32),
                "scale": scales((4, 272), F16),
                "group": (torch.arange(128) // 32).int(),
            },
            (128, 272),
        )
        for less in (False, True)
    },
}


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("cached", [64, 1 << 17])
@pytest.mark.parametrize("method", METHODS)
def test_codes_of_four_bits(method: str, cached: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes_on_cpu, "_VALUES_AT_ONCE", cached)
    monkeypatch.setattr(codes_on_cpu, "_TABLE_VALUES", 1)
    unpack, parts, shape = METHODS[method]
    into = empty(shape, order)
    assert unpack.on_cpu is not None
    assert unpack.on_cpu(parts, into)
    assert_same(into, unpack.by_torch(parts))


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("AWQ", {"scale": scales((4, 272), F16).neg()}),  # (0 - 0) * -1 is -0.0
        ("AWQ", {"scale": torch.full((4, 272), torch.inf, dtype=F16)}),
        ("INT4 torch.bfloat16 24 groups", {"scale": scales((11, 5))}),  # of float32
        ("NVFP4 0", {}),  # too few to make a table for
    ],
)
def test_what_is_left_to_the_definition(method: str, changed: Mapping[str, torch.Tensor]) -> None:
    unpack, parts, shape = METHODS[method]
    assert unpack.on_cpu is not None
    assert not unpack.on_cpu({**parts, **changed}, torch.empty(shape, dtype=BF16))


def test_scaling_in_one_pass_is_held_against_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert groups.is_exact()
    groups.is_exact.cache_clear()
    zeros, ones, offsets = groups._of_nothing(64)
    monkeypatch.setattr(groups, "_of_nothing", lambda _: (zeros, ones * (1 + 2**-20), offsets))  # a CPU that rounds otherwise
    assert not groups.is_exact()
    groups.is_exact.cache_clear()
