"""What every layout is read into: one sequence with its tokens, mask and states."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Problem:
    """A fault: its kind, a key of `faults.KINDS`, and what was seen."""

    kind: str
    what: str


@dataclass(frozen=True)
class Sample:
    """One sequence of a dump: `token_ids` int [T] and `loss_mask` [T], None where it has none, and `planes` [T, W] in the order of layers.

    `problems` is what its reader saw: files that are damaged, absent, or disagree.
    """

    name: str
    token_ids: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    planes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
