"""The Triton kernel that rounds activations to FP8. Imported only where there is a GPU."""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
BY_LARGEST, LEAST = tl.constexpr(1 / 448), tl.constexpr(1e-10)


@triton.jit(do_not_specialize=["number"])  # type: ignore[untyped-decorator]
def round_blocks(values, rounded, scales, number, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program rounds BLOCKS of `number` blocks of 128 values, which lie end to end, as torch does on a GPU: 448 divides by its inverse."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_there = block < number
    value = tl.load(values + place, mask=is_there[:, None], other=0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), LEAST) * BY_LARGEST
    tl.store(scales + block, scale, mask=is_there)
    tl.store(
        rounded + place, tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape)).to(rounded.dtype.element_ty), mask=is_there[:, None]
    )
