"""One `m2ray extract` at work, started as a user would: by hand, or as a Ray job."""

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.faults.cluster import Cluster
from tests.ray.conftest import REPOSITORY

_COMMAND = [sys.executable, "-m", "m2ray.cli", "extract"]


class Driver:
    """A driver process and what it prints. Its client is the process itself, or `ray job submit`, which follows the job."""

    def __init__(self, cluster: Cluster, output: str, words: Sequence[str], log: Path, *, as_job: bool) -> None:
        self._cluster = cluster
        self.output = output
        self.model = Path(words[words.index("--model") + 1])
        self._words = words
        self._log = log
        self._job = f"faults-{uuid.uuid4().hex[:8]}" if as_job else None
        command = [*_COMMAND, "--output", output, *words]
        if self._job:
            command = ["ray", "job", "submit", "--address", cluster.dashboard, "--submission-id", self._job, "--", *command]
        with log.open("wb") as file:
            self._client = subprocess.Popen(command, cwd=REPOSITORY, env=cluster.env, stdout=file, stderr=subprocess.STDOUT)
        self.was_killed = False
        self._process: int | None = None
        """The process that was paused: a second driver of the same run has the same words."""

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._client.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs. `ray job submit` itself gives 0 for a job that was stopped; one that had completed by then was not."""
        code = self._client.poll()
        was_stopped = self._job and f"'{self._job}' was stopped" in self.printed and "\nComplete: " not in self.printed
        return 1 if code == 0 and was_stopped else code

    @property
    def num_restarts(self) -> int:
        """How often it has said that it goes on after a failure."""
        return len(self.tried_again)

    @property
    def tried_again(self) -> list[int]:
        """The shards in flight at each failure, as it has said."""
        return [int(number) for number in re.findall(r"(\d+) shards in flight are tried again", self.printed)]

    @property
    def error(self) -> str:
        """Its error message, if it stopped with one."""
        found = re.search(r"^Error: (.*)", self.printed, re.MULTILINE)
        return found[1] if found else ""

    def kill(self) -> bool:
        """SIGKILL the driver process. Gives whether it was there."""
        pid = self._pid()
        if pid is None:
            return False
        self.was_killed = True
        os.kill(pid, signal.SIGKILL)
        return True

    def pause(self) -> bool:
        """SIGSTOP the driver process, until `go_on`. Gives whether it was there."""
        return self._signal(signal.SIGSTOP)

    def go_on(self) -> bool:
        return self._signal(signal.SIGCONT)

    def interrupt(self) -> None:
        """Ctrl-C, for a driver that was started by hand."""
        self._client.send_signal(signal.SIGINT)

    def another(self) -> "Driver":
        """A second driver of the same run, started by hand."""
        return Driver(self._cluster, self.output, self._words, self._log.with_suffix(".second.log"), as_job=False)

    def _signal(self, signum: signal.Signals) -> bool:
        with suppress(ProcessLookupError):
            if self._process is None:
                self._process = self._pid()
            if self._process is not None:
                os.kill(self._process, signum)
                return True
        return False

    def ask_to_stop(self) -> None:
        """`ray job stop`, or the signal that it sends."""
        if self._job:
            words = ["ray", "job", "stop", "--address", self._cluster.dashboard, self._job]
            subprocess.run(words, env=self._cluster.env, capture_output=True, timeout=120, check=False)
        else:
            self._client.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> None:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        self._client.wait(timeout_s)

    def end(self) -> None:
        """Leave nothing of it behind."""
        self.kill()
        if self.is_running:
            self._client.kill()
        self._client.wait(30)

    def _pid(self) -> int | None:
        """The process that runs `m2ray extract` for this output: in a job, Ray's supervisor started it."""
        wanted = [*(word.encode() for word in _COMMAND), b"--output", self.output.encode()]
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "cmdline").read_bytes().split(b"\0")[: len(wanted)] == wanted:
                    return int(folder.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return None
