"""The Triton kernels that round activations to FP8. Imported only where there is a GPU."""

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


@triton.jit  # type: ignore[untyped-decorator]
def round_norm(stream, beside, weight, rounded, scales, wide, epsilon, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program norms one row of `stream`, or of its sum with `beside`'s, and rounds it to bfloat16 and then as `round_blocks` does; `wide` has it unrounded.

    BLOCKS: of 128 values, as many as a row has or more.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(stream + row * WIDTH + place, mask=place < WIDTH, other=0).to(tl.float32)
    if beside is not None:
        value += tl.load(beside + row * WIDTH + place, mask=place < WIDTH, other=0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / WIDTH + epsilon)
    value = value * factor * tl.load(weight + place, mask=place < WIDTH, other=0).to(tl.float32)
    if wide is not None:
        tl.store(wide + row * WIDTH + place, value, mask=place < WIDTH)
    value = value.to(tl.bfloat16).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), LEAST) * BY_LARGEST
    tl.store(scales + row * (WIDTH // BLOCK) + block, scale, mask=block < WIDTH // BLOCK)
    by_scale = tl.broadcast_to(tl.div_rn(1.0, scale)[:, None], value.shape)
    share = value * by_scale
    share = tl.fma(tl.fma(-share, tl.broadcast_to(scale[:, None], value.shape), value), by_scale, share)  # as a division rounds it
    tl.store(rounded + row * WIDTH + place, share.to(rounded.dtype.element_ty), mask=place < WIDTH)
