"""The kernel of causal attention, in Gluon, of FlashAttention 3's kind: two groups of warps have 64 queries each of a tile, and one makes exponentials while
the other's products are made. A third brings queries, keys and values.

Imported only where there is a GPU of Hopper's kind. Gluon is Triton's own, and named an experiment there: where this cannot be made, torch does the work.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202 - Triton compiles a function's text, and knows no names but its own and constants

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

BLOCK = gl.constexpr(128)
HALF = gl.constexpr(64)
PIECE = gl.constexpr(64)
HELD = gl.constexpr(2)
BYTES = gl.constexpr(2)
NONE = gl.constexpr(-1e30)
BY_LARGEST, LEAST = gl.constexpr(1 / 448), gl.constexpr(1e-10)
REGISTERS = gl.constexpr(240)
FEW_REGISTERS = gl.constexpr(24)


@gluon.jit(do_not_specialize=["num_tokens", "num_heads", "group", "num_pairs", "section"])
def causal_attention(
    queries,
    keys,
    values,
    sums,
    scales,
    num_tokens,
    num_heads,
    group,
    num_pairs,
    section,
    scale,
    PIECES: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """Each program has tiles of 128 of a sequence's queries of one head. `scale` is that of the scores, times log2(e).

    `queries`, `keys`, `values`: descriptors of [B, T, heads, width] by blocks of 128 positions: of queries and keys a piece of 64 at a time, which there are
    PIECES of; of values all WIDTH. Past a sequence's end they bring zeros: nothing of the next one is read. `num_pairs`: of a sequence and a head;
    `section`: so many are dealt with at a time, whose keys and values the GPU's cache holds.
    """
    held = (
        gl.allocate_shared_memory(queries.dtype, [PIECES, 1, BLOCK, 1, PIECE], queries.layout),
        gl.allocate_shared_memory(keys.dtype, [HELD * PIECES, 1, BLOCK, 1, PIECE], keys.layout),
        gl.allocate_shared_memory(values.dtype, [HELD, 1, BLOCK, 1, WIDTH], values.layout),
    )
    full = (_barriers(1, 1), _barriers(HELD, 1), _barriers(HELD, 1))
    free = (_barriers(1, 2), _barriers(HELD, 2), _barriers(HELD, 2))
    fence_async_shared()
    order = ((num_tokens + BLOCK - 1) // BLOCK, num_pairs, section)
    gl.warp_specialize(
        [
            (_half, (sums, scales, num_tokens, num_heads, scale, order, held, full, free, 0, PIECES, WIDTH)),
            (_half, (sums, scales, num_tokens, num_heads, scale, order, held, full, free, 1, PIECES, WIDTH)),
            (_bring, (queries, keys, values, num_heads, group, order, held, full, free, PIECES, WIDTH)),
        ],
        [4, 1],
        [REGISTERS, FEW_REGISTERS],
    )


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(number), count=COUNT)
    return barriers


@gluon.jit
def _place(tile, order):
    """A tile's block of queries, and its pair. A section begins with its sequences' last blocks, which take longest; every second one, counted from the
    last, ends with them, lest the same programs have the longest tiles of each.
    """
    blocks, num_pairs, section = order
    number = tile // (section * blocks)
    first = number * section
    pairs = gl.minimum(section, num_pairs - first)
    within = tile - first * blocks
    is_turned = ((num_pairs - 1) // section - number) & 1
    within += is_turned * (pairs * blocks - 1 - 2 * within)
    return blocks - 1 - within // pairs, first + within % pairs


@gluon.jit
def _next(tile, num_tiles):
    """The tile after the `num_tiles`-th of a program: programs have tiles in turn, each time in the other direction, which evens out what they take."""
    return 2 * gl.num_programs(0) * num_tiles - 1 - tile


@gluon.jit
def _bring(queries, keys, values, num_heads, group, order, held, full, free, PIECES: gl.constexpr, WIDTH: gl.constexpr):
    """Begin to bring each tile's queries, and its blocks of keys and values from the diagonal's to the first, once both halves are done with what lay there."""
    number = gl.to_tensor(0)
    num_tiles = gl.to_tensor(0)
    tile = gl.program_id(0)
    while tile < order[0] * order[1]:
        row, pair = _place(tile, order)
        sequence, head = pair // num_heads, pair % num_heads
        shared = head // group
        _bring_pieces(queries, sequence, row, head, num_tiles, held[0], full[0], free[0], 1, PIECES)
        num_tiles += 1
        _bring_pieces(keys, sequence, row, shared, number, held[1], full[1], free[1], HELD, PIECES)
        for step in range(row):  # a block's values are needed after the next one's keys
            _bring_pieces(keys, sequence, row - step - 1, shared, number + 1, held[1], full[1], free[1], HELD, PIECES)
            _bring_values(values, sequence, row - step, shared, number, held[2], full[2], free[2], WIDTH)
            number += 1
        _bring_values(values, sequence, 0, shared, number, held[2], full[2], free[2], WIDTH)
        number += 1
        tile = _next(tile, num_tiles)


@gluon.jit
def _bring_pieces(source, sequence, block, head, number, into, full, free, STAGES: gl.constexpr, PIECES: gl.constexpr):
    """The `number`-th block of queries or keys."""
    stage = number % STAGES
    mbarrier.wait(free.index(stage), ((number // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK * PIECES * PIECE * BYTES)
    for piece in gl.static_range(PIECES):
        at = [sequence, block * BLOCK, head, piece * PIECE]
        tma.async_copy_global_to_shared(source, at, full.index(stage), into.index(stage * PIECES + piece))


@gluon.jit
def _bring_values(source, sequence, block, head, number, into, full, free, WIDTH: gl.constexpr):
    stage = number % HELD
    mbarrier.wait(free.index(stage), ((number // HELD) & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK * WIDTH * BYTES)
    tma.async_copy_global_to_shared(source, [sequence, block * BLOCK, head, 0], full.index(stage), into.index(stage))


@gluon.jit
def _half(
    sums, scales, num_tokens, num_heads, scale, order, held, full, free, NUMBER: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr
):
    """64 rows of each tile. All tiles' blocks are one stream: a block's scores are begun before the values of the one before it are added, also where that
    one ends a tile, whose sums are written meanwhile.
    """
    scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    outs: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    factors: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=outs, k_width=2)
    of_row: gl.constexpr = gl.SliceLayout(1, scores)
    place = NUMBER * HALF + gl.arange(0, HALF, layout=of_row)
    visible = gl.expand_dims(place, 1) >= gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, scores)), 0)
    tiles = order[0] * order[1]
    tile = gl.program_id(0)
    row, pair = _place(tile, order)
    mbarrier.wait(full[0].index(0), 0)
    mbarrier.wait(full[1].index(0), 0)
    score = warpgroup_mma_wait(0, deps=(_score(held, 0, NUMBER, PIECES, scores),))
    mbarrier.arrive(free[1].index(0), count=1)
    mbarrier.arrive(free[0].index(0), count=1, pred=row == 0)
    none = gl.full((HALF,), NONE, gl.float32, layout=of_row)
    nothing = gl.zeros((HALF,), gl.float32, layout=of_row)
    share, _, most, total = _softmax(gl.where(visible, score, NONE), none, nothing, scale)
    factor = gl.convert_layout(share.to(gl.bfloat16), factors)
    summed = gl.zeros((HALF, WIDTH), dtype=gl.float32, layout=outs)
    done = gl.to_tensor(0)  # blocks of this tile, before this one
    number = gl.to_tensor(0)
    num_tiles = gl.to_tensor(1)
    has_ended, of_block, of_pair, of_total = tile < 0, gl.to_tensor(0), gl.to_tensor(0), nothing
    more = (done < row) | (_next(tile, num_tiles) < tiles)
    _await_scored(full, number + 1, num_tiles, more, done == row)
    while more:
        before, stage = number % HELD, (number + 1) % HELD
        score = _score(held, stage, NUMBER, PIECES, scores)
        if has_ended:
            _store(sums, scales, summed, of_total, of_block, of_pair, num_tokens, num_heads, NUMBER, WIDTH, outs)
            summed = gl.zeros((HALF, WIDTH), dtype=gl.float32, layout=outs)
        summing = _add(held, full, number, factor, summed, WIDTH)
        score = warpgroup_mma_wait(1, deps=(score,))
        has_ended, of_block, of_pair, of_total = done == row, row, pair, total
        if has_ended:
            tile = _next(tile, num_tiles)
            row, pair = _place(tile, order)
            done = gl.to_tensor(0)
            num_tiles += 1
            most, total = none, nothing
            score = gl.where(visible, score, NONE)
        else:
            done += 1
        mbarrier.arrive(free[1].index(stage), count=1)
        mbarrier.arrive(free[0].index(0), count=1, pred=done == row)
        share, shrunk, most, total = _softmax(score, most, total, scale)
        number += 1
        more = (done < row) | (_next(tile, num_tiles) < tiles)
        _await_scored(full, number + 1, num_tiles, more, done == row)
        # behind a barrier's wait: ptxas would put this one before the exponentials
        summed, share = warpgroup_mma_wait(0, deps=(summing, share))
        mbarrier.arrive(free[2].index(before), count=1)
        if not has_ended:
            summed = summed * gl.expand_dims(gl.convert_layout(shrunk, gl.SliceLayout(1, outs)), 1)
        factor = gl.convert_layout(share.to(gl.bfloat16), factors)
    if has_ended:
        _store(sums, scales, summed, of_total, of_block, of_pair, num_tokens, num_heads, NUMBER, WIDTH, outs)
        summed = gl.zeros((HALF, WIDTH), dtype=gl.float32, layout=outs)
    summed = warpgroup_mma_wait(0, deps=(_add(held, full, number, factor, summed, WIDTH),))
    _store(sums, scales, summed, total, row, pair, num_tokens, num_heads, NUMBER, WIDTH, outs)


@gluon.jit
def _await_scored(full, number, num_tiles, is_any, is_new):
    """What the `number`-th block's scores are made of."""
    mbarrier.wait(full[0].index(0), num_tiles & 1, pred=is_any & is_new)
    mbarrier.wait(full[1].index(number % HELD), (number // HELD) & 1, pred=is_any)


@gluon.jit
def _score(held, stage, NUMBER: gl.constexpr, PIECES: gl.constexpr, scores: gl.constexpr):
    """Begin to multiply."""
    score = gl.zeros((HALF, BLOCK), dtype=gl.float32, layout=scores)
    for piece in gl.static_range(PIECES):
        query = held[0].index(piece).reshape([BLOCK, PIECE]).slice(NUMBER * HALF, HALF, dim=0)
        key = held[1].index(stage * PIECES + piece).reshape([BLOCK, PIECE])
        score = warpgroup_mma(query, key.permute((1, 0)), score, use_acc=piece > 0, is_async=True)
    return score


@gluon.jit
def _softmax(score, most, total, scale):
    """Each key's share as yet, by what the shares of those before shrink, and their greatest score and the sum of all shares with these."""
    higher = gl.maximum(most, gl.max(score, axis=1) * scale)
    share = gl.exp2(score * scale - gl.expand_dims(higher, 1))
    shrunk = gl.exp2(most - higher)
    return share, shrunk, higher, total * shrunk + gl.sum(share, axis=1)


@gluon.jit
def _add(held, full, number, factor, summed, WIDTH: gl.constexpr):
    """Begin to add the `number`-th block's values."""
    mbarrier.wait(full[2].index(number % HELD), (number // HELD) & 1)
    return warpgroup_mma(factor, held[2].index(number % HELD).reshape([BLOCK, WIDTH]), summed, is_async=True)


@gluon.jit
def _store(sums, scales, summed, total, block, pair, num_tokens, num_heads, NUMBER: gl.constexpr, WIDTH: gl.constexpr, outs: gl.constexpr):
    """Each thread writes 16 bytes of a row at once, which other threads of its own warp have summed."""
    lines: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]] + ([[0, 64]] if WIDTH == 128 else []),
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[HALF, WIDTH],
    )
    rounded = (summed * gl.expand_dims(1.0 / gl.convert_layout(total, gl.SliceLayout(1, outs)), 1)).to(gl.bfloat16)
    first = block * BLOCK + NUMBER * HALF
    if sums.dtype.element_ty == gl.float8e4nv:
        value = rounded.to(gl.float32)
        scale = gl.maximum(gl.max(gl.abs(value), axis=1), LEAST) * BY_LARGEST
        row = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, outs))
        at = (pair // num_heads * num_tokens + row) * num_heads + pair % num_heads
        gl.store(scales + at, scale, mask=row < num_tokens)
        by_scale, _ = gl.broadcast(gl.expand_dims(gl.div_rn(1.0, scale), 1), value)
        minus_scale, _ = gl.broadcast(gl.expand_dims(-scale, 1), value)
        share = value * by_scale
        rounded = gl.fma(gl.fma(share, minus_scale, value), by_scale, share).to(gl.float8e4nv)  # as a division rounds it
    rounded = gl.convert_layout(rounded, lines)
    line = gl.arange(0, HALF, layout=gl.SliceLayout(1, lines))
    begin = (pair // num_heads * num_tokens + first).to(gl.int64) * (num_heads * WIDTH) + pair % num_heads * WIDTH
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, lines))
    at = sums + begin + gl.expand_dims(line * (num_heads * WIDTH), 1) + gl.expand_dims(column, 0)
    gl.store(at, rounded, mask=gl.expand_dims(first + line < num_tokens, 1))
