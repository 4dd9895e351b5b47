"""The same products by a kernel for Hopper GPUs, in Gluon: one warp brings blocks, two groups of warps share a tile, and one adds while the other's
products are made.

Imported only where there is such a GPU. Gluon is Triton's own, and named an experiment there: where this cannot be made, `triton_kernel.py` does the work.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202 - Triton compiles a function's text, and knows no names but its own and constants

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

BLOCK = gl.constexpr(128)
HALF = gl.constexpr(64)
STEP_BYTES = gl.constexpr(3 * 128 * 128)
REGISTERS = gl.constexpr(240)
FEW_REGISTERS = gl.constexpr(24)
LARGEST, LEAST = gl.constexpr(448.0), gl.constexpr(1e-10)
"""As `rounding.round_rows` has them."""


@gluon.jit
def multiply_pairs(
    rows,
    row_scales,
    weight,
    weight_scales,
    tiles,
    ends,
    put,
    out,
    out_scales,
    WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    HAS_PUT: gl.constexpr,
):
    """As `triton_kernel.multiply_tiles`, of tiles of 128 rows and two blocks of a weight: neighbours, or gate and up.

    Gated: what is kept is silu(gate) * up, both rounded to bfloat16 before, as FP8 [rows, COLUMNS / 2] and the scales of its blocks.
    `rows`, `weight`: descriptors of blocks of 128 x 128 bytes, weights below each other. `tiles`: of `expert_products.tiles`.
    """
    of_rows = gl.allocate_shared_memory(rows.dtype, [STAGES, BLOCK, BLOCK], rows.layout)
    of_weight = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, BLOCK, BLOCK], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turned: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK], gl.bfloat16)
    gates = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, BLOCK], turned) if GATED else full
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _half,
                (
                    row_scales,
                    weight_scales,
                    tiles,
                    ends,
                    put,
                    out,
                    out_scales,
                    of_rows,
                    of_weight,
                    gates,
                    full,
                    free,
                    0,
                    WIDTH,
                    COLUMNS,
                    STAGES,
                    GATED,
                    HAS_PUT,
                ),
            ),
            (
                _half,
                (
                    row_scales,
                    weight_scales,
                    tiles,
                    ends,
                    put,
                    out,
                    out_scales,
                    of_rows,
                    of_weight,
                    gates,
                    full,
                    free,
                    1,
                    WIDTH,
                    COLUMNS,
                    STAGES,
                    GATED,
                    HAS_PUT,
                ),
            ),
            (_bring, (rows, weight, tiles, of_rows, of_weight, full, free, WIDTH, COLUMNS, STAGES, GATED)),
        ],
        [4, 1],
        [REGISTERS, FEW_REGISTERS],
    )


@gluon.jit
def _bring(
    rows,
    weight,
    tiles,
    of_rows,
    of_weight,
    full,
    free,
    WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
):
    """Bring blocks of rows and of the weight, STAGES pairs ahead, beyond a tile's end those of the next."""
    ACROSS: gl.constexpr = COLUMNS // (2 * BLOCK)
    STEP: gl.constexpr = BLOCK if GATED else 2 * BLOCK
    APART: gl.constexpr = COLUMNS // 2 if GATED else BLOCK
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.load(tiles) * ACROSS, gl.num_programs(0)):
        entry = tiles + (tile // ACROSS + 1) * 4
        first = gl.load(entry + 3) + (tile // ACROSS - gl.load(entry + 1)) * BLOCK
        weight_row = gl.load(entry) * COLUMNS + tile % ACROSS * STEP
        for block in range(WIDTH // BLOCK):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), STEP_BYTES)
            tma.async_copy_global_to_shared(rows, [first, block * BLOCK], full.index(stage), of_rows.index(stage))
            tma.async_copy_global_to_shared(weight, [weight_row, block * BLOCK], full.index(stage), of_weight.index(2 * stage))
            tma.async_copy_global_to_shared(weight, [weight_row + APART, block * BLOCK], full.index(stage), of_weight.index(2 * stage + 1))
            step += 1


@gluon.jit
def _half(
    row_scales,
    weight_scales,
    tiles,
    ends,
    put,
    out,
    out_scales,
    of_rows,
    of_weight,
    gates,
    full,
    free,
    NUMBER: gl.constexpr,
    WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    HAS_PUT: gl.constexpr,
):
    """64 rows of each tile. Where a group has none of them nothing is multiplied."""
    BLOCKS: gl.constexpr = WIDTH // BLOCK
    ACROSS: gl.constexpr = COLUMNS // (2 * BLOCK)
    APART: gl.constexpr = ACROSS if GATED else 1
    OUT: gl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    sums: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    lines: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]) if GATED else gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.load(tiles) * ACROSS, gl.num_programs(0)):
        entry = tiles + (tile // ACROSS + 1) * 4
        across = tile % ACROSS * (1 if GATED else 2)
        group = gl.load(entry)
        first = gl.load(entry + 3) + (tile // ACROSS - gl.load(entry + 1)) * BLOCK + NUMBER * HALF
        stop = gl.load(ends + group)
        if first < stop:
            place = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, sums))
            row_scale_at = row_scales + gl.where(place < stop, place, first) * BLOCKS
            weight_scale_at = weight_scales + (group.to(gl.int64) * (COLUMNS // BLOCK) + across) * BLOCKS
            total = gl.zeros((HALF, BLOCK), dtype=gl.float32, layout=sums)
            second = gl.zeros((HALF, BLOCK), dtype=gl.float32, layout=sums)
            for block in range(BLOCKS):
                stage = step % STAGES
                row_scale = gl.load(row_scale_at + block)
                scale = row_scale * gl.load(weight_scale_at + block)
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                half = of_rows.index(stage).slice(NUMBER * HALF, HALF, dim=0)
                none = gl.zeros((HALF, BLOCK), dtype=gl.float32, layout=sums)
                products = warpgroup_mma(half, of_weight.index(2 * stage).permute((1, 0)), none, use_acc=False, is_async=True)
                products = warpgroup_mma_wait(0, deps=(products,))
                total += products * gl.expand_dims(scale, 1)
                products = warpgroup_mma(half, of_weight.index(2 * stage + 1).permute((1, 0)), none, use_acc=False, is_async=True)
                scale = row_scale * gl.load(weight_scale_at + APART * BLOCKS + block)
                products = warpgroup_mma_wait(0, deps=(products,))
                mbarrier.arrive(free.index(stage), count=1)
                second += products * gl.expand_dims(scale, 1)
                step += 1
            row = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, lines))
            column = across * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, lines))
            is_row = gl.expand_dims(row < stop, 1)
            if GATED:
                # By way of memory: values in the layout of `sums` would need more registers than there are.
                gates.index(NUMBER).store(total.to(gl.bfloat16))
                gate = gates.index(NUMBER).load(lines)
                gates.index(NUMBER).store(second.to(gl.bfloat16))
                up = gates.index(NUMBER).load(lines).to(gl.float32)
                gate = gate.to(gl.float32)
                value = gate / (1 + gl.exp(-gate)) * up
                scale = gl.maximum(gl.max(gl.abs(value), axis=1), LEAST) / LARGEST
                gl.store(out_scales + row * (OUT // BLOCK) + across, scale, mask=row < stop)
                at = out + gl.expand_dims(row.to(gl.int64) * OUT, 1) + gl.expand_dims(column, 0)
                gl.store(at, (value / gl.expand_dims(scale, 1)).to(gl.float8e4nv), mask=is_row)
            else:
                into = gl.load(put + row, mask=row < stop, other=0) if HAS_PUT else row.to(gl.int64)
                at = out + gl.expand_dims(into * OUT, 1) + gl.expand_dims(column, 0)
                gl.store(at, gl.convert_layout(total.to(gl.bfloat16), lines), mask=is_row)
                gl.store(at + BLOCK, gl.convert_layout(second.to(gl.bfloat16), lines), mask=is_row)
        else:
            for _ in range(BLOCKS):
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(free.index(step % STAGES), count=1)
                step += 1
