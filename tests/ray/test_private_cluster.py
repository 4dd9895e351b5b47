"""Ray that `m2ray extract` starts for itself is this user's alone: loopback, a token, a folder that nobody else may enter."""

import os
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


@pytest.fixture
def temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="m2ray-p-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    model, prompts = make_minimax(tmp_path / "model", "fp8"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "one two three"}\n' * 40, encoding="utf-8")
    return ["m2ray", "extract", "--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "run"), "--stages", "2"]


def listening(process: psutil.Process) -> set[tuple[str, str]]:
    """(process, address) of every socket on which its children wait."""
    found = set()
    for child in process.children(recursive=True):
        try:
            found |= {(child.name(), one.laddr.ip) for one in child.net_connections() if one.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


def test_nobody_else_reaches_it(words: list[str], temporary: Path) -> None:
    env = environment(TMPDIR=str(temporary))
    started = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sockets: set[tuple[str, str]] = set()
    modes: set[int] = set()
    process = psutil.Process(started.pid)
    while started.poll() is None:
        sockets |= listening(process)
        # What is in the folder is Ray's, and it opens that to all: none but this user comes to it.
        modes |= {stat.S_IMODE(folder.stat().st_mode) for folder in temporary.glob("m2ray-*") if (folder / "r").is_dir()}
        time.sleep(0.1)
    assert started.stdout is not None
    assert started.returncode == 0, started.stdout.read()
    assert {name for name, _ in sockets} >= {"gcs_server", "raylet"}
    assert {ip for _, ip in sockets} <= set(LOOPBACK), sockets
    assert modes == {0o700}
    assert list(temporary.iterdir()) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ends", [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_and_ctrl_c_end_it_in_a_paragraph_and_it_goes_on(words: list[str], temporary: Path, ends: signal.Signals) -> None:
    env = environment(TMPDIR=str(temporary))
    prompts = Path(words[words.index("--prompts") + 1])
    prompts.write_text('{"text": "one two three"}\n' * 600, encoding="utf-8")
    words += ["--shard-tokens", "64"]  # still at work when the signal comes
    started = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    assert started.stdout is not None
    assert started.stderr is not None
    for line in started.stdout:
        if line.startswith("load"):
            break
    os.kill(started.pid, ends)
    _, told = started.communicate(timeout=200)
    assert "Traceback" not in told
    assert {signal.SIGHUP: "The run was stopped on request.", signal.SIGINT: "Stopped by Ctrl-C. Committed shards are kept"}[ends] in told
    assert started.returncode == {signal.SIGHUP: 1, signal.SIGINT: 130}[ends]
    again = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert "Complete: 600 sequences" in again.stdout
