"""The Triton kernel that makes rows' CRC32s. Imported only where there is a GPU: torch's CPU builds have no Triton."""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl


# Specialised on nothing, it is compiled once for each kind of units.
@triton.jit(do_not_specialize=["units", "masks", "crcs", "of_zeros", "num_rows", "num_words", "row_units"])  # type: ignore[untyped-decorator]
def make_crcs(  # type: ignore[no-untyped-def]
    units,
    masks,
    crcs,
    of_zeros,
    num_rows,
    num_words,
    row_units,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program takes some rows. Each bit of a CRC32 is the parity of those bits of the row that its mask has (m2ray.model.row_crcs): of all words
    what the mask leaves of them is gathered by exclusive or, in a word for each of 32 bits and each lane, and counted once at the end.

    `units` are the rows' bytes as numbers of 1, 2 or 4 bytes, of which UNITS are a word; `of_zeros` is the CRC32 of a row of zeros.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, 32)
    lane = tl.arange(0, LANES)
    is_row = (row < num_rows)[:, None, None]
    rows_at = units + row[:, None, None] * row_units
    masks_at = masks + bit[None, :, None] * num_words
    gathered = tl.zeros([ROWS, 32, LANES], tl.int32)
    for start in tl.range(0, num_words, LANES, num_stages=STAGES):
        word_at = start + lane[None, None, :]
        word = tl.zeros([ROWS, 1, LANES], tl.int32)
        for number in tl.static_range(UNITS):
            unit_at = word_at * UNITS + number
            unit = tl.load(rows_at + unit_at, mask=is_row & (unit_at < row_units), other=0)
            word |= unit.to(tl.int32) << (32 // UNITS * number)
        gathered ^= word & tl.load(masks_at + word_at, mask=word_at < num_words, other=0)
    parity = tl.xor_sum(gathered, axis=2)
    parity ^= parity >> 16
    parity ^= parity >> 8
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    tl.store(crcs + row, tl.xor_sum((parity & 1) << bit[None, :], axis=1) ^ of_zeros, mask=row < num_rows)
