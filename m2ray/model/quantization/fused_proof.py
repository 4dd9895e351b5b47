"""The fused kernel held against torch on the very GPU, before it unpacks a weight: Triton, driver and GPU differ from machine to machine."""

import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product

import torch

from m2ray.model.extents import Range, RowsToLoad
from m2ray.model.kernel_proof import making_errors
from m2ray.model.quantization import mxfp4, nvfp4
from m2ray.model.quantization.awq import Awq
from m2ray.model.quantization.fused import SCALES, VALUES, KernelTable, has_kernel
from m2ray.model.quantization.gptq import Gptq
from m2ray.model.quantization.pack_quantized import PackQuantized
from m2ray.model.quantization.packed import Packed
from m2ray.model.quantization.scaling import Block, ScaledUnpack
from m2ray.model.quantization.stored import Unpack

_SHAPE = (72, 384)
"""Rows and columns: several programs of each kernel, the last one not whole."""

_BLOCKS: tuple[Block, ...] = (None, (1, 384), (1, 32), (16, 64), (128, 128))

_GROUP = 32

_METHODS: tuple[Packed, ...] = (
    mxfp4.COMPRESSED,
    nvfp4.MODELOPT,
    nvfp4.COMPRESSED,
    *(PackQuantized(_GROUP, is_symmetric=is_symmetric) for is_symmetric in (True, False)),
    Awq(_GROUP),
    *(Gptq(_GROUP, zeros_one_less=in_order, in_order=in_order) for in_order in (True, False)),
)
"""Of 4 bits."""

_ALIGNMENT = 16


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
    with torch.cuda.device(device), torch.inference_mode():
        try:
            different = [name for name, has_same in _compared(device) if not has_same]
        except making_errors() as error:
            return f"Triton cannot make it: {error}"
    return f"it does not have torch's bits with {different[0]} and {len(different) - 1} others" if different else ""


def _compared(device: torch.device) -> Iterator[tuple[str, bool]]:
    """By what is unpacked: whether the kernel's bits are torch's."""
    for name, unpack, parts, into in [*_of_bytes(device), *_of_nibbles(device)]:
        expected = unpack(parts)
        data, places = _side_by_side(parts)
        table = KernelTable()
        table.add(RowsToLoad("", places, unpack, into), {part: place.offset for part, place in places.items()})
        table.to(device)
        table.run(data, slice(0, 1))
        yield name, torch.equal(into.contiguous().view(torch.int16), expected.contiguous().view(torch.int16))


Case = tuple[str, Unpack, Mapping[str, torch.Tensor], torch.Tensor]
"""What is unpacked, in words; how; its parts; where it is written."""


def _of_bytes(device: torch.device) -> Iterator[Case]:
    for (values_dtype, scale_dtype), block in product(product(VALUES, SCALES), _BLOCKS):
        height, width = block or _SHAPE
        blocks = (-(-_SHAPE[0] // height), -(-_SHAPE[1] // width))
        parts = {"values": _numbers(values_dtype, _SHAPE, device), "scale": _numbers(scale_dtype, blocks, device)}
        for in_scale_dtype in {False, scale_dtype == torch.float16}:
            yield f"{values_dtype} times {scale_dtype} in blocks of {block}", ScaledUnpack(block, in_scale_dtype), parts, _into(device)


def _of_nibbles(device: torch.device) -> Iterator[Case]:
    for method in _METHODS:
        pieces = method.pieces(_SHAPE)
        for scale_dtype in pieces["scale"].dtypes:
            dtypes = {name: piece.dtypes[0] for name, piece in pieces.items()} | {"scale": scale_dtype}
            parts = {name: _numbers(dtypes[name], piece.shape, device) for name, piece in pieces.items()}
            if isinstance(method, Gptq):
                groups = torch.arange(_SHAPE[1], dtype=torch.int32, device=device) // _GROUP
                parts["group"] = groups if method.in_order else groups.flip(0)
            for columns in (_SHAPE[1], _SHAPE[1] + 1):  # these not by chunks
                into = _into(device, columns)
                yield f"{method.name} times {scale_dtype}", method.unpacking(), parts, into.t() if method.swapped else into


def _into(device: torch.device, columns: int = _SHAPE[1]) -> torch.Tensor:
    """A matrix whose rows lie so many columns apart."""
    return torch.zeros(_SHAPE[0], columns, dtype=torch.bfloat16, device=device)[:, : _SHAPE[1]]


def _side_by_side(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Range]]:
    """Parts in one buffer, as a file has them, and where."""
    pieces, places, at = [], {}, 0
    for name, part in parts.items():
        places[name] = Range("", at, part.nbytes, part.dtype, tuple(part.shape))
        padded = -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
        pieces.append(torch.nn.functional.pad(part.contiguous().view(-1).view(torch.uint8), (0, padded - part.nbytes)))
        at += padded
    return torch.cat(pieces), places


def _numbers(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """All numbers that a dtype of 8 bits or of whole numbers has, or random ones of wider dtypes. None is NaN, whose bits mean nothing."""
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.randn(shape, generator=generator).to(dtype).to(device)
    bits = torch.randint(
        0, 255, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8
    )  # 255 is a number in int8 alone, of these
    if dtype == torch.float8_e4m3fn:
        bits[bits == 127] = 126
    elif dtype == torch.float8_e5m2:
        bits[(bits & 127) > 123] = 123
    return bits.view(dtype).view(shape).to(device)
