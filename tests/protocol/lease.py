"""The lease (m2ray/activations/writing/lease.py) as a state machine: a folder of numbers, and three drivers that take it, renew it and give it back.

A step is one request. Time is a tick a period: each driver that does not stand still has done what it does in a period before the next one
begins. One that stands still does nothing while ticks pass, wherever it is: between a look and the create that follows, too.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from m2ray.model.interpreter import without_collector

NUM_DRIVERS, PATIENCE, TICKS = 3, 2, 3
_TRIES = 2
"""Two ticks without another number are enough to call a driver silent; the real one waits for four, since a tick is no clock."""

Key = tuple[int, int]
"""(number, name): a driver takes another name for each try to get the lease."""

_RESTING = {"off", "watch", "held", "ended", "told", "dead"}
_BELIEVES = {"held", "next", "renewed", "tidy"}
BUGS = ("the first number is not looked at again", "a renewal looks at higher numbers alone", "a renewal is not looked at again")


class Driver(NamedTuple):
    """Where a driver is. `number` is its own; `before` the key that it takes over or renews; `keys` those that it deletes next."""

    at: str = "off"
    number: int = 0
    tries: int = 0
    before: Key | None = None
    keys: tuple[Key, ...] = ()
    waited: int = 0
    is_done: bool = True
    stands_still: bool = False
    is_behind: bool = False
    """It stood still, and has not created a number since and looked at it again."""
    is_fresh: bool = False
    """It has created one."""


class World(NamedTuple):
    keys: frozenset[Key] = frozenset()
    drivers: tuple[Driver, ...] = (Driver(),) * NUM_DRIVERS
    ticks: int = TICKS
    pauses: int = 1
    deaths: int = 1

    def name(self, number: int) -> int:
        return number + NUM_DRIVERS * self.drivers[number].tries

    def newest(self) -> Key | None:
        return max(self.keys, default=None)


def steps(world: World, bug: str = "") -> Iterator[tuple[tuple[object, ...], World]]:
    """Everything that may happen next."""
    for number, me in enumerate(world.drivers):
        if me.at in {"ended", "told", "dead"} or (number and me == world.drivers[number - 1] == Driver()):
            continue  # drivers are alike, and numbered as they begin
        if me.stands_still:
            yield (number, "goes on"), _at(world, number, me._replace(stands_still=False, is_behind=True, is_fresh=False))
            continue
        for what, after in _of(world, number, me, bug):
            yield (number, me.at, what), after
        if world.pauses:
            yield (number, "stands still"), _at(world._replace(pauses=world.pauses - 1), number, me._replace(stands_still=True))
        if world.deaths and me.at != "off":
            yield (number, "dies"), _at(world._replace(deaths=world.deaths - 1), number, Driver("dead"))
    if world.ticks and all(each.stands_still or (each.at in _RESTING and each.is_done) for each in world.drivers):
        yield ("tick",), world._replace(ticks=world.ticks - 1, drivers=tuple(map(_ticked, world.drivers)))


def _ticked(me: Driver) -> Driver:
    if me.stands_still or me.at not in {"watch", "held"}:
        return me
    return me._replace(is_done=False, waited=me.waited + 1 if me.at == "watch" else 0)


def _at(world: World, number: int, driver: Driver, keys: frozenset[Key] | None = None) -> World:
    drivers = (*world.drivers[:number], driver, *world.drivers[number + 1 :])
    return world._replace(drivers=drivers, keys=world.keys if keys is None else keys)


def _of(world: World, number: int, me: Driver, bug: str) -> Iterator[tuple[str, World]]:
    """What a driver that does not stand still does next."""
    if me.at in {"off", "watch"}:
        yield from _looked(world, number, me)
    elif me.at in {"take", "next"}:
        yield "creates", _created(world, number, me, bug)
    elif me.at == "taken":
        yield "looks again", _at(world, number, _held(me) if _is_ours(world, number, me) else _again(me))
    elif me.at == "renewed":
        yield "looks again", _renewed(world, number, me)
    elif me.at == "held":
        if not me.is_done:
            yield "looks", _at(world, number, _to_renew(world, number, me, bug))
        newest = world.newest()
        own = newest[0] if newest and newest[1] == world.name(number) else me.number
        yield "ends", _at(world, number, me._replace(at="close", keys=tuple(sorted(key for key in world.keys if key[0] <= own))))
    else:
        yield from _deleted(world, number, me)


def _looked(world: World, number: int, me: Driver) -> Iterator[tuple[str, World]]:
    newest = world.newest()
    new = Driver(is_behind=me.is_behind, tries=me.tries)
    if newest is None:
        yield "finds nobody", _at(world, number, new._replace(at="take", number=1))
    elif me.at == "watch" and newest != me.before:
        yield "is refused", _at(world, number, Driver("ended"))
        yield "waits for the end", _at(world, number, new._replace(at="watch", before=newest))
    elif me.at == "watch" and (me.waited >= PATIENCE or world.drivers[newest[1] % NUM_DRIVERS].at == "dead"):
        yield "finds it silent", _at(world, number, new._replace(at="take", number=newest[0] + 1, before=newest))
    elif me.at == "off" or not me.is_done:
        yield "watches", _at(world, number, me._replace(at="watch", before=newest, is_done=True))


def _created(world: World, number: int, me: Driver, bug: str) -> World:
    """The next number, if nobody has it."""
    wanted = me.number if me.at == "take" else me.number + 1
    if any(key[0] == wanted for key in world.keys):
        return _at(world, number, _again(me) if me.at == "take" else me._replace(at="told"))
    keys = world.keys | {(wanted, world.name(number))}
    if me.at == "take":
        taken = me._replace(at="taken", is_fresh=True)
        return _at(world, number, _held(taken) if bug == "the first number is not looked at again" else taken, keys)
    after = _at(world, number, me._replace(at="renewed", number=wanted, is_fresh=True), keys)
    return _tidied(after, number, after.drivers[number]) if bug == "a renewal is not looked at again" else after


def _is_ours(world: World, number: int, me: Driver) -> bool:
    """Whether a number that was created is the newest, and what it follows still there: else others have been at it since the look."""
    return world.newest() == (me.number, world.name(number)) and (me.before is None or me.before in world.keys)


def _held(me: Driver) -> Driver:
    return Driver("held", me.number, me.tries, is_behind=me.is_behind and not me.is_fresh)


def _again(me: Driver) -> Driver:
    return Driver(tries=(me.tries + 1) % _TRIES, is_behind=me.is_behind)


def _to_renew(world: World, number: int, me: Driver, bug: str) -> Driver:
    newest = world.newest()
    if bug == "a renewal looks at higher numbers alone" and (newest is None or newest[0] <= me.number):
        return me._replace(at="next", before=None)
    if newest is None or newest[1] != world.name(number):
        return me._replace(at="told")
    return me._replace(at="next", before=newest, number=newest[0])


def _renewed(world: World, number: int, me: Driver) -> World:
    return _tidied(world, number, me) if _is_ours(world, number, me) else _at(world, number, me._replace(at="told"))


def _tidied(world: World, number: int, me: Driver) -> World:
    lower = tuple(sorted(key for key in world.keys if key[0] < me.number))
    return _at(world, number, me._replace(at="tidy", keys=lower) if lower else _held(me))


def _deleted(world: World, number: int, me: Driver) -> Iterator[tuple[str, World]]:
    """One of the keys, in any order; at the end the own one last. What has the number by now is what goes."""
    last = Driver("ended") if me.at == "close" else _held(me)
    if not me.keys:
        yield "has nothing to delete", _at(world, number, last)
    for key in me.keys[:-1] or me.keys:
        left = tuple(each for each in me.keys if each != key)
        keys = frozenset(each for each in world.keys if each[0] != key[0])
        yield f"deletes {key[0]}", _at(world, number, me._replace(keys=left) if left else last, keys)


def problem_of(world: World, *, nobody_paused: bool) -> str:
    """Two believe to hold it, though neither stands still or is yet to renew after it did; or one is told that it is lost though nobody ever stood still."""
    holders = [number for number, each in enumerate(world.drivers) if each.at in _BELIEVES and not (each.stands_still or each.is_behind)]
    if len(holders) > 1:
        return f"drivers {holders} hold the lease"
    told = [number for number, each in enumerate(world.drivers) if each.at == "told"]
    return f"driver {told[0]} is told that it lost the lease" if told and nobody_paused else ""


@without_collector()
def search(pauses: int, bug: str = "") -> tuple[int, str, tuple[tuple[object, ...], ...]]:
    """How many states there are; the first problem, and the way to it."""
    start = World(pauses=pauses, deaths=1 - pauses)
    came_from: dict[World, tuple[World, tuple[object, ...]] | None] = {start: None}
    waiting = deque([start])
    while waiting:
        world = waiting.popleft()
        for label, after in steps(world, bug):
            if after in came_from:
                continue
            came_from[after] = (world, label)
            waiting.append(after)
            if problem := problem_of(after, nobody_paused=not pauses):
                return len(came_from), problem, _way(came_from, after)
    return len(came_from), "", ()


def _way(came_from: dict[World, tuple[World, tuple[object, ...]] | None], world: World) -> tuple[tuple[object, ...], ...]:
    way = []
    while (came := came_from[world]) is not None:
        world, label = came
        way.append(label)
    return tuple(reversed(way))
