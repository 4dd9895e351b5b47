"""The Triton kernel that dequantises FP8 blocks. Imported only where there is a GPU: torch's CPU builds have no Triton."""

import triton
import triton.language as tl


# Without annotations: Triton compiles the function's text, and knows no names but its own. Specialised on nothing, it is compiled once.
@triton.jit(do_not_specialize=["table", "data", "max_blocks"])  # type: ignore[untyped-decorator]
def dequantize_tensors(  # type: ignore[no-untyped-def]  # noqa: ANN201
    table,  # noqa: ANN001
    data,  # noqa: ANN001
    max_blocks,  # noqa: ANN001
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program a block of one tensor of the table (m2ray.model.fp8.KernelTable), `max_blocks` programs a tensor.

    Load FP8, multiply by the block's float32 scale, round once to bfloat16.
    """
    tensor = table + (tl.program_id(0) // max_blocks) * 7
    number = tl.program_id(0) % max_blocks
    scale_at = tl.load(tensor + 1)
    rows = tl.load(tensor + 3)
    columns = tl.load(tensor + 4)
    scale_columns = tl.load(tensor + 6)
    row_block = number // scale_columns
    column_block = number % scale_columns
    if row_block * BLOCK_ROWS < rows:
        scale = (-scale_at).to(tl.pointer_type(tl.float32)) if scale_at < 0 else (data + scale_at).to(tl.pointer_type(tl.float32))
        weight = (data + tl.load(tensor)).to(tl.pointer_type(tl.float8e4nv))
        into = tl.load(tensor + 2).to(tl.pointer_type(tl.bfloat16))
        row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        is_inside = (row < rows) & (column < columns)
        factor = tl.load(scale + number)
        values = tl.load(weight + row * columns + column, mask=is_inside).to(tl.float32) * factor
        tl.store(into + row * tl.load(tensor + 5) + column, values.to(tl.bfloat16), mask=is_inside)
