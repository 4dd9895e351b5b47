"""How often the driver asks its stages: a call to each of them costs as much as a micro-batch does."""

from types import SimpleNamespace
from typing import Any

import pytest

from m2ray.batches import LayerSpan
from m2ray.chain import stages as module
from m2ray.chain.stages import ASK_S, Stages
from m2ray.chain.status import StageStatus
from m2ray.model.stage import StageSpec


class Refs:
    """Stands for Ray: a reference is ready once its name is in `ready`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ready: set[str] = set()
        self.now_s = 100.0

    def actor(self, name: str) -> Any:
        def remote() -> str:
            self.asked.append(f"{name}{len(self.asked)}")
            return self.asked[-1]

        return SimpleNamespace(status=SimpleNamespace(remote=remote))

    def wait(self, refs: list[str], **_: Any) -> tuple[list[str], list[str]]:
        return [ref for ref in refs if ref in self.ready], [ref for ref in refs if ref not in self.ready]


@pytest.fixture
def refs(monkeypatch: pytest.MonkeyPatch) -> Refs:
    refs = Refs()
    monkeypatch.setattr(module, "calls", SimpleNamespace(wait=refs.wait))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: refs.now_s))
    monkeypatch.setattr(module, "_answer", lambda ref, _: StageStatus(LayerSpan(0, 1), ref, ""))
    return refs


def test_stages_are_asked_once_a_second_and_a_silent_one_not_again(refs: Refs) -> None:
    spec = StageSpec("", LayerSpan(0, 1), "bfloat16", "auto", "cpu", None)
    stages = Stages([(spec,), (spec,)], SimpleNamespace(handles=[]), timeout_s=1.0)
    stages._actors.handles = [refs.actor("a"), refs.actor("b")]
    for _ in range(100):
        stages.ask()
    assert refs.asked == ["a0", "b1"]
    refs.ready = {"b1"}
    refs.now_s += ASK_S
    stages.ask()
    stages.ask()
    assert refs.asked == ["a0", "b1", "b2"], "the first stage has not answered yet"
    assert [status.node for status in stages.statuses] == ["b1"]


def test_it_is_known_how_long_a_stage_has_been_silent(refs: Refs) -> None:
    spec = StageSpec("", LayerSpan(0, 1), "bfloat16", "auto", "cpu", None)
    stages = Stages([(spec,)], SimpleNamespace(handles=[]), timeout_s=1.0)
    stages._actors.handles = [refs.actor("a")]
    stages.ask()
    assert stages.status(0) is None
    refs.ready, refs.now_s = {"a0"}, refs.now_s + ASK_S
    stages.ask()
    for _ in range(20):  # it was asked again, and does not answer
        refs.now_s += ASK_S
        stages.ask()
    status = stages.status(0)
    assert status is not None
    assert status.silent_s == 20 * ASK_S
