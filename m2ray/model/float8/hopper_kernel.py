"""The same products by a kernel for Hopper GPUs, in Gluon: two groups of warps share a tile, and one adds while the other's products are made.

Imported only where there is such a GPU. Gluon is Triton's own, and named an experiment there: where this cannot be made, `triton_kernel.py` does the work.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202 - Triton compiles a function's text, and knows no names but its own and constants

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

BLOCK = gl.constexpr(128)
HALF = gl.constexpr(64)
TILE_BYTES = gl.constexpr(2 * 128 * 128)
REGISTERS = gl.constexpr(240)


@gluon.jit
def multiply_tiles(
    rows,
    row_scales,
    weight,
    weight_scales,
    tiles,
    num_tiles,
    put,
    out,
    WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_PUT: gl.constexpr,
):
    """As `triton_kernel.multiply_tiles`, of tiles of 128 rows. `rows`, `weight`: descriptors of blocks of 128 x 128 bytes, weights below each other."""
    of_rows = gl.allocate_shared_memory(rows.dtype, [STAGES, BLOCK, BLOCK], rows.layout)
    of_weight = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK, BLOCK], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    count = gl.load(num_tiles)
    gl.warp_specialize(
        [
            (
                _half,
                (
                    rows,
                    row_scales,
                    weight,
                    weight_scales,
                    tiles,
                    count,
                    put,
                    out,
                    of_rows,
                    of_weight,
                    full,
                    free,
                    0,
                    WIDTH,
                    COLUMNS,
                    STAGES,
                    HAS_PUT,
                ),
            ),
            (
                _half,
                (
                    rows,
                    row_scales,
                    weight,
                    weight_scales,
                    tiles,
                    count,
                    put,
                    out,
                    of_rows,
                    of_weight,
                    full,
                    free,
                    1,
                    WIDTH,
                    COLUMNS,
                    STAGES,
                    HAS_PUT,
                ),
            ),
        ],
        [4],
        [REGISTERS],
    )


@gluon.jit
def _half(
    rows,
    row_scales,
    weight,
    weight_scales,
    tiles,
    count,
    put,
    out,
    of_rows,
    of_weight,
    full,
    free,
    NUMBER: gl.constexpr,
    WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_PUT: gl.constexpr,
):
    """64 rows of each tile. The first half brings the tiles' blocks too, STAGES - 2 of them ahead, beyond the tile's end those of the next."""
    BLOCKS: gl.constexpr = WIDTH // BLOCK
    ACROSS: gl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    sums: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    programs = gl.num_programs(0)
    end = count * ACROSS
    step = gl.to_tensor(0)
    brought = gl.to_tensor(0)
    to_bring = gl.program_id(0)
    bring_block = gl.to_tensor(0)
    if NUMBER == 0:
        for _ in gl.static_range(STAGES - 2):
            if to_bring < end:
                _bring(rows, weight, tiles, of_rows, of_weight, full, free, to_bring, bring_block, brought, COLUMNS, ACROSS, STAGES)
                brought += 1
            bring_block += 1
            if bring_block == BLOCKS:
                bring_block = 0
                to_bring += programs
    for tile in range(gl.program_id(0), end, programs):
        line = tiles + tile // ACROSS * 3
        across = tile % ACROSS
        group = gl.load(line).to(gl.int64)
        first = gl.load(line + 1) + NUMBER * HALF
        stop = gl.load(line + 2)
        place = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, sums))
        row_scale_at = row_scales + gl.where(place < stop, place, 0).to(gl.int64) * BLOCKS
        weight_scale_at = weight_scales + (group * ACROSS + across) * BLOCKS
        total = gl.zeros((HALF, BLOCK), dtype=gl.float32, layout=sums)
        for block in range(BLOCKS):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            half = of_rows.index(stage).slice(NUMBER * HALF, HALF, dim=0)
            products = warpgroup_mma(
                half,
                of_weight.index(stage).permute((1, 0)),
                gl.zeros((HALF, BLOCK), dtype=gl.float32, layout=sums),
                use_acc=False,
                is_async=True,
            )
            scale = gl.load(row_scale_at + block) * gl.load(weight_scale_at + block)
            if NUMBER == 0:
                if to_bring < end:
                    _bring(rows, weight, tiles, of_rows, of_weight, full, free, to_bring, bring_block, brought, COLUMNS, ACROSS, STAGES)
                    brought += 1
                bring_block += 1
                if bring_block == BLOCKS:
                    bring_block = 0
                    to_bring += programs
            products = warpgroup_mma_wait(0, deps=(products,))
            mbarrier.arrive(free.index(stage), count=1)
            total += products * gl.expand_dims(scale, 1)
            step += 1
        rounded = gl.convert_layout(total.to(gl.bfloat16), lines)
        place = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, lines))
        column = across * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, lines))
        into = gl.load(put + place, mask=place < stop, other=0) if HAS_PUT else place.to(gl.int64)
        at = out + gl.expand_dims(into * COLUMNS, 1) + gl.expand_dims(column, 0)
        gl.store(at, rounded, mask=gl.expand_dims(place < stop, 1) & gl.expand_dims(column < COLUMNS, 0))


@gluon.jit
def _bring(
    rows,
    weight,
    tiles,
    of_rows,
    of_weight,
    full,
    free,
    tile,
    block,
    number,
    COLUMNS: gl.constexpr,
    ACROSS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Begin to bring a block of rows and of the weight, the `number`-th of this program, once both halves are done with what lay there."""
    stage = number % STAGES
    line = tiles + tile // ACROSS * 3
    mbarrier.wait(free.index(stage), ((number // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), TILE_BYTES)
    tma.async_copy_global_to_shared(rows, [gl.load(line + 1), block * BLOCK], full.index(stage), of_rows.index(stage))
    weight_row = gl.load(line) * COLUMNS + tile % ACROSS * BLOCK
    tma.async_copy_global_to_shared(weight, [weight_row, block * BLOCK], full.index(stage), of_weight.index(stage))
