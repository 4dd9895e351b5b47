"""Who only looks waits 30 s at most for a store that does not answer, and is told what is to be done."""

import errno
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from ray.exceptions import RpcError

from m2ray.activations.job import JOB_KEY, read_job
from m2ray.activations.reading.verify import verify
from m2ray.activations.writing.commits import claim_run, reopen
from m2ray.activations.writing.lease import held
from m2ray.cli import main
from m2ray.cli import submit as submitting
from m2ray.errors import RunConflictError, StoreError
from m2ray.storage import LocalStore, connect, local, open_store
from m2ray.storage.address import parse_address
from tests.unit import activation_runs as runs


@pytest.fixture(params=["silent", "gone"])
def endpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that takes connections and says nothing, and none at all."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        if request.param == "gone":
            server.close()
        yield f"http://127.0.0.1:{server.getsockname()[1] if request.param == 'silent' else 9}"


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "{}"],
        ["verify", "{}"],
        ["plan", "--model", "{}", "--gpus", "8xH100-80GB"],
        ["doctor", "--model", "{}"],
    ],
    ids=lambda words: words[0],
)
def test_a_store_that_does_not_answer(words: list[str], endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "LOOKING", connect.Patience(1, 1))
    url = f"s3://bucket/run?endpoint={endpoint}"
    began = time.monotonic()
    ended = CliRunner().invoke(main, [word.format(url) for word in words])
    assert time.monotonic() - began < 30
    assert ended.exit_code == 1
    assert "s3://bucket/run" in ended.output
    assert "Traceback" not in ended.output


def test_the_patience_of_who_looks() -> None:
    assert 2 * sum(connect.LOOKING) < 30
    with connect.looking():
        store: Any = connect.connect(parse_address("s3://bucket/run"))
        assert store.client_options["timeout"] == "10s"
        assert store.retry_config["retry_timeout"].total_seconds() == 4
    assert connect.patience() == connect.AT_WORK


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
@pytest.mark.parametrize("secret", ["?X-Amz-Signature=abcdef", "?sig=abcdef", "#abcdef"])
def test_an_endpoint_that_holds_a_signature_is_refused(name: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"https://user:word@host/{secret}")
    with pytest.raises(StoreError, match="https://host/ comes with a user, a query or a fragment") as raised:
        open_store("s3://bucket/run")
    monkeypatch.delenv(name)
    with pytest.raises(StoreError) as of_url:
        open_store(f"s3://bucket/run?endpoint=https://host/{secret}&X-Amz-Credential=abcdef")
    assert "abcdef" not in f"{raised.value}{of_url.value}"
    assert "word@" not in str(raised.value)


def full(path: Path, monkeypatch: pytest.MonkeyPatch, **found: int) -> str:
    usual = {"f_bavail": 0, "f_frsize": 4096, "f_files": 1000, "f_favail": 900}
    monkeypatch.setattr(local.os, "statvfs", lambda _: SimpleNamespace(**{**usual, **found}))

    def no_room(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local.os, "writev", no_room)
    with pytest.raises(StoreError) as raised:
        LocalStore(path).create("key", b"data")
    return raised.value.remedy


def test_inodes_that_run_out_are_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert full(tmp_path, monkeypatch).startswith("The disk is full: free space")
    assert full(tmp_path, monkeypatch, f_bavail=100_000, f_favail=0).startswith(
        "The disk has 409,600,000 bytes left, but no inode: it holds 1,000 files"
    )
    assert full(tmp_path, monkeypatch, f_bavail=100_000, f_files=0, f_favail=0).startswith("The disk has 409,600,000 bytes left by now")


def test_lost_and_found_is_passed_over_and_no_other_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the top of every ext4 disk there is one that root alone may enter."""
    (tmp_path / "prompts.txt").write_text("a")
    (tmp_path / "lost+found").mkdir()
    scandir: Callable[..., Any] = os.scandir

    def refused(folder: Any) -> Any:
        if Path(folder).name in ("lost+found", "private"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(local.os, "scandir", refused)
    assert [key for key, _ in LocalStore(tmp_path).list("")] == ["prompts.txt"]
    (tmp_path / "prompts.txt").unlink()
    assert read_job(LocalStore(tmp_path)) is None
    (tmp_path / "private").mkdir()
    with pytest.raises(StoreError, match="private"):
        list(LocalStore(tmp_path).list(""))


# -- a person is told ---------------------------------------------------------------------------------------------------


def killed_driver(store: LocalStore) -> None:
    """The lease of a process that was killed."""
    pid = os.fork()
    if pid == 0:
        with held(store, print, print):
            os._exit(0)
    os.waitpid(pid, 0)


def test_a_driver_that_was_killed_is_told_by_inspect_and_the_next_start(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    claim_run(store, runs.job(store))
    killed_driver(store)
    told = CliRunner().invoke(main, ["inspect", str(tmp_path / "run")])
    assert "ended without a word: it was killed, most often for lack of memory" in told.output
    said: list[str] = []
    with held(store, said.append, said.append):
        assert "ended without a word: it was killed" in said[-1]


def test_repair_names_what_it_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    store = LocalStore(folder)
    run = runs.finished_run(store)
    part = min((folder / "data").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    before = {key for key, _ in store.list("")}
    told = CliRunner().invoke(main, ["verify", str(folder), "--repair"])
    deleted = sorted(before - {key for key, _ in store.list("")})
    assert deleted == ["_SUCCESS", "_commits/shard-000000.json", "manifest.parquet"]
    assert f"Deleted: {len(deleted)} files" in told.output
    assert [key for key in deleted if f"  {key}\n" not in told.output] == []
    assert reopen(store, run.job, []) == []
    assert not verify(store, checksums=False, threads=1).damages


def test_a_folder_that_was_renamed_gets_advice_that_works(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    claim_run(store, runs.job(store))
    (tmp_path / "run").rename(tmp_path / "renamed")
    store.put("data/site=residual/layer=000/shard-000000-a.parquet", b"")
    with pytest.raises(RunConflictError, match=r"renamed, moved or deleted while a driver was at work\. Give the folder's new name"):
        read_job(store)
    assert read_job(LocalStore(tmp_path / "renamed")) is not None
    assert store.size(JOB_KEY) is None


class Client:
    """Ray's, of a job that runs on."""

    def __init__(self, **info: Any) -> None:
        self.info = SimpleNamespace(**info)
        self.stopped: list[str] = []

    def submit_job(self, **given: Any) -> str:
        self.given = given
        return "job-1"

    def get_job_info(self, _job_id: str) -> Any:
        return self.info

    def stop_job(self, job_id: str) -> None:
        self.stopped.append(job_id)


def submit(client: Client, log: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Result:
    monkeypatch.setattr(submitting, "_client", lambda _: client)
    monkeypatch.setattr(submitting, "_print_log", log)
    words = ["--working-dir", str(tmp_path), "--model", "/m", "--prompts", "/p", "--output", "/o"]
    return CliRunner().invoke(main, ["submit", *words])


async def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


async def ended(*_: object) -> None:
    return


def test_ctrl_c_at_the_question_says_that_the_job_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: object, **__: object) -> None:
        raise click.Abort

    monkeypatch.setattr(click, "confirm", again)
    client = Client()
    told = submit(client, interrupted, monkeypatch, tmp_path)
    assert (told.exit_code, client.stopped) == (130, [])
    assert "Job job-1 runs on. Its log: ray job logs --follow job-1; to stop it: ray job stop job-1" in told.stderr
    assert "Aborted" not in told.output


@pytest.mark.parametrize(
    ("named", "told"), [("127.0.0.1:1", "127.0.0.1:1 cannot be used: Timed out"), ("", "http://127.0.0.1:8265 cannot be used: Timed out")]
)
def test_the_cluster_that_ray_address_names_is_asked_and_its_silence_is_one_paragraph(
    named: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray looks for the dashboard behind HOST:PORT by an error of its own."""

    class Silent(Client):
        def submit_job(self, **_: Any) -> str:
            raise RpcError("Timed out while waiting for GCS to become available.")

    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", named)
    found = submit(Silent(), ended, monkeypatch, tmp_path)
    assert found.exit_code == 1
    assert found.stderr.startswith(f"Error: The Ray dashboard at {told}")
    assert "such as http://HEAD:8265" in found.stderr


def test_a_job_brings_this_m2ray_and_what_its_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder where one stands, whose names need not be the cluster's; flags win."""
    (tmp_path / "job.toml").write_text(
        'model = "Qwen/Qwen3-0.6B"\nprompts = "/p"\noutput = "/o"\nlayers = "0"\nlimit = 5\ncompile = false\nwait = true\n'
        "add_generation_prompt = false\ntemplate_options = {enable_thinking = false}\n"
    )
    monkeypatch.chdir(tmp_path)
    client = Client()
    monkeypatch.setattr(submitting, "_client", lambda _: client)
    told = CliRunner().invoke(main, ["submit", "job.toml", "--layers", "1,2", "--no-wait"])
    assert told.exit_code == 0, told.output
    python, *words = shlex.split(client.given["entrypoint"])
    assert (python, words[:5]) == ("python", ["-P", "-m", "m2ray.cli", "extract", "--in-job"])
    assert set(words[5:]) == {
        *("--model=Qwen/Qwen3-0.6B", "--prompts=/p", "--output=/o", "--layers=1,2", "--limit=5", "--compile=false", "--wait"),
        '--template-options={"enable_thinking": false}',
    }
    assert client.given["runtime_env"]["py_modules"] == [str(Path(submitting.__file__).parents[1])]
    (tmp_path / "prompts.jsonl").write_text("{}")
    relative = ["submit", "job.toml", "--prompts", "prompts.jsonl", "--output", "run", "--no-wait"]
    refused = CliRunner().invoke(main, relative)
    assert refused.exit_code == 1
    assert "2 problems" in refused.stderr
    assert "prompts = 'prompts.jsonl' is relative" in " ".join(refused.stderr.split())
    brought = CliRunner().invoke(main, [*relative[:-2], "/o", "--no-wait", "--working-dir", "."])
    assert brought.exit_code == 0, brought.output
    assert client.given["runtime_env"]["working_dir"] == str(tmp_path)


@pytest.mark.parametrize(
    ("exit_code", "words", "returned"),
    [
        (-9, "Its driver was ended by SIGKILL: most often a node ran out of memory.", 137),
        (137, "Its driver was ended by SIGKILL: most often a node ran out of memory.", 137),  # as the shell around it says
        (None, "Its driver is gone (The actor died.): most often", 1),
        (3, "", 3),
        (130, "", 130),
    ],
)
def test_a_job_that_was_killed(exit_code: int | None, words: str, returned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(status="FAILED", driver_exit_code=exit_code, message="The actor died.\nMore.")
    told = submit(client, ended, monkeypatch, tmp_path)
    assert told.exit_code == returned
    assert words in told.stderr
    assert ("Its driver" in told.stderr) == bool(words)


# -- actors -------------------------------------------------------------------------------------------------------------


def test_a_stage_that_is_about_to_start_does_not_once_the_chain_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain's thread starts stages one by one while another thread ends the run."""
    from m2ray.chain import actors
    from m2ray.errors import StageError

    started: list[int] = []
    killed: list[int] = []
    second, may_go_on = threading.Event(), threading.Event()

    class Started:
        def options(self, **_: Any) -> "Started":
            return self

        def remote(self, *_: Any, **__: Any) -> int:
            started.append(len(started))
            if len(started) == 2:
                second.set()
                may_go_on.wait(10)
            return started[-1]

    room = SimpleNamespace(num_cpus=1, num_gpus=0)
    reservation: Any = SimpleNamespace(rooms=[room] * 4, places=[(None, 0)] * 4)
    monkeypatch.setattr(actors, "actor_class", lambda _: Started())
    monkeypatch.setattr(actors, "PlacementGroupSchedulingStrategy", lambda *_: None)
    monkeypatch.setattr(actors.ray, "kill", killed.append)
    chain = actors.Actors([[SimpleNamespace(threads=1, wave_tokens=0)]] * 4, reservation, "auto", 1.0, 1.0)  # type: ignore[list-item]

    def start() -> None:
        with suppress(StageError):
            chain.start(0)

    thread = threading.Thread(target=start)
    thread.start()
    assert second.wait(10)
    ending = threading.Thread(target=chain.end)
    ending.start()
    may_go_on.set()
    thread.join(10)
    ending.join(10)
    assert sorted(killed) == started
    with pytest.raises(StageError, match="was ended"):
        chain.start(1)
