"""The Triton kernels that unpack values with scales: along memory, or, what lies otherwise than it is written, by place. Imported only where there is a GPU.

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
def unpack_runs(table, data, max_tiles, CHUNKS: tl.constexpr, BITS: tl.constexpr):
    """One program a run of CHUNKS chunks of one matrix of the table, `max_tiles` programs a matrix, whatever rows the run lies in.

    Values of 8 or 4 bits, less the zero point, times the scale of the block that they lie in, in float32; rounded once to bfloat16, or to
    float16 first.
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
        block_row = row >> tl.load(line + HEIGHT_SHIFT).to(tl.int32)
        block_column = (column * CHUNK) >> tl.load(line + WIDTH_SHIFT).to(tl.int32)
        scale = _scale(data, line, block_row, block_column, is_inside)
        CHUNK_BYTES: tl.constexpr = CHUNK * BITS // 8
        at = (tl.load(line + VALUES_AT) // CHUNK_BYTES + chunk)[:, None] * CHUNK_BYTES + tl.arange(0, CHUNK_BYTES)[None, :]
        bits = tl.load(data + at, mask=is_inside[:, None], other=0)
        if BITS == 8:
            values = _of_byte(bits, tl.load(line + VALUES_KIND))
        else:
            values = _of_code(tl.interleave(bits & 15, bits >> 4).to(tl.int32), tl.load(line + VALUES_KIND))
            values -= _zero_point(data, line, block_row, block_column, is_inside)[:, None]
        # Counted from `data`, since the alignment of an address out of memory would not be known.
        into = (tl.load(line + INTO) - data.to(tl.int64)) // (2 * CHUNK)
        into += row.to(tl.int64) * (tl.load(line + STRIDE) // CHUNK) + column
        into_chunks = data.to(tl.pointer_type(tl.bfloat16)) + into[:, None] * CHUNK + within
        tl.store(into_chunks, _rounded(values * scale[:, None], line), mask=is_inside[:, None])


@triton.jit(do_not_specialize=["table", "max_tiles"])
def unpack_squares(table, data, max_tiles, SIDE: tl.constexpr):
    """One program a square of one matrix of 4-bit values, each found by its place; `fast` is the axis along which is written."""
    line = table + tl.program_id(0) // max_tiles * FIELDS
    rows, columns = tl.load(line + ROWS).to(tl.int32), tl.load(line + COLUMNS).to(tl.int32)
    is_transposed = tl.load(line + IS_TRANSPOSED) != 0
    slow_count, fast_count = tl.where(is_transposed, columns, rows), tl.where(is_transposed, rows, columns)
    across = (fast_count + SIDE - 1) // SIDE
    number = tl.program_id(0) % max_tiles
    if number // across * SIDE < slow_count:
        slow = (number // across * SIDE + tl.arange(0, SIDE))[:, None]
        fast = (number % across * SIDE + tl.arange(0, SIDE))[None, :]
        is_inside = (slow < slow_count) & (fast < fast_count)
        row, column = tl.where(is_transposed, fast, slow), tl.where(is_transposed, slow, fast)
        block_row, block_column = row >> tl.load(line + HEIGHT_SHIFT).to(tl.int32), column >> tl.load(line + WIDTH_SHIFT).to(tl.int32)
        groups_at = tl.load(line + GROUPS_AT)
        if groups_at != NOWHERE:
            block_row = tl.load(_place(data, groups_at).to(tl.pointer_type(tl.int32)) + row, mask=is_inside, other=0)
        at = _number(line, row, column, tl.load(line + LINE_COLUMNS).to(tl.int32), tl.load(line + WORD_ROWS_SHIFT).to(tl.int32))
        pair = tl.load(data + tl.load(line + VALUES_AT) + (at >> 1), mask=is_inside, other=0).to(tl.int32)
        values = _of_code((pair >> ((at & 1) * 4)) & 15, tl.load(line + VALUES_KIND))
        values -= _zero_point(data, line, block_row, block_column, is_inside)
        products = values * _scale(data, line, block_row, block_column, is_inside)
        into = tl.load(line + INTO).to(tl.pointer_type(tl.bfloat16))
        tl.store(into + slow.to(tl.int64) * tl.load(line + STRIDE) + fast, _rounded(products, line), mask=is_inside)


@triton.jit
def _place(data, at):
    """The address of a byte of the buffer, or the negative number's own."""
    return tl.where(at < 0, -at, data.to(tl.int64) + at)


@triton.jit
def _of_byte(bits, kind):
    if kind == 0:
        values = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif kind == 1:
        values = bits.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        values = bits.to(tl.float8e5, bitcast=True).to(tl.float32)
    return values


@triton.jit
def _of_code(code, kind):
    if kind <= 4:  # FP4's bits, moved, are an FP8 number 64 times smaller
        moved = ((code & 8) << 4) | ((code & 7) << 2)
        values = moved.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) * 64.0
        values = tl.where((kind == 4) & (code == 8), 0.0, values)
    else:
        values = (code - tl.where(kind == 6, 8, 0)).to(tl.float32)
    return values


@triton.jit
def _number(line, row, column, columns, word_rows_shift):
    """How many numbers of four bits lie before one: in rows, or, of which a word holds eight, in words of a column; AWQ mixes eight columns."""
    mixed = (column & -8) + ((column & 7) >> 1) + (column & 1) * 4
    column = tl.where(tl.load(line + IS_INTERLEAVED) != 0, mixed, column)
    return (((row >> word_rows_shift) * columns + column) << word_rows_shift) + (row & ((1 << word_rows_shift) - 1))


@triton.jit
def _zero_point(data, line, block_row, block_column, is_inside):
    """Zero points of blocks, as float32; 0 where there are none."""
    at = tl.load(line + ZERO_AT)
    zero = tl.zeros_like(block_row + block_column)
    if at != NOWHERE:
        columns, word_rows_shift = tl.load(line + BLOCK_COLUMNS).to(tl.int32), tl.load(line + ZERO_WORD_ROWS_SHIFT).to(tl.int32)
        number = _number(line, block_row, block_column, columns, word_rows_shift)
        word = tl.load(_place(data, at).to(tl.pointer_type(tl.int32)) + (number >> 3), mask=is_inside, other=0)
        zero = ((word + tl.load(line + ZERO_MORE).to(tl.int32)) >> ((number & 7) * 4)) & 15
    return zero.to(tl.float32)


@triton.jit
def _scale(data, line, block_row, block_column, is_inside):
    """Scales of blocks as float32, with the matrix's own, where it has one."""
    address, kind = _place(data, tl.load(line + SCALE_AT)), tl.load(line + SCALE_KIND)
    index = block_row * tl.load(line + BLOCK_COLUMNS).to(tl.int32) + block_column
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
    tensor_scale_at = tl.load(line + TENSOR_SCALE_AT)
    if tensor_scale_at != NOWHERE:
        tensor_scale = tl.load(_place(data, tensor_scale_at).to(tl.pointer_type(tl.float32)))
        if tl.load(line + IS_DIVIDED) != 0:
            scale = tl.div_rn(scale, tensor_scale)
        else:
            scale = scale * tensor_scale
    return scale


@triton.jit
def _rounded(products, line):
    if tl.load(line + IN_FLOAT16) != 0:
        products = products.to(tl.float16).to(tl.float32)
    return products.to(tl.bfloat16)
