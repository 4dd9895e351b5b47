"""Holder: the driver's process that holds a lease, and whether it lives, as far as its own machine can tell."""

import os
from dataclasses import dataclass
from pathlib import Path

KILLED = "ended without a word: it was killed, most often for lack of memory, which dmesg or journalctl -k of its machine tells"
"""What became of a driver whose process is gone and whose lease is there."""

_PATIENCE_PERIODS = 4
_LONGEST_PERIOD_S = 15.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: a driver process. `driver` is unlike any other's; `since` is UTC, ISO 8601, for people.

    `process` is the boot of its machine, its process namespace and its start there, with single spaces; empty where the system does not tell.
    """

    format_version: int
    driver: str
    host: str
    pid: int
    since: str
    period_s: float
    process: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host!r}, since {self.since}"

    @property
    def patience_s(self) -> float:
        """How long it may give no sign."""
        return _PATIENCE_PERIODS * min(max(self.period_s, 0.0), _LONGEST_PERIOD_S)

    @property
    def is_dead(self) -> bool:
        """Whether it surely is no more. False on another machine, in another container, and wherever that cannot be told."""
        machine, _, start = self.process.rpartition(" ")
        return bool(machine) and machine == _machine() and not _may_live(self.pid, start)

    @property
    def is_here(self) -> bool:
        """Whether its process is one of this machine, whose end `is_dead` tells."""
        machine = self.process.rpartition(" ")[0]
        return bool(machine) and machine == _machine()


def own_process() -> str:
    """What tells this process from all others that `_machine` ever runs, and from those of any other one."""
    machine = _machine()
    return f"{machine} {_state_and_start(os.getpid())[1]}" if machine else ""


def _machine() -> str:
    """This boot of the machine and the namespace of this process's number; empty where /proc is absent or shows another namespace."""
    try:
        is_own = str(Path("/proc/self").readlink()) == str(os.getpid())
        boot, namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/pid").readlink()
    except OSError:
        return ""
    return f"{boot} {namespace}" if is_own else ""


def _may_live(pid: int, start: str) -> bool:
    """Whether process `pid`, started at `start`, may still be there. A number that went on to another process has another start."""
    try:
        state, now = _state_and_start(pid)
    except (FileNotFoundError, ProcessLookupError):
        return _exists(pid)
    except OSError:
        return True
    return now == start and state not in {"Z", "X"}  # ended, though nobody has asked for its exit code yet


def _state_and_start(pid: int) -> tuple[str, str]:
    """State and start, in clock ticks since the boot, of a process."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()  # the name before may hold anything
    return fields[0], fields[19]


def _exists(pid: int) -> bool:
    """Whether a process has this number: where /proc hides other users' processes, they look absent there."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
