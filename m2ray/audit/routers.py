"""The router of transformers' own decoder layer, found by what it returns: ids of the chosen experts, their weights, and logits of all.

As with the branches no name of a module is believed: this knows nothing of how m2ray finds routers (m2ray.model.site_table).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_NEAR_ONE = 1e-3
"""How near to 1 rows of probabilities add up, in any dtype."""


@dataclass
class Router:
    """What one layer's router returned in one pass. Make it before the pass, and `close` it after.

    Of a layer without a module that returns such tensors, or with several, nothing is known.
    """

    layer: nn.Module
    _returned: list[Mapping[str, tuple[torch.Tensor, ...]]] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._handles = [module.register_forward_hook(self._note) for module in self.layer.modules() if module is not self.layer]

    def _note(self, _: nn.Module, __: Any, returned: Any) -> None:
        if isinstance(returned, tuple) and (found := _choice(returned)):
            self._returned.append(found)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def found(self, batch: int) -> Mapping[str, tuple[torch.Tensor, ...]]:
        """`router_topk`, ids and weights [B, T, K], and `router_logits` [B, T, E], as far as they are told, of a batch of so many sequences."""
        if len(self._returned) != 1:
            return {}
        return {site: tuple(each.reshape(batch, -1, each.shape[-1]) for each in values) for site, values in self._returned[0].items()}


def _choice(returned: tuple[Any, ...]) -> Mapping[str, tuple[torch.Tensor, ...]]:
    """A router's: one tensor of whole numbers, one of as many weights, and beside them one that is wider."""
    tensors = [each.flatten(0, -2) for each in returned if isinstance(each, torch.Tensor) and each.dim() > 1]
    ids = [each for each in tensors if each.dtype in (torch.int32, torch.int64)]
    weights = [each for each in tensors if each.is_floating_point() and ids and each.shape == ids[0].shape]
    if len(ids) != 1 or len(weights) != 1:
        return {}
    wider = [each for each in tensors if each.is_floating_point() and len(each) == len(ids[0]) and each.shape[1] > ids[0].shape[1]]
    # Some routers return probabilities in the place of logits.
    logits = [each for each in wider if len(wider) == 1 and not _is_distribution(each)]
    found = {"router_topk": (ids[0].clone(), weights[0].clone())}
    return found | ({"router_logits": (logits[0].clone(),)} if logits else {})


def _is_distribution(values_NE: torch.Tensor) -> bool:
    return bool((values_NE >= 0).all() and ((values_NE.float().sum(dim=1) - 1).abs() < _NEAR_ONE).all())
