"""What is decided about failures."""

from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayTaskError

from m2ray.chain.failure import Failure, FailureKind, FailurePolicy, GiveUp, Retry, classify
from m2ray.errors import CheckpointError, StageError, StoreError

POLICY = FailurePolicy(shard_failures=4, stage_restarts=2, window_s=100.0, store_retries=2)


def in_stage(cause: Exception, times: int = 1) -> Exception:
    """An error as the driver sees it that came through so many stages."""
    for _ in range(times):
        cause = RayTaskError("forward", "trace", cause)
    return cause


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ActorDiedError(), FailureKind.DEATH),
        (in_stage(ActorDiedError(), 3), FailureKind.DEATH),
        (GetTimeoutError("late"), FailureKind.HANG),
        (ObjectLostError("a" * 56, None, ""), FailureKind.LOST),
        (in_stage(StoreError("full"), 2), FailureKind.STORE),
        (in_stage(CheckpointError("damaged")), FailureKind.USER),
        (in_stage(StageError("not finite"), 2), FailureKind.USER),
        (in_stage(ZeroDivisionError("a defect")), FailureKind.USER),
    ],
)
def test_kinds(error: Exception, kind: FailureKind) -> None:
    assert classify(error) is kind


def deaths(*at_s: float, stage: int = 1, shard: int | None = None) -> list[Failure]:
    return [Failure(FailureKind.DEATH, when, (stage,), (number if shard is None else shard,)) for number, when in enumerate(at_s)]


def test_a_stage_is_restarted_so_often_within_the_window() -> None:
    assert POLICY.decide(deaths(0, 1)) == Retry(0.0)
    decision = POLICY.decide(deaths(0, 1, 2))
    assert isinstance(decision, GiveUp)
    assert "Stage 1 failed 3 times" in decision.why
    assert POLICY.decide(deaths(0, 1, 101)) == Retry(0.0)


def test_a_shard_that_is_in_flight_in_every_failure_ends_the_chain() -> None:
    assert POLICY.decide(deaths(0, 200, 400, shard=7)) == Retry(0.0)
    decision = POLICY.decide(deaths(0, 200, 400, 600, shard=7))
    assert isinstance(decision, GiveUp)
    assert "Shard 7" in decision.why


def test_failures_without_a_shard_or_a_lost_stage_end_the_chain_too() -> None:
    idle = [Failure(FailureKind.LOST, float(number), (), ()) for number in range(4)]
    assert POLICY.decide(idle[:3]) == Retry(0.0)
    assert isinstance(POLICY.decide(idle), GiveUp)
    assert POLICY.decide([*idle[:3], Failure(FailureKind.LOST, 200.0, (), ())]) == Retry(0.0)


@pytest.mark.parametrize(("lost", "enough"), [((), 4), ((1,), 3)])
def test_hangs_come_as_far_apart_as_the_chain_is_patient_and_are_bounded_all_the_same(lost: tuple[int, ...], enough: int) -> None:
    policy = replace(POLICY, patience_s=1800.0)
    hangs = [Failure(FailureKind.HANG, 1900.0 * number, lost, ()) for number in range(enough)]
    assert policy.decide(hangs[:-1]) == Retry(0.0)
    assert isinstance(policy.decide(hangs), GiveUp)
    assert policy.decide([*hangs[:-1], replace(hangs[-1], at_s=100_000.0)]) == Retry(0.0)


def test_a_store_is_tried_again_with_growing_pauses() -> None:
    refused = [Failure(FailureKind.STORE, float(number), (), (3, 4)) for number in range(3)]
    assert [POLICY.decide(refused[: count + 1]) for count in range(2)] == [Retry(1.0), Retry(2.0)]
    assert isinstance(POLICY.decide(refused), GiveUp)


def test_a_users_error_is_never_tried_again() -> None:
    assert isinstance(POLICY.decide([Failure(FailureKind.USER, 0.0, (), ())]), GiveUp)
