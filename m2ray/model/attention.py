"""Which attention a model runs with, and why it cannot: by its family and dtype before a GPU is taken, by its machine at the stage."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import masking_utils

from m2ray.errors import ConfigError, raise_all
from m2ray.model.compilation import allow_variants
from m2ray.model.towers import decoder_class, decoder_config

_SUPPORT = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn", "flex_attention": "_supports_flex_attn"}
"""The attributes by which transformers' classes say what they can."""

_SINKS = ("deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash")
"""Families whose softmax has a learned sink: an attention that knows none drops it without a word. Of others the tensors' names tell."""

FLEX_BLOCK = 128
"""Positions in a block of flex_attention's mask."""

_FLASH_PACKAGE = "flash-attn"
_FLASH_VERSION = (2, 6)
"""The first that caps scores, as some families ask it to."""

_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_DIM = 256
_SAFE = 'Use "auto" or "eager".'


def resolve_attn_implementation(config: Any, wanted: str, compute_dtype: torch.dtype) -> str:
    """What `attn_implementation` means for a model: "auto" is sdpa where the family has it, else eager, as in transformers.

    What only the machine that runs the layers can tell is left to `require_machine`.

    Args:
        config: transformers' configuration.
        wanted: "auto", "eager", "sdpa", "flash_attention_2" or "flex_attention".

    Raises:
        ConfigError: the family or the dtype cannot; all reasons at once.
    """
    if wanted == "auto":
        return "eager" if list(_reasons(config, "sdpa", compute_dtype)) else "sdpa"
    raise_all([_refusal(config, wanted, reason) for reason in _reasons(config, wanted, compute_dtype)])
    return wanted


def require_machine(config: Any, chosen: str, device: torch.device) -> None:
    """Raise ConfigError, all reasons at once, unless this machine's `device` can run the attention that was chosen."""
    raise_all([_refusal(config, chosen, reason) for reason in _reasons_here(config, chosen, device)])
    if chosen == "flex_attention":
        # A graph for each kind of mask and of shape (one sequence or several, up to 128 tokens or more). Past torch's limit of 8
        # it would stop to compile, and build the matrix of scores.
        allow_variants()


@contextmanager
def positions_of_one_sequence() -> Iterator[None]:
    """While it lasts, transformers' masks take for granted that a row's positions are one sequence's, as m2ray's are.

    Otherwise it looks whether any begin anew, and the host waits until the GPU has come there: half a millisecond of nothing a pass.
    """
    was = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = was


def require_attention_to_sinks(config: Any, chosen: str, tensor_names: Iterable[str]) -> None:
    """Raise ConfigError for a model with learned sinks, as its tensors' names tell, and an attention that leaves them out."""
    if chosen == "flash_attention_2" and any("sink" in name for name in tensor_names):
        raise _refusal(config, chosen, "the family's attention has sinks, and it would leave them out")


def avoid_plans_by_shape() -> None:
    """Leave cuDNN out of what torch's sdpa chooses from, in this process.

    It builds a plan for each new number and length of sequences, and nearly every micro-batch of a prompt set is new. FlashAttention has
    one kernel for all of them.
    """
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)


def _refusal(config: Any, wanted: str, reason: str) -> ConfigError:
    return ConfigError(f"attn_implementation = {wanted!r} and model_type {config.model_type}: {reason}.", _SAFE)


def _reasons(config: Any, wanted: str, compute_dtype: torch.dtype) -> Iterator[str]:
    """Why a family in this dtype cannot run it, on any machine."""
    if wanted == "eager":
        return
    if wanted not in _SUPPORT:
        yield f"there is no such attention; there are auto, eager, {', '.join(_SUPPORT)}"
        return
    model_class, config = decoder_class(config), decoder_config(config)
    if not getattr(model_class, _SUPPORT[wanted], False):
        yield f"transformers' {model_class.__name__} does not support it"
    elif wanted == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        yield f"the family caps its scores (attn_logit_softcapping = {config.attn_logit_softcapping:g}), and sdpa would leave that out"
    if wanted == "flash_attention_2":
        yield from _flash_reasons(config, compute_dtype)


def _flash_reasons(config: Any, compute_dtype: torch.dtype) -> Iterator[str]:
    if compute_dtype == torch.float32:
        yield "it computes in bfloat16 and float16 only, and compute_dtype is float32"
    if config.model_type in _SINKS:
        yield "the family's attention has sinks, and it would leave them out"
    head_dim = max(
        getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        for layer in getattr(config, "per_layer_config", None) or [config]
    )
    if head_dim > _FLASH_HEAD_DIM:
        yield f"it takes heads of at most {_FLASH_HEAD_DIM} dimensions, and these have {head_dim}"


def _reasons_here(config: Any, chosen: str, device: torch.device) -> Iterator[str]:
    if chosen == "flash_attention_2":
        if device.type != "cuda":
            yield f"it needs a CUDA GPU, and the stage is on {device}"
        elif torch.cuda.get_device_capability(device) < _FLASH_CAPABILITY:
            major, minor = torch.cuda.get_device_capability(device)
            yield f"it needs compute capability 8.0, and the GPU has {major}.{minor}"
        if (found := _flash_version()) is None:
            yield f"the package {_FLASH_PACKAGE} is not installed"
        elif found < _FLASH_VERSION:
            yield f"the package {_FLASH_PACKAGE} is of version {found[0]}.{found[1]}, and 2.6 is the first that serves"
    if chosen == "flex_attention" and device.type == "cpu" and config.model_type in _SINKS:
        yield "the family's attention has sinks, which flex_attention has on GPUs only"


def _flash_version() -> tuple[int, int] | None:
    """Of the installed package. transformers would fetch a kernel from a hub instead, which m2ray never does."""
    try:
        major, minor = version(_FLASH_PACKAGE).split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)
