"""The Triton kernel of causal attention. Imported only where there is a GPU: torch's CPU builds have no Triton."""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def causal_attention(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    sums,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program has a block of one sequence's queries of one head. `scale` is that of the scores, times log2(e).

    What is read past a sequence's end is the next one's: real queries give it a share of 0, which counts for nothing as long as there are numbers, and
    what is not a query is not kept. Where the next one's values are none, up to 63 rows of this one are none either.
    """
    sequence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # long ones first
    first, shared = sequence * num_tokens, head // GROUP
    query = queries.load([first + begin, head * WIDTH])
    row = begin + tl.arange(0, ROWS)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(0, begin, COLUMNS):
        score = tl.dot(query, keys.load([first + start, shared * WIDTH]).T)
        higher = tl.maximum(most, tl.max(score, axis=1) * scale)
        share, shrunk = tl.math.exp2(score * scale - higher[:, None]), tl.math.exp2(most - higher)
        total, most = total * shrunk + tl.sum(share, axis=1), higher
        value = values.load([first + start, shared * WIDTH])
        summed = tl.dot(share.to(value.dtype), value, summed * shrunk[:, None])
    for start in tl.range(begin, begin + ROWS, COLUMNS):
        score = tl.dot(query, keys.load([first + start, shared * WIDTH]).T) * scale
        score = tl.where(row[:, None] >= start + tl.arange(0, COLUMNS)[None, :], score, -1e30)
        higher = tl.maximum(most, tl.max(score, axis=1))
        share, shrunk = tl.math.exp2(score - higher[:, None]), tl.math.exp2(most - higher)
        total, most = total * shrunk + tl.sum(share, axis=1), higher
        value = values.load([first + start, shared * WIDTH])
        summed = tl.dot(share.to(value.dtype), value, summed * shrunk[:, None])
    place = (first + row).to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(sums + place, (summed / total[:, None]).to(sums.dtype.element_ty), mask=(row < num_tokens)[:, None])
