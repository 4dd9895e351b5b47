"""Bytes that a stage takes: on each of its GPUs, and on its host. Weights are exact, the rest is bounded from above.

What no formula gives is one of the constants below: allowances, to be held against measurements on a new kind of machine.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from m2ray.batches import LayerSpan, TensorRow, TensorTable

_GIB, _MIB = 2**30, 2**20

CONTEXT_BYTES = _GIB + _GIB // 4
"""What the driver keeps back of its own total, the CUDA context with its kernels, and the libraries' workspaces."""

UNUSABLE_SHARE = 1 / 8
"""Of the transient memory: blocks that torch's caching allocator holds but cannot use again for other sizes."""

UNUSABLE_BYTES = 128 * _MIB
"""The same for weights and small tensors: their blocks are multiples of 2 MiB, of 20 MiB between 1 and 10 MiB."""

DEVICE_BUFFERS = 2
"""Micro-batches' hidden states on a GPU besides the one that is computed: one received, one on its way out. Captured rows
likewise: one layer's are selected while those of the layer before are copied to the host."""

HOST_BUFFERS = 3
"""Micro-batches' hidden states in a stage's host memory: received, computed, on the way out."""

PROCESS_BYTES = {"gpu": 2 * _GIB, "cpu": _GIB}
"""An actor's own memory: Python, Ray and torch, and with a GPU the CUDA libraries on the host's side."""

LOAD_THREADS = 4
"""Tensors that are read and converted at the same time."""

TransientBytes = Callable[[int, int], int]
"""Bytes a layer's forward pass allocates beside its weights, from (padded tokens, the longest sequence's tokens)."""


@dataclass(frozen=True)
class ModelShape:
    """What decides the memory of a decoder layer's forward pass; 0 where a model has none of it.

    Attributes:
        hidden_size: H.
        num_heads, num_kv_heads, head_dim: of the attention.
        intermediate_size: width of the widest dense MLP.
        num_experts, experts_per_token, expert_size: of the mixture; `expert_size` is one expert's width.
        shared_size: width of the experts that every token goes through.
        is_eager_attention: whether the matrix of attention scores is built ("eager"), or not ("sdpa", flash kernels).
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_size: int = 0
    is_eager_attention: bool = False

    def transient_bytes(self, itemsize_bytes: int) -> TransientBytes:
        """The bound as a function of the micro-batch, for a compute dtype of `itemsize_bytes`.

        Read off transformers' own code (modeling_*.py; integrations/moe.py, grouped_mm_experts_forward) by counting the tensors
        that are alive at once; tests/unit/test_memory.py counts them again while the code runs. A layer holds its input, the
        residual stream and the normed hidden states, and on top of that the largest of three phases:

        - attention: queries and keys before and after rotation with two temporaries each, and values, as in families
          that rotate in float32; built scores count in compute dtype, in float32, and as the softmax's float32 result;
        - dense MLP: gate and up as one tensor, the activated gate, their product;
        - experts, a row each for every token and expert chosen: either the selected input with the same four, or the selected
          input, its output, and both weighted and reordered outputs in float32, since routing weights are float32.
        """
        attention = 16 * self.head_dim * (self.num_heads + self.num_kv_heads)
        pair = self.num_heads * (itemsize_bytes + 8) + itemsize_bytes if self.is_eager_attention else 0
        dense = 4 * max(self.intermediate_size, self.shared_size) * itemsize_bytes
        selected = max(
            (self.hidden_size + 4 * self.expert_size) * itemsize_bytes,
            self.hidden_size * (2 * itemsize_bytes + 8),
        )
        experts = self.experts_per_token * (selected + 40) + self.num_experts * 12
        held = (4 if self.shared_size else 3) * self.hidden_size * itemsize_bytes

        def bound(padded_tokens: int, longest_tokens: int) -> int:
            return padded_tokens * (held + max(attention + longest_tokens * pair, dense, experts))

        return bound


@dataclass(frozen=True)
class Workload:
    """What goes through a stage at one time.

    Attributes:
        padded_tokens: tokens of the largest micro-batch, padding included.
        longest_tokens: tokens of the longest sequence.
        hidden_size: H.
        itemsize_bytes: of the compute dtype.
        store_itemsize_bytes: of the store dtype.
        writer_queue_bytes: captured bytes that may wait for the store, a stage.
    """

    padded_tokens: int
    longest_tokens: int
    hidden_size: int
    itemsize_bytes: int
    store_itemsize_bytes: int
    writer_queue_bytes: int

    @property
    def hidden_bytes(self) -> int:
        """One micro-batch's hidden states."""
        return self.padded_tokens * self.hidden_size * self.itemsize_bytes

    @property
    def captured_bytes(self) -> int:
        """One micro-batch's rows of one layer, at most."""
        return self.padded_tokens * self.hidden_size * self.store_itemsize_bytes


@dataclass(frozen=True)
class Memory:
    """What one GPU or one stage's host memory holds, item by item, while it runs and while it loads."""

    running: Mapping[str, int]
    loading: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return max(sum(self.running.values()), sum(self.loading.values()))


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


def gpu_overhead(workload: Workload, transient_bytes: TransientBytes, *, captures: bool) -> dict[str, int]:
    """Everything that a running stage needs on a GPU besides its weights."""
    transient = transient_bytes(workload.padded_tokens, workload.longest_tokens)
    return {
        "transient": transient,
        "unusable": int(transient * UNUSABLE_SHARE) + UNUSABLE_BYTES,
        "hidden_states": DEVICE_BUFFERS * workload.hidden_bytes,
        "capture": DEVICE_BUFFERS * workload.captured_bytes if captures else 0,
        "context": CONTEXT_BYTES,
    }


def gpu_memory(rows: Sequence[TensorRow], workload: Workload, transient_bytes: TransientBytes, *, captures: bool) -> Memory:
    """A GPU that holds the tensors `rows`."""
    weights = {"weights": weight_bytes(rows, workload.itemsize_bytes)}
    loading = {"staging": staging_bytes(rows, workload.itemsize_bytes), "unusable": UNUSABLE_BYTES, "context": CONTEXT_BYTES}
    return Memory(weights | gpu_overhead(workload, transient_bytes, captures=captures), weights | loading)


def gpu_host_memory(rows: Sequence[TensorRow], workload: Workload, captured_layers: int) -> Memory:
    """The host's side of a stage whose weights are on GPUs."""
    process = {"process": PROCESS_BYTES["gpu"]}
    return Memory(process | _host_buffers(workload, captured_layers), process | {"staging": staging_bytes(rows, workload.itemsize_bytes)})


def cpu_memory(rows: Sequence[TensorRow], workload: Workload, transient_bytes: TransientBytes, captured_layers: int) -> Memory:
    """A stage without a GPU: everything is in host memory."""
    held = {"weights": weight_bytes(rows, workload.itemsize_bytes), "process": PROCESS_BYTES["cpu"]}
    transient = {"transient": transient_bytes(workload.padded_tokens, workload.longest_tokens)}
    return Memory(
        held | transient | _host_buffers(workload, captured_layers), held | {"staging": staging_bytes(rows, workload.itemsize_bytes)}
    )


def staging_bytes(rows: Iterable[TensorRow], itemsize_bytes: int) -> int:
    """Bytes of the checkpoint's tensors on their way: as they are on disk, in float32, and in the compute dtype.

    `LOAD_THREADS` of the largest at once, or what there is if that is less.
    """
    on_the_way = [_source_bytes(row, itemsize_bytes) for row in rows if row.sources]
    all_bytes = sum(num_bytes * len(row.sources) for num_bytes, row in zip(on_the_way, (row for row in rows if row.sources), strict=True))
    return min(LOAD_THREADS * max(on_the_way, default=0), all_bytes)


def _source_bytes(row: TensorRow, itemsize_bytes: int) -> int:
    """One of the row's checkpoint tensors, converted if its bytes on disk are not those in memory."""
    disk_bytes = row.disk_bytes // len(row.sources)
    if row.disk_bytes == row.compute_bytes(itemsize_bytes):
        return disk_bytes
    return disk_bytes + row.num_elements // len(row.sources) * (4 + itemsize_bytes)


def _host_buffers(workload: Workload, captured_layers: int) -> dict[str, int]:
    """Hidden states, and the captured rows: those of one micro-batch, and those that wait for the store."""
    capture = captured_layers * workload.captured_bytes + workload.writer_queue_bytes if captured_layers else 0
    return {"hidden_states": HOST_BUFFERS * workload.hidden_bytes, "capture": capture}
