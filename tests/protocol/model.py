# ruff: noqa: PLR0911 - one return for each place that a driver may be at
"""The commit protocol as a state machine: a store, two drivers with three writers each, a repair, and requests that go astray.

A step is one request that changes the store, or the reads that belong together, with all that is decided from their answers. Between any two
steps every other process may do any number of its own: so each driver may stand still anywhere, for as long as it likes, and no lease
keeps two of them apart. docs/decisions/the-commit-protocol-modelled.md says what is left out.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

NUM_DRIVERS, NUM_WRITERS = 2, 3
NONE, WHOLE = -1, (1 << NUM_WRITERS) - 1
_EACH = NUM_DRIVERS + 1
ENDED = ("done", "dead")

Request = tuple[str, tuple[Any, ...], Any]
"""(verb, key, value): create, put or delete; a key is its kind and its numbers."""


class Driver(NamedTuple):
    """Where a driver is, and what it remembers: `put` are bits of the parts of the shard it is at, `named` commits as it read them, `listed` parts,
    `written` the manifest.
    """

    at: str = "off"
    todo: tuple[int, ...] = ()
    put: int = 0
    named: tuple[int, ...] = ()
    listed: tuple[int, ...] = ()
    written: tuple[int, ...] | None = None
    was_finished: bool = False
    deletes: tuple[tuple[Any, ...], ...] = ()


class World(NamedTuple):
    """A store, and who is at it. A driver's number stands for its survey, and for its attempt at each shard.

    Attributes:
        job: whose survey job.json names.
        surveys: bits of the drivers whose survey is stored.
        parts: of each driver's attempt at each shard, and of a third one's, bits of the parts that are stored.
        commits: of each shard, whose attempt it names.
        manifest: the same of all shards.
        late: requests that were sent and may arrive at any time, each with whether its name was freed or anything struck since, or a repair sent it.
        broken: an attempt of which a part was lost.
        opened: the shards that a repair or a loss took back.
        swept: attempts that are marked, before their parts go: a commit of one is void.
        is_stale: such a request was done.
    """

    job: int = NONE
    surveys: int = 0
    parts: tuple[int, ...] = (0,) * 2 * _EACH
    commits: tuple[int, ...] = (NONE,) * 2
    manifest: tuple[int, ...] | None = None
    success: bool = False
    drivers: tuple[Driver, ...] = (Driver(),) * NUM_DRIVERS
    repair: tuple[tuple[Any, ...], ...] = ()
    late: tuple[tuple[Request, bool], ...] = ()
    faults: int = 1
    strikes: int = 1
    broken: tuple[int, int] | None = None
    opened: frozenset[int] = frozenset()
    swept: frozenset[int] = frozenset()
    is_stale: bool = False

    def is_whole(self, shard: int, driver: int) -> bool:
        return self.parts[shard * _EACH + driver] == WHOLE

    def is_sound(self, shard: int, driver: int) -> bool:
        """Whether what a commit names is there, or was lost by a strike."""
        return self.is_whole(shard, driver) or self.broken == (shard, driver)

    @property
    def counted(self) -> tuple[int, ...]:
        """The commits without the void ones."""
        if not self.swept:
            return self.commits
        return tuple(NONE if shard * _EACH + driver in self.swept else driver for shard, driver in enumerate(self.commits))

    def is_finished(self) -> bool:
        """What `Run.finished` finds: `_SUCCESS`, manifest, commits, parts and surveys agree."""
        has_records = self.success and self.manifest is not None and NONE not in self.counted
        return has_records and self.surveys == 1 << self.job and self.is_swept(self.manifest or ())

    def is_swept(self, named: tuple[int, ...]) -> bool:
        """Whether the parts that are stored are those of these attempts."""
        attempts = {shard * _EACH + driver for shard, driver in enumerate(named)}
        return all(parts == (WHOLE if attempt in attempts else 0) for attempt, parts in enumerate(self.parts))


def begun(num_shards: int, *, faults: int, strikes: int) -> World:
    """An empty store, and so many requests that may go astray and strikes that may come."""
    return World(parts=(0,) * num_shards * _EACH, commits=(NONE,) * num_shards, faults=faults, strikes=strikes)


BUGS = {
    "commit before part": begun(2, faults=0, strikes=0),
    "put instead of create-if-absent": begun(2, faults=0, strikes=0),
    "lease as the guard": begun(2, faults=0, strikes=0),
    "loser deletes its shard's parts": begun(2, faults=0, strikes=0),
    "parts are swept without a mark": begun(1, faults=0, strikes=1),
    "parts are marked after they are swept": begun(1, faults=0, strikes=1),
    "survey is deleted when its claim fails": begun(1, faults=1, strikes=0),
    "parts are listed after the commits were read": begun(2, faults=0, strikes=1),
    "sweep before all is committed": begun(2, faults=0, strikes=1),
    "manifest of other attempts is kept": begun(2, faults=0, strikes=1),
    "manifest is put": begun(2, faults=0, strikes=1),
    "repair deletes parts": begun(2, faults=0, strikes=1),
    "the end is not looked at again": begun(2, faults=0, strikes=1),
    "repair begins with _SUCCESS": begun(1, faults=1, strikes=1),
}
"""Other protocols, and the start from which the search refutes each. The last four, and the sweep without a mark, are what m2ray once did."""

Step = tuple[tuple[Any, ...], World]
"""(what happened, the world after)."""


def apply(world: World, request: Request) -> tuple[World, bool]:
    """The world once the store has done what was asked, and whether a create found its key taken."""
    verb, key, value = request
    kind = key[0]
    if verb == "delete":
        return _freed(world, key), False
    if kind == "swept":
        return world._replace(swept=world.swept | {attempt for attempt, _ in key[1]}), False
    if kind == "part":
        parts = list(world.parts)
        parts[key[2] * _EACH + key[1]] |= 1 << key[3]
        return world._replace(parts=tuple(parts)), False
    if kind == "commit":
        is_taken = verb == "create" and world.commits[key[1]] != NONE
        return (world if is_taken else world._replace(commits=_with(world.commits, key[1], value))), is_taken
    is_taken = verb == "create" and {"job": world.job != NONE, "manifest": world.manifest is not None, "success": world.success}[kind]
    return (world if is_taken else world._replace(**{kind: value})), is_taken


def _freed(world: World, key: tuple[Any, ...]) -> World:
    kind = key[0]
    late = tuple((request, was or request[1] == key) for request, was in world.late)
    if kind == "commit":
        return world._replace(late=late, commits=_with(world.commits, key[1], NONE))
    if kind == "swept":  # (attempts with the bits that were listed, surveys)
        parts = list(world.parts)
        for attempt, bits in key[1]:
            parts[attempt] &= ~bits
        return world._replace(parts=tuple(parts), surveys=world.surveys & ~key[2])
    if kind == "manifest":
        return world._replace(late=late, manifest=None)
    return world._replace(late=late, success=False)


def _with(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def steps(world: World, bug: str = "") -> Iterator[Step]:
    """Everything that may happen next."""
    for number, driver in enumerate(world.drivers):
        if driver.at in ENDED or not _may_go(world, number):
            continue
        request = asked(world, number, driver, bug)
        if request is None:
            yield ("driver", number, "ok"), looked(world, number, bug)
        else:
            yield from _sent(world, number, request, bug)
        yield ("driver", number, "dies"), _at(world, number, Driver("dead"))
    if world.repair:
        for what, after, _ in _requested(world, ("delete", world.repair[0], None)):
            left = () if what in {"late", "dies"} else world.repair[1:]
            yield ("repair", 0, what), after._replace(repair=left, late=tuple((request, True) for request, _ in after.late))
    for place, (request, is_old) in enumerate(world.late):
        left = world._replace(late=(*world.late[:place], *world.late[place + 1 :]))
        landed, is_taken = apply(left, request)
        is_stale = is_old and not is_taken
        yield ("lands", request, ""), landed._replace(is_stale=world.is_stale or is_stale)
    if world.strikes:
        yield from _struck(world, bug)


def _may_go(world: World, number: int) -> bool:
    """Drivers are numbered as they begin. None begins beside a repair, which holds the lease."""
    return world.drivers[number].at != "off" or not (world.repair or (number and world.drivers[number - 1].at == "off"))


def _struck(world: World, bug: str) -> Iterator[Step]:
    """A repair that takes a shard back, a commit that is lost, or a part; beside one driver that stands still at the most."""
    if sum(driver.at not in (*ENDED, "off") for driver in world.drivers) > 1:
        return
    for shard, driver in enumerate(world.commits):
        if driver == NONE:
            continue
        late = tuple((request, True) for request, _ in world.late)
        struck = world._replace(strikes=world.strikes - 1, opened=world.opened | {shard}, late=late)
        repair = taken_back((shard,), bug)
        if bug == "repair deletes parts":
            repair += (("swept", tuple((shard * _EACH + number, WHOLE) for number in range(NUM_DRIVERS)), 0),)
        yield ("repair begins", shard, ""), struck._replace(repair=repair)
        yield ("commit lost", shard, ""), _freed(struck, ("commit", shard))
        parts = _with(struck.parts, shard * _EACH + driver, WHOLE & ~1)
        yield ("part lost", shard, ""), struck._replace(parts=parts, broken=(shard, driver))


def taken_back(shards: tuple[int, ...], bug: str = "") -> tuple[tuple[Any, ...], ...]:
    """The keys that go when shards cease to count, in this order."""
    records, commits = (("success",), ("manifest",)), tuple(("commit", shard) for shard in shards)
    return (*records, *commits) if bug == "repair begins with _SUCCESS" else (*commits, *records)


def _requested(world: World, request: Request) -> Iterator[tuple[str, World, bool]]:
    """(what becomes of a request, the world then, whether its sender is told that the key is taken). One that is lost is a sender's death."""
    after, is_taken = apply(world, request)
    yield "ok", after, is_taken
    if world.faults:
        after = after._replace(faults=world.faults - 1)
        copy = ((request, False),)
        yield "late", world._replace(faults=world.faults - 1, late=world.late + copy), False
        if _may_matter_twice(world, request):
            yield "doubled", after._replace(late=after.late + copy), is_taken
        if request[0] == "create":
            yield "again", after, True
    yield "dies", world, False


def _may_matter_twice(world: World, request: Request) -> bool:
    """Whether a second copy of a request may ever change anything: parts are swept, other names freed only after a strike."""
    return request[1][0] == "part" or (request[1][0] not in {"job", "swept"} and bool(world.strikes or world.opened))


def _sent(world: World, number: int, request: Request, bug: str) -> Iterator[Step]:
    for what, after, is_taken in _requested(world, request):
        if what == "late":
            loses_survey = bug == "survey is deleted when its claim fails" and request[1] == ("job",)
            surveys = after.surveys & ~(loses_survey << number)
            yield ("driver", number, what), _at(after._replace(surveys=surveys), number, Driver("dead"))
        elif what != "dies":
            yield ("driver", number, what), _at(after, number, answered(after, number, request, is_taken, bug))


def _at(world: World, number: int, driver: Driver) -> World:
    return world._replace(drivers=(*world.drivers[:number], driver, *world.drivers[number + 1 :]))


# -- a driver: what it asks, and what it makes of the answers ---------------------------------------------------------------


def asked(world: World, number: int, me: Driver, bug: str) -> Request | None:
    """The request that a driver sends next; None where it looks."""
    if me.at == "claim":
        return "create", ("job",), number
    if me.at == "discard":
        return "delete", ("swept", (), 1 << number), None
    if me.at in {"take back", "unpublish"}:
        return "delete", me.deletes[0], None
    if me.at == "unseal":
        return "delete", ("success",), None
    if me.at in {"write", "replace"}:
        return _of_a_shard(world, number, me, bug)
    if me.at == "lose":
        return "delete", ("swept", tuple((me.todo[0] * _EACH + driver, WHOLE) for driver in range(NUM_DRIVERS)), 0), None
    if me.at == "publish":
        return "put" if bug == "manifest is put" else "create", ("manifest",), me.named
    if me.at == "mark":
        return "create", ("swept", _unnamed(me), 0), None
    if me.at == "sweep":
        return "delete", ("swept", _unnamed(me), world.surveys & ~(1 << world.job)), None
    return ("create", ("success",), True) if me.at == "seal" else None


def _of_a_shard(world: World, number: int, me: Driver, bug: str) -> Request | None:
    """A writer's next part, the first that is absent, since writers are alike; then the commit."""
    shard = me.todo[0]
    is_early = bug == "commit before part" and me.put == WHOLE >> 1 and world.commits[shard] != number
    if me.put != WHOLE and not is_early:
        return "put", ("part", number, shard, me.put.bit_length()), None
    if bug == "lease as the guard" and me.at == "write":
        return None  # it looks whether it still holds the lease, and whether the shard is free
    return "create" if bug not in {"put instead of create-if-absent", "lease as the guard"} else "put", ("commit", shard), number


def answered(world: World, number: int, request: Request, is_taken: bool, bug: str) -> Driver:  # noqa: FBT001 - an answer, not a flag
    """What a driver is at once it has heard what became of its request, in the world as it is then."""
    me = world.drivers[number]
    if me.at == "claim":
        return _writing(world.commits) if world.job == number else Driver("discard")
    if me.at == "discard":
        return Driver("resume")
    if me.at == "take back":
        return me._replace(deletes=me.deletes[1:]) if me.deletes[1:] else _writing(me.named)
    if me.at in {"write", "replace"} and request[1][0] == "commit":
        if is_taken and world.commits[me.todo[0]] != number and bug == "loser deletes its shard's parts":
            return me._replace(at="lose")
        return _next_shard(me) if me.put == WHOLE else me
    if me.at == "write":
        me = me._replace(put=me.put << 1 | 1)
        return _next_shard(me) if me.put == WHOLE and world.commits[me.todo[0]] == number else me
    if me.at == "lose":
        return _next_shard(me)
    if me.at == "unpublish":
        return me._replace(deletes=me.deletes[1:]) if me.deletes[1:] else me._replace(at="publish", deletes=())
    if me.at == "publish":
        return Driver("finish") if is_taken else _swept(world, me, bug)
    if me.at in {"mark", "sweep"}:
        return _swept_next(me, bug)
    if me.at == "seal":
        return Driver("done") if bug == "the end is not looked at again" else Driver("look again", named=me.named)
    return Driver("dead")  # it has said that shards are missing


def _swept_next(me: Driver, bug: str) -> Driver:
    """Attempts are marked, then their parts go."""
    order = ("sweep", "mark") if bug == "parts are marked after they are swept" and _unnamed(me) else ("mark", "sweep")
    if me.at == order[0]:
        return me._replace(at=order[1])
    return Driver("dead") if NONE in me.named else Driver("seal", named=me.named)


def _next_shard(me: Driver) -> Driver:
    return Driver("write", todo=me.todo[1:]) if me.todo[1:] else Driver("finish")


def _writing(named: tuple[int, ...]) -> Driver:
    todo = tuple(shard for shard, driver in enumerate(named) if driver == NONE)
    return Driver("write", todo=todo) if todo else Driver("finish")


def looked(world: World, number: int, bug: str) -> World:
    """The world once a driver has looked at the store and decided."""
    me = world.drivers[number]
    if me.at == "off" and world.job == NONE:
        return _at(world._replace(surveys=world.surveys | 1 << number), number, Driver("claim"))
    return _at(world, number, _decided(world, me, bug))


def _decided(world: World, me: Driver, bug: str) -> Driver:
    if me.at == "off":
        return Driver("resume")
    if me.at == "resume":
        if world.is_finished():
            return Driver("finish")
        void = tuple(shard for shard, driver in enumerate(world.commits) if driver != world.counted[shard])
        return Driver("check", todo=void, named=world.counted, was_finished=world.success)
    if me.at == "check":
        lost = tuple(shard for shard, driver in enumerate(me.named) if driver != NONE and not world.is_whole(shard, driver))
        lost = tuple(sorted({*lost, *me.todo}))
        named = tuple(NONE if shard in lost else driver for shard, driver in enumerate(me.named))
        is_opened = lost or (me.was_finished and NONE in named)
        return Driver("take back", named=named, deletes=taken_back(lost, bug)) if is_opened else _writing(named)
    if me.at == "write":
        return me._replace(at="replace") if world.commits[me.todo[0]] == NONE else _next_shard(me)
    if me.at == "finish":
        return Driver("done") if world.is_finished() else Driver("list parts", written=world.manifest, was_finished=world.success)
    if me.at == "list parts":
        if bug == "parts are listed after the commits were read" and me.named:
            return _publishing(world, me._replace(listed=world.parts), bug)
        return me._replace(at="read commits", listed=world.parts)
    if me.at == "read commits":
        return _read(world, me._replace(named=world.counted), bug)
    assert me.at == "look again"
    is_same = world.success and world.manifest == me.named and NONE not in world.counted
    is_same = is_same and (world.is_swept(me.named) or world.counted == me.named)
    return Driver("done" if is_same else "finish")


def _read(world: World, me: Driver, bug: str) -> Driver:
    if NONE in me.named:
        if bug == "sweep before all is committed" and _unnamed(me):
            return Driver("mark", named=me.named, listed=me.listed)
        return Driver("unseal" if me.was_finished else "dead")
    attempts = [shard * _EACH + driver for shard, driver in enumerate(me.named)]
    if any(WHOLE not in (me.listed[attempt], world.parts[attempt]) for attempt in attempts):
        return Driver("dead")  # it has said which parts are lost
    if bug == "parts are listed after the commits were read":
        return me._replace(at="list parts", listed=())
    return _publishing(world, me, bug)


def _publishing(world: World, me: Driver, bug: str) -> Driver:
    """On to the manifest. What is wrong of the records is deleted first, and only what was there before the commits were read."""
    is_same = me.written == me.named or (bug == "manifest of other attempts is kept" and me.written is not None)
    if is_same:
        return _swept(world, me, bug)
    deletes = ((("success",),) if me.was_finished else ()) + ((("manifest",),) if me.written is not None else ())
    return me._replace(at="unpublish" if deletes else "publish", deletes=deletes)


def _swept(world: World, me: Driver, bug: str) -> Driver:
    """On to the sweep, if there is anything to delete; attempts are marked before their parts go."""
    is_early = bug in {"parts are swept without a mark", "parts are marked after they are swept"}
    at = "mark" if _unnamed(me) and not is_early else "sweep"
    is_needed = _unnamed(me) or world.surveys != 1 << world.job
    return Driver(at, named=me.named, listed=me.listed) if is_needed else Driver("seal", named=me.named)


def _unnamed(me: Driver) -> tuple[tuple[int, int], ...]:
    named = {shard * _EACH + driver for shard, driver in enumerate(me.named) if driver != NONE}
    return tuple((attempt, bits) for attempt, bits in enumerate(me.listed) if bits and attempt not in named)
