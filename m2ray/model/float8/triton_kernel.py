"""The Triton kernel that multiplies FP8 rows with FP8 weights, a group of rows with a weight each. Imported only where there is a GPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own and constants

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
"""Columns that share a scale, and rows of a weight that do: a step of the sum, and the width of a tile."""


@triton.jit
def multiply_tiles(
    rows,
    row_scales,
    weight,
    weight_scales,
    tiles,
    num_tiles,
    take,
    put,
    out,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs share the tiles [ROWS, BLOCK] of the result [rows, COLUMNS], one after the other. `tiles`, `num_tiles`: of `tiles_of`.

    A sum of 128 products is made in the tensor cores, and added in float32 to those before it, times the scales of its row and of the weight's block.
    """
    BLOCKS: tl.constexpr = WIDTH // BLOCK
    ACROSS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    for tile in range(tl.program_id(0), tl.load(num_tiles) * ACROSS, tl.num_programs(0)):
        line, across = tiles + tile // ACROSS * 3, tile % ACROSS
        group, first, stop = tl.load(line).to(tl.int64), tl.load(line + 1), tl.load(line + 2)
        place = first + tl.arange(0, ROWS)
        is_row = place < stop
        row = place if take is None else tl.load(take + place, mask=is_row, other=0)
        row = tl.where(is_row, row, 0).to(tl.int64)
        column = across * BLOCK + tl.arange(0, BLOCK)
        is_column = column < COLUMNS
        step = tl.arange(0, BLOCK)
        row_at = rows + row[:, None] * WIDTH + step[None, :]
        weight_at = weight + (group * COLUMNS + tl.where(is_column, column, 0))[None, :] * WIDTH + step[:, None]
        row_scale_at = row_scales + row * BLOCKS
        weight_scale_at = weight_scales + (group * ACROSS + across) * BLOCKS
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            products = tl.dot(tl.load(row_at + block * BLOCK), tl.load(weight_at + block * BLOCK))
            scale = tl.load(row_scale_at + block) * tl.load(weight_scale_at + block)
            total += products * scale[:, None]
        into = place if put is None else tl.load(put + place, mask=is_row, other=0)
        out_at = out + into.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(out_at, total.to(tl.bfloat16), mask=is_row[:, None] & is_column[None, :])
