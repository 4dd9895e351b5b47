"""The Triton kernel that norms and turns heads. Imported only where there is a GPU: torch's CPU builds have no Triton."""

# ruff: noqa: ANN001, ANN201 - Triton compiles a function's text, and knows no names but its own

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_angles"])  # type: ignore[untyped-decorator]
def turn_heads(  # type: ignore[no-untyped-def]
    given,
    weight,
    cos,
    sin,
    turned,
    num_angles,
    epsilon,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    IS_EACH: tl.constexpr,
):
    """Each program norms and turns one token's heads: HEADS of WIDTH values, of which the first HALF turn with the next HALF, and the rest stay.

    `num_angles`: tokens that have angles of their own; those behind have the same again. IS_EACH: each head has a norm of its own; else all have one together.
    """
    token = tl.program_id(0).to(tl.int64)
    place = token % num_angles * (2 * HALF)
    head = tl.arange(0, PADDED)[:, None]
    column = tl.arange(0, HALF)[None, :]
    at = head * WIDTH + column
    begin = token * (HEADS * WIDTH)
    first = tl.load(given + begin + at, mask=head < HEADS, other=0).to(tl.float32)
    second = tl.load(given + begin + HALF + at, mask=head < HEADS, other=0).to(tl.float32)
    if WIDTH > 2 * HALF:
        behind = 2 * HALF + tl.arange(0, WIDTH - 2 * HALF)[None, :]
        rest = tl.load(given + begin + head * WIDTH + behind, mask=head < HEADS, other=0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(first * first + second * second, axis=1)
        if WIDTH > 2 * HALF:
            squares += tl.sum(rest * rest, axis=1)
        if IS_EACH:
            factor = tl.rsqrt(squares / WIDTH + epsilon)[:, None]
            of_head = head * 0
        else:
            factor = tl.rsqrt(tl.sum(squares, axis=0) / (HEADS * WIDTH) + epsilon)
            of_head = head * WIDTH
        first = first * factor * tl.load(weight + of_head + column, mask=head < HEADS, other=0).to(tl.float32)
        second = second * factor * tl.load(weight + of_head + HALF + column, mask=head < HEADS, other=0).to(tl.float32)
        if WIDTH > 2 * HALF:
            rest = rest * factor * tl.load(weight + of_head + behind, mask=head < HEADS, other=0).to(tl.float32)
    cos_first = tl.load(cos + place + column).to(tl.float32)
    cos_second = tl.load(cos + place + HALF + column).to(tl.float32)
    sin_first = tl.load(sin + place + column).to(tl.float32)
    sin_second = tl.load(sin + place + HALF + column).to(tl.float32)
    kind = turned.dtype.element_ty
    tl.store(turned + begin + at, (first * cos_first - second * sin_first).to(kind), mask=head < HEADS)
    tl.store(turned + begin + HALF + at, (second * cos_second + first * sin_second).to(kind), mask=head < HEADS)
    if WIDTH > 2 * HALF:
        tl.store(turned + begin + head * WIDTH + behind, rest.to(kind), mask=head < HEADS)
