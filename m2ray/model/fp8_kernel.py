"""The Triton kernel that dequantises FP8 blocks. Imported only where there is a GPU: torch's CPU builds have no Triton."""

import triton
import triton.language as tl


# Without annotations: Triton compiles the function's text, and knows no names but its own.
@triton.jit  # type: ignore[untyped-decorator]
def dequantize_block(  # type: ignore[no-untyped-def]  # noqa: ANN201
    weight,  # noqa: ANN001
    scale,  # noqa: ANN001
    into,  # noqa: ANN001
    rows,  # noqa: ANN001
    columns,  # noqa: ANN001
    into_stride,  # noqa: ANN001
    scale_columns,  # noqa: ANN001
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program a block: load FP8, multiply by the block's float32 scale, round once to bfloat16."""
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    is_inside = (row < rows) & (column < columns)
    factor = tl.load(scale + row_block * scale_columns + column_block)
    values = tl.load(weight + row * columns + column, mask=is_inside).to(tl.float32) * factor
    tl.store(into + row * into_stride + column, values.to(tl.bfloat16), mask=is_inside)
