"""transformers' linear layers and stacked experts, with products of FP8."""

from functools import cache
from typing import Any

import torch
from torch import nn

from m2ray.errors import StageError
from m2ray.model.expert_sums import sum_rows
from m2ray.model.experts import has_kernels, is_silu_gated, sorted_choices, spread_rows
from m2ray.model.float8 import REMEDY
from m2ray.model.float8.products import multiply, multiply_gated
from m2ray.model.float8.proof import has_gated
from m2ray.model.float8.rounding import FP8, round_rows

SCALES = "_scale_inv"
"""Behind the name of a weight: the buffer with the scales of its blocks, as checkpoints have it."""


class Float8Linear(nn.Linear):
    """One whose `weight` is FP8 [O, W], with `weight_scale_inv`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., W] to [..., O], in their dtype. Raises StageError: they come in FP8, without scales."""
        if hidden.dtype == FP8:  # of families that give a projection its input in its weight's dtype, as DeepSeek's indexers do
            raise StageError("A layer rounds its own activations to its weights' FP8, which loses their scale.", REMEDY)
        scales: Any = self.weight_scale_inv
        rows, row_scales = round_rows(hidden.reshape(-1, hidden.shape[-1]))
        out: torch.Tensor = multiply(rows, row_scales, self.weight[None], scales[None], None, None, None).to(hidden.dtype)
        bias: torch.Tensor | None = self.bias
        return (out if bias is None else out + bias).view(*hidden.shape[:-1], -1)


class Float8Experts(nn.Module):
    """Before transformers' own class of a family: its activation, its weights stacked [experts, O, W]."""

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, H] through each token's experts [N, K], weighted and summed as by transformers' grouped experts."""
        experts: Any = self
        if hasattr(self, "m2ray_gated"):
            return self._by_kernels(hidden_states, top_k_index, top_k_weights)
        num_tokens, num_chosen = top_k_index.shape
        expert_of, order = torch.sort(top_k_index.reshape(-1))
        weights_up, scales_up = self._of_up()
        numbers = torch.arange(len(weights_up), device=expert_of.device)
        ends = torch.searchsorted(expert_of, numbers, right=True).to(torch.int32)
        rows, scales = round_rows(hidden_states)
        activate = experts._apply_gate if experts.has_gate else experts.act_fn  # noqa: SLF001 - transformers'
        # In one expression: what has no name is gone once it is used, and a plan counts on that.
        rows, scales = round_rows(activate(multiply(rows, scales, weights_up, scales_up, ends, order // num_chosen, None)))
        down: torch.Tensor = multiply(rows, scales, *self._of("down_proj"), ends, None, order)
        weighted = down.view(num_tokens, num_chosen, -1) * top_k_weights[..., None]
        return weighted.sum(1).to(hidden_states.dtype)

    def use_kernels(self, device: torch.device) -> bool:
        """Let compiled experts take rows to where they are multiplied, gate and sum them by the kernels of this GPU; False where it has none."""
        if not has_kernels(device):
            return False
        self.m2ray_gated = is_silu_gated(self) and has_gated(device)
        return True

    def _by_kernels(self, hidden_NH: torch.Tensor, chosen_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """The same in the order of the experts. A token is rounded once, and written to its experts' rows."""
        experts: Any = self
        choice_R, places_NK, ends = sorted_choices(chosen_NK, len(self._of_up()[0]))
        rows, scales = round_rows(hidden_NH)
        rows, scales = spread_rows(rows, places_NK), scales[choice_R // chosen_NK.shape[1]]
        if self.m2ray_gated:
            rows, scales = multiply_gated(rows, scales, *self._of_up(), ends)
        else:
            activate = experts._apply_gate if experts.has_gate else experts.act_fn  # noqa: SLF001 - transformers'
            rows, scales = round_rows(activate(multiply(rows, scales, *self._of_up(), ends, None, None)))
        down = multiply(rows, scales, *self._of("down_proj"), ends, None, None)
        sums_NH: torch.Tensor = sum_rows(down, places_NK, weights_NK)
        return sums_NH.to(hidden_NH.dtype)

    def _of_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        experts: Any = self
        return self._of("gate_up_proj" if experts.has_gate else "up_proj")

    def _of(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, name), getattr(self, name + SCALES)


def use_float8(model: nn.Module) -> None:
    """Let all modules of a model whose weights came with scales multiply in FP8. Hooks, names and what else they have stay."""
    for module in list(model.modules()):
        if any(name.endswith(SCALES) for name in module._buffers):  # noqa: SLF001 - has no public name
            kind: Any = type(module)
            module.__class__ = Float8Linear if kind is nn.Linear else _experts(kind)


@cache
def _experts(kind: Any) -> type[nn.Module]:
    return type(f"Float8{kind.__name__}", (Float8Experts, kind), {})
