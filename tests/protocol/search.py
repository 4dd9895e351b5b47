"""The search: every state that can be reached, each step and state held against what is promised."""

from collections import deque
from typing import Any, NamedTuple

from m2ray.model.interpreter import without_collector
from tests.protocol.model import ENDED, NONE, NUM_DRIVERS, Driver, World, steps

Label = tuple[Any, ...]


class Found(NamedTuple):
    """What a search came to: how many states there are, and the first broken promise with the way to it."""

    num_states: int
    num_steps: int
    problem: str = ""
    way: tuple[Label, ...] = ()


@without_collector()
def search(start: World, bug: str = "") -> Found:
    """Go through all states, the nearest first, until a promise is broken."""
    came_from: dict[World, tuple[World, Label] | None] = {start: None}
    healed: dict[World, str] = {}
    waiting, num_steps = deque([start]), 0
    while waiting:
        world = waiting.popleft()
        for label, after in steps(world, bug):
            num_steps += 1
            if after in came_from:
                problem = problem_of_step(world, after)
            else:
                came_from[after] = (world, label)
                waiting.append(after)
                problem = problem_of_step(world, after) or problem_of_state(after) or _problem_of_healing(after, healed, bug)
            if problem:
                return Found(len(came_from), num_steps, problem, (*_way(came_from, world), label))
    return Found(len(came_from), num_steps)


def _way(came_from: dict[World, tuple[World, Label] | None], world: World) -> tuple[Label, ...]:
    way: list[Label] = []
    while (came := came_from[world]) is not None:
        world, label = came
        way.append(label)
    return tuple(reversed(way))


# -- what is promised -------------------------------------------------------------------------------------------------------


def problem_of_step(before: World, after: World) -> str:
    """A commit never changes, and ceases to count only where its shard was taken back or lost something."""
    commits = () if (before.commits, before.swept) == (after.commits, after.swept) else zip(before.counted, after.counted, strict=True)
    for shard, (was, now) in enumerate(commits):
        if was not in (NONE, now) and now != NONE:
            return f"the commit of shard {shard} was replaced"
        if was != NONE and now == NONE and shard not in after.opened:
            return f"the commit of shard {shard} is lost"
    ended = [driver for driver, each in enumerate(after.drivers) if each.at == "done" and before.drivers[driver].at != "done"]
    if not ended:
        return ""
    is_closed = after.success and after.manifest == after.counted
    is_quiet = all(each.at in (*ENDED, "off") for each in after.drivers) and not (after.repair or after.late or after.is_stale)
    if is_quiet and not is_closed:
        return f"driver {ended[0]} said Complete, the last of all, and the run is not closed"
    return ""


def problem_of_state(world: World) -> str:
    """Whatever a reader resolves is whole, and a finished run is closed."""
    if world.job != NONE and not world.surveys >> world.job & 1:
        return "job.json names a survey that is gone"
    for shard, driver in enumerate(world.counted):
        if driver != NONE and not world.is_sound(shard, driver):
            return f"the commit of shard {shard} names parts that are not there"
    if world.is_stale or not world.success:
        return ""
    for shard, driver in enumerate(world.manifest or ()):
        if not world.is_whole(shard, driver) and world.broken != (shard, driver):
            return f"the manifest of a finished run names parts of shard {shard} that are not there"
    if not world.opened and (world.manifest != world.counted or NONE in world.counted):
        return "a finished run is not closed"
    return ""


def _problem_of_healing(world: World, healed: dict[World, str], bug: str) -> str:
    """Whatever is left, the same command closes the run, and keeps what is committed and whole."""
    records = (world.job, world.surveys, world.parts, world.commits, world.manifest, world.success)
    left = World(*records, faults=0, strikes=0, swept=world.swept)
    if left not in healed:
        healed[left] = _healing(left, bug)
    return healed[left]


def _healing(left: World, bug: str) -> str:
    """A third driver alone, three times at the most: it may have to stop once to say what is lost."""
    world = left
    kept = {shard: driver for shard, driver in enumerate(left.counted) if driver != NONE and left.is_whole(shard, driver)}
    for _ in range(3):
        world = _alone(world._replace(drivers=(Driver("dead"),) * NUM_DRIVERS + (Driver(),)), bug)
        if world.drivers[-1].at == "done":
            break
    changed = [shard for shard, driver in kept.items() if world.counted[shard] != driver]
    if changed:
        return f"the same command lost the commit of shard {changed[0]}"
    return "" if world.is_finished() else "the same command does not close the run"


def _alone(world: World, bug: str) -> World:
    """Every step of the last driver, answered."""
    for _ in range(200):
        ways = [after for label, after in steps(world, bug) if label[0] == "driver" and label[2] == "ok"]
        if not ways:
            return world
        world = ways[0]
    return world
