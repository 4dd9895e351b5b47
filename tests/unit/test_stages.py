"""The driver's side of the actors of a chain, over a Ray that answers when the test says so."""

import itertools
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan
from m2ray.chain import stages as module
from m2ray.chain.actor import Job
from m2ray.chain.completion import Completed
from m2ray.chain.stages import Stages
from m2ray.chain.status import StageStatus
from m2ray.model.capture import CaptureSpec

ANSWER = StageStatus(LayerSpan(0, 2), "here", "cpu", needed_bytes=10, read_bytes=5)

NOW = 0.01


class Ray:
    """A call is named by method and number; it is done once it was given its answer."""

    def __init__(self) -> None:
        self.calls: dict[str, Future[Any]] = {}

    def actor(self, name: str) -> Any:
        def call(method: str) -> Any:
            return SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: self._call(f"{name}.{method}")))

        return SimpleNamespace(**{method: call(method) for method in ("link", "watch", "completed")})

    def _call(self, name: str) -> Future[Any]:
        return self.calls.setdefault(f"{name}{sum(call.startswith(name) for call in self.calls)}", Future())

    def answer(self, **answers: Any) -> None:
        """By actor_method_number."""
        for name, answer in answers.items():
            call = self.calls[name.replace("_", ".", 1).replace("_", "")]
            call.set_exception(answer) if isinstance(answer, Exception) else call.set_result(answer)

    def get(self, refs: list[Any], timeout: float) -> None:
        """What is linked answers at once."""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    monkeypatch.setattr(module, "ray", ray)
    return ray


def linked(ray: Ray) -> Stages:
    stages = Stages([None, None], None, transport="auto", timeout_s=20.0, placement_timeout_s=1.0)
    stages._actors.handles = [ray.actor("first"), ray.actor("last")]
    stages.link(0)
    return stages


@pytest.mark.parametrize(("answers", "patience"), [({}, "80 s"), ({0: ANSWER}, "20 s")])
def test_a_stage_whose_process_still_starts_gets_that_long_too(monkeypatch, answers: dict[int, StageStatus], patience: str) -> None:
    clock = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(module.ray, "wait", lambda refs, **_: ([], refs))
    silent = SimpleNamespace(remote=lambda *_: object())
    stages = Stages([None], None, transport="auto", timeout_s=20.0, placement_timeout_s=1.0)
    stages.begin(Job(CaptureSpec({}, "float32"), WriterSpec("run", {}, 1, 1), 1))
    stages._actors.handles = [SimpleNamespace(look=silent, load=silent, begin=silent, status=silent)]
    stages._answers = dict(answers)
    with pytest.raises(GetTimeoutError, match=f"stood still for {patience}"):
        stages.load(threading.Event())


def test_a_failure_comes_before_all_news(ray: Ray) -> None:
    """News, a watch that ended for nothing, and one with a failure: all are there at one time."""
    stages = linked(ray)
    assert stages.news(0, 0, 0, NOW) is None
    ray.answer(last_completed_0=Completed(1, ()), first_watch_0=None, last_watch_0=ActorDiedError())
    with pytest.raises(ActorDiedError):
        stages.news(0, 0, 0, NOW)


def test_a_watch_that_ended_for_nothing_is_begun_again_and_keeps_no_news_back(ray: Ray) -> None:
    stages = linked(ray)
    assert stages.news(0, 0, 0, NOW) is None
    ray.answer(last_completed_0=Completed(3, ()), first_watch_0=None)
    assert stages.news(0, 0, 0, NOW) == Completed(3, ())
    assert "first.watch1" in ray.calls
    assert stages.news(0, 3, 0, NOW) is None


def test_a_late_answer_to_an_earlier_epoch_is_nobodys(ray: Ray) -> None:
    stages = linked(ray)
    assert stages.news(0, 0, 0, NOW) is None
    stages.link(1)
    ray.answer(last_completed_0=Completed(3, ()))
    assert stages.news(1, 0, 0, NOW) is None
    ray.answer(last_completed_1=Completed(1, ()))
    assert stages.news(1, 0, 0, NOW) == Completed(1, ())


def test_a_last_stage_that_is_lost_has_no_news_but_an_error(ray: Ray) -> None:
    stages = linked(ray)
    assert stages.news(0, 0, 0, NOW) is None
    ray.answer(last_completed_0=ActorDiedError())
    with pytest.raises(ActorDiedError):
        stages.news(0, 0, 0, NOW)
