"""Packed layers brought and unpacked just before they run."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from m2ray.model.filling import assign
from m2ray.model.openmp import lone_threads
from m2ray.model.residency.landing import Landing
from m2ray.model.residency.packed_layer import PackedLayer
from m2ray.model.residency.places import InCheckpoint, InHostMemory, OnDevice, Place
from m2ray.model.residency.readers import Readers
from m2ray.model.residency.unpacking import Unpacking
from m2ray.model.skeleton import Skeleton


class Bringing:
    """Hooks before the layers. The layer that ran last is in place, and its hook does nothing.

    All are unpacked into one workspace. Those that are not on the device land first in one of two buffers, the next one while one runs; the
    order wraps round. What is not quantised is used where it lies in the run.
    """

    def __init__(self, skeleton: Skeleton, layers: Mapping[int, tuple[PackedLayer, Place]], readers: Readers, device: torch.device) -> None:
        """Args:
        layers: by number, with the place of each, in which it is by now.
        device: where they run.
        """
        landing = {number: place for number, (_, place) in sorted(layers.items()) if isinstance(place, InCheckpoint | InHostMemory)}
        self._order = list(landing)
        self._landing = Landing(landing, {number: layers[number][0].num_bytes for number in landing}, readers, device) if landing else None
        self._resident = {number: place.run for number, (_, place) in layers.items() if isinstance(place, OnDevice)}
        self._entered: int | None = None
        workspace = torch.empty(max(layer.workspace_bytes for layer, _ in layers.values()), dtype=torch.uint8, device=device)
        pool = None if device.type == "cuda" else lone_threads(torch.get_num_threads(), "unpack")
        self._unpacking = {number: Unpacking(layer, workspace, pool) for number, (layer, _) in layers.items()}
        self._moving: dict[int, list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        for number, (layer, _) in layers.items():
            runs = self._runs(number)
            for name, values in (layer.in_workspace(workspace) | layer.in_run(runs[0])).items():
                assign(skeleton.model, name, values)
            model = skeleton.model
            self._moving[number] = [[(_tensor(model, name), view) for name, view in layer.in_run(run).items()] for run in runs]
            skeleton.layers[number].register_forward_pre_hook(partial(self._enter, number))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the buffers are filled on another stream
        if self._landing is not None:
            self._landing.begin(self._order[0])

    def _runs(self, number: int) -> list[torch.Tensor]:
        """Where the layer's run may be when it is unpacked."""
        return [self._resident[number]] if self._landing is None or number in self._resident else self._landing.runs(number)

    def _enter(self, number: int, *_: Any) -> None:
        if number == self._entered:
            return
        self._entered = None
        place = self._land(number)
        for tensor, view in self._moving[number][place]:
            tensor.data = view
        self._unpacking[number](self._runs(number)[place])
        self._entered = number

    def _land(self, number: int) -> int:
        """Which of its runs the layer is in; the next one that lands is begun."""
        if self._landing is None:
            return 0
        lands = number not in self._resident
        if lands:
            self._landing.begin(number)
        following = next((other for other in self._order if other > number), self._order[0])
        self._landing.begin(following, number if lands else None)
        return self._landing.wait(number) if lands else 0


def _tensor(model: torch.nn.Module, name: str) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(module), leaf)
    assert isinstance(found, torch.Tensor)
    return found
