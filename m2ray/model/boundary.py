"""What one stage hands to the next: one hidden state a token, and for the families of `CONTRACTS` more than that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

Crossing = Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Tensors [B, T, ...] that cross a boundary beside the hidden states: by name, the axes after T, and the dtype (None: the compute dtype)."""

_ENDLESS = 2**62
"""Tokens of a sequence that nothing bounds."""


class Boundary(NamedTuple):
    """All that a stage needs of the layers before it, but for the token ids, which every stage has.

    Attributes:
        hidden_BTH: in the compute dtype; of a family with several residual streams [B, T, S, H].
        beside: what else the family's layers hand on, [B, T, ...] by name: what `crossing` says, mostly nothing.
    """

    hidden_BTH: torch.Tensor
    beside: Mapping[str, torch.Tensor] = {}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All by name, the hidden states first, as "hidden_BTH"."""
        return {"hidden_BTH": self.hidden_BTH, **self.beside}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "Boundary":
        """The boundary whose `tensors` these are."""
        return cls(tensors["hidden_BTH"], {name: tensor for name, tensor in tensors.items() if name != "hidden_BTH"})

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Boundary":
        """The same with every tensor changed."""
        return Boundary(change(self.hidden_BTH), {name: change(tensor) for name, tensor in self.beside.items()})


def _nothing(_: Any, __: int, ___: int) -> Crossing:
    return {}


@dataclass(frozen=True)
class Contract:
    """What the decoder layers of a family need of those before them beside one hidden state, and where the family's code keeps it.

    Attributes:
        streams: the field of the configuration that says how many residual streams there are.
        input_ids: whether layers have an argument of that name, which is the token ids.
        second: the name and the next layer's argument of the second value that a layer returns.
        shared: the argument of a layer in which all layers keep keys and values [B, heads, T, D] for later ones, by kind of layer.
        prepared: the base model's argument that holds something for each layer [B, T, L, ...], and its method that makes it, once.
        crosses: from the configuration, the first layer behind a boundary and the longest sequence's tokens to what crosses.
        in_float32: the field of the configuration by which layers add to hidden states in float32, whatever the compute dtype.
    """

    streams: str = ""
    input_ids: bool = False
    second: tuple[str, str] = ("", "")
    shared: str = ""
    prepared: tuple[str, str] = ("", "")
    crosses: Callable[[Any, int, int], Crossing] = _nothing
    in_float32: str = ""


def _shared_indices(config: Any, layer: int, num_tokens: int) -> Crossing:
    """The indices that the last indexer chose, if the next layer has no indexer of its own."""
    if config.indexer_types[layer] != "shared":
        return {}
    return {"topk_indices": ((min(config.index_topk, num_tokens),), torch.int32)}


def _shared_keys_and_inputs(config: Any, layer: int, _: int) -> Crossing:
    """Keys and values that later layers take from an earlier one of their kind, and the inputs of the layers to come."""
    modes, kinds = config.kv_sharing_modes, config.layer_types
    crossing: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    wanted = {kind for kind, mode in zip(kinds[layer:], modes[layer:], strict=True) if mode == "reuse"}
    for number in range(layer):
        if modes[number] == "store" and kinds[number] in wanted:
            of_layer = config.per_layer_config[number]
            heads = ((of_layer.num_key_value_heads, of_layer.head_dim), None)
            crossing |= {f"{kinds[number]}.keys": heads, f"{kinds[number]}.values": heads}
    if width := getattr(config, "hidden_size_per_layer_input", 0):
        crossing["per_layer_inputs"] = ((config.num_hidden_layers - layer, width), None)
    return crossing


_INDICES = ("topk_indices", "prev_topk_indices")
_MAMBA = Contract(in_float32="residual_in_fp32")

CONTRACTS = {
    "deepseek_v4": Contract(streams="hc_mult", input_ids=True),
    "falcon_mamba": _MAMBA,
    "gemma4_text": Contract(
        shared="shared_kv_states", prepared=("per_layer_inputs", "project_per_layer_inputs"), crosses=_shared_keys_and_inputs
    ),
    "gemma4_unified_text": Contract(shared="shared_kv_states", crosses=_shared_keys_and_inputs),
    "glm5_next_text": Contract(streams="hc_mult"),
    "glm_moe_dsa": Contract(second=_INDICES, crosses=_shared_indices),
    "hy_v4": Contract(second=_INDICES, streams="hc_mult", crosses=_shared_indices),
    "hy_v4_vl_text": Contract(second=_INDICES, streams="hc_mult", crosses=_shared_indices),
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
}
"""By model type. What is not listed has layers that need nothing of those before them but hidden states [B, T, H]."""

CANNOT_BE_CUT = {
    "dory": "it runs some of its layers several times over",
    "gemma3n_text": "its hidden states are several versions of one another, [4, B, T, H], beside shared keys and values and an input for each layer",
    "gemma4_assistant": "its layers read keys and values of another model",
    "gemma4_unified_assistant": "its layers read keys and values of another model",
    "mistral_large4_text": "its rotary embedding has weights, which every stage would need",
    "zamba": "its shared block reads what the first layer was given",
    "zamba2": "its shared block reads what the first layer was given",
}
"""Why a model cannot be run as stages, or not yet, by its type."""

_SHARED_STATE = ("num_kv_shared_layers", "hidden_size_per_layer_input")
"""Fields of the configuration by which layers hand on more than hidden states, in any family."""


def contract_of(config: Any) -> Contract:
    """That of a configuration's family."""
    return CONTRACTS.get(config.model_type, Contract())


def why_uncuttable(config: Any) -> list[str]:
    """The reasons why a model's layers cannot be dealt out to stages."""
    if reason := CANNOT_BE_CUT.get(config.model_type):
        return [f"model_type = {config.model_type}: {reason}"]
    if config.model_type in CONTRACTS:
        return []
    return [
        f"{field} = {getattr(config, field)}: layers of a {config.model_type} share state across stage boundaries"
        for field in _SHARED_STATE
        if getattr(config, field, None)
    ]


def row_width(config: Any) -> int:
    """Elements of one token's residual: of several streams all, one after the other."""
    return prod(hidden_shape(config))


def hidden_shape(config: Any) -> tuple[int, ...]:
    """The axes of hidden states after [B, T]: (H,), or (S, H) of several residual streams."""
    streams = contract_of(config).streams
    return (getattr(config, streams), config.hidden_size) if streams else (config.hidden_size,)


def residual_dtype(config: Any) -> torch.dtype | None:
    """Of hidden states between layers, where the compute dtype does not decide."""
    field = contract_of(config).in_float32
    return torch.float32 if field and getattr(config, field) else None


def crossing(config: Any, layer: int, num_tokens: int = _ENDLESS) -> Crossing:
    """What crosses the boundary before `layer` beside the hidden states, for sequences of `num_tokens` at most."""
    return contract_of(config).crosses(config, layer, num_tokens) if 0 < layer < config.num_hidden_layers else {}


def token_bytes(config: Any, layer: int, compute_dtype: torch.dtype) -> int:
    """Bytes of one token at the boundary before `layer`, at most."""
    crosses = (((row_width(config),), residual_dtype(config)), *crossing(config, layer).values())
    return sum(prod(shape) * (dtype or compute_dtype).itemsize for shape, dtype in crosses)


def most_beside(config: Any) -> tuple[int, int]:
    """What crosses any boundary beside one token's hidden states, at most: elements of the compute dtype, and bytes of other dtypes."""
    elements, num_bytes = [0], [0]
    for layer in range(1, config.num_hidden_layers):
        beside = crossing(config, layer).values()
        elements.append(sum(prod(shape) for shape, dtype in beside if dtype is None))
        num_bytes.append(sum(prod(shape) * dtype.itemsize for shape, dtype in beside if dtype is not None))
    return max(elements), max(num_bytes)


def shapes_at(
    config: Any, layer: int, shape: tuple[int, int], compute_dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of each tensor of the boundary before `layer`, for a micro-batch of `shape`, (B, T)."""
    axes: dict[str, Any] = {"hidden_BTH": (hidden_shape(config), residual_dtype(config)), **crossing(config, layer, shape[1])}
    return {name: ((*shape, *others), dtype or compute_dtype) for name, (others, dtype) in axes.items()}


def blank(config: Any, layer: int, shape: tuple[int, int], compute_dtype: torch.dtype) -> Boundary:
    """Zeros on the host in place of what crosses the boundary before `layer`, for a micro-batch of `shape`, (B, T)."""
    of_each = shapes_at(config, layer, shape, compute_dtype).items()
    return Boundary.of({name: torch.zeros(axes, dtype=dtype) for name, (axes, dtype) in of_each})
