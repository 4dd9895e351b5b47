"""The two branches of transformers' own decoder layer, found by what they are: outputs of its modules that, added to its input, make its output.

No name of a module and no table of families is believed: of all that a layer's own modules returned, the first two count that give the
layer's output to the bit. So this knows nothing of how m2ray finds them (m2ray.model.site_table).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn


@dataclass
class Branches:
    """What a layer's own modules returned in one pass, in the order in which they ran. Make it before the pass, and `close` it after.

    Of a layer in which no two are found (one branch, a gate, a norm around the sum) nothing is known.
    """

    layer: nn.Module
    _ran: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._handles = [module.register_forward_hook(self._note) for module in self.layer.children()]

    def _note(self, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        entering, leaving = (_first_tensor(values) for values in (given, returned))
        if leaving is not None:  # copies: a layer may write into the memory of either
            self._ran.append((module, torch.empty(0) if entering is None else entering.clone(), leaving.clone()))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def found(self, entering_BTH: torch.Tensor, leaving_BTH: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """`attention`, `mlp`, `residual_mid` and `mlp_in` [B, T, H], as far as they are told by the layer's input and output."""
        for (first, attention), (second, mlp) in combinations(self._added(leaving_BTH), 2):
            middle = entering_BTH + attention
            if torch.equal(middle + mlp, leaving_BTH) or torch.equal(attention + mlp + entering_BTH, leaving_BTH):
                sites = {"attention": attention, "mlp": mlp, "residual_mid": middle}
                blocks = [number for number in range(first + 1, second + 1) if any(self._ran[number][0].children())]
                return sites | ({"mlp_in": self._ran[blocks[-1]][1]} if blocks else {})
        return {}

    def _added(self, leaving_BTH: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """What a layer may have added: what its modules returned, and that times a factor that the layer has."""
        return [
            (number, scaled)
            for number, (_, _, returned) in enumerate(self._ran)
            if returned.shape == leaving_BTH.shape
            for scaled in (returned, *(returned * factor for factor in self._factors()))
        ]

    def _factors(self) -> Iterator[float]:
        return (value for value in vars(self.layer).values() if isinstance(value, float) and value not in (0.0, 1.0))


def _first_tensor(values: Any) -> torch.Tensor | None:
    if isinstance(values, tuple | list):
        return next((value for value in values if isinstance(value, torch.Tensor)), None)
    return values if isinstance(values, torch.Tensor) else None
