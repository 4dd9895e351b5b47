"""The Triton kernels of a router's product. Imported only where there is a GPU: torch's CPU builds have no Triton."""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl

REST = tl.constexpr(2048.0)
"""What a float16's rounding leaves of a value has all bits of a float16 at this many times its size."""


@triton.jit  # type: ignore[untyped-decorator]
def split_weight(weight, parts, size, part_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each float32 value as float16, and REST times what is left: [2, part_size], zeros behind the last."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(weight + place, mask=place < size, other=0)
    first = value.to(tl.float16)
    tl.store(parts + place, first, mask=place < part_size)
    tl.store(parts + part_size + place, ((value - first.to(tl.float32)) * REST).to(tl.float16), mask=place < part_size)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def multiply_parts(  # type: ignore[no-untyped-def]
    hidden,
    parts,
    logits,
    num_rows,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Each program makes a tile of the product of float32 rows, times SCALE, and a weight whose two parts lie below each other, PADDED rows each.

    Rows are split as the weight is. Of the four products of parts three are made: the fourth is below float32's own rounding. A step's large
    products are summed apart, and then added in float32: tensor cores cut off what they add to a larger sum.
    """
    ACROSS: tl.constexpr = PADDED // COLUMNS
    begin, across = tl.program_id(0) // ACROSS * ROWS, tl.program_id(0) % ACROSS * COLUMNS
    total, rests = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for depth in range(0, WIDTH, DEPTH):
        values = hidden.load([begin, depth]) * SCALE
        first = values.to(tl.float16)
        rest = ((values - first.to(tl.float32)) * REST).to(tl.float16)
        of_first = parts.load([across, depth]).T
        sums = tl.dot(first, of_first)
        rests = tl.dot(rest, of_first, rests)
        rests = tl.dot(first, parts.load([PADDED + across, depth]).T, rests)
        total = tl.fma(sums, 1.0, total)  # a plain addition would become the product's own
    row, column = begin + tl.arange(0, ROWS), across + tl.arange(0, COLUMNS)
    is_there = (row < num_rows)[:, None] & (column < OUT)[None, :]
    tl.store(logits + row[:, None].to(tl.int64) * OUT + column[None, :], (total + rests / REST) / SCALE, mask=is_there)
