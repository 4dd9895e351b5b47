"""The Triton kernel that unpacks 8-bit values with scales. Imported only where there is a GPU: torch's CPU builds have no Triton."""

import triton
import triton.language as tl


# Without annotations: Triton compiles the function's text, and knows no names but its own. Specialised on nothing, it is compiled once.
@triton.jit(do_not_specialize=["table", "data", "max_tiles"])  # type: ignore[untyped-decorator]
def unpack_tensors(  # type: ignore[no-untyped-def]  # noqa: ANN201
    table,  # noqa: ANN001
    data,  # noqa: ANN001
    max_tiles,  # noqa: ANN001
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One program a tile of one tensor of the table (m2ray.model.quantization.fused.KernelTable), `max_tiles` programs a tensor.

    Load 8 bits, multiply by the scale of the block that they lie in, in float32, round once to bfloat16.
    """
    tensor = table + (tl.program_id(0) // max_tiles) * 11
    number = tl.program_id(0) % max_tiles
    rows = tl.load(tensor + 3)
    columns = tl.load(tensor + 4)
    across = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS
    first_row = number // across * TILE_ROWS
    if first_row < rows:
        row = first_row + tl.arange(0, TILE_ROWS)
        column = number % across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        is_inside = (row < rows)[:, None] & (column < columns)[None, :]
        bits = tl.load(data + tl.load(tensor) + row[:, None] * columns + column[None, :], mask=is_inside, other=0)
        values_dtype = tl.load(tensor + 9)
        if values_dtype == 0:
            values = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        elif values_dtype == 1:
            values = bits.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            values = bits.to(tl.float8e5, bitcast=True).to(tl.float32)
        scale_at = tl.load(tensor + 1)
        address = -scale_at if scale_at < 0 else data.to(tl.int64) + scale_at
        block_row = row // tl.load(tensor + 7)
        block = block_row[:, None] * tl.load(tensor + 6) + (column // tl.load(tensor + 8))[None, :]
        scale_dtype = tl.load(tensor + 10)
        if scale_dtype == 0:
            scale = tl.load(address.to(tl.pointer_type(tl.float32)) + block, mask=is_inside, other=0)
        elif scale_dtype == 1:
            scale = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + block, mask=is_inside, other=0).to(tl.float32)
        elif scale_dtype == 2:
            scale = tl.load(address.to(tl.pointer_type(tl.float16)) + block, mask=is_inside, other=0).to(tl.float32)
        else:  # exponents of two, less 127: 0 is a number below the normal ones, and 255 none in float8_e8m0fnu
            exponent = tl.load(address.to(tl.pointer_type(tl.uint8)) + block, mask=is_inside, other=0).to(tl.int32)
            pattern = tl.where(exponent == 0, 0x00400000, exponent << 23)
            pattern = tl.where((exponent == 255) & (scale_dtype == 4), 0x7FC00000, pattern)
            scale = pattern.to(tl.float32, bitcast=True)
        into = tl.load(tensor + 2).to(tl.pointer_type(tl.bfloat16))
        tl.store(into + row[:, None] * tl.load(tensor + 5) + column[None, :], (values * scale).to(tl.bfloat16), mask=is_inside)
