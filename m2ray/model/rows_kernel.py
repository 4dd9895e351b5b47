"""The Triton kernel that takes rows of a tensor. Imported only where there is a GPU: torch's CPU builds have no Triton."""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def take_rows(  # type: ignore[no-untyped-def]
    values,
    places,
    rows,
    extremes,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program takes every so many rows; and the smallest and the largest value of those, as the numbers that the bits of float32 are if
    all but the sign of negative ones are turned: they are in the order of the values, with what is no number at either end.
    """
    program = tl.program_id(0)
    low = tl.full([ROWS, COLUMNS], 0x7FFFFFFF, tl.int32)
    high = tl.full([ROWS, COLUMNS], -0x80000000, tl.int32)
    for block in range(program, (num_rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        place = tl.load(places + row, mask=row < num_rows, other=0)
        for start in range(0, WIDTH, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            is_there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
            taken = tl.load(values + place[:, None] * WIDTH + column[None, :], mask=is_there, other=0)
            tl.store(rows + row[:, None] * WIDTH + column[None, :], taken, mask=is_there)
            bits = taken.to(tl.float32).to(tl.int32, bitcast=True)
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            low = tl.minimum(low, tl.where(is_there, ordered, 0x7FFFFFFF))
            high = tl.maximum(high, tl.where(is_there, ordered, -0x80000000))
    tl.store(extremes + 2 * program, tl.min(tl.min(low, axis=1), axis=0))
    tl.store(extremes + 2 * program + 1, tl.max(tl.max(high, axis=1), axis=0))
