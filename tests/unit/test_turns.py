"""What the threads of a stage agree on: order, epochs, the first failure, and how much may stand at each door."""

import threading

import pytest
from ray.exceptions import GetTimeoutError

from m2ray.chain.door import Door
from m2ray.chain.turns import Superseded, Turns

PATIENCE_S = 30.0


def in_thread(work, results: list) -> threading.Thread:
    def run() -> None:
        try:
            results.append(work())
        except (Superseded, GetTimeoutError, ValueError) as error:
            results.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_steps_take_their_turns_in_order_whoever_comes_first() -> None:
    turns, order = Turns(0), []

    def take(step: int) -> None:
        with turns.turn(0, step, PATIENCE_S):
            order.append(step)

    threads = [threading.Thread(target=take, args=(step,)) for step in (3, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == [0, 1, 2, 3]


def test_a_new_epoch_lets_everyone_go_who_waits_for_the_old_one() -> None:
    turns, results = Turns(0), []
    door = Door(turns, "compute", 0, "room", PATIENCE_S)
    waiting = [
        in_thread(lambda: door.place(0).__enter__(), results),
        in_thread(lambda: turns.turn(0, 1, PATIENCE_S).__enter__(), results),
    ]
    turns.begin(1)
    for thread in waiting:
        thread.join(PATIENCE_S)
    assert results == [Superseded, Superseded]
    with turns.turn(1, 0, PATIENCE_S), pytest.raises(Superseded):
        turns.require(0)


def test_the_first_failure_of_an_epoch_is_told_and_a_late_one_of_an_earlier_is_not() -> None:
    turns, results = Turns(0), []
    watch = in_thread(lambda: turns.watch(0, PATIENCE_S), results)
    turns.fail(0, ValueError("first"))
    turns.fail(0, GetTimeoutError("second"))
    watch.join(PATIENCE_S)
    assert results == [ValueError]
    with pytest.raises(Superseded):
        turns.require(0)
    turns.begin(1)
    turns.fail(0, ValueError("late"))
    turns.require(1)
    turns.watch(1, 0.0)


def test_a_turn_that_failed_is_not_passed_on() -> None:
    turns = Turns(0)
    with pytest.raises(ValueError, match="no"), turns.turn(0, 0, PATIENCE_S):
        raise ValueError("no")
    with pytest.raises(GetTimeoutError, match="micro-batch 0, which comes before 1"), turns.turn(0, 1, 0.01):
        pass


def at_door(door: Door, epoch: int, work, *arguments) -> None:
    with door.place(epoch) as hand_over:
        hand_over(work, *arguments)


def test_a_place_at_a_door_is_held_until_the_work_is_done() -> None:
    turns, done, may_end = Turns(0), [], threading.Event()
    door = Door(turns, "compute", 1, "room", 0.01)
    at_door(door, 0, lambda epoch, what: (may_end.wait(PATIENCE_S), done.append((epoch, what))), "first")
    with pytest.raises(GetTimeoutError, match="for room"):
        at_door(door, 0, print)
    turns.begin(1)
    with pytest.raises(GetTimeoutError, match="for room"):
        at_door(door, 1, print)
    may_end.set()
    door.drain(PATIENCE_S)
    at_door(door, 1, done.append)
    door.drain(PATIENCE_S)
    assert done == [(0, "first"), 1]


def test_a_door_may_have_places_for_tokens_and_what_is_larger_has_it_alone() -> None:
    turns, may_end = Turns(0), threading.Event()
    door = Door(turns, "compute", 10, "room", 0.01)
    with door.place(0, 6) as hand_over:
        hand_over(lambda _: may_end.wait(PATIENCE_S))
    with pytest.raises(GetTimeoutError, match="for room"), door.place(0, 5):
        pass
    door.resize(11)
    with door.place(0, 5):
        pass
    door.resize(4)
    with pytest.raises(GetTimeoutError, match="for room"), door.place(0, 1):
        pass
    may_end.set()
    door.drain(PATIENCE_S)
    with door.place(0, 99), pytest.raises(GetTimeoutError, match="for room"), door.place(0, 1):
        pass
    with door.place(0, 4):
        pass


def test_a_place_is_free_again_if_nothing_is_handed_over_or_the_work_fails() -> None:
    turns = Turns(0)
    door = Door(turns, "compute", 1, "room", 0.01)

    def fail(_: int) -> None:
        raise ValueError("in the thread")

    with pytest.raises(ZeroDivisionError), door.place(0):
        raise ZeroDivisionError
    at_door(door, 0, fail)
    door.drain(PATIENCE_S)
    with pytest.raises(ValueError, match="in the thread"):
        turns.watch(0, PATIENCE_S)
    turns.begin(1)
    at_door(door, 1, lambda _: None)
    door.drain(PATIENCE_S)
    turns.require(1)


def test_done_counts_from_nought_in_each_epoch() -> None:
    turns = Turns(0)
    turns.finish_step(0)
    turns.finish_step(0)
    assert turns.done == 2
    turns.begin(1)
    turns.finish_step(0)
    assert turns.done == 0
