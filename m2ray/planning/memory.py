"""Bytes that a stage takes: on each of its GPUs, and on its host. Weights are exact, the rest is bounded from above.

What no formula gives is one of the constants below: allowances, to be held against measurements on a new kind of machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from m2ray.batches import LayerSpan
from m2ray.planning.hardware import Node
from m2ray.tensor_rows import TensorRow, TensorTable

_GIB, _MIB = 2**30, 2**20

CONTEXT_BYTES = 768 * _MIB
"""The CUDA context with its kernels, and the libraries' workspaces: stages on an H100 and an H200 had 0.25 to 0.34 GB beside torch's allocator, once 0.83."""

UNUSABLE_SHARE = 0.35
"""Of the transient memory: blocks that torch's caching allocator holds but cannot use again for other sizes. Few are left where the
largest micro-batch came first, as a stage's warm-up sees to. Not measured: it was 0.5 in the plans that were held against GPUs, all of MiniMax-M2's
layers; reckoned again with 0.35 these are 1.02 to 1.07 of what was taken, one that was looked at once 1.11 (docs/planning.md)."""

UNUSABLE_BYTES = 128 * _MIB
"""The same for weights and small tensors: their blocks are multiples of 2 MiB, of 20 MiB between 1 and 10 MiB."""

HIDDEN_BUFFERS = 4
"""Micro-batches' hidden states on a GPU besides the one that is computed: one received, one queued behind the computation, one that is
sent, and the slot out of which the next stage fetches (m2ray.chain.cuda_ipc). A GPU with the whole model receives and sends none."""

CAPTURE_BUFFERS = 3
"""Layers' captured rows on a GPU: one layer's are selected while those of two before it are copied to the host (m2ray.model.capture)."""

CRC_BYTES = 4
"""Of a row's values in one column, beside them, on a GPU and in host memory (m2ray.model.row_crcs)."""

STATISTICS_SHARDS = 3
"""Shards whose statistics a stage sums up at one time: one that ends, one that begins, and one that is being written."""

STATISTICS_MICRO_BATCHES = 4
"""Micro-batches whose statistics are in host memory: two that wait, one that is merged, and as much again while a shard's are written."""

ENCODING_BYTES = 6 * 64 * _MIB
"""What it takes to encode rows in 8 bits, some at a time, in float32 (m2ray.model.eight_bits)."""

LANDING_BUFFERS = 2
"""Packed layers on a device that are brought there: one that is unpacked, one that is on its way."""

READERS_BYTES = 128 * _MIB
"""Host memory, pinned beside a GPU, through which a device's layers are read from files: at most 16 readers, each with a piece of 8 MiB."""

READERS_A_CORE_BYTES = 16 * _MIB
"""The same without a GPU, two readers a core: what is hashed and not kept while a stage loads, and what a bucket answers on its way to its place."""

HOST_BUFFERS = 3
"""Micro-batches' hidden states in a stage's host memory: received, computed, on the way out."""

WAITING_RUNS = 2
"""Pinned memory that rows which wait for the store may hold, over their own bytes, where micro-batches have little more than half the tokens of a
full one: each part's rows take as much as those of a full one then (m2ray.model.pinned). An H200's stage with all nine sites, most of
whose micro-batches had 9,400 to 11,600 of 16,384 tokens, took 14.9 GB where 14.2 were planned without this: three of them, reckoned, hold 12.8."""

ALIGNMENT_BYTES, GROWN_BYTES = 64, 32 * _MIB
"""Of such memory: what each run is rounded up to; and what is had at once of runs of a size that nobody has reserved, of which the last ones may stay unused."""

PROCESS_BYTES = {"gpu": 2 * _GIB + 256 * _MIB, "cpu with cuda": _GIB, "cpu": 576 * _MIB}
"""A stage's process: Python, Ray and torch, with a GPU the CUDA libraries on the host's side and the process beside it that writes rows, which took 190 MB
(m2ray.activations.writing.process); without one less where torch was built without CUDA, the
same as an actor and in the driver's own process (benchmarks/memory_on_cpu.py)."""

HEAP_SHARE, HEAP_BYTES = 1.2, 134 * _MIB
"""Of the transient memory without a GPU, and at most: what C's allocator keeps of blocks below 32 MiB. A stage whose micro-batches had 256 to 4,096 tokens
took 5, 0, 71, 112 and 132 MB more than it is reckoned with otherwise, of transient memory of 16 to 252 MB (benchmarks/memory_on_cpu.py's checkpoint)."""

TOKEN_BYTES = 1000
"""A tokenizer's entry in the driver's process, of which a stage without a GPU may be part: those of 49,152 to 200,000 entries took 920 to 1,040 bytes an
entry, looked at once."""

STAGING_BYTES = {"device": _GIB, "host": 512 * _MIB}
"""Tensors on their way from the checkpoint: on a GPU 16 extents of 32 MiB, on both sides, and scales that lie apart from their weights, at most
5 times 64 MiB. Where a GPU has no FP8, extents are converted there as pieces are on the CPU."""

PIECE_BYTES = 8 * _MIB
"""Of a tensor that is loaded without a GPU, at most (m2ray.model.pieces)."""

LOADING_THREADS = 4
"""They have a piece each."""

PIECES = {"plain": 8, "packed": 64}
"""So many of them at most: one a thread, and what becomes of it: in another dtype as much again, unpacked up to 15 times as much."""


def window(num_stages: int) -> int:
    """Micro-batches in a chain at most: two a stage keep each computing while one is handed on, and two to spare."""
    return 2 * num_stages + 2


MOST_BATCHES = 16
"""Micro-batches of a wave: for each that may be on its way a stage has a thread."""


@dataclass(frozen=True)
class Workload:
    """What goes through a stage at one time.

    Attributes:
        batch_tokens: of a full micro-batch, padding included.
        padded_tokens: the same of the largest one: a longer sequence is one by itself.
        longest_tokens: tokens of the longest sequence.
        token_bytes: what one token takes from stage to stage: its hidden states, of some families more.
        itemsize_bytes: of the compute dtype.
        transient_bytes: what a layer's forward pass allocates beside its weights.
        writer_queue_bytes: captured bytes that may wait for the store, a stage.
        encoding_bytes: what it takes to encode a part's rows, beside what they are then.
    """

    batch_tokens: int
    padded_tokens: int
    longest_tokens: int
    token_bytes: int
    itemsize_bytes: int
    transient_bytes: int
    writer_queue_bytes: int
    encoding_bytes: int = 0

    @property
    def hidden_bytes(self) -> int:
        """What one micro-batch hands from stage to stage."""
        return self.padded_tokens * self.token_bytes


@dataclass(frozen=True)
class Memory:
    """What one GPU or one stage's host memory holds, item by item, while it runs and while it loads."""

    running: Mapping[str, int]
    loading: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return max(sum(self.running.values()), sum(self.loading.values()))

    @property
    def weights_bytes(self) -> int:
        """Weights, ready and packed, and what it takes to use those that are not ready."""
        return sum(self.running.get(name, 0) for name in ("weights", "packed_weights", "workspace", "landing_buffers"))


def span_rows(table: TensorTable, span: LayerSpan, *, with_final_norm: bool) -> tuple[TensorRow, ...]:
    """The tensors that a span computes with: its layers', the embedding's with the first, the final norm's with the last."""
    return tuple(
        row
        for row in table.rows
        if (row.role == "layer" and row.layer in span)
        or (row.role == "embedding" and span.start == 0)
        or (row.role == "final_norm" and with_final_norm and span.stop == table.num_layers)
    )


def weight_bytes(rows: Iterable[TensorRow], itemsize_bytes: int) -> int:
    """Bytes of the parameters once loaded: exact."""
    return sum(row.compute_bytes(itemsize_bytes) for row in rows)


def gpu_overhead(workload: Workload, captured_bytes: int, statistics_bytes: int = 0, *, is_alone: bool = False) -> dict[str, int]:
    """Everything that a running stage needs on a GPU besides its weights.

    Args:
        workload: what goes through it.
        captured_bytes: what one token's captured rows take there.
        statistics_bytes: what statistics do.
        is_alone: it has the whole model, so that hidden states neither come nor go.
    """
    overhead = {
        "transient": workload.transient_bytes,
        "unusable": int(workload.transient_bytes * UNUSABLE_SHARE) + UNUSABLE_BYTES,
        "hidden_states": HIDDEN_BUFFERS * workload.hidden_bytes,
        "capture": workload.padded_tokens * captured_bytes + workload.encoding_bytes,
        "context": CONTEXT_BYTES,
    }
    if is_alone:
        del overhead["hidden_states"]
    return overhead | ({"statistics": statistics_bytes} if statistics_bytes else {})


def gpu_memory(
    held: Mapping[str, int], workload: Workload, captured_bytes: int, statistics_bytes: int = 0, *, is_alone: bool = False
) -> Memory:
    """A GPU that holds weights, item by item, and what it takes to use them (m2ray.planning.residency)."""
    loading = {"staging": STAGING_BYTES["device"], "unusable": UNUSABLE_BYTES, "context": CONTEXT_BYTES}
    return Memory({**held, **gpu_overhead(workload, captured_bytes, statistics_bytes, is_alone=is_alone)}, {**held, **loading})


def gpu_host_memory(
    workload: Workload, column_bytes: Sequence[int], offloaded: Mapping[str, int] | None = None, statistics_bytes: int = 0
) -> Memory:
    """The host's side of a stage whose weights are on GPUs, but for what is `offloaded`, item by item.

    `column_bytes` are those of a row of each column of each part, and of its CRC.
    """
    process = {"process": PROCESS_BYTES["gpu"]} | {name: num_bytes for name, num_bytes in (offloaded or {}).items() if num_bytes}
    buffers = _host_buffers(workload, column_bytes, statistics_bytes)
    buffers["capture"] = _pinned_bytes(workload, column_bytes) if column_bytes else 0
    return Memory(process | buffers, process | {"staging": STAGING_BYTES["host"]})


def cpu_memory(held: Mapping[str, int], workload: Workload, row_bytes: Sequence[int], statistics_bytes: int = 0) -> Memory:
    """A stage without a GPU: everything is in host memory, of its weights, its process and what it is loaded through what `held` says item by item."""
    running = {name: num_bytes for name, num_bytes in held.items() if name != "staging"}
    return Memory(
        running | _transient_on_cpu(workload) | _host_buffers(workload, row_bytes, statistics_bytes),
        dict(held),
    )


def _transient_on_cpu(workload: Workload) -> dict[str, int]:
    heap_bytes = min(int(workload.transient_bytes * HEAP_SHARE), HEAP_BYTES)
    return {"transient": workload.transient_bytes + workload.encoding_bytes, "heap": heap_bytes}


def process_bytes(node: Node, num_tokens: int) -> int:
    """Of a stage without a GPU, with a tokenizer of so many entries; where torch is not known, as if it had CUDA."""
    return PROCESS_BYTES["cpu" if "torch" in node.versions and "cuda" not in node.versions else "cpu with cuda"] + TOKEN_BYTES * num_tokens


def readers_on_cpu_bytes(node: Node, packed_bytes: int) -> int:
    """What a stage without a GPU reads `packed_bytes` of layers through that lie as on disk."""
    return min(READERS_BYTES, READERS_A_CORE_BYTES * (node.cpus or 8), packed_bytes)


def staging_bytes(rows: Iterable[TensorRow], compute_dtype: str) -> int:
    """What these tensors are loaded through without a GPU; those that lie in the files as they are computed with go straight to their place."""
    longest, together = {"plain": 0, "packed": 0}, {"plain": 0, "packed": 0}
    for row in rows:
        kind = "packed" if row.method else "plain"
        if not row.is_ready(compute_dtype):
            longest[kind] = max(longest[kind], min(PIECE_BYTES, row.disk_bytes // max(1, len(row.sources))))
            together[kind] += row.disk_bytes
    return max(min(PIECES[kind] * longest[kind], PIECES[kind] // LOADING_THREADS * together[kind]) for kind in longest)


def _pinned_bytes(workload: Workload, column_bytes: Sequence[int]) -> int:
    """Pinned memory for captured rows, as m2ray.model.pinned has it: runs of a full micro-batch's rows, each of a column, taken in turn.

    Sequences that are longer have runs of two, four, eight times that beside them, and none of these is given back.
    """
    run_tokens, pinned_bytes = workload.batch_tokens, 0
    while True:
        left_bytes = 2 * run_tokens * sum(column_bytes) + WAITING_RUNS * workload.writer_queue_bytes
        sizes = [_aligned(run_tokens * num_bytes) for num_bytes in column_bytes]
        for run_bytes in cycle(sizes):
            if left_bytes <= 0:
                break
            left_bytes -= run_bytes
            pinned_bytes += run_bytes
        pinned_bytes += GROWN_BYTES * len(set(sizes))
        if run_tokens >= workload.longest_tokens:
            return pinned_bytes
        run_tokens *= 2


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _host_buffers(workload: Workload, row_bytes: Sequence[int], statistics_bytes: int) -> dict[str, int]:
    """Hidden states, statistics, and the captured rows: those of two micro-batches, and those that wait for the store."""
    capture = 2 * workload.padded_tokens * sum(row_bytes) + workload.writer_queue_bytes if row_bytes else 0
    statistics = {"statistics": statistics_bytes} if statistics_bytes else {}
    return {"hidden_states": HOST_BUFFERS * workload.hidden_bytes, "capture": capture} | statistics
