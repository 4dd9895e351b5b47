"""The lease as a state machine: three drivers, of which one may die, one stand still, and a request go astray.

Time is one rule: who waits may give up a driver that is gone, or one that has given no sign, since it stood still or got no answer.
"""

from collections.abc import Iterator
from typing import NamedTuple

NUM_DRIVERS = 3
_MOST_RENEWALS = 3
HOLDING = ("holds", "renews", "trims")
BUGS = ("a lease is put", "the end deletes every lease", "a renewal does not look who is there")

Keys = tuple[tuple[int, int], ...]
"""(number, driver) of each file of `_lease/`, ascending."""


class Driver(NamedTuple):
    """`number` is that of its lease, `seen` the newest that it waits for, `was_silent` whether it may have been given up."""

    at: str = "off"
    number: int = 0
    seen: tuple[int, int] | None = None
    was_silent: bool = False


class World(NamedTuple):
    keys: Keys = ()
    drivers: tuple[Driver, ...] = (Driver(),) * NUM_DRIVERS
    late: Keys = ()
    faults: int = 1
    pauses: int = 1


def newest(keys: Keys) -> tuple[int, int] | None:
    return keys[-1] if keys else None


def steps(world: World, bug: str = "") -> Iterator[World]:
    """Everything that may happen next."""
    for number, driver in enumerate(world.drivers):
        if driver.at in {"ended", "refused", "lost", "dead"} or (number and world.drivers[number - 1].at == "off"):
            continue
        yield from _driven(world, number, driver, bug)
        yield _at(world, number, driver._replace(at="dead"))
        if world.pauses and driver.at in HOLDING:
            yield _at(world._replace(pauses=world.pauses - 1), number, driver._replace(was_silent=True))
    for place, key in enumerate(world.late):
        left = world._replace(late=(*world.late[:place], *world.late[place + 1 :]))
        yield _created(left, *key, bug="")[0]


def _driven(world: World, number: int, me: Driver, bug: str) -> Iterator[World]:
    there = newest(world.keys)
    if me.at == "off":
        yield _at(world, number, me._replace(at="watches" if there else "takes", seen=there))
    elif me.at == "watches" and there != me.seen:
        yield _at(world, number, Driver("refused") if there else Driver("takes"))
    elif me.at == "watches" and me.seen and _is_given_up(world.drivers[me.seen[1]]):
        yield _at(world, number, me._replace(at="takes"))
    elif me.at == "takes":
        yield from _takes(world, number, me, bug)
    elif me.at == "holds":
        is_outlived = there is not None and there[0] > me.number and there[1] != number and bug != "a renewal does not look who is there"
        if me.number < _MOST_RENEWALS:
            yield _at(world, number, me._replace(at="lost" if is_outlived else "renews"))
        kept = () if bug == "the end deletes every lease" else tuple(key for key in world.keys if key[0] > me.number)
        yield _at(world._replace(keys=kept), number, me._replace(at="ended"))
    elif me.at == "renews":
        yield from _renews(world, number, me, bug)
    elif me.at == "trims":
        yield _at(world._replace(keys=tuple(key for key in world.keys if key[0] >= me.number)), number, me._replace(at="holds"))


def _takes(world: World, number: int, me: Driver, bug: str) -> Iterator[World]:
    wanted = me.seen[0] + 1 if me.seen else 1
    after, is_own = _created(world, wanted, number, bug)
    yield _at(after, number, Driver("holds", wanted) if is_own else Driver())
    if world.faults:
        yield _at(world._replace(faults=world.faults - 1, late=(*world.late, (wanted, number))), number, me._replace(at="dead"))


def _renews(world: World, number: int, me: Driver, bug: str) -> Iterator[World]:
    after, is_own = _created(world, me.number + 1, number, bug)
    yield _at(after, number, me._replace(at="trims", number=me.number + 1) if is_own else me._replace(at="lost"))
    if world.faults:  # said, and tried again: an answer that was lost finds its own number taken
        left = world._replace(faults=world.faults - 1)
        silent = me._replace(at="holds", was_silent=True)
        yield _at(left._replace(late=(*left.late, (me.number + 1, number))), number, silent)
        yield _at(after._replace(faults=world.faults - 1), number, silent)


def _created(world: World, wanted: int, number: int, bug: str) -> tuple[World, bool]:
    """The world once a number was asked for, and whether it is this driver's."""
    taken = dict(world.keys).get(wanted)
    if taken is None or bug == "a lease is put":
        return world._replace(keys=tuple(sorted((dict(world.keys) | {wanted: number}).items()))), True
    there = newest(world.keys)
    return world, there == (wanted, number)


def _is_given_up(driver: Driver) -> bool:
    return driver.at not in HOLDING or driver.was_silent


def _at(world: World, number: int, driver: Driver) -> World:
    return world._replace(drivers=(*world.drivers[:number], driver, *world.drivers[number + 1 :]))


def problem_of(world: World) -> str:
    """A driver that never was silent holds the newest number, and is alone, but for one that was given up and has not heard of it yet."""
    for number, driver in enumerate(world.drivers):
        if driver.at in HOLDING and not driver.was_silent:
            if newest(world.keys) != (driver.number, number):
                return f"driver {number} gave every sign, and another one took the run over"
            if any(each.at in HOLDING and not each.was_silent for each in world.drivers[number + 1 :]):
                return "two drivers hold the lease"
    return ""


def search(bug: str = "") -> tuple[int, str]:
    """How many states there are, and the first broken promise."""
    seen, waiting = {World()}, [World()]
    while waiting:
        for after in steps(waiting.pop(), bug):
            if after not in seen:
                if problem := problem_of(after):
                    return len(seen), problem
                seen.add(after)
                waiting.append(after)
    return len(seen), ""
