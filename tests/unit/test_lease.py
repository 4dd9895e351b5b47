"""The lease: a second driver is refused by name or waits, a dead one is outlived, and an end is seen at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from m2ray.activations.job import read_job
from m2ray.activations.writing.holder import KILLED, Holder
from m2ray.activations.writing.lease import held, read_holder
from m2ray.errors import M2rayError, RunConflictError, StoreError
from m2ray.storage import LocalStore

PERIOD_S = 0.4
"""A driver is given up after 1.6 s."""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


class Driver:
    """What one driver was told."""

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        self.lines: list[str] = []
        self.lost = threading.Event()

    def at_work(self, *, wait: bool = False):
        return held(self.store, self.lines.append, lambda why: (self.lines.append(why), self.lost.set()), wait=wait, period_s=PERIOD_S)


def keys(store: LocalStore) -> list[str]:
    return sorted(key for key, _ in store.list("_lease"))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # polls; nothing rests on the interval


def test_a_lease_is_renewed_by_the_next_number_and_gone_at_the_end(store: LocalStore) -> None:
    with Driver(store).at_work() as is_second:
        assert not is_second
        assert keys(store) == ["_lease/00000001.json"]
        wait_for(lambda: "_lease/00000004.json" in keys(store))
        assert len(keys(store)) <= 2, "older numbers are deleted"
        assert read_job(store) is None, "a run may begin where a driver is at work"
    assert keys(store) == []
    with Driver(store).at_work() as is_second:
        assert not is_second, "the next one starts at once"


def test_a_driver_that_fails_gives_its_lease_back(store: LocalStore) -> None:
    with pytest.raises(StoreError), Driver(store).at_work():
        raise StoreError("the disk is full")
    assert keys(store) == []


def test_a_second_driver_is_refused_by_name(store: LocalStore) -> None:
    second = Driver(store)
    with Driver(store).at_work():
        holder = read_holder(store)
        with (
            pytest.raises(RunConflictError, match=f"Another driver is at the run at {store.url}: process {holder.pid} on .*--wait"),
            second.at_work(),
        ):
            pytest.fail("two are at work")
        assert read_holder(store).driver == holder.driver
    assert "waiting up to 1.6 s" in second.lines[0]


def test_a_second_driver_can_wait_for_the_end_of_the_first(store: LocalStore) -> None:
    first, second, order = Driver(store), Driver(store), []

    def follow() -> None:
        with second.at_work(wait=True) as is_second:
            assert is_second
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with first.at_work():
            following = pool.submit(follow)
            wait_for(lambda: any("is at work: waiting" in line for line in second.lines))
            order.append("first")
        following.result(20)
    assert order == ["first", "second"]
    assert not first.lost.is_set()
    assert keys(store) == []


class Standing(LocalStore):
    """A driver's disk that stands still on command, as its process would: what it was at goes on later."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.goes = threading.Event()
        self.goes.set()

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        self.goes.wait(20)
        return super().list(prefix)


def test_a_driver_without_a_sign_is_outlived_and_told(store: LocalStore) -> None:
    standing = Standing(store.folder)
    first, second = Driver(standing), Driver(store)
    with first.at_work():
        standing.goes.clear()
        with second.at_work() as is_second:
            assert is_second
            assert second.lines[-1] == "None came: this driver takes the run over."
            own = read_holder(store)
            standing.goes.set()
            assert first.lost.wait(20)
            assert "Another driver took the run over" in first.lines[-1]
            wait_for(lambda: read_holder(store) and keys(store) and keys(store)[-1] > "_lease/00000004.json")
            assert read_holder(store).driver == own.driver
    assert keys(store) == []


def test_a_dead_drivers_lease_is_outlived_by_one_of_many(store: LocalStore) -> None:
    dead = Holder(1, "dead", "host", 1, "2026-01-01T00:00:00+00:00", PERIOD_S)
    store.put("_lease/00000041.json", json.dumps(asdict(dead)).encode())
    won, stay = [], threading.Event()

    def drive() -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(Driver(store).at_work())
            except M2rayError:
                return
            won.append(read_holder(store).driver)
            stay.wait(20)

    with ThreadPoolExecutor(4) as pool:
        drivers = [pool.submit(drive) for _ in range(4)]
        wait_for(lambda: sum(driver.done() for driver in drivers) == 3)
        stay.set()
        for driver in drivers:
            driver.result(20)
    assert len(won) == 1
    assert keys(store) == []


HOLDER = """
import sys
from m2ray.activations.writing.lease import held
from m2ray.storage import open_store
with held(open_store(sys.argv[1]), print, print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_driver_killed_on_this_machine_is_outlived_at_once(store: LocalStore) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, store.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        try:
            assert child.stdout.readline() == "held\n"
            holder = read_holder(store)
            os.kill(child.pid, signal.SIGSTOP)
            assert not holder.is_dead
        finally:
            child.kill()
        wait_for(lambda: holder.is_dead)  # nobody has asked for its exit code yet
    assert holder.is_dead
    driver = Driver(store)
    with driver.at_work() as is_second:
        assert is_second
    assert driver.lines == [f"The driver that was at this run {KILLED} ({holder}): this driver takes the run over."]


def test_a_process_number_in_use_is_a_sign_of_its_first_process_alone(store: LocalStore) -> None:
    with Driver(store).at_work():
        own = read_holder(store)
    boot, namespace, start = own.process.split(" ")
    assert not own.is_dead
    assert replace(own, process=f"{boot} {namespace} {int(start) - 1}").is_dead, "the number went on to this process"
    assert replace(own, pid=10**12).is_dead
    for elsewhere in ("", f"another-boot {namespace} 1", f"{boot} pid:[1] 1"):
        assert not replace(own, process=elsewhere).is_dead


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_lease_that_cannot_be_read_keeps_nobody_out_for_ever(store: LocalStore, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2ray.activations.writing.lease._UNKNOWN", Holder(1, "", "an unknown host", 0, "an unknown time", PERIOD_S))
    store.put("_lease/00000007.json", content)
    driver = Driver(store)
    with driver.at_work() as is_second:
        assert is_second
        assert "_lease/00000008.json" in keys(store)
    assert "unknown host" in driver.lines[0]


def test_a_renewal_whose_answer_was_lost_is_its_own(store: LocalStore) -> None:
    class Deaf(LocalStore):
        def create(self, key: str, data) -> None:
            super().create(key, data)
            super().create(key, data)  # the answer was lost, and the request repeated

    driver = Driver(Deaf(store.folder))
    with driver.at_work() as is_second:
        assert not is_second
        wait_for(lambda: keys(store) and keys(store)[-1] >= "_lease/00000003.json")
    assert not driver.lost.is_set()


def test_a_renewal_that_landed_though_its_answer_failed_is_gone_on_with(store: LocalStore) -> None:
    class Failing(LocalStore):
        failed = 0

        def create(self, key: str, data) -> None:
            super().create(key, data)
            if key in ("_lease/00000002.json", "_lease/00000005.json"):
                self.failed += 1
                raise StoreError("no answer came")

    driver = Driver(failing := Failing(store.folder))
    with driver.at_work():
        wait_for(lambda: failing.failed == 2)
    assert keys(store) == [], "a number whose answer failed is given back too"
    assert not driver.lost.is_set()


def test_a_lease_that_a_newer_m2ray_took_is_lost(store: LocalStore) -> None:
    driver = Driver(store)
    with driver.at_work():
        store.put("_lease/00000900.json", json.dumps({"format_version": 99}).encode())
        assert driver.lost.wait(20)
    assert "has format 99" in driver.lines[-1]
    assert "_lease/00000900.json" in keys(store)


@pytest.mark.parametrize("number", [1, 8])
def test_a_number_that_is_taken_and_not_listed_is_an_error(store: LocalStore, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2ray.activations.writing.lease._WATCH_S", 0.01)
    if number == 8:
        dead = Holder(1, "dead", "host", 1, "2026-01-01T00:00:00+00:00", 0.0)
        store.put("_lease/00000007.json", json.dumps(asdict(dead)).encode())
    store.path(f"_lease/0000000{number}.json").mkdir(parents=True)
    with pytest.raises(StoreError, match=rf"_lease/0000000{number}\.json is taken, and is not listed"), Driver(store).at_work():
        pytest.fail("it holds no lease")
