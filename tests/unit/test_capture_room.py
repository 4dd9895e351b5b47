"""How far the host may run ahead of a GPU while rows are copied out. Events of a GPU are played by the test."""

import pytest
import torch

from m2ray.batches import PartSpec
from m2ray.model import capture
from m2ray.model.capture import Capture
from m2ray.model.eight_bits import Encoder
from m2ray.selection import Selection
from tests.reference import micro_batch_of


class Event:
    waits = 0

    def record(self, _: object) -> None:
        pass

    def synchronize(self) -> None:
        Event.waits += 1


@pytest.mark.parametrize("sites", [("residual",), ("residual", "attention", "mlp", "mlp_in")])
def test_the_host_waits_for_rows_of_three_layers_before_however_many_sites_they_have(
    sites: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four sites three parts were less than a layer: the GPU had nothing to do while the host launched the next one."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Capture, "_to_host", lambda _, values, *__: values)
    parts = [PartSpec.of(site, layer, "float32", 8) for site in sites for layer in range(6)]
    keeping = Capture(micro_batch_of((5, 3), 96), parts, Selection(), Encoder(), None)
    keeping._copy_stream = object()  # type: ignore[assignment]
    Event.waits = 0
    for layer in range(6):
        for site in sites:
            keeping.keep(site, layer, torch.zeros(2, 5, 8))
        assert Event.waits == len(sites) * max(0, layer + 1 - capture.COPYING_LAYERS)
