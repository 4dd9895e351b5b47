"""Bytes that a stage takes: on each of its GPUs, and on its host. Weights are exact, the rest is bounded from above.

What no formula gives is one of the constants below: allowances, to be held against measurements on a new kind of machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Self

from m2ray.batches import LayerSpan, TensorRow, TensorTable
from m2ray.planning.hardware import Node

_GIB, _MIB = 2**30, 2**20

CONTEXT_BYTES = _GIB + _GIB // 4
"""What the driver keeps back of its own total, the CUDA context with its kernels, and the libraries' workspaces."""

UNUSABLE_SHARE = 0.35
"""Of the transient memory: blocks that torch's caching allocator holds but cannot use again for other sizes. Few are left where the
largest micro-batch came first, as a stage's warm-up sees to. Not measured: it was 0.5 in the plans that were held against GPUs, all of MiniMax-M2's
layers; reckoned again with 0.35 these are 1.02 to 1.07 of what was taken, one that was looked at once 1.11 (docs/planning.md)."""

UNUSABLE_BYTES = 128 * _MIB
"""The same for weights and small tensors: their blocks are multiples of 2 MiB, of 20 MiB between 1 and 10 MiB."""

HIDDEN_BUFFERS = 4
"""Micro-batches' hidden states on a GPU besides the one that is computed: one received, one queued behind the computation, one that is
sent, and the slot out of which the next stage fetches (m2ray.chain.cuda_ipc)."""

CAPTURE_BUFFERS = 3
"""Layers' captured rows on a GPU: one layer's are selected while those of two before it are copied to the host (m2ray.model.capture)."""

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
"""The same without a GPU, where only what a bucket answers lies there on its way into a landing buffer: two readers a core."""

HOST_BUFFERS = 3
"""Micro-batches' hidden states in a stage's host memory: received, computed, on the way out."""

WAITING_RUNS = 2
"""Pinned memory that rows which wait for the store may hold, over their own bytes, where micro-batches have little more than half the tokens of a
full one: each part's rows take as much as those of a full one then (m2ray.model.pinned). An H200's stage with all nine sites, most of
whose micro-batches had 9,400 to 11,600 of 16,384 tokens, took 14.9 GB where 14.2 were planned without this: three of them, reckoned, hold 12.8."""

PROCESS_BYTES = {"gpu": 2 * _GIB, "cpu with cuda": _GIB, "cpu": 600 * _MIB}
"""A stage's process: Python, Ray and torch, with a GPU the CUDA libraries on the host's side; without one less where torch was built without CUDA, the
same as an actor and in the driver's own process (benchmarks/memory_on_cpu.py)."""

STAGING_BYTES = {"device": _GIB, "host": 512 * _MIB}
"""Tensors on their way from the checkpoint: on a GPU 16 extents of 32 MiB, on both sides, and scales that lie apart from their weights, at most
5 times 64 MiB. Where a GPU has no FP8, extents are converted there as pieces are on the CPU."""

PIECE_BYTES = 8 * _MIB
"""Of a tensor that is loaded without a GPU, at most (m2ray.model.weights)."""

PIECES = {"plain": 8, "packed": 64}
"""So many of them at most: 4 threads have one each, and what becomes of it: in another dtype as much again, unpacked up to 15 times as much."""


def window(num_stages: int) -> int:
    """Micro-batches in a chain at most: two a stage keep each computing while one is handed on, and two to spare."""
    return 2 * num_stages + 2


MOST_BATCHES = 16
"""Micro-batches of a wave: for each that may be on its way a stage has a thread."""

_ONE_KERNEL = ("silu", "swish", "relu", "gelu", "gelu_pytorch_tanh")
"""Activations, by transformers' names, that are one kernel of torch's."""


def _activation(config: Any) -> str:
    return next(
        (str(name) for field in ("hidden_act", "hidden_activation", "activation_function") if (name := getattr(config, field, None))), ""
    )


@dataclass(frozen=True)
class ModelShape:
    """What decides the memory of a decoder layer's forward pass; 0 where a model has none of it.

    Attributes:
        hidden_size: H.
        num_heads, num_kv_heads, head_dim: of the attention.
        intermediate_size: width of the widest dense MLP.
        num_experts, experts_per_token, expert_size: of the mixture; `expert_size` is one expert's width.
        shared_size: width of the experts that every token goes through.
        attn_implementation: "eager" builds the matrix of attention scores; "sdpa", "flash_attention_2", "flex_attention" do not.
        window: positions that a layer with a sliding window sees; for such layers sdpa is given a mask of all pairs of positions.
        streams: residual streams.
        activation_steps: tensors that the activation of an MLP makes, one after the other: 1 where torch has a kernel for it.
        index_heads, index_dim: of an indexer that chooses which positions attention sees; `index_every` of them are scored as one.
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
    attn_implementation: str = "sdpa"
    window: int = 0
    streams: int = 1
    index_heads: int = 0
    index_dim: int = 0
    index_every: int = 1
    activation_steps: int = 1

    @classmethod
    def of(cls, config: Any, attn_implementation: str) -> Self:
        """The dimensions in a model's configuration, by the names that transformers' configurations use for them; the largest of its layers."""
        layers = getattr(config, "per_layer_config", None) or [config]

        def first(*fields: str) -> int:
            return max(next((int(value) for field in fields if (value := getattr(layer, field, None))), 0) for layer in layers)

        heads = first("num_attention_heads") or 1  # of recurrent models that have no attention
        num_experts = first("num_local_experts", "num_experts", "n_routed_experts")
        expert_size = first("moe_intermediate_size", "intermediate_size") if num_experts else 0
        return cls(
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=first("num_key_value_heads") or heads,
            head_dim=first("qk_head_dim", "head_dim") or config.hidden_size // heads,
            intermediate_size=first("intermediate_size", "ffn_dim", "n_inner") or 4 * config.hidden_size,
            num_experts=num_experts,
            experts_per_token=first("num_experts_per_tok", "top_k_experts") if num_experts else 0,
            expert_size=expert_size,
            shared_size=expert_size * first("n_shared_experts"),
            attn_implementation=attn_implementation,
            window=first("sliding_window"),
            streams=first("hc_mult") or 1,
            index_heads=first("index_n_heads"),
            index_dim=first("index_head_dim"),
            activation_steps=1 if _activation(config) in _ONE_KERNEL else 2,
            index_every=min((getattr(config, "compress_rates", None) or {"": 1}).values()),
        )

    def transient_bytes(self, padded_tokens: int, longest_tokens: int, itemsize_bytes: int) -> int:
        """A bound on what a layer's forward pass allocates beside its weights.

        Read off transformers' own code (modeling_*.py; integrations/moe.py, grouped_mm_experts_forward) by counting the tensors
        that are alive at once; tests/unit/test_memory.py counts them again while the code of every family runs. A layer holds its
        input, the residual stream, the normed hidden states and one more (two with shared experts), and with them the largest of:

        - attention: queries and keys before and after rotation with two temporaries each, and values, in float32 as some
          families rotate; where scores are built, those in compute dtype, in float32, and the softmax's float32 result, and a mask
          for each kind of layer; where a window is shorter than a sequence under sdpa, the mask of all pairs, its inverse, and what ATen makes of it, twice;
        - an indexer's scores of all pairs of positions, beside the queries, keys and values;
        - several residual streams, mixed in float32;
        - dense MLP: gate and up as one tensor, the activated gate, their product, and one more for activations in several steps
          (compiled: the gate, up, and their product);
        - experts, a row each for every token and expert chosen: either the selected input with the first four of those, or the
          selected input, its output, and that weighted and put in order, in float32 as routing weights are.
        """
        up = (self.hidden_size + 4 * self.expert_size) * itemsize_bytes
        down = self.hidden_size * (2 * itemsize_bytes + 8)
        return self._transient_bytes(padded_tokens, longest_tokens, itemsize_bytes, max(up, down), 3 + self.activation_steps)

    def compiled_transient_bytes(self, padded_tokens: int, longest_tokens: int, itemsize_bytes: int) -> int:
        """The same for a compiled layer, whose steps between matrix products are fused.

        An expert's row is then its selected input and gate and up as one tensor, and the experts are given a copy of the hidden states
        (m2ray.model.compilation). Held against an H200 at MiniMax-M2's dimensions, without that copy: between 1.1 and 1.2 of what was
        allocated.
        """
        expert_row_bytes = (self.hidden_size + 2 * self.expert_size) * itemsize_bytes
        copied = self.hidden_size * itemsize_bytes if self.num_experts else 0
        return self._transient_bytes(padded_tokens, longest_tokens, itemsize_bytes, expert_row_bytes, 3) + padded_tokens * copied

    def _transient_bytes(
        self, padded_tokens: int, longest_tokens: int, itemsize_bytes: int, expert_row_bytes: int, mlp_tensors: int
    ) -> int:
        attention = 16 * self.head_dim * (self.num_heads + self.num_kv_heads)
        scores = longest_tokens * self._pair_bytes(longest_tokens, itemsize_bytes)
        index = longest_tokens * self._index_pair_bytes()
        dense = mlp_tensors * max(self.intermediate_size, self.shared_size) * itemsize_bytes
        experts = self.experts_per_token * (expert_row_bytes + 40) + self.num_experts * 12
        mixing = 12 * self.streams * self.hidden_size if self.streams > 1 else 0
        held = (5 if self.shared_size else 4) * self.streams * self.hidden_size * itemsize_bytes
        return padded_tokens * (held + max(attention + max(scores, index), dense, experts, mixing))

    def _pair_bytes(self, longest_tokens: int, itemsize_bytes: int) -> int:
        """What attention holds for each pair of positions of a sequence."""
        if self.attn_implementation == "eager" and self.index_every > 1:
            # Beside the scores are those of the sinks and, behind them, of positions that are scored as one.
            return self.num_heads * 6 * itemsize_bytes * (self.index_every + 1) // self.index_every
        if self.attn_implementation == "eager":
            return self.num_heads * (itemsize_bytes + 8) + (2 if self.window else 1) * itemsize_bytes
        if self.attn_implementation == "sdpa" and 0 < self.window < longest_tokens:
            return 2 + 2 * itemsize_bytes
        return 0

    def _index_pair_bytes(self) -> int:
        """What an indexer holds for each pair of positions: its keys, which are repeated for each query, and its heads' scores three times."""
        return (4 * self.index_dim + 12 * self.index_heads + 32) // self.index_every if self.index_heads else 0


@dataclass(frozen=True)
class Workload:
    """What goes through a stage at one time.

    Attributes:
        padded_tokens: tokens of the largest micro-batch, padding included.
        longest_tokens: tokens of the longest sequence.
        token_bytes: what one token takes from stage to stage: its hidden states, of some families more.
        itemsize_bytes: of the compute dtype.
        transient_bytes: what a layer's forward pass allocates beside its weights.
        writer_queue_bytes: captured bytes that may wait for the store, a stage.
        encoding_bytes: what it takes to encode a part's rows, beside what they are then.
    """

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


def gpu_overhead(workload: Workload, captured_bytes: int, statistics_bytes: int = 0) -> dict[str, int]:
    """Everything that a running stage needs on a GPU besides its weights; `captured_bytes` are what one token's captured rows take there."""
    overhead = {
        "transient": workload.transient_bytes,
        "unusable": int(workload.transient_bytes * UNUSABLE_SHARE) + UNUSABLE_BYTES,
        "hidden_states": HIDDEN_BUFFERS * workload.hidden_bytes,
        "capture": workload.padded_tokens * captured_bytes + workload.encoding_bytes,
        "context": CONTEXT_BYTES,
    }
    return overhead | ({"statistics": statistics_bytes} if statistics_bytes else {})


def gpu_memory(held: Mapping[str, int], workload: Workload, captured_bytes: int, statistics_bytes: int = 0) -> Memory:
    """A GPU that holds weights, item by item, and what it takes to use them (m2ray.planning.residency)."""
    loading = {"staging": STAGING_BYTES["device"], "unusable": UNUSABLE_BYTES, "context": CONTEXT_BYTES}
    return Memory({**held, **gpu_overhead(workload, captured_bytes, statistics_bytes)}, {**held, **loading})


def gpu_host_memory(
    workload: Workload, column_bytes: Sequence[int], offloaded: Mapping[str, int] | None = None, statistics_bytes: int = 0
) -> Memory:
    """The host's side of a stage whose weights are on GPUs, but for what is `offloaded`, item by item.

    `column_bytes` are those of a row of each column of each part.
    """
    process = {"process": PROCESS_BYTES["gpu"]} | {name: num_bytes for name, num_bytes in (offloaded or {}).items() if num_bytes}
    pinned = replace(workload, writer_queue_bytes=WAITING_RUNS * workload.writer_queue_bytes)
    buffers = _host_buffers(pinned, column_bytes, statistics_bytes)
    buffers["capture"] = _pinned_bytes(buffers["capture"], [workload.padded_tokens * num_bytes for num_bytes in column_bytes])
    return Memory(process | buffers, process | {"staging": STAGING_BYTES["host"]})


def cpu_memory(held: Mapping[str, int], workload: Workload, row_bytes: Sequence[int], statistics_bytes: int = 0) -> Memory:
    """A stage without a GPU: everything is in host memory, of its weights, its process and what it is loaded through what `held` says item by item."""
    running = {name: num_bytes for name, num_bytes in held.items() if name != "staging"}
    return Memory(
        running | {"transient": workload.transient_bytes + workload.encoding_bytes} | _host_buffers(workload, row_bytes, statistics_bytes),
        dict(held),
    )


def process_bytes(node: Node) -> int:
    """Of a stage without a GPU; where torch is not known, as if it had CUDA."""
    return PROCESS_BYTES["cpu" if "torch" in node.versions and "cuda" not in node.versions else "cpu with cuda"]


def staging_bytes(rows: Iterable[TensorRow], compute_dtype: str) -> int:
    """What these tensors are loaded through without a GPU; those that lie in the files as they are computed with go straight to their place."""
    longest = {"plain": 0, "packed": 0}
    for row in rows:
        kind = "packed" if row.method else "plain"
        if not row.is_ready(compute_dtype):
            longest[kind] = max(longest[kind], min(PIECE_BYTES, row.disk_bytes // max(1, len(row.sources))))
    return max(PIECES[kind] * num_bytes for kind, num_bytes in longest.items())


def _pinned_bytes(num_bytes: int, pieces_bytes: Sequence[int]) -> int:
    """What torch takes to pin `num_bytes` in such pieces, one of each in turn: each is rounded up to a power of two."""
    left_bytes, pinned_bytes = num_bytes, 0
    for piece_bytes in cycle(pieces_bytes):
        if left_bytes <= 0:
            break
        left_bytes -= piece_bytes
        pinned_bytes += 1 << (piece_bytes - 1).bit_length()
    return pinned_bytes


def _host_buffers(workload: Workload, row_bytes: Sequence[int], statistics_bytes: int) -> dict[str, int]:
    """Hidden states, statistics, and the captured rows: those of two micro-batches, and those that wait for the store."""
    capture = 2 * workload.padded_tokens * sum(row_bytes) + workload.writer_queue_bytes if row_bytes else 0
    statistics = {"statistics": statistics_bytes} if statistics_bytes else {}
    return {"hidden_states": HOST_BUFFERS * workload.hidden_bytes, "capture": capture} | statistics
