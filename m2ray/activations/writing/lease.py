"""Lease: which driver is at a run. It saves a second one from working in vain; that rows count once never rests on it.

The holder creates `_lease/00000001.json`, then, every few seconds, the next number, each only if absent, and deletes the ones before. A number
gives the lease only if it is the highest once it is created, and what it follows is still there: else others have been at it since the look.
Nothing is ever overwritten, and no clock is compared with another machine's: whoever finds a lease watches by its own clock whether
another number comes. On the holder's own machine it also sees whether that process is still there. At its end a driver deletes what it created.
tests/protocol/lease.py holds this as a model, whose states are searched.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from uuid import uuid4

from pydantic import TypeAdapter

from m2ray.activations.job import utc_now
from m2ray.activations.json_record import read_record, to_json
from m2ray.activations.schema import FORMAT_VERSION, LEASE_FOLDER
from m2ray.activations.writing.holder import KILLED, Holder, own_process
from m2ray.errors import AlreadyExistsError, RunConflictError, RunDamagedError, StoreError
from m2ray.storage import Store

PERIOD_S = 5.0
"""How often a lease is renewed."""

_WATCH_S = 0.5
_TRIES = 10
_CLOSING_S = 5.0
_KEY = re.compile(rf"{LEASE_FOLDER}/(\d{{8,}})\.json")


_HOLDER = TypeAdapter(Holder)
_UNKNOWN = Holder(FORMAT_VERSION, "", "an unknown host", 0, "an unknown time", PERIOD_S)


def read_holder(store: Store) -> Holder | None:
    """Who holds the lease of a run, whether alive or not; None if nobody does. Raises StoreError."""
    newest = read_lease(store)
    return newest[1] if newest else None


def read_lease(store: Store) -> tuple[int, Holder] | None:
    """The same with the lease's number, which grows for as long as its holder lives. Raises StoreError."""
    return _newest(store)


@contextmanager
def held(
    store: Store, say: Callable[[str], None], on_lost: Callable[[str], None], *, wait: bool = False, period_s: float = PERIOD_S
) -> Iterator[bool]:
    """Hold the lease of a run for the length of a context, which gets whether another driver held it before.

    Args:
        store: the run folder.
        say: takes a line for the person who waits.
        on_lost: called on another thread, with the reason, if another driver took the lease over: this one gave no sign for too long.
        wait: wait for the end of a driver that is at work, however long that takes.
        period_s: how often the lease is renewed; another driver waits four times as long for a sign.

    Raises:
        RunConflictError: another driver is at work.
        StoreError: the store refuses.
    """
    process = Holder(FORMAT_VERSION, "", socket.gethostname(), os.getpid(), utc_now(), period_s, own_process())
    number, own, is_second = _acquire(store, process, say, wait=wait)
    lease = _Lease(store, own, number, say, on_lost)
    try:
        yield is_second
    finally:
        lease.close()


class _Lease:
    """A lease that is renewed on a thread of its own."""

    def __init__(self, store: Store, own: Holder, number: int, say: Callable[[str], None], on_lost: Callable[[str], None]) -> None:
        self._store = store
        self._own = own
        self._number = number
        self._say = say
        self._on_lost = on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Delete it, so that the next driver starts at once. A store that does not answer keeps nobody waiting for long."""
        self._ended.set()
        self._thread.join(_CLOSING_S)

    def _run(self) -> None:
        is_told = False
        while not self._ended.wait(self._own.period_s):
            taken_by: Holder | str | None
            try:
                taken_by = self._renew()
            except RunConflictError as error:  # a newer m2ray's, which this one does not understand
                taken_by = error.what.rstrip(".")
            except StoreError as error:
                if not is_told:
                    self._say(f"This driver's lease of the run could not be renewed, and is tried again: {error}")
                is_told = True
                continue
            is_told = False
            if taken_by:
                self._on_lost(f"Another driver took the run over, since this one gave no sign for {self._own.patience_s:g} s: {taken_by}.")
                return
        try:
            self._give_back()
        except (StoreError, RunConflictError) as error:
            self._say(f"This driver's lease could not be given back; the next one waits {self._own.patience_s:g} s for it: {error}")

    def _renew(self) -> Holder | str | None:
        """Create the next number and delete those before. Gives who took the lease over, if somebody did."""
        newest = self._looked()
        number = self._number + 1
        if newest and newest[1].driver == self._own.driver and _create(self._store, number, self._own, newest):
            self._number = number
            self._store.delete([key for each, key in _keys(self._store) if each < number])
            return None
        newest = _newest(self._store)
        return newest[1] if newest and newest[1].driver != self._own.driver else "one that has ended since"

    def _looked(self) -> tuple[int, Holder] | None:
        """The newest. One of this driver's that was created though its answer failed is taken as its own."""
        newest = _newest(self._store)
        if newest and newest[1].driver == self._own.driver:
            self._number = newest[0]
        return newest

    def _give_back(self) -> None:
        """The highest last: until then nobody else finds the lease free. The others' numbers are higher."""
        self._looked()
        keys = [key for number, key in sorted(_keys(self._store)) if number <= self._number]
        self._store.delete(keys[:-1])
        self._store.delete(keys[-1:])


def _acquire(store: Store, process: Holder, say: Callable[[str], None], *, wait: bool) -> tuple[int, Holder, bool]:
    """The number under which the lease was created, by whom, and whether another driver held it before."""
    is_second, refused = False, 0
    while True:
        own = replace(process, driver=uuid4().hex)  # a number that it did not get the lease by is another's
        found = _newest(store)
        if refused == _TRIES:  # of drivers that begin at once another one wins, and is found
            key = _key(found[0] + 1 if found else 1)
            raise StoreError(f"{store.where(key)} is taken, and is not listed as a file.", "If no driver is at work, delete it.")
        if found is None:
            if _create(store, 1, own, None):
                return 1, own, is_second
            refused += 1
            time.sleep(_WATCH_S)
            continue
        if not is_second and not found[1].is_dead:
            say(f"A driver may be at this run ({found[1]}): waiting up to {found[1].patience_s:g} s for a sign of it.")
        is_second = True
        now = _watched(store, found)
        if now == found:
            if _create(store, found[0] + 1, own, found):
                why = f"The driver that was at this run {KILLED} ({found[1]})" if found[1].is_dead else "None came"
                say(f"{why}: this driver takes the run over.")
                return found[0] + 1, own, is_second
            refused += 1
        elif now and not wait:
            raise RunConflictError(
                f"Another driver is at the run at {store.url}: {now[1]}.",
                "Wait for its end, or give --wait, which waits for it; `m2ray inspect` shows how far it is.",
            )
        elif now:
            refused = 0
            say(f"{now[1]} is at work: waiting for its end.")
            while now and now != (found := now):
                now = _watched(store, found)


def _watched(store: Store, found: tuple[int, Holder]) -> tuple[int, Holder] | None:
    """What is the newest once it is not `found` any more, `found` itself if it is dead or gives no sign in time, None at the end of the lease."""
    deadline = time.monotonic() + found[1].patience_s
    while (now := _newest(store)) == found and not found[1].is_dead and time.monotonic() < deadline:
        time.sleep(min(_WATCH_S, found[1].patience_s / 16))
    return now


def _newest(store: Store) -> tuple[int, Holder] | None:
    """The highest number and its holder; None if there is none."""
    while keys := sorted(_keys(store)):
        number, key = keys[-1]
        if holder := _holder(store, key):
            return number, holder
    return None


def _holder(store: Store, key: str) -> Holder | None:
    """Whose number it is; None if it is gone: renewed or given back, often between a listing and the look."""
    try:
        return read_record(store, key, _HOLDER)
    except RunDamagedError:
        return _UNKNOWN
    except StoreError:
        if store.size(key) is not None:
            raise
    return None


def _keys(store: Store) -> list[tuple[int, str]]:
    found = ((_KEY.fullmatch(key), key) for key, _ in store.list(LEASE_FOLDER))
    return [(int(match[1]), key) for match, key in found if match]


def _key(number: int) -> str:
    return f"{LEASE_FOLDER}/{number:08d}.json"


def _create(store: Store, number: int, own: Holder, before: tuple[int, Holder] | None) -> bool:
    """Whether this driver holds the lease by the number: it is the newest, its own, and what it follows is still there.

    The last two looks are for a driver that stood still since its first one, while others took the lease, renewed it and gave it back.
    """
    with suppress(AlreadyExistsError):  # which may be its own, of a request that was repeated
        store.create(_key(number), to_json(own))
    newest = _newest(store)
    is_newest = newest is not None and newest[0] == number and newest[1].driver == own.driver
    return is_newest and (before is None or _holder(store, _key(before[0])) == before[1])
