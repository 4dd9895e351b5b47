"""The driver's side of the actors of a chain, over a Ray that answers when the test says so."""

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from m2ray.activations.writing.writer import WriterSpec
from m2ray.batches import LayerSpan
from m2ray.chain import stages as module
from m2ray.chain.completion import Completed
from m2ray.chain.job import Job
from m2ray.chain.stages import Stages
from m2ray.chain.status import StageStatus
from m2ray.model.capture import CaptureSpec

ANSWER = StageStatus(LayerSpan(0, 2), "here", "cpu", needed_bytes=10, read_bytes=5)


class Ray:
    """A call is named by method and number; it is ready once `answers` has its name. Of those that are ready `wait` gives the last."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.calls: list[str] = []

    def actor(self, name: str) -> Any:
        def call(method: str) -> Any:
            return SimpleNamespace(remote=lambda *_: self._call(f"{name}.{method}"))

        return SimpleNamespace(**{method: call(method) for method in ("link", "watch", "completed", "reset")})

    def _call(self, name: str) -> str:
        self.calls.append(f"{name}{sum(call.startswith(name) for call in self.calls)}")
        return self.calls[-1]

    def wait(self, refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        ready = [ref for ref in refs if ref in self.answers][-num_returns:]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Any, timeout: float) -> Any:
        answer = None if isinstance(ref, list) else self.answers[ref]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    monkeypatch.setattr(module, "calls", ray)
    return ray


def linked(ray: Ray) -> Stages:
    spec: Any = SimpleNamespace(wave_tokens=0)
    stages = Stages([[spec], [spec]], SimpleNamespace(handles=[]), timeout_s=20.0)
    stages._actors.handles = [ray.actor("first"), ray.actor("last")]
    stages.link(0)
    return stages


def test_a_stage_that_is_started_again_is_not_waited_for_at_the_end(ray: Ray) -> None:
    """Its node may be gone, as when Slurm ends a job; it would be waited for as long as writers may take."""
    stages = linked(ray)
    stages._actors.handles = [
        SimpleNamespace(close=SimpleNamespace(remote=lambda name=name: ray._call(name))) for name in ("first", "last")
    ]
    stages._actors.end = lambda: None
    stages._forget([1])
    ray.answers = {"first0": None}
    ray.calls.clear()
    stages.close()
    assert ray.calls == ["first0"]


def test_layers_are_read_by_stages_that_start_alone(ray: Ray) -> None:
    stages, job = linked(ray), Job(CaptureSpec({}, "float32"), WriterSpec("run", {}, 1, 1), 1)
    assert stages.reads
    ray.answers = {"first.reset0": None, "last.reset0": None}
    stages.begin(job)
    assert not stages.reads, "they stood already"
    stages._forget([1])
    assert stages.reads, "the lost one comes back"


@pytest.mark.parametrize(("answers", "patience"), [({}, "80 s"), ({0: ANSWER}, "20 s")])
def test_a_stage_whose_process_still_starts_gets_that_long_too(monkeypatch, answers: dict[int, StageStatus], patience: str) -> None:
    clock = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(module.calls, "wait", lambda refs, **_: ([], refs))
    silent = SimpleNamespace(remote=lambda *_: object())
    spec: Any = SimpleNamespace(span=LayerSpan(0, 2), wave_tokens=0)
    stages = Stages([[spec]], SimpleNamespace(handles=[]), timeout_s=20.0)
    stages.begin(Job(CaptureSpec({}, "float32"), WriterSpec("run", {}, 1, 1), 1))
    stages._actors.handles = [SimpleNamespace(get_ready=silent, status=silent)]
    stages._answers = dict(answers)
    with pytest.raises(GetTimeoutError, match=rf"stood still for {patience} in stage 0 \(layers 0-1\)"):
        stages.load(threading.Event())


def test_a_failure_is_found_whichever_call_ray_names_first(ray: Ray) -> None:
    """News, a watch that ended for nothing, and one with a failure: all are there at one time."""
    stages = linked(ray)
    ray.answers = {"last.completed0": Completed(1, ()), "first.watch0": ActorDiedError(), "last.watch0": None}
    stages.news(0, 0, 0, 1.0)
    assert isinstance(stages.failed(), ActorDiedError)


def test_a_watch_that_ended_for_nothing_is_begun_again_and_keeps_no_news_back(ray: Ray) -> None:
    stages = linked(ray)
    ray.answers = {"last.completed0": Completed(3, ()), "first.watch0": None}
    assert (stages.news(0, 0, 0, 1.0), stages.failed()) == (None, None)
    assert ray.calls.count("first.watch1") == 1
    assert (stages.news(0, 0, 0, 1.0), stages.failed()) == (Completed(3, ()), None)


def test_a_late_answer_to_an_earlier_epoch_is_nobodys(ray: Ray) -> None:
    stages = linked(ray)
    assert stages.news(0, 0, 0, 1.0) is None
    stages.link(1)
    ray.answers = {"last.completed0": Completed(3, ())}
    assert stages.news(1, 0, 0, 1.0) is None
    ray.answers["last.completed1"] = Completed(1, ())
    assert stages.news(1, 0, 0, 1.0) == Completed(1, ())


def test_a_last_stage_that_is_lost_has_no_news_but_an_error(ray: Ray) -> None:
    stages = linked(ray)
    ray.answers = {"last.completed0": ActorDiedError()}
    stages._watches.clear()
    with pytest.raises(ActorDiedError):
        stages.news(0, 0, 0, 1.0)
