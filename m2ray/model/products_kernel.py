"""The Triton kernels of experts' products. Imported only where there is a GPU: torch's CPU builds have no Triton."""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def plan_tiles(ends, tiles, NUMBER: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How experts' rows are cut: of each tile its expert, the expert's first tile, its tiles and its first row; before them all their number.

    `ends` [NUMBER]: behind each expert's last row. EXPERTS is NUMBER, or what is above it that is a power of two.
    """
    expert = tl.arange(0, EXPERTS)
    is_there = expert < NUMBER
    end = tl.load(ends + expert, mask=is_there, other=0)
    begin = tl.load(ends + expert - 1, mask=is_there & (expert > 0), other=0)
    many = tl.where(is_there, (end - begin + ROWS - 1) // ROWS, 0)
    first = tl.cumsum(many, axis=0) - many
    tl.store(tiles, tl.sum(many, axis=0))
    for number in range(tl.max(many, axis=0)):
        place = tiles + (first + number + 1) * 4
        is_tile = number < many
        tl.store(place, expert, mask=is_tile)
        tl.store(place + 1, first, mask=is_tile)
        tl.store(place + 2, many, mask=is_tile)
        tl.store(place + 3, begin, mask=is_tile)


@triton.jit  # type: ignore[untyped-decorator]
def multiply_rows(  # type: ignore[no-untyped-def]
    tokens,
    choices,
    inner,
    weights,
    rows,
    tiles,
    ends,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    CHOSEN: tl.constexpr,
    IS_GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Each program takes every so many tiles of the product of each expert's rows and its weight.

    Gated: a row is that of the token whose choice it is, and what is kept is silu(gate) * up, both rounded before as a product in memory is.
    `weights` are blocks of gate and of up then, multiplied as one. Rows behind an expert's last are zeros, which take less power than others.
    Tiles that share weights run side by side: an expert's tiles down its rows are next to each other.
    """
    ACROSS: tl.constexpr = OUT // COLUMNS
    WIDE: tl.constexpr = 2 * COLUMNS if IS_GATED else COLUMNS
    for tile in tl.range(tl.program_id(0), tl.load(tiles) * ACROSS, tl.num_programs(0), flatten=FLATTEN):
        entry = tiles + (tile // ACROSS + 1) * 4
        expert = tl.load(entry)
        within = tile - tl.load(entry + 1) * ACROSS
        many = tl.load(entry + 2)
        begin, across = tl.load(entry + 3) + (within % many) * ROWS, (within // many) * COLUMNS
        end = tl.load(ends + expert)
        row = begin + tl.arange(0, ROWS)
        is_row = (row < end)[:, None]
        sums = tl.zeros([ROWS, WIDE], tl.float32)
        if IS_GATED:
            token = tl.load(choices + tl.minimum(row, end - 1)) // CHOSEN
            place = tokens + token[:, None] * WIDTH + tl.arange(0, DEPTH)[None, :]
            for depth in range(0, WIDTH, DEPTH):
                both = tl.reshape(weights.load([expert, 0, across, depth]), [WIDE, DEPTH])
                sums = tl.dot(tl.load(place + depth, mask=is_row, other=0), both.T, sums)
            rounded = sums.to(tl.bfloat16).to(tl.float32)
            gate, up = tl.split(tl.permute(tl.reshape(rounded, [ROWS, 2, COLUMNS]), [0, 2, 1]))
            made = gate / (1 + tl.exp(-gate)) * up
        else:
            for depth in range(0, WIDTH, DEPTH):
                sums = tl.dot(inner.load([begin, depth]), weights.load([expert * OUT + across, depth]).T, sums)
            made = sums
        column = across + tl.arange(0, COLUMNS)
        tl.store(rows + row[:, None].to(tl.int64) * OUT + column[None, :], made.to(tl.bfloat16), mask=is_row)
