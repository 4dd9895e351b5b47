"""Memory that processes of one node have together: one copy, which lives as long as anybody has it, and no name that is left behind."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from m2ray.errors import StageError
from m2ray.model.residency import node_memory
from m2ray.model.residency.node_memory import NodeMemory, Porter

NUM_BYTES = 8 * 2**20
PATTERN = torch.arange(256, dtype=torch.uint8).repeat(NUM_BYTES // 256)

OTHER = """
import sys, time
import torch
from m2ray.model.residency.node_memory import NodeMemory, Porter
filled, unfilled = (NodeMemory(name, int(sys.argv[1])) for name in sys.argv[2:])
porter = Porter()
porter.look_after(filled)
porter.look_after(unfilled)
memory = filled.map(writable=True)
memory.copy_(torch.arange(256, dtype=torch.uint8).repeat(len(memory) // 256))
filled.offer()
print(filled.is_ours, unfilled.is_ours, flush=True)
time.sleep(600)
"""


@pytest.fixture
def names() -> list[str]:
    return [f"test-{os.getpid()}-{kind}" for kind in ("filled", "unfilled")]


@pytest.fixture
def other(names: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that has filled one piece of memory and not yet another."""
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(NUM_BYTES), *names], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True True\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def porter() -> Iterator[Porter]:
    porter = Porter()
    yield porter
    porter.close()


def listening() -> dict[str, str]:
    """The sockets at which layers are asked for on this machine: by address, the inode."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines() if f"@m2ray-{os.getuid()}-" in line]
    return {line[7]: line[6] for line in lines}


def wait_until_others_listen(before: dict[str, str]) -> None:
    """Until somebody else listens at each of these addresses."""
    while any(listening().get(address) in (None, inode) for address, inode in before.items()):
        time.sleep(0.01)


def mapped_bytes(pid: int, what: str) -> int:
    """Rss or Pss of what a process maps of such memory."""
    found, is_ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_ours = "memfd:m2ray" in line
        elif is_ours and line.startswith(f"{what}:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.timeout(60)
def test_two_processes_have_one_copy_that_outlives_the_one_that_filled_it(
    other: subprocess.Popen[str], names: list[str], porter: Porter
) -> None:
    mine, theirs = (NodeMemory(name, NUM_BYTES) for name in names)
    porter.look_after(mine)
    porter.look_after(theirs)
    assert not mine.is_ours
    mine.wait(30)
    memory = mine.map(writable=False)
    assert torch.equal(memory, PATTERN)
    assert [mapped_bytes(pid, "Rss") for pid in (other.pid, os.getpid())] == [NUM_BYTES, NUM_BYTES]
    assert [mapped_bytes(pid, "Pss") for pid in (other.pid, os.getpid())] == [NUM_BYTES // 2, NUM_BYTES // 2]

    listened = {address: inode for address, inode in listening().items() if address.endswith(names[0])}
    assert len(listened) == 1
    waiting = threading.Thread(target=theirs.wait, args=(30,))
    waiting.start()
    other.kill()
    other.wait()
    waiting.join(30)
    assert theirs.is_ours, "what was not filled is to be filled by one that waits"
    assert torch.equal(memory, PATTERN)
    assert mapped_bytes(os.getpid(), "Pss") == NUM_BYTES
    wait_until_others_listen(listened)
    again = NodeMemory(names[0], NUM_BYTES)
    assert not again.is_ours
    again.wait(30)
    assert torch.equal(again.map(writable=True), PATTERN)
    assert not [name for name in os.listdir("/dev/shm") if "m2ray" in name and str(os.getpid()) in name]
    for each in (mine, again):
        each.close()
    assert torch.equal(memory, PATTERN), "what is mapped stays"
    anew = NodeMemory(names[0], NUM_BYTES)
    if not anew.is_ours:
        anew.wait(30)
    assert anew.is_ours, "nobody has it any more"
    anew.close()


@pytest.mark.timeout(60)
def test_memory_that_does_not_come_or_is_another_is_said(names: list[str], porter: Porter) -> None:
    filled, unfilled = (NodeMemory(name, NUM_BYTES) for name in names)
    porter.look_after(filled)
    filled.offer()
    with pytest.raises(StageError, match=rf"Another process \({os.getpid()}\) reads {NUM_BYTES:,} bytes of a layer for all of this node"):
        NodeMemory(names[1], NUM_BYTES).wait(0.1)
    with pytest.raises(StageError, match=rf"Process {os.getpid()} has handed over other memory than 4,096 bytes"):
        NodeMemory(names[0], 4096).wait(30)
    unfilled.close()


@pytest.mark.timeout(60)
def test_one_that_never_gives_anything_is_not_asked_for_ever(names: list[str]) -> None:
    """It answers each time, at once, and with nothing: no wait of a socket's ends that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as standing_in:
        standing_in.bind(f"\0m2ray-{os.geteuid()}-{names[0]}-refused")
        standing_in.listen()
        answering = threading.Thread(target=refuse_all, args=(standing_in,))
        answering.start()
        waiting = NodeMemory(f"{names[0]}-refused", NUM_BYTES)
        assert not waiting.is_ours
        begin = time.process_time()
        with pytest.raises(StageError, match="was not done in time"):
            waiting.wait(0.5)
        assert time.process_time() - begin < 0.3, "it is asked now and then"
        standing_in.shutdown(socket.SHUT_RDWR)
        answering.join(30)


@pytest.mark.timeout(60)
def test_the_collector_may_end_a_piece_on_the_thread_that_hands_it_out(
    names: list[str], porter: Porter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage whose load failed is found by it at any moment, as this thread makes an object."""
    name, found = f"{names[0]}-left", node_memory._peer
    piece = NodeMemory(name, NUM_BYTES)
    porter.look_after(piece)
    held = [piece.map(writable=True)]
    weakref.finalize(held[0], piece.leave).atexit = False
    piece.offer()

    def collecting(connection: socket.socket) -> tuple[int, int, int]:
        if threading.current_thread().name == "packed, handed out":
            held.clear()
        return found(connection)

    monkeypatch.setattr(node_memory, "_peer", collecting)
    other = NodeMemory(name, NUM_BYTES)
    other.wait(30)
    assert not other.is_ours
    assert not held
    other.close()
    while not piece.is_closed:
        time.sleep(0.01)


def refuse_all(listening: socket.socket) -> None:
    """Take each connection and end it, until nobody listens any more."""
    with suppress(OSError):
        while True:
            listening.accept()[0].close()


def test_memory_that_is_not_to_be_had_leaves_no_name_and_no_descriptor(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(StageError, match=rf"{NUM_BYTES:,} bytes of memory for all processes.* Cannot allocate memory"):
            NodeMemory(f"{names[0]}-refused", NUM_BYTES)
    assert descriptors() <= before
    again = NodeMemory(f"{names[0]}-refused", NUM_BYTES)
    assert again.is_ours
    again.close()


def descriptors() -> set[str]:
    """This process's of such memory: each has a number of its own as long as it is open."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            found |= {path.name} if "memfd:m2ray" in os.readlink(path) else set()
    return found
