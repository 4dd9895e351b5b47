"""A stage's actor, without Ray around it."""

import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from m2ray.batches import LayerSpan
from m2ray.chain import actor
from m2ray.chain.loading import WriterSpec
from m2ray.chain.status import StageStatus
from m2ray.errors import StoreError
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.stage import StageSpec
from m2ray.storage import open_store
from tests.reference import make_family


def test_what_a_failed_load_held_is_given_back_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver asks the same process again; on a GPU there is no room for two spans."""
    model = make_family(tmp_path / "llama", "llama")
    spec = StageSpec(str(model), LayerSpan(0, 5), (4,), ("residual",), "float32", "float32", "auto", "cpu", 1)
    held: list[weakref.ref[DecoderSpan]] = []
    was_read, was_made = Checkpoint.read_extent, DecoderSpan.__init__

    def made(self: DecoderSpan, *arguments: Any) -> None:
        held.append(weakref.ref(self))
        assert all(earlier() is None for earlier in held[:-1]), "two spans at once"
        was_made(self, *arguments)

    def refused(self: Checkpoint, file: str, offset: int, out: memoryview) -> None:
        if len(held) == 1 and offset == self.headers["model.layers.0.self_attn.o_proj.weight"].offset:
            raise StoreError("gone")
        was_read(self, file, offset, out)

    monkeypatch.setattr(DecoderSpan, "__init__", made)
    monkeypatch.setattr(Checkpoint, "read_extent", refused)
    monkeypatch.setattr(actor, "status_here", lambda _: StageStatus("layers 0-4", "here", "cpu", "node", os.getpid()))
    stage = actor.StageActor([spec], WriterSpec(str(tmp_path / "run"), {}, 1 << 20, 1, 60.0, 128), transport="auto", epoch=0)
    store = open_store(tmp_path / "run")
    with pytest.raises(StoreError, match="gone"):
        stage._build(store)
    stage._build(store)
    assert len(held) == 2
    stage.close()
