"""The fused kernel held against torch on the very GPU, before it unpacks a weight: Triton, driver and GPU differ from machine to machine."""

import warnings
from collections.abc import Iterator
from functools import cache
from itertools import product

import torch

from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.quantization.fused import SCALES, VALUES, KernelTable, has_kernel
from m2ray.model.quantization.scaling import Block, ScaledUnpack

_SHAPE = (24, 384)
"""Rows and columns: more than one tile of the kernel either way, none of them whole at the end."""

_BLOCKS: tuple[Block, ...] = (None, (1, 384), (1, 32), (10, 100), (128, 128))


@cache
def is_exact(device: torch.device) -> bool:
    """Whether there is a kernel for this device, and all that it makes of every dtype of values and scales has torch's bits. Triton compiles
    it here, when it is first run.

    Where it does not, or cannot be made, a warning says so, and torch unpacks, which is slower.
    """
    if not has_kernel(device):
        return False
    problem = _problem(device)
    if problem:
        warnings.warn(f"The fused kernel is not used on {device}, and loading takes longer: {problem}.", RuntimeWarning, stacklevel=2)
    return not problem


def _problem(device: torch.device) -> str:
    from triton.errors import TritonError

    with torch.cuda.device(device), torch.inference_mode():
        try:
            different = [name for name, has_same in _compared(device) if not has_same]
        except TritonError as error:
            return f"Triton cannot make it: {error}"
    return f"it does not have torch's bits with {different[0]} and {len(different) - 1} others" if different else ""


def _compared(device: torch.device) -> Iterator[tuple[str, bool]]:
    """By values, scales and blocks: whether the kernel's bits are torch's."""
    for (values_dtype, scale_dtype), block in product(product(VALUES, SCALES), _BLOCKS):
        values = _numbers(values_dtype, _SHAPE, device)
        height, width = block or _SHAPE
        scale = _numbers(scale_dtype, (-(-_SHAPE[0] // height), -(-_SHAPE[1] // width)), device)
        unpack, into = ScaledUnpack(block), torch.zeros(_SHAPE, dtype=torch.bfloat16, device=device)
        parts = {"values": values, "scale": scale}
        data, at = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts.values()]), values.nbytes
        places = {
            "values": Range("", 0, values.nbytes, values_dtype, tuple(values.shape)),
            "scale": Range("", at, scale.nbytes, scale_dtype, tuple(scale.shape)),
        }
        table = KernelTable()
        max_tiles = table.add(RowsToLoad("", places, unpack, into), 0, at)
        table.to(device)
        table.run(data, slice(0, 1), max_tiles)
        yield (
            f"{values_dtype} times {scale_dtype} in blocks of {block}",
            torch.equal(into.view(torch.int16), unpack(parts).view(torch.int16)),
        )


def _numbers(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """All numbers that such a dtype of 8 bits has, or random ones of wider dtypes. None is NaN, whose bits mean nothing."""
    generator = torch.Generator().manual_seed(0)
    if dtype.itemsize > 1:
        return torch.randn(shape, generator=generator).to(dtype).to(device)
    bits = torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)  # 255 is no number in any of these but int8
    if dtype == torch.float8_e4m3fn:
        bits[bits == 127] = 126
    elif dtype == torch.float8_e5m2:
        bits[(bits & 127) > 123] = 123
    return bits.view(dtype).to(device)
