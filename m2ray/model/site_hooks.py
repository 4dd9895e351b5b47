"""Hooks on a layer's modules that keep what its sites show until the layer has run.

A hook writes into attributes of the module that it is on, and does nothing else: so it can be part of a compiled layer, whose graphs layers
of one kind share, and what it keeps is one more output of the graph. Whether it keeps anything is an attribute too, which compiled code looks
at: other sites are another graph.
"""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn

from m2ray.model.site_table import Point, Points, Tap

OnSite = Callable[..., None]
"""Takes a site's name, the layer (None at sites of the whole model), and its values [B, T, ...], one tensor a column."""


class SiteHooks:
    """The sites of one decoder layer.

    Attributes:
        points: where the layer shows each.
    """

    def __init__(self, layer: nn.Module, points: Points) -> None:
        self.points = points
        self._layer = layer
        self._watched: dict[str, Point] = {}
        self._asked: Container[str] = ()
        taps = [tap for point in points.values() for tap in point.taps]
        for name, side in sorted({(tap.module, tap.side) for tap in taps}):
            module = layer.get_submodule(name)
            if side == "input":
                module.m2ray_shows_input = False  # type: ignore[assignment]
                module.register_forward_pre_hook(_keep_input, with_kwargs=True)
            else:
                module.m2ray_shows_output = False  # type: ignore[assignment]
                is_reused = any(tap.is_reused for tap in taps if (tap.module, tap.side) == (name, side))
                module.register_forward_hook(_keep_copy if is_reused else _keep_output)

    def watch(self, sites: Container[str], asked: Container[str]) -> None:
        """From the next pass on, keep these sites, as far as the layer has them, and no others.

        Args:
            sites: what layers of the span are asked for: what one keeps, all keep, so that they can share a graph.
            asked: what this layer hands on.
        """
        self._asked = asked
        self._watched = {site: point for site, point in self.points.items() if site in sites}
        shown = {(tap.module, tap.side) for point in self._watched.values() for tap in point.taps}
        for name, side in {(tap.module, tap.side) for point in self.points.values() for tap in point.taps}:
            setattr(self._layer.get_submodule(name), f"m2ray_shows_{side}", (name, side) in shown)

    def hand_on(self, number: int, shape: tuple[int, ...], on_site: OnSite) -> None:
        """Give what was kept to `on_site`, site by site, and let go of it.

        Args:
            number: the layer's.
            shape: of the hidden states that it returned, (B, T, H) or (B, T, S, H).
        """
        for site, point in self._watched.items():
            if site in self._asked:
                on_site(site, number, *values_of(self._layer, point, self._kept, site, shape))
        self.let_go()

    def let_go(self) -> None:
        """Forget what was kept."""
        for point in self._watched.values():
            for tap in point.taps:
                vars(self._layer.get_submodule(tap.module)).pop(f"m2ray_{tap.side}", None)

    def _kept(self, tap: Tap) -> torch.Tensor:
        return _at(getattr(self._layer.get_submodule(tap.module), f"m2ray_{tap.side}"), tap.place)


def values_of(
    layer: nn.Module, point: Point, kept: Callable[[Tap], torch.Tensor], site: str, shape: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """A site's values [B, T, ...], one tensor a column, from what its taps show.

    Args:
        kept: what a tap shows.
        shape: of the layer's hidden states.
    """
    if site == "router_topk":
        ids, weights = map(kept, point.taps)
        if point.chosen:  # logits and weights of all experts
            ids = torch.topk(ids, point.chosen, dim=-1).indices
            weights = weights.gather(-1, ids)
        return ids.reshape(*shape[:2], -1).to(torch.int16), weights.reshape(*shape[:2], -1).float()
    if site == "router_logits":
        return (kept(point.taps[0]).reshape(*shape[:2], -1).float(),)
    terms = [_scaled(layer, kept(tap), tap.factor) for tap in point.taps]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return (_scaled(layer, total, point.factor).reshape(shape),)


def _scaled(layer: nn.Module, values: torch.Tensor, factor: str) -> torch.Tensor:
    return values * getattr(layer, factor) if factor else values


def _at(shown: Any, index: int) -> torch.Tensor:
    tensor: torch.Tensor = shown[index] if isinstance(shown, tuple | list) else shown
    return tensor


def _keep_output(module: nn.Module, _: Any, output: Any) -> None:
    if module.m2ray_shows_output:
        module.m2ray_output = output


def _keep_copy(module: nn.Module, _: Any, output: Any) -> None:
    if module.m2ray_shows_output:
        module.m2ray_output = _at(output, 0).clone()


def _keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if module.m2ray_shows_input:
        module.m2ray_input = args[0] if args else kwargs["hidden_states"]
