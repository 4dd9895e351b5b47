"""Ray that `m2ray extract` starts for itself is this user's alone: loopback, a token, a folder that nobody else may enter."""

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ray.conftest import environment
from tests.reference import make_minimax

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
NUM_PROMPTS = 300
"""Still at work when a signal comes."""


@pytest.fixture
def temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="m2ray-p-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    model, prompts = make_minimax(tmp_path / "model", "fp8"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "one two three"}\n' * NUM_PROMPTS, encoding="utf-8")
    inputs = ["--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "run")]
    return ["m2ray", "extract", *inputs, "--stages", "2", "--shard-tokens", "64"]


def listening(process: psutil.Process) -> set[tuple[str, str]]:
    """(process, address) of every socket on which its children wait."""
    found = set()
    for child in process.children(recursive=True):
        try:
            found |= {(child.name(), one.laddr.ip) for one in child.net_connections() if one.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


@pytest.mark.timeout(600)
def test_a_closed_terminal_and_ctrl_c_end_it_in_a_paragraph_and_it_goes_on_where_nobody_else_reaches_it(
    words: list[str], temporary: Path
) -> None:
    """One run, since Ray starts for each command."""
    env = environment(TMPDIR=str(temporary))
    assert stopped(words, env, signal.SIGHUP) == (1, "The run was stopped on request.")
    assert stopped(words, env, signal.SIGINT) == (130, "Stopped by Ctrl-C. Committed shards are kept")
    completes_unreached(words, env, temporary)


def stopped(words: list[str], env: dict[str, str], ends: signal.Signals) -> tuple[int, str]:
    """The exit code of a run that gets a signal while it loads, as a terminal sends it: Ray's processes get it too. And what is said of it."""
    started = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, start_new_session=True)
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith("load"):
            break
    os.killpg(started.pid, ends)
    _, told = started.communicate(timeout=200)
    assert "Traceback" not in told
    found = re.search(r"The run was stopped on request\.|Stopped by Ctrl-C\. Committed shards are kept", told)
    assert found, told
    return started.returncode, found[0]


def completes_unreached(words: list[str], env: dict[str, str], temporary: Path) -> None:
    """The same command goes on to the end; meanwhile it is looked at from outside."""
    started = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    sockets: set[tuple[str, str]] = set()
    modes: set[int] = set()
    process = psutil.Process(started.pid)
    while started.poll() is None:
        sockets |= listening(process)
        # What is in the folder is Ray's, and it opens that to all: none but this user comes to it.
        modes |= {stat.S_IMODE(folder.stat().st_mode) for folder in temporary.glob("m2ray-*") if (folder / "r").is_dir()}
        time.sleep(0.2)  # looks around now and then; sockets are open to the end
    printed, told = started.communicate(timeout=10)
    assert started.returncode == 0, told
    assert told == ""
    assert f"Complete: {NUM_PROMPTS} sequences" in printed
    assert {name for name, _ in sockets} >= {"gcs_server", "raylet"}
    assert {ip for _, ip in sockets} <= set(LOOPBACK), sockets
    assert modes == {0o700}
    assert list(temporary.iterdir()) == []
