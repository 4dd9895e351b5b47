"""The Triton kernel that hashes pieces of a buffer by xxh3. Imported only where there is a GPU: torch's CPU builds have no Triton."""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl


# Specialised on nothing, it is compiled once.
@triton.jit(do_not_specialize=["table", "data", "words", "found", "first"])
def accumulate(  # type: ignore[no-untyped-def]
    table,
    data,
    words,
    found,
    first,
):
    """One program a piece of the table (m2ray.model.gpu_hashes), from number `first` on: its bytes taken into xxh3's eight accumulators, 64 of them a stripe, 16
    stripes a block. `words` are WORDS of m2ray.model.gpu_hashes.
    """
    piece = first + tl.program_id(0)
    at = tl.load(table + 2 * piece)
    num_bytes = tl.load(table + 2 * piece + 1)
    values = (data + at).to(tl.pointer_type(tl.uint64))
    secret = words.to(tl.pointer_type(tl.uint64))
    lane = tl.arange(0, 8)
    stripe = tl.arange(0, 16)
    keys = tl.load(secret + stripe[:, None] + lane[None, :])
    scrambling = tl.load(secret + 16 + lane)
    accumulators = tl.load(secret + 32 + lane)
    here = stripe[:, None] * 8 + lane[None, :]
    neighbour = stripe[:, None] * 8 + (lane ^ 1)[None, :]
    blocks = (num_bytes - 1) // 1024
    for block in tl.range(0, blocks, num_stages=4):
        keyed = tl.load(values + block * 128 + here) ^ keys
        products = keyed.to(tl.uint32).to(tl.uint64) * (keyed >> 32)
        accumulators += tl.sum(products + tl.load(values + block * 128 + neighbour), axis=0)
        accumulators = (accumulators ^ (accumulators >> 47) ^ scrambling) * 2654435761
    # The last block has fewer stripes, and after it comes the stripe that ends the piece, whether it has been taken or not.
    is_there = stripe[:, None] < (num_bytes - 1 - blocks * 1024) // 64
    keyed = tl.load(values + blocks * 128 + here, mask=is_there, other=0) ^ keys
    products = tl.where(is_there, keyed.to(tl.uint32).to(tl.uint64) * (keyed >> 32), 0)
    accumulators += tl.sum(products + tl.load(values + blocks * 128 + neighbour, mask=is_there, other=0), axis=0)
    last = values + num_bytes // 8 - 8
    keyed = tl.load(last + lane) ^ tl.load(secret + 24 + lane)
    accumulators += keyed.to(tl.uint32).to(tl.uint64) * (keyed >> 32) + tl.load(last + (lane ^ 1))
    tl.store(found.to(tl.pointer_type(tl.uint64)) + piece * 8 + lane, accumulators)
