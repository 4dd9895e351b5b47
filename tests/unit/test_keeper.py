"""The keeper of a warm chain, over stages that answer, die and hang when the test says so."""

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from ray.exceptions import ActorDiedError, RaySystemError, RayTaskError

from m2ray.batches import CapturedLayer, LayerSpan
from m2ray.chain import keeper as module
from m2ray.chain import standing_stages
from m2ray.chain.admission import Visitor
from m2ray.chain.keeper import EPOCHS_A_JOB, Keeper
from m2ray.chain.requests import Answer, Request
from m2ray.chain.served import Served
from m2ray.chain.standing_stages import StandingStages
from m2ray.chain.status import StageStatus
from m2ray.errors import ClusterError, StageError

FIRST, SECOND = (Visitor(f"ticket-{number}", f"driver-{number}", f"job {number}") for number in (1, 2))
REQUEST = Request(["sea"], "text", "residual:0")


class FakeStages:
    """Two stages of three layers each, and of Ray what the keeper calls. A reference is what a call gives, or raises."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.dead: set[int] = set()
        self.hung: set[int] = set()
        self.killed: list[Any] = []
        self.restarted: list[tuple[int, ...]] = []
        self.failure: Exception | None = None
        self.has_ended = False
        self.handles = [self._handle(index) for index in range(2)]

    def _handle(self, index: int) -> Any:
        def method(name: str) -> Any:
            return SimpleNamespace(remote=lambda *given: self._call(index, name, *given))

        return SimpleNamespace(index=index, **{name: method(name) for name in ("status", "load", "close", "reset", "answer")})

    def _call(self, index: int, name: str, *given: Any) -> Any:
        self.calls.append((index, name, *given))
        if index in self.dead:
            return _Reference(ActorDiedError())
        if name in ("close", "reset") and index in self.hung:
            return _Reference(None, is_ready=False)
        if name == "answer":
            if self.failure is not None:
                return _Reference(RayTaskError("answer", "trace", self.failure))
            followers = given[3]
            following = followers[0].answer.remote(*given[:3], followers[1:]) if followers else None
            return _Reference(((CapturedLayer("residual", index, ()),), following))
        return _Reference(StageStatus(LayerSpan(3 * index, 3 * index + 3), "here", "cpu") if name == "status" else None)

    def restart(self, lost: Any, epoch: int) -> bool:
        self.restarted.append((*sorted(lost), epoch))
        self.dead -= set(lost)
        return True

    def require_weights(self, weights: Any) -> None:
        """See `Actors`; tests/ray/test_warm_chain.py has real ones."""

    def end(self) -> None:
        self.has_ended = True

    # -- Ray's

    def wait(self, refs: list[Any], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Any], list[Any]]:
        return [ref for ref in refs if ref.is_ready], [ref for ref in refs if not ref.is_ready]

    def get(self, ref: Any, timeout: float) -> Any:
        if isinstance(ref, list):
            return [self.get(each, timeout) for each in ref]
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def kill(self, handle: Any) -> None:
        self.killed.append(handle.index)


class _Reference:
    def __init__(self, value: Any, *, is_ready: bool = True) -> None:
        self.value = value
        self.is_ready = is_ready


class FakeDesk:
    """Hands the computation what it was asked for."""

    at_work = 0
    answered = 0

    def answer(self, request: Request, compute: Any) -> Answer:
        micro_batch: Any = request
        return compute(None, 5 if request.sites == "residual:5" else 0, micro_batch)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    stages = FakeStages()
    monkeypatch.setattr(module, "ray", stages)
    monkeypatch.setattr(standing_stages, "ray", stages)
    monkeypatch.setattr(module, "dead_drivers", lambda: {"driver-0"})
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=module.time.monotonic, sleep=lambda _: None))
    return stages


@pytest.fixture
def keeper(stages: FakeStages) -> Keeper:
    plan: Any = SimpleNamespace(demand=SimpleNamespace(options=SimpleNamespace(stage_timeout_s=1.0)))
    keeper = Keeper(Served("tiny", "model", {}, {}, plan, None, None))  # type: ignore[arg-type]
    specs: Any = [[SimpleNamespace(span=LayerSpan(start, start + 3))] for start in (0, 3)]
    keeper._stages = StandingStages(specs, stages, 1.0)  # type: ignore[arg-type]
    keeper._desk = FakeDesk()  # type: ignore[assignment]
    return keeper


def test_the_next_job_is_let_in_once_nothing_of_the_last_is_left(keeper: Keeper, stages: FakeStages) -> None:
    epoch, handles = keeper.admit(FIRST)
    assert handles == stages.handles
    assert keeper.admit(SECOND) == "is at job 1"
    assert (keeper.status().job, keeper.status().waiting, keeper.status().idle_s) == ("job 1", 1, 0.0)
    assert not stages.calls
    keeper.leave(FIRST.ticket)
    assert [call[:2] for call in stages.calls] == [(0, "close"), (1, "close"), (0, "reset"), (1, "reset")]
    assert {call[2] for call in stages.calls if call[1] == "reset"} == {epoch + EPOCHS_A_JOB}
    later, _ = keeper.admit(SECOND)
    assert later == epoch + 2 * EPOCHS_A_JOB, "a late call of the first job is of an earlier epoch"
    keeper.leave(SECOND.ticket)
    assert (keeper.status().job, keeper.status().jobs) == ("", 2)


def test_a_job_that_only_waited_leaves_the_stages_alone(keeper: Keeper, stages: FakeStages) -> None:
    keeper.admit(FIRST)
    keeper.admit(SECOND)
    keeper.leave(SECOND.ticket)
    assert not stages.calls


def test_a_dead_driver_is_outlived(keeper: Keeper, stages: FakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper.admit(FIRST)
    keeper._look()
    assert keeper.status().job == "job 1", "it lives"
    monkeypatch.setattr(module, "dead_drivers", lambda: {FIRST.driver})
    keeper._look()
    assert keeper.status().job == ""
    assert (0, "close") in stages.calls


def test_a_cluster_that_does_not_answer_for_a_moment_is_outlived(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> NoReturn:
        raise RaySystemError("no answer")

    keeper.admit(FIRST)
    with monkeypatch.context() as patched:
        patched.setattr(module, "dead_drivers", silent)
        keeper._look()
    assert "no answer" in keeper.status().trouble
    keeper.leave(FIRST.ticket)
    keeper._look()
    assert keeper.status().trouble == ""


def test_a_stage_that_hangs_on_a_job_that_left_is_ended_and_comes_back(keeper: Keeper, stages: FakeStages) -> None:
    keeper.admit(FIRST)
    stages.hung.add(1)
    keeper.leave(FIRST.ticket)
    assert set(stages.killed) == {1}
    stages.dead, stages.hung = {1}, set()
    keeper._look()
    assert [restarted[:1] for restarted in stages.restarted] == [(1,)]
    assert (1, "load") in stages.calls


def test_only_the_job_that_has_the_chain_may_restart_stages(keeper: Keeper, stages: FakeStages) -> None:
    keeper.admit(FIRST)
    keeper.admit(SECOND)
    with pytest.raises(ClusterError, match="another job"):
        keeper.restart(SECOND.ticket, {0: None}, 7)
    assert keeper.restart(FIRST.ticket, {0: None}, 7) == (True, stages.handles)
    assert stages.restarted == [(0, 7)]


def test_a_request_goes_no_further_than_the_stage_of_its_last_layer(keeper: Keeper, stages: FakeStages) -> None:
    assert [each.layer for each in keeper.answer(REQUEST)] == [0]  # type: ignore[union-attr]
    assert [call[:2] for call in stages.calls] == [(0, "answer")]
    assert [each.layer for each in keeper.answer(REQUEST._replace(sites="residual:5"))] == [0, 1]  # type: ignore[union-attr]


def test_a_request_outlives_a_stage(keeper: Keeper, stages: FakeStages) -> None:
    stages.dead.add(0)
    assert [each.layer for each in keeper.answer(REQUEST)] == [0]  # type: ignore[union-attr]
    assert [restarted[:1] for restarted in stages.restarted] == [(0,)]


def test_while_a_job_has_the_chain_a_request_leaves_lost_stages_to_it(keeper: Keeper, stages: FakeStages) -> None:
    keeper.admit(FIRST)
    stages.dead.add(0)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        keeper.restart(FIRST.ticket, {0: None}, 7)

    module.time.sleep = sleep  # type: ignore[assignment]
    assert [each.layer for each in keeper.answer(REQUEST)] == [0]  # type: ignore[union-attr]
    assert (len(waited), stages.restarted) == (1, [(0, 7)])


def test_what_a_stage_says_of_a_request_is_said_once_and_as_it_is(keeper: Keeper, stages: FakeStages) -> None:
    stages.failure = StageError("A row is not finite.", "Look.")
    with pytest.raises(StageError, match="not finite"):
        keeper.answer(REQUEST)
    assert [call[1] for call in stages.calls] == ["answer"]


def test_a_chain_is_idle_from_its_last_job_or_request_on(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    keeper._served = keeper._served._replace(idle_timeout_s=30.0)
    keeper._used_at = 100.0
    now[0] = 129.0
    keeper.answer(REQUEST)
    now[0] = 150.0
    assert not keeper._ends_alone()
    keeper.expect(FIRST)
    now[0] = 999.0
    assert not keeper._ends_alone(), "a job's prompts are looked at"
    keeper.admit(SECOND)
    keeper.leave(FIRST.ticket)
    now[0] = 1999.0
    assert not keeper._ends_alone(), "a job has it"
    keeper.leave(SECOND.ticket)
    now[0] = 2028.0
    assert not keeper._ends_alone()
    now[0] = 2030.0
    assert keeper._ends_alone()
    assert_has_ended(keeper)


def test_a_driver_that_dies_while_it_looks_at_prompts_leaves_an_idle_chain(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper.expect(FIRST)
    assert keeper.status().idle_s == 0.0
    monkeypatch.setattr(module, "dead_drivers", lambda: {FIRST.driver})
    keeper._used_at = -1e9
    keeper._look()
    assert 0.0 < keeper.status().idle_s < 60.0, "from now on, not since the last job"


def test_a_chain_that_was_stopped_lets_nobody_in_and_brings_no_stage_back(keeper: Keeper, stages: FakeStages) -> None:
    keeper.admit(FIRST)
    keeper.stop()
    assert stages.has_ended
    assert_has_ended(keeper)
    with pytest.raises(ClusterError, match="has ended.*finished is kept"):
        keeper.restart(FIRST.ticket, {0: None}, 7)
    assert not stages.restarted


def test_an_idle_chain_ends_whatever_ray_serve_says(keeper: Keeper, stages: FakeStages, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> NoReturn:
        raise TimeoutError

    monkeypatch.setattr("m2ray.chain.http.stop_http", refuse)
    monkeypatch.setattr(stages, "get_actor", lambda *_: SimpleNamespace(index="the keeper"), raising=False)
    keeper._served = keeper._served._replace(idle_timeout_s=30.0, http="http://127.0.0.1:8000/v1/activations")
    keeper._used_at = -1e9
    with pytest.raises(TimeoutError):
        keeper._watch()
    assert stages.has_ended
    assert stages.killed == ["the keeper"]


def assert_has_ended(keeper: Keeper) -> None:
    for asks in (lambda: keeper.expect(SECOND), lambda: keeper.admit(SECOND), lambda: keeper.answer(REQUEST)):
        with pytest.raises(ClusterError, match="The chain tiny has ended"):
            asks()
