"""How long stages that load may be silent."""

import itertools
import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError

from m2ray.chain import stages as module
from m2ray.chain.stages import Patience, Stages
from m2ray.chain.status import StageStatus

ANSWER = StageStatus("layers 0-1", "here", "cpu", ready=False, needed_bytes=10, read_bytes=5)


@pytest.mark.parametrize(("answers", "patience"), [({}, "80 s"), ({0: ANSWER}, "20 s")])
def test_a_stage_whose_process_still_starts_gets_that_long_too(monkeypatch, answers: dict[int, StageStatus], patience: str) -> None:
    clock = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(module.ray, "wait", lambda refs, **_: ([], refs))
    silent = SimpleNamespace(remote=object)
    stages = Stages([None], None, None, Patience(stage_s=20.0, placement_s=1.0), window=1, transport="auto")
    stages.actors = [SimpleNamespace(load=silent, status=silent)]
    stages._unloaded = {0}
    stages._answers = dict(answers)
    with pytest.raises(GetTimeoutError, match=f"stood still for {patience}"):
        stages.load(threading.Event())
