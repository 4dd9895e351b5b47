"""The Triton kernels around the products of a mixture of experts. Imported only where there is a GPU: torch's CPU builds have no Triton."""

# ruff: noqa: ANN001, ANN201, PLR0124 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def spread_rows(  # type: ignore[no-untyped-def]
    tokens,
    places,
    rows,
    WIDTH: tl.constexpr,
    CHOSEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program reads one token's row once, and writes it to all its places."""
    token = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        values = tl.load(tokens + token * WIDTH + column, mask=column < WIDTH)
        for choice in tl.static_range(CHOSEN):
            place = tl.load(places + token * CHOSEN + choice)
            tl.store(rows + place * WIDTH + column, values, mask=column < WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def sum_rows(  # type: ignore[no-untyped-def]
    stream,
    beside,
    rows,
    places,
    weights,
    sums,
    WIDTH: tl.constexpr,
    CHOSEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program adds up one token's rows, weighted, in the order of its choices, and adds them to the token's row of `stream` and `beside`, if there are such."""
    token = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        total = tl.zeros([COLUMNS], tl.float32)
        for choice in tl.static_range(CHOSEN):
            place = tl.load(places + token * CHOSEN + choice)
            weight = tl.load(weights + token * CHOSEN + choice).to(tl.float32)
            total += tl.load(rows + place * WIDTH + column, mask=column < WIDTH).to(tl.float32) * weight
        if stream is not None:
            added = tl.load(stream + token * WIDTH + column, mask=column < WIDTH).to(tl.float32)
            if beside is not None:
                added += tl.load(beside + token * WIDTH + column, mask=column < WIDTH).to(tl.float32)
            total += added
        tl.store(sums + token * WIDTH + column, total.to(sums.dtype.element_ty), mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def top_k(  # type: ignore[no-untyped-def]
    scores,
    values,
    indices,
    num_rows,
    WIDTH: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The largest values of each row, in falling order, and where they are; of equal ones the first.

    A value and its column are one number: the bits of float32 in the order of the values (what is no number above all), and the column from the end.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    is_there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    score = tl.load(scores + row[:, None] * WIDTH + column[None, :], mask=is_there, other=0).to(tl.float32) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    number = (ordered.to(tl.int64) << 32) | (COLUMNS - 1 - column)[None, :].to(tl.int64)
    number = tl.where(is_there, number, -0x8000000000000000)
    for choice in tl.static_range(CHOSEN):
        best = tl.max(number, axis=1)
        found = (best >> 32).to(tl.int32)
        value = (found ^ ((found >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(values + row * CHOSEN + choice, value.to(values.dtype.element_ty), mask=row < num_rows)
        tl.store(indices + row * CHOSEN + choice, COLUMNS - 1 - (best & 0xFFFFFFFF), mask=row < num_rows)
        number = tl.where(number == best[:, None], -0x8000000000000000, number)
