"""The Triton kernel that multiplies FP8 rows with FP8 weights, a group of rows with a weight each. Imported only where there is a GPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202 - Triton compiles a function's text, and knows no names but its own and constants

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
"""Columns that share a scale, and rows of a weight that do: a step of the sum, and the width of a tile."""


@triton.jit(do_not_specialize=["num_rows"])
def multiply_groups(
    rows,
    row_scales,
    weight,
    weight_scales,
    ends,
    take,
    put,
    out,
    num_rows,
    num_groups,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs share the tiles [ROWS, BLOCK] of the result [num_rows, COLUMNS], one after the other, those of a group side by side.

    A sum of 128 products is made in the tensor cores, and added in float32 to those before it, times the scales of its row and of the weight's block.
    GROUPS is a power of two that `num_groups` does not exceed; WIDTH of a row is a multiple of BLOCK.
    """
    BLOCKS: tl.constexpr = WIDTH // BLOCK
    ACROSS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    number = tl.arange(0, GROUPS)
    if ends is None:
        stops = tl.where(number < num_groups, num_rows, 0)
        starts = tl.zeros_like(stops)
    else:
        stops = tl.load(ends + number, mask=number < num_groups, other=0)
        starts = tl.load(ends + number - 1, mask=(number > 0) & (number < num_groups), other=0)
    tiles = (stops - starts + ROWS - 1) // ROWS * ACROSS
    behind = tl.cumsum(tiles, 0)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        group = tl.sum((behind <= tile).to(tl.int32), 0)
        is_it = number == group
        start, stop = tl.sum(tl.where(is_it, starts, 0), 0), tl.sum(tl.where(is_it, stops, 0), 0)
        down = (stop - start + ROWS - 1) // ROWS
        within = tile - (tl.sum(tl.where(is_it, behind, 0), 0) - down * ACROSS)
        # Neighbours have the same columns of the weight, which so comes from memory once.
        across = within // down
        place = start + within % down * ROWS + tl.arange(0, ROWS)
        is_row = place < stop
        row = place if take is None else tl.load(take + place, mask=is_row, other=0)
        row = tl.where(is_row, row, 0).to(tl.int64)
        column = across * BLOCK + tl.arange(0, BLOCK)
        is_column = column < COLUMNS
        step = tl.arange(0, BLOCK)
        row_at = rows + row[:, None] * WIDTH + step[None, :]
        weight_at = weight + (group.to(tl.int64) * COLUMNS + tl.where(is_column, column, 0))[None, :] * WIDTH + step[:, None]
        row_scale_at = row_scales + row * BLOCKS
        weight_scale_at = weight_scales + (group.to(tl.int64) * ACROSS + across) * BLOCKS
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            products = tl.dot(tl.load(row_at + block * BLOCK), tl.load(weight_at + block * BLOCK))
            scale = tl.load(row_scale_at + block) * tl.load(weight_scale_at + block)
            total += products * scale[:, None]
        into = place if put is None else tl.load(put + place, mask=is_row, other=0)
        out_at = out + into.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(out_at, total.to(tl.bfloat16), mask=is_row[:, None] & is_column[None, :])
