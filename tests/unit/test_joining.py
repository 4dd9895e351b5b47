"""A Ray of this machine's own that does not start."""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Timer, current_thread
from typing import NoReturn

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from m2ray.chain import joining
from m2ray.chain.joining import cluster, cluster_ahead, wait_for
from m2ray.errors import ClusterError


def test_a_ray_that_does_not_start_in_time_is_told_in_one_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is where the temporary folder fills while it starts."""

    def init(**_: object) -> NoReturn:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - what Ray raises

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(ClusterError, match=r"could not be started on this machine: The current node.*Free: .* bytes in .*TMPDIR"),
        cluster(1),
    ):
        pytest.fail("it started")


class FakeRay:
    """What Ray's own state is to `cluster`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.is_there = False
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray, "is_initialized", lambda: self.is_there)
        monkeypatch.setattr(ray, "init", lambda **_: self.say("started", is_there=True))
        monkeypatch.setattr(ray, "shutdown", lambda: self.say("ended", is_there=False))

    def say(self, word: str, *, is_there: bool) -> None:
        self.told.append(word)
        self.is_there = is_there


def test_calls_in_several_threads_share_one_cluster_and_the_last_one_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, together, first_is_done = FakeRay(monkeypatch), Barrier(2, timeout=30), Event()

    def call(place: int) -> list[str]:
        with cluster(1):
            together.wait()
            if place:
                assert first_is_done.wait(30)
            inside = list(fake.told)
        first_is_done.set()
        return inside

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == [["started"], ["started"]]
    assert fake.told == ["started", "ended"]
    with cluster(1):
        assert fake.is_there
    assert fake.told == ["started", "ended"] * 2


def test_whoever_is_connected_already_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    fake.is_there = True
    with cluster(1), cluster(1):
        pass
    assert fake.told == []


def test_a_cluster_that_starts_beside_other_work_is_shared_and_ends_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, may_start = FakeRay(monkeypatch), Event()
    monkeypatch.setattr(ray, "init", lambda **_: may_start.wait(30) and fake.say("started", is_there=True))
    with cluster_ahead(1, print) as begun:
        assert not begun.done()
        may_start.set()
        with cluster(1):
            assert fake.told == ["started"]
        assert fake.is_there
    assert fake.told == ["started", "ended"]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Short enough for the sockets of Ray."""
    with tempfile.TemporaryDirectory(prefix="m2-", dir="/tmp") as folder:
        yield Path(folder)


def test_ray_ends_before_the_thread_that_started_it_and_second_thoughts_do_not_break_that_off(
    monkeypatch: pytest.MonkeyPatch, short_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel kills Ray's processes with that thread, and ray.shutdown waits a minute for what is dead, and then ends this process."""
    fake, may_start, starters = FakeRay(monkeypatch), Event(), []
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))

    def init(_temp_dir: str, **_: object) -> None:
        starters.append(current_thread())
        assert may_start.wait(30)
        (Path(_temp_dir)).mkdir()
        fake.say("started", is_there=True)

    def shutdown() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        fake.say(f"ended, its starter alive: {starters[0].is_alive()}", is_there=False)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", shutdown)
    with pytest.raises(KeyboardInterrupt), cluster_ahead(1, print):
        Timer(0.2, may_start.set).start()
        os.kill(os.getpid(), signal.SIGINT)
    assert fake.told == ["started", "ended, its starter alive: True"]
    assert list(short_folder.iterdir()) == []
    assert capsys.readouterr().out == "Ray is being started, and ends as soon as it is there.\n"


def test_a_closed_terminal_does_not_end_rays_processes_before_the_run_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP goes to all processes of the terminal's foreground group."""
    fake, outlived = FakeRay(monkeypatch), []

    def init(**_: object) -> None:
        outlived.append(subprocess.run(["sh", "-c", "kill -HUP $$; echo there"], capture_output=True, timeout=30, check=False).stdout)
        fake.say("started", is_there=True)

    monkeypatch.setattr(ray, "init", init)
    with cluster(1):
        pass
    with cluster_ahead(1, print) as begun:
        wait_for(begun)
    assert outlived == [b"there\n"] * 2
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, []), "this process hears of it"


def test_a_ray_that_hangs_is_neither_waited_for_without_end_nor_held_once_it_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, may_start = FakeRay(monkeypatch), Event()
    monkeypatch.setattr(ray, "init", lambda **_: may_start.wait(30) and fake.say("started", is_there=True))
    monkeypatch.setattr(joining, "START_S", 0.1)
    begin = time.monotonic()
    with pytest.raises(ClusterError, match="Ray is not there after 0.1 s"), cluster_ahead(1, print) as begun:
        wait_for(begun)
    assert time.monotonic() - begin < 5
    (holding,) = (thread for thread in threading.enumerate() if thread.name == "cluster")
    assert holding.daemon, "the program's end does not wait for it"
    assert capsys.readouterr().out.endswith("Ray is not there after 0.1 s, and is left behind.\n")
    with pytest.raises(ClusterError, match="Ray is not there after 0.1 s"), cluster(1):
        pytest.fail("another thread of this process is still at it")
    may_start.set()
    holding.join(30)
    assert fake.told == ["started", "ended"]


def test_a_cluster_that_cannot_be_joined_beside_other_work_is_told_of_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with cluster_ahead(1, print) as begun, pytest.raises(ClusterError, match="cannot be joined"):
        begun.result(30)


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """What a cluster's head says to whoever asks for its id."""

    def __init__(self, refusal: grpc.StatusCode | None) -> None:
        self.refusal = refusal

    def GetClusterId(self, request: object, context: grpc.ServicerContext) -> object:  # noqa: N802 - Ray's name
        if self.refusal is not None:
            context.abort(self.refusal, "Authentication token is missing or incorrect")
        return gcs_service_pb2.GetClusterIdReply()


@pytest.mark.parametrize("refusal", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED, None])
def test_a_token_that_is_refused_is_told_in_one_paragraph_before_ray_tries_it_again_and_again(
    monkeypatch: pytest.MonkeyPatch, refusal: grpc.StatusCode | None
) -> None:
    fake, head = FakeRay(monkeypatch), grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(refusal), head)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.add_insecure_port('127.0.0.1:0')}")
    head.start()
    try:
        if refusal is grpc.StatusCode.UNAUTHENTICATED:
            with pytest.raises(ClusterError, match="refuses the token.*RAY_AUTH_TOKEN"), cluster(10):
                pytest.fail("it was joined")
            assert "started" not in fake.told
        else:
            with cluster(10):
                assert fake.told == ["started"]
    finally:
        head.stop(None).wait(10)
