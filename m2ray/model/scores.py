"""From a decoder's last hidden states, after the final norm, to the model's scores of every token, by transformers' own code.

That is its head, the head's bias, and what a family does behind it: a soft cap (Gemma 2), a factor (Granite, Cohere).
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from m2ray.errors import CheckpointError
from m2ray.model.around_layers import NoValues
from m2ray.model.rehearsal import NOT_RUN, rehearse, told
from m2ray.model.skeleton import Skeleton, build_skeleton

Scores = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From states [N, H], some rows of the head [V, H] and, of a head with a bias, as many of its values [V], all float32, to scores [N, V]."""

_TOLERANCE = 1e-4
"""Of the largest score: products of other shapes are summed otherwise."""


def scores_by(skeleton: Skeleton) -> Scores:
    """The model's own, in float32; of any rows of its head, since each token is scored by itself (`require_scores`)."""
    model, decoder, head = skeleton.model, skeleton.decoder, skeleton.model.get_output_embeddings()

    def apply(states_NH: torch.Tensor, head_VH: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
        head.weight = nn.Parameter(head_VH, requires_grad=False)
        if bias_V is not None:
            head.bias = nn.Parameter(bias_V, requires_grad=False)
        decoder.forward = lambda *_, **__: _Last(last_hidden_state=states_NH[None])
        token_ids_BT = torch.zeros(1, len(states_NH), dtype=torch.long, device="meta")
        with torch.inference_mode(), NoValues():  # type: ignore[no-untyped-call]
            scores_NV: torch.Tensor = model(input_ids=token_ids_BT, use_cache=False).logits[0]
        return scores_NV

    return apply


def require_scores(config: Any) -> None:
    """Raise CheckpointError unless `scores_by` gives, of a tiny copy of the configuration, the scores of the whole model."""
    tiny, states_NH, head, expected_NV = _of_tiny(config)
    bias_V, middle = getattr(head, "bias", None), len(head.weight) // 2
    try:
        scores = scores_by(build_skeleton(tiny, torch.float32))
        found = [
            scores(states_NH, head.weight[rows], None if bias_V is None else bias_V[rows])
            for rows in (slice(0, middle), slice(middle, None))
        ]
    except NOT_RUN as error:
        raise _untold(config, error) from error
    if not _is_close(torch.cat(found, dim=-1), expected_NV):
        raise _refusal(config, "a token's score depends on more than the last state and its own row of the head")


def require_plain_scores(config: Any) -> None:
    """Raise CheckpointError unless a tiny copy's scores are the products of its last states and its head, and nothing more."""
    _, states_NH, head, expected_NV = _of_tiny(config)
    if not _is_close(states_NH @ head.weight.T, expected_NV):
        what = "scores are more than products of the last states and the head (a bias, a factor, a soft cap), for which these files have no room"
        raise _refusal(config, what, "Choose another consumer.")


def _of_tiny(config: Any) -> tuple[Any, torch.Tensor, Any, torch.Tensor]:
    """A tiny copy of a configuration, some last states [N, H] of it, its head, and its scores [N, V]. Raises CheckpointError: it gives none."""
    with TemporaryDirectory(prefix="m2ray-scores-") as folder:
        rehearsal = rehearse(config, 0, Path(folder))
        try:
            states_NH, head, scores_NV = rehearsal.scores()
            assert head.weight.shape[1:] == states_NH.shape[1:], "the last states are not what the head takes"
        except NOT_RUN as error:
            raise _untold(config, error) from error
    return rehearsal.tiny, states_NH, head, scores_NV


def _is_close(found_NV: torch.Tensor, expected_NV: torch.Tensor) -> bool:
    return found_NV.shape == expected_NV.shape and bool((found_NV - expected_NV).abs().max() <= _TOLERANCE * expected_NV.abs().max())


def _untold(config: Any, error: Exception) -> CheckpointError:
    return _refusal(config, f"how it scores tokens cannot be told: {told(error)}")


def _refusal(config: Any, what: str, remedy: str = "m2ray makes nothing of its scores.") -> CheckpointError:
    return CheckpointError(f"config.json: of a {config.model_type}, {what}.", remedy)


class _Last(BaseModelOutputWithPast):  # type: ignore[misc]  # transformers has no types
    """What a decoder returns, and None for whatever else the model around it looks for there (routers' scores, states of images)."""

    def __getattr__(self, _: str) -> None:
        return None
