"""How far the host may run ahead of a GPU while rows are copied out, and how often it tells the GPU to. Streams and events are played by the test."""

from contextlib import nullcontext

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

    def __init__(self, **_: bool) -> None:
        pass

    def record(self, _: object) -> None:
        pass

    def synchronize(self) -> None:
        Event.waits += 1


class Stream:
    device = torch.device("cpu")
    waits = 0

    def wait_stream(self, _: object) -> None:
        Stream.waits += 1


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(Capture, "_on_host", lambda _, rows: rows)
    Event.waits = Stream.waits = 0


def keeping(parts: list[PartSpec]) -> Capture:
    found = Capture(micro_batch_of((5, 3), 96), parts, Selection(), Encoder(), None)
    found._copy_stream = Stream()  # type: ignore[assignment]
    return found


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("sites", [("residual",), ("residual", "attention", "mlp", "mlp_in")])
def test_the_host_waits_for_rows_of_three_layers_before_however_many_sites_they_have(sites: tuple[str, ...]) -> None:
    """With four sites three parts were less than a layer: the GPU had nothing to do while the host launched the next one."""
    kept = keeping([PartSpec.of(site, layer, "float32", 8) for site in sites for layer in range(6)])
    for layer in range(6):
        for site in sites:
            kept.keep(site, layer, torch.zeros(2, 5, 8))
        assert Event.waits == max(0, layer + 1 - capture.COPYING_LAYERS)
        assert Stream.waits == layer + 1, "as often as there are layers"


@pytest.mark.usefixtures("played")
def test_what_is_of_no_layer_or_whose_layer_ends_early_is_copied_too() -> None:
    parts = [PartSpec.of("embedding", None, "float32", 8), PartSpec.of("final_norm", None, "float32", 8)]
    parts += [PartSpec.of(site, 0, "float32", 8) for site in ("residual", "mlp")]
    kept = keeping(parts)
    for number, part in enumerate((parts[0], parts[2], parts[1])):
        kept.keep(part.site, part.layer, torch.full((2, 5, 8), number))
    kept.end()
    assert [(each.site, each.layer) for each in kept.finish()] == [("embedding", None), ("final_norm", None), ("residual", 0)]


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize(
    ("handed_bytes", "come"), [(1, [[0], [1], [2], [3], [4]]), (600, [[0, 1], [2, 3], [4]]), (1 << 20, [[0, 1, 2, 3, 4]])]
)
def test_rows_of_a_gpu_come_layer_after_layer_or_several_at_once_where_they_are_small(
    monkeypatch: pytest.MonkeyPatch, handed_bytes: int, come: list[list[int]]
) -> None:
    monkeypatch.setattr(capture, "_HANDED_BYTES", handed_bytes)
    kept = keeping([PartSpec.of(site, layer, "float32", 8) for site in ("residual", "mlp") for layer in range(5)])
    for layer in range(5):
        for site in ("mlp", "residual"):  # 2 x 8 rows of 32 bytes
            kept.keep(site, layer, torch.zeros(2, 5, 8))
    kept.end()
    found = []
    for number, captured in enumerate(kept.arriving(), 1):
        assert Event.waits == 2 + number, "for the last layer of these alone"
        assert [each.site for each in captured] == ["mlp", "residual"] * (len(captured) // 2)
        found.append([each.layer for each in captured[::2]])
    assert found == come


@pytest.mark.usefixtures("played")
def test_of_a_gpu_nothing_comes_at_once_where_nothing_is_kept() -> None:
    kept = keeping([])
    kept.end()
    assert list(kept.arriving()) == [()]
