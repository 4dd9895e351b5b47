"""The Triton kernels that take statistics of rows. Imported only where there is a GPU: torch's CPU builds have no Triton.

Rows [N, WIDTH] lie one behind the other. Sums over PIECE of them are float32, sums of these float64.
"""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl

# Compiled once for a width and a dtype of rows.


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def piece_sums(  # type: ignore[no-untyped-def]
    rows,
    sums,
    smallest,
    largest,
    num_rows,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a piece of rows, and COLUMNS: their sum, and their extremes, each float32 [pieces, WIDTH]."""
    piece = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    low = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    high = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for start in range(0, PIECE, ROWS):
        row = piece * PIECE + start + tl.arange(0, ROWS)
        is_there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        values = tl.load(rows + row[:, None] * WIDTH + column[None, :], mask=is_there, other=0).to(tl.float32)
        total += values
        low = tl.minimum(low, tl.where(is_there, values, float("inf")))
        high = tl.maximum(high, tl.where(is_there, values, float("-inf")))
    place = piece * WIDTH + column
    tl.store(sums + place, tl.sum(total, axis=0), mask=column < WIDTH)
    tl.store(smallest + place, tl.min(low, axis=0), mask=column < WIDTH)
    tl.store(largest + place, tl.max(high, axis=0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_rows", "num_pieces"])  # type: ignore[untyped-decorator]
def centre_of(  # type: ignore[no-untyped-def]
    rows,
    sums,
    smallest,
    largest,
    moments,
    centre,
    num_rows,
    num_pieces,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The extremes of all pieces, and a value near the mean that rows may have; of a channel that never changes that one."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    low = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    high = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for start in range(0, num_pieces, ROWS):
        piece = start + tl.arange(0, ROWS)
        is_there = (piece < num_pieces)[:, None] & (column < WIDTH)[None, :]
        place = piece[:, None] * WIDTH + column[None, :]
        total += tl.load(sums + place, mask=is_there, other=0).to(tl.float64)
        low = tl.minimum(low, tl.load(smallest + place, mask=is_there, other=float("inf")))
        high = tl.maximum(high, tl.load(largest + place, mask=is_there, other=float("-inf")))
    least, most = tl.min(low, axis=0), tl.max(high, axis=0)
    mean = (tl.sum(total, axis=0) / num_rows).to(tl.float32).to(rows.dtype.element_ty).to(tl.float32)
    tl.store(centre + column, tl.where(least == most, least, mean), mask=column < WIDTH)
    tl.store(moments + 2 * WIDTH + column, least.to(tl.float64), mask=column < WIDTH)
    tl.store(moments + 3 * WIDTH + column, most.to(tl.float64), mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def piece_deviations(  # type: ignore[no-untyped-def]
    rows,
    centre,
    sums,
    squares,
    num_rows,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a piece of rows, and COLUMNS: the sums of deviations from the centre, and of their squares, each float32 [pieces, WIDTH]."""
    piece = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    about = tl.load(centre + column, mask=column < WIDTH, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squared = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, PIECE, ROWS):
        row = piece * PIECE + start + tl.arange(0, ROWS)
        is_there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        values = tl.load(rows + row[:, None] * WIDTH + column[None, :], mask=is_there, other=0).to(tl.float32)
        off = tl.where(is_there, values - about[None, :], 0)
        total += off
        squared += off * off
    place = piece * WIDTH + column
    tl.store(sums + place, tl.sum(total, axis=0), mask=column < WIDTH)
    tl.store(squares + place, tl.sum(squared, axis=0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_rows", "num_pieces"])  # type: ignore[untyped-decorator]
def moments_of(  # type: ignore[no-untyped-def]
    centre,
    sums,
    squares,
    moments,
    rest,
    num_rows,
    num_pieces,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The mean, the sum of squared deviations from it, and how far the mean is from the centre."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    squared = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, num_pieces, ROWS):
        piece = start + tl.arange(0, ROWS)
        is_there = (piece < num_pieces)[:, None] & (column < WIDTH)[None, :]
        place = piece[:, None] * WIDTH + column[None, :]
        total += tl.load(sums + place, mask=is_there, other=0).to(tl.float64)
        squared += tl.load(squares + place, mask=is_there, other=0).to(tl.float64)
    off = tl.sum(total, axis=0) / num_rows
    about = tl.load(centre + column, mask=column < WIDTH, other=0).to(tl.float64)
    tl.store(rest + column, off, mask=column < WIDTH)
    tl.store(moments + column, about + off, mask=column < WIDTH)
    tl.store(moments + WIDTH + column, tl.maximum(tl.sum(squared, axis=0) - off * off * num_rows, 0.0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def count_norms(  # type: ignore[no-untyped-def]
    rows,
    counts,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One program ROWS rows: their norms, summed in float64, as float32, and one more in the bins that these bits name."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        values = tl.load(rows + row[:, None] * WIDTH + column[None, :], mask=is_there, other=0).to(tl.float64)
        total += values * values
    norm = tl.sqrt(tl.sum(total, axis=1)).to(tl.float32)
    tl.atomic_add(counts + (norm.to(tl.int32, bitcast=True) >> SHIFT), 1, mask=row < num_rows, sem="relaxed")
