"""Proof that a configuration can be run as m2ray runs it, on a tiny copy of it with random weights.

Two things are proved, by transformers alone: the model is causal, and a prompt's rows do not depend on the prompts beside it. So a field
of the configuration that breaks one of them is found even if m2ray does not know it.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import nn
from transformers import AutoModelForCausalLM

from m2ray.errors import CheckpointError, raise_all
from m2ray.model.attention import resolve_attn_implementation
from m2ray.model.skeleton import QUIET
from m2ray.model.tiny import tiny_copy

TOLERANCE = 1e-4
"""Of a row's norm, in float32. Rounding moves rows by 1e-6; what leaks moves them by 1e-2 and more."""

_LENGTH, _SHORT, _COMMON = 24, 9, 12
"""Tokens of the long prompt, of the short one that is padded beside it, and of the prefix that two long ones have in common."""

_SEEDS = (0, 1)
_MOST_PARAMETERS = 30_000_000

# What transformers' code raises where a tiny copy's sizes do not fit together.
_NOT_TINY = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


def prove(config: Any) -> None:
    """Try a configuration on a tiny copy of it; what was proved once is remembered in the user's cache folder.

    A family of `families.VERIFIED` of which no tiny copy can be made passes without it: tests prove each family layer by layer.

    Args:
        config: transformers' configuration, as `parse_config` gives it.

    Raises:
        CheckpointError: a prompt's rows depend on later tokens, or on the prompts beside it; says which, or both.
    """
    cached = _cached_at(config)
    with suppress(OSError):  # a folder that may not be looked into remembers nothing
        if cached and cached.exists():
            return
    problems: list[CheckpointError] = []
    for seed in _SEEDS:  # rounding may flip the choice of an expert with one seed; what leaks, leaks with all
        try:
            rows = _probe(config, seed)
        except _NOT_TINY:
            return
        problems = _differences(config, rows)
        if not problems:
            break
    raise_all(problems)
    if cached:
        with suppress(OSError):  # where nothing can be written, the next run proves it again
            cached.parent.mkdir(parents=True, exist_ok=True)
            cached.touch()


def _probe(config: Any, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of rows [T, H] that are equal in a model that can be run, by what was changed between them."""
    model = _random_model(tiny_copy(config), seed)
    generator = torch.Generator().manual_seed(seed)
    token_ids_BT = torch.randint(3, model.config.vocab_size - 1, (2, _LENGTH), generator=generator)
    token_ids_BT[1, _SHORT:] = 0
    others_BT = token_ids_BT.clone()
    others_BT[0, _COMMON:] = torch.randint(3, model.config.vocab_size - 1, (_LENGTH - _COMMON,), generator=generator)
    with torch.inference_mode():
        rows_BTH, others_BTH, alone_BTH = (
            model.base_model(
                input_ids=ids_BT, position_ids=torch.arange(ids_BT.shape[1])[None], attention_mask=None, use_cache=False
            ).last_hidden_state
            for ids_BT in (token_ids_BT, others_BT, token_ids_BT[1:, :_SHORT])
        )
    if not rows_BTH.isfinite().all():
        raise ArithmeticError("random weights overflow")
    return {
        "when only the tokens after them change": (rows_BTH[0, :_COMMON], others_BTH[0, :_COMMON]),
        "between the prompt alone and right-padded beside a longer one": (rows_BTH[1, :_SHORT], alone_BTH[0]),
    }


def _random_model(tiny: Any, seed: int) -> Any:
    """The model that transformers makes of a tiny configuration in float32, with weights that make every layer matter."""
    for field in QUIET:
        setattr(tiny, field, False)
    attn_implementation = resolve_attn_implementation(tiny, "auto", torch.float32)
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(tiny).parameters())
    if num_parameters > _MOST_PARAMETERS:
        raise ValueError(f"a tiny {tiny.model_type} still has {num_parameters} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32, attn_implementation=attn_implementation).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model


def _differences(config: Any, rows: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[CheckpointError]:
    problems = []
    for change, (one_TH, other_TH) in rows.items():
        moved = ((one_TH - other_TH).norm(dim=-1) / other_TH.norm(dim=-1)).max().item()
        if moved > TOLERANCE:
            problems.append(
                CheckpointError(
                    f"config.json: rows of a tiny {config.model_type} with its fields differ by {moved:.2g} of their norm {change}.",
                    "m2ray runs causal decoders, whose rows depend on nothing but the tokens before them.",
                )
            )
    return problems


def _digest(config: Any) -> str:
    """The digest of all that the proof depends on, this file included."""
    digest = xxhash.xxh3_128(Path(__file__).read_bytes())
    digest.update(Path(tiny_copy.__code__.co_filename).read_bytes())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _cached_at(config: Any) -> Path | None:
    """The file whose being there says that a configuration was proved; None for a user without a home."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except RuntimeError:
        return None
    return folder / "m2ray" / "proofs" / _digest(config)
