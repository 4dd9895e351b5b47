"""The Triton kernels that unpack values with scales: of 8 bits along memory, of 4 bits by place. Imported only where there is a GPU.

Triton compiles a function's text and knows no names but its own and constants, so there are no annotations. Specialised on nothing but the
alignment of `data`, which is always the same, each is compiled once. What a table's line says: m2ray.model.quantization.fused.Line.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202, SIM108

import triton
import triton.language as tl

from m2ray.model.quantization import fused
from m2ray.model.quantization.fused import Line

(
    VALUES_AT,
    SCALE_AT,
    INTO,
    ROWS,
    COLUMNS,
    STRIDE,
    BLOCK_COLUMNS,
    HEIGHT_SHIFT,
    WIDTH_SHIFT,
    VALUES_KIND,
    SCALE_KIND,
    IN_FLOAT16,
    LINE_COLUMNS,
    IS_TRANSPOSED,
    WORD_ROWS_SHIFT,
    IS_INTERLEAVED,
    ZERO_AT,
    ZERO_WORD_ROWS_SHIFT,
    ZERO_MORE,
    GROUPS_AT,
    TENSOR_SCALE_AT,
    IS_DIVIDED,
) = (tl.constexpr(number) for number in range(len(Line._fields)))
"""Where each field of a line stands."""

FIELDS = tl.constexpr(len(Line._fields))

CHUNK = tl.constexpr(fused.CHUNK)
NOWHERE = tl.constexpr(fused.NOWHERE)


@triton.jit(do_not_specialize=["table", "max_tiles"])
def unpack_bytes(table, data, max_tiles, CHUNKS: tl.constexpr):
    """One program a run of CHUNKS chunks of one tensor of the table, `max_tiles` programs a tensor, whatever rows the run lies in.

    Load 8 bits, multiply by the scale of the block that they lie in, in float32, round once to bfloat16, or to float16 first.
    """
    line = table + tl.program_id(0) // max_tiles * FIELDS
    across = (tl.load(line + COLUMNS) // CHUNK).to(tl.int32)
    count = tl.load(line + ROWS).to(tl.int32) * across
    first = tl.program_id(0) % max_tiles * CHUNKS
    if first < count:
        chunk = first + tl.arange(0, CHUNKS)
        is_inside = chunk < count
        row = chunk // across
        column = chunk - row * across
        within = tl.arange(0, CHUNK)[None, :]
        bits = tl.load(data + (tl.load(line + VALUES_AT) // CHUNK + chunk)[:, None] * CHUNK + within, mask=is_inside[:, None], other=0)
        block = (row >> tl.load(line + HEIGHT_SHIFT).to(tl.int32)) * tl.load(line + BLOCK_COLUMNS).to(tl.int32)
        block += (column * CHUNK) >> tl.load(line + WIDTH_SHIFT).to(tl.int32)
        scale = _scale(data, tl.load(line + SCALE_AT), block, is_inside, tl.load(line + SCALE_KIND))
        kind = tl.load(line + VALUES_KIND)
        if kind == 0:
            values = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        elif kind == 1:
            values = bits.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            values = bits.to(tl.float8e5, bitcast=True).to(tl.float32)
        products = values * scale[:, None]
        if tl.load(line + IN_FLOAT16) != 0:
            products = products.to(tl.float16).to(tl.float32)
        # Counted from `data`, since the alignment of an address out of memory would not be known.
        into = (tl.load(line + INTO) - data.to(tl.int64)) // (2 * CHUNK)
        into += row.to(tl.int64) * (tl.load(line + STRIDE) // CHUNK) + column
        rounded = products.to(tl.bfloat16)
        tl.store(data.to(tl.pointer_type(tl.bfloat16)) + into[:, None] * CHUNK + within, rounded, mask=is_inside[:, None])


@triton.jit(do_not_specialize=["table", "max_tiles"])
def unpack_nibbles(table, data, max_tiles, SIDE: tl.constexpr):
    """One program a square of one tensor of the table, `max_tiles` programs a tensor; `fast` is the axis along which is written.

    Take 4 bits, less the zero point of the group that they lie in, times its scale, in float32; round as `unpack_bytes` does.
    """
    line = table + tl.program_id(0) // max_tiles * FIELDS
    rows, columns, stride = tl.load(line + ROWS).to(tl.int32), tl.load(line + COLUMNS).to(tl.int32), tl.load(line + STRIDE)
    is_transposed = tl.load(line + IS_TRANSPOSED) != 0
    slow_count, fast_count = tl.where(is_transposed, columns, rows), tl.where(is_transposed, rows, columns)
    across = (fast_count + SIDE - 1) // SIDE
    number = tl.program_id(0) % max_tiles
    if number // across * SIDE < slow_count:
        slow = (number // across * SIDE + tl.arange(0, SIDE))[:, None]
        fast = (number % across * SIDE + tl.arange(0, SIDE))[None, :]
        is_inside = (slow < slow_count) & (fast < fast_count)
        row, column = tl.where(is_transposed, fast, slow), tl.where(is_transposed, slow, fast)
        is_interleaved = tl.load(line + IS_INTERLEAVED) != 0

        block_row = row >> tl.load(line + HEIGHT_SHIFT).to(tl.int32)
        groups_at = tl.load(line + GROUPS_AT)
        if groups_at != NOWHERE:
            block_row = tl.load(_place(data, groups_at).to(tl.pointer_type(tl.int32)) + row, mask=is_inside, other=0)
        block_column, block_columns = column >> tl.load(line + WIDTH_SHIFT).to(tl.int32), tl.load(line + BLOCK_COLUMNS).to(tl.int32)
        scale = _scale(data, tl.load(line + SCALE_AT), block_row * block_columns + block_column, is_inside, tl.load(line + SCALE_KIND))
        tensor_scale_at = tl.load(line + TENSOR_SCALE_AT)
        if tensor_scale_at != NOWHERE:
            tensor_scale = tl.load(_place(data, tensor_scale_at).to(tl.pointer_type(tl.float32)))
            if tl.load(line + IS_DIVIDED) != 0:
                scale = tl.div_rn(scale, tensor_scale)
            else:
                scale = scale * tensor_scale

        at = _number(row, column, tl.load(line + LINE_COLUMNS).to(tl.int32), tl.load(line + WORD_ROWS_SHIFT).to(tl.int32), is_interleaved)
        pair = tl.load(data + tl.load(line + VALUES_AT) + (at >> 1), mask=is_inside, other=0).to(tl.int32)
        code = (pair >> ((at & 1) * 4)) & 15
        kind = tl.load(line + VALUES_KIND)
        if kind <= 4:  # FP4's bits, moved, are an FP8 number 64 times smaller
            moved = ((code & 8) << 4) | ((code & 7) << 2)
            values = moved.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) * 64.0
            values = tl.where((kind == 4) & (code == 8), 0.0, values)
        else:
            values = (code - tl.where(kind == 6, 8, 0)).to(tl.float32)
        zero_at = tl.load(line + ZERO_AT)
        if zero_at != NOWHERE:
            zero = _number(block_row, block_column, block_columns, tl.load(line + ZERO_WORD_ROWS_SHIFT).to(tl.int32), is_interleaved)
            word = tl.load(_place(data, zero_at).to(tl.pointer_type(tl.int32)) + (zero >> 3), mask=is_inside, other=0)
            values -= (((word + tl.load(line + ZERO_MORE).to(tl.int32)) >> ((zero & 7) * 4)) & 15).to(tl.float32)
        products = values * scale
        if tl.load(line + IN_FLOAT16) != 0:
            products = products.to(tl.float16).to(tl.float32)
        into = tl.load(line + INTO).to(tl.pointer_type(tl.bfloat16))
        tl.store(into + slow.to(tl.int64) * stride + fast, products.to(tl.bfloat16), mask=is_inside)


@triton.jit
def _place(data, at):
    """The address of a byte of the buffer, or the negative number's own."""
    return tl.where(at < 0, -at, data.to(tl.int64) + at)


@triton.jit
def _number(row, column, columns, word_rows_shift, is_interleaved):
    """How many numbers of four bits lie before one: in rows, or, of which a word holds eight, in words of a column; AWQ mixes eight columns."""
    mixed = (column & -8) + ((column & 7) >> 1) + (column & 1) * 4
    column = tl.where(is_interleaved, mixed, column)
    return (((row >> word_rows_shift) * columns + column) << word_rows_shift) + (row & ((1 << word_rows_shift) - 1))


@triton.jit
def _scale(data, at, index, is_inside, kind):
    """Scales as float32."""
    address = _place(data, at)
    if kind == 0:
        scale = tl.load(address.to(tl.pointer_type(tl.float32)) + index, mask=is_inside, other=0)
    elif kind == 1:
        scale = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + index, mask=is_inside, other=0).to(tl.float32)
    elif kind == 2:
        scale = tl.load(address.to(tl.pointer_type(tl.float16)) + index, mask=is_inside, other=0).to(tl.float32)
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.uint8)) + index, mask=is_inside, other=0)
        if kind == 5:
            scale = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:  # exponents of two, less 127: 0 is a number below the normal ones, and 255 none in float8_e8m0fnu
            exponent = bits.to(tl.int32)
            pattern = tl.where(exponent == 0, 0x00400000, exponent << 23)
            pattern = tl.where((exponent == 255) & (kind == 4), 0x7FC00000, pattern)
            scale = pattern.to(tl.float32, bitcast=True)
    return scale
