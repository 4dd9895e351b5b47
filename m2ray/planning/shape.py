"""The dimensions that decide what a decoder layer takes: read off a model's configuration, and the memory of a forward pass by them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from m2ray.tensor_rows import TensorRow

_ONE_KERNEL = ("silu", "swish", "relu", "gelu", "gelu_pytorch_tanh")
"""Activations, by transformers' names, that are one kernel of torch's."""


_PLAIN = frozenset(
    f"{part}.weight"
    for part in (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
)
"""The matrices of a layer that is attention and a gated MLP, and nothing else; all else that it has are vectors."""


def all_plain(rows: Iterable[TensorRow], num_layers: int) -> bool:
    """Whether each of the first layers is attention and a gated MLP, by their matrices' names: as in Llama, Qwen3, Gemma, Granite, OLMo."""
    matrices: dict[int, set[str]] = {layer: set() for layer in range(num_layers)}
    for row in rows:
        if row.role == "layer" and row.layer in matrices and len(row.shape) > 1:
            matrices[row.layer].add(re.sub(r".*?layers\.\d+\.", "", row.name))
    return all(of_layer == _PLAIN for of_layer in matrices.values())


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
        is_plain: all its layers are attention and a gated MLP (`all_plain`).
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
    is_plain: bool = False

    @classmethod
    def of(cls, config: Any, attn_implementation: str) -> Self:
        """The dimensions in a model's configuration, by the names that transformers' configurations use for them; the largest of its layers."""
        layers = getattr(config, "per_layer_config", None) or [config]

        def first(*fields: str) -> int:
            return max(next((_largest(value) for field in fields if (value := getattr(layer, field, None))), 0) for layer in layers)

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
          (compiled: the gate, up, and their product; of a plain layer the gate and up);
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
        allocated. A plain layer's product of gate and up takes the gate's memory, and its attention holds queries, keys and values before and
        after rotation, in the compute dtype, and its sums; tests/unit/test_compiled_memory.py counts what torch.compile's code allocates.
        """
        if self.is_plain and self.attn_implementation != "eager":
            return self._plain_bytes(padded_tokens, longest_tokens, itemsize_bytes)
        expert_row_bytes = (self.hidden_size + 2 * self.expert_size) * itemsize_bytes
        copied = self.hidden_size * itemsize_bytes if self.num_experts else 0
        return self._transient_bytes(padded_tokens, longest_tokens, itemsize_bytes, expert_row_bytes, 3) + padded_tokens * copied

    def _plain_bytes(self, padded_tokens: int, longest_tokens: int, itemsize_bytes: int) -> int:
        """Of a compiled layer, hidden states as of all layers, and what positions are turned by."""
        attention = 5 * self.head_dim * (self.num_heads + self.num_kv_heads) * itemsize_bytes
        pairs = longest_tokens * self._pair_bytes(longest_tokens, itemsize_bytes)
        held, mlp = 4 * self.hidden_size * itemsize_bytes, 2 * self.intermediate_size * itemsize_bytes
        return padded_tokens * (held + max(attention + pairs, mlp)) + longest_tokens * 4 * self.head_dim * itemsize_bytes

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


def _largest(value: Any) -> int:
    """A size, or the largest of a field that has one for each layer, such as Hunyuan-A13B's experts."""
    return max(map(int, value)) if isinstance(value, list | tuple) else int(value)
