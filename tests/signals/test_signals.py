"""Each signal that ends a run, in each phase of one with Ray. Not in CI: `scripts/test signals`, some ten minutes on two cores.

Ctrl-C and a closed terminal reach all processes of a terminal's foreground group, Ray's among them; SIGTERM comes to the driver alone.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2ray.chain.stopping import GOES_ON, NOTHING_WRITTEN
from tests.ray.conftest import environment
from tests.reference import make_minimax

MARK = "M2RAY_SIGNALLED"
START_S = 240.0
END_S = 60.0
GONE_S = 15.0
"""What a busy machine may take until a phase has begun, from the signal to the driver's end, and from there to the end of Ray's last process."""

EARLY = ("survey", "starting")
"""Phases before the run is claimed."""

STOPPED = "Error: The run was stopped on request."
CTRL_C, KEPT = "Stopped by Ctrl-C.", "Committed shards are kept: the same command goes on."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("signals") / "model", "fp8")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="m2ray-s-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Signalled:
    """A run with Ray of its own, in a process group of its own as a shell makes one."""

    def __init__(self, model: Path, folder: Path, num_prompts: int) -> None:
        self.output = folder / "run"
        prompts = folder / "prompts.jsonl"
        prompts.write_text('{"text": "one two three"}\n' * num_prompts, encoding="utf-8")
        paths = ["--model", str(model), "--prompts", str(prompts), "--output", str(self.output)]
        self._words = ["m2ray", "extract", *paths, "--stages", "2", "--shard-tokens", "64"]
        self._env = environment(TMPDIR=str(folder), **{MARK: str(folder)})
        self._mark = f"{MARK}={folder}".encode()
        self.lines: list[str] = []

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._words, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        stdout = self.process.stdout
        assert stdout is not None
        self._reader = threading.Thread(target=self._read, args=(stdout,), daemon=True)
        self._reader.start()

    def _read(self, stdout: "Iterator[str]") -> None:
        for line in stdout:
            self.lines.append(line)

    def reach(self, phase: str) -> None:
        """Wait until a phase has begun."""
        deadline = time.monotonic() + START_S
        while not self._is_in(phase):
            assert self.process.poll() is None, f"{phase} never came: {self.lines} {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, f"{phase} never came: {self.lines}"
            time.sleep(0.005)

    def _is_in(self, phase: str) -> bool:
        if phase == "running":
            return len(self.commits()) >= 2
        if phase == "finishing":
            sizes = [int(found[1].replace(",", "")) for line in self.lines if (found := re.search(r"tokens in ([\d,]+) shards", line))]
            return bool(sizes) and len(self.commits()) == sizes[0]
        said = {"survey": "survey:", "starting": "cluster: starting Ray", "loading": "load:"}[phase]
        return any(line.startswith(said) for line in list(self.lines))

    def commits(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.output / "_commits").glob("shard-*.json")}

    def blow(self, ends: signal.Signals) -> tuple[int, list[str], float]:
        """Its exit code, the lines of stderr, and what that took."""
        began = time.monotonic()
        if ends is signal.SIGTERM:
            os.kill(self.process.pid, ends)
        else:
            os.killpg(self.process.pid, ends)
        self.process.wait(2 * END_S)
        took_s = time.monotonic() - began
        assert self.process.stderr is not None
        told = self.process.stderr.read()
        return self.process.returncode, [line for line in told.splitlines() if line.strip()], took_s

    def left(self) -> list[str]:
        """The commands of those of its processes that are still there a while after its end."""
        deadline = time.monotonic() + GONE_S
        while (left := list(self._marked())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _marked(self) -> Iterator[str]:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark in (process / "environ").read_bytes().split(b"\0"):
                    yield (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue

    def end(self) -> None:
        """Whatever became of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def complete(self) -> None:
        """The same command goes on to the end."""
        done = subprocess.run(self._words, env=self._env, capture_output=True, text=True, timeout=START_S, check=False)
        assert done.returncode == 0, done.stderr
        assert (self.output / "_SUCCESS").exists()


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda ends: ends.name)
@pytest.mark.parametrize("phase", ["survey", "starting", "loading", "running", "finishing"])
@pytest.mark.timeout(600)
def test_a_signal_ends_a_run_in_a_paragraph_and_leaves_its_commits_and_no_process(
    ends: signal.Signals, phase: str, model: Path, temporary: Path
) -> None:
    run = Signalled(model, temporary, 200_000 if phase == "survey" else 300)
    run.start()
    try:
        run.reach(phase)
        before = run.commits()
        code, told, took_s = run.blow(ends)
    finally:
        run.end()
    assert took_s < END_S
    assert "Traceback" not in "".join(run.lines)
    if phase == "finishing" and code == 0:  # nothing was left to be broken off
        assert told == []
        assert (run.output / "_SUCCESS").exists()
    elif ends is signal.SIGINT:
        assert (code, told) == (130, [f"{CTRL_C} {NOTHING_WRITTEN if phase in EARLY else KEPT}"])
    else:
        assert (code, told) == (1, [f"{STOPPED} {NOTHING_WRITTEN if phase in EARLY else GOES_ON}"])
    assert run.left() == []
    if phase in EARLY:
        assert not run.output.exists() or not list(run.output.rglob("*"))
        return
    after = run.commits()
    assert before.items() <= after.items()
    run.complete()
    assert after.items() <= run.commits().items()
