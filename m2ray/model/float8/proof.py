"""Which kernel multiplies FP8 on a GPU: the first that can be made there, and gives what torch gives on that very GPU."""

import warnings
from collections.abc import Callable
from functools import cache

import torch

from m2ray.errors import ConfigError, StageError
from m2ray.model.float8 import REMEDY, twin
from m2ray.model.float8.launching import by_triton, gated_on_hopper, on_hopper
from m2ray.model.float8.rounding import BLOCK, is_near, round_rows
from m2ray.model.kernel_proof import is_proved, making_errors
from m2ray.toolchain import require_triton

LEAST_CAPABILITY = (8, 9)
"""Of a GPU whose tensor cores multiply FP8: Ada, Hopper and later ones."""

ORDER = 2.0**-10
"""Of the sum of all products' magnitudes: the most by which a result may differ from the exact one before it is rounded to bfloat16. Float32 sums,
in whatever order, differ by far less; a Hopper's tensor cores add FP8 products with some 14 bits, 128 of them before their sum is added in float32."""

Multiply = Callable[..., torch.Tensor]
"""As `m2ray.model.float8.products.multiply`."""

_HOPPER = (9, 0)

_ENDS = (0, 1, 128, 300, 300, 685)
_OUT, _WIDTH = 320, 384
"""Groups of no row, of one and of several tiles; a tile of a weight that is not whole; several steps of the sum."""

_GATED_ENDS, _GATED_OUT = (0, 1, 3000, 3000, 9000, 9100), 512


def require_gpu(device: torch.device) -> None:
    """Hold the device against what products of FP8 need.

    Raises:
        ConfigError: it is no GPU, or one without FP8.
        StageError: Triton can make no kernel there, or none gives what it should.
    """
    if device.type != "cuda":
        raise ConfigError('compute_dtype = "float8" on a CPU: products of FP8 are made on GPUs only.', REMEDY)
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        name, has = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise ConfigError(f'compute_dtype = "float8" on a {name}: its compute capability is {has}, and FP8 begins with 8.9.', REMEDY)
    require_triton('compute_dtype = "float8"')
    kernel_for(device)


@cache
def kernel_for(device: torch.device) -> Multiply:
    """The fastest kernel that is right on this GPU; a warning says why it is not the one that was made for it. Raises StageError: none is."""
    problems: list[str] = []
    for kernel in (on_hopper, by_triton) if torch.cuda.get_device_capability(device) == _HOPPER else (by_triton,):
        problem = _problem(device, kernel)
        if not problem:
            if problems:
                warnings.warn(
                    f"FP8 is multiplied by {kernel.__name__} on {device}, which takes longer: {problems[0]}.", RuntimeWarning, stacklevel=2
                )
            return kernel
        problems.append(f"{kernel.__name__}: {problem}")
    raise StageError(f'compute_dtype = "float8" on {device}: {"; ".join(problems)}.', REMEDY)


@cache
def has_gated(device: torch.device) -> bool:
    """Whether there is a kernel for this GPU that gates experts' rows and rounds them to FP8, as torch does."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == _HOPPER
        and kernel_for(device) is on_hopper
        and is_proved(device, "Experts are gated in FP8", gated_problem)
    )


def gated_problem(device: torch.device) -> str:
    """Of more tiles than a GPU has processors, the last of some groups with few rows: beside the same products, gated and rounded by torch."""
    generator = torch.Generator(device).manual_seed(0)
    ends = torch.tensor(_GATED_ENDS, dtype=torch.int32, device=device)
    rows, row_scales = round_rows(torch.randn((_GATED_ENDS[-1], _WIDTH), generator=generator, device=device))
    weight = torch.randn((len(_GATED_ENDS), _GATED_OUT, _WIDTH), generator=generator, device=device).to(rows.dtype)
    weight_scales = torch.rand((len(_GATED_ENDS), _GATED_OUT // BLOCK, _WIDTH // BLOCK), generator=generator, device=device) / 16 + 0.02
    given = rows, row_scales, weight, weight_scales, ends
    is_right = is_near(gated_on_hopper(*given), twin.gated(on_hopper(*given, None, None)))
    return "" if is_right else "what is gated is not as torch's"


def _problem(device: torch.device, kernel: Multiply) -> str:
    with torch.cuda.device(device), torch.inference_mode():
        try:
            return wrong(device, kernel)
        except torch.OutOfMemoryError:
            raise
        except _refusals() as error:
            return f"cannot be used: {error}"


def _refusals() -> tuple[type[Exception], ...]:
    """What says that a kernel cannot be made; and torch's words for a dtype or a layout of scales that its own does not know here."""
    return (*making_errors(), RuntimeError, ValueError)


def wrong(device: torch.device, multiply: Multiply) -> str:
    """What of products made on a device is not what it should be, within ORDER and the rounding to bfloat16; "" if nothing is."""
    generator = torch.Generator().manual_seed(0)
    num_rows, num_groups = _ENDS[-1], len(_ENDS)
    rows, row_scales = round_rows(torch.randn(num_rows, _WIDTH, generator=generator))
    weight = torch.randn(num_groups, _OUT, _WIDTH, generator=generator).to(rows.dtype)
    weight_scales = torch.rand(num_groups, -(-_OUT // 128), _WIDTH // 128, generator=generator) + 0.5
    ends = torch.tensor(_ENDS, dtype=torch.int32)
    orders = [torch.randperm(num_rows, generator=generator) for _ in range(2)]
    cases: dict[str, tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]] = {
        "one weight": (weight[:1, :256], weight_scales[:1, :2], (None, None, None)),
        "one weight of no whole blocks": (weight[:1], weight_scales[:1], (None, None, None)),
        "a weight for each group": (weight, weight_scales, (ends, None, None)),
        "rows in another order": (weight, weight_scales, (ends, *orders)),
        "weights of whole pairs of blocks": (weight[:, :256].contiguous(), weight_scales[:, :2].contiguous(), (ends, *orders)),
    }
    far = []
    for name, (of_weight, of_scales, (of_ends, take, put)) in cases.items():
        given = (rows, row_scales, of_weight, of_scales, of_ends, take, put)
        found = multiply(*(each if each is None else each.to(device) for each in given)).cpu().bfloat16().double()
        exact = twin.multiply(rows, row_scales, of_weight, of_scales, of_ends, take, put, torch.float64)
        magnitudes = twin.multiply(rows.float().abs(), row_scales, of_weight.float().abs(), of_scales, of_ends, take, put, torch.float64)
        if not ((found - exact).abs() <= ORDER * magnitudes + exact.abs() * 2.0**-8).all():  # what is no number is not within
            far.append(name)
    return f"products with {' and with '.join(far)} are not those of torch" if far else ""
