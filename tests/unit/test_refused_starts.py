"""A start that is refused leaves nothing behind and says once what is to be done; what a run needs of its surroundings is found or named."""

import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from click.testing import CliRunner
from obstore.exceptions import GenericError
from obstore.store import MemoryStore
from ray.exceptions import RayError

from m2ray.activations.resumable import require_same
from m2ray.chain import joining, probing
from m2ray.cli import main
from m2ray.errors import ClusterError, RunConflictError, StoreError
from m2ray.model import site_table
from m2ray.model.site_table import Point, Tap
from m2ray.prompts.rendering import RefusedError, Rendered, Renderer
from m2ray.prompts.rows import PromptRow
from m2ray.storage import LocalStore, ObjectStore, no_empty_folders
from tests.reference import make_minimax
from tests.unit import activation_runs as made

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("refused") / "model", "fp8")


@pytest.fixture
def start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The command, on a cluster that is not there."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "one two three"}\n', encoding="utf-8")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")

    def run(output: Path | str, *more: str) -> str:
        words = ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(output), *more]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 1, done.output
        return done.stderr

    return run


def test_no_folder_is_left_of_a_start_that_is_refused(start: Callable[..., str], tmp_path: Path) -> None:
    assert "RAY_ADDRESS" in start(tmp_path / "new" / "deep" / "run"), "the prompts were surveyed"
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine" / "own").mkdir(parents=True)
    start(tmp_path / "mine", "--layers", "99")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["own"], "a user's own empty folder stays"


def test_a_router_that_is_captured_for_its_statistics_alone_is_proved_too(
    start: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong = {"router_topk": Point((Tap("mlp.gate", place=2), Tap("mlp.gate", place=0)))}
    monkeypatch.setitem(site_table._OTHERWISE, "minimax_m2", wrong)
    said = " ".join(start(tmp_path / "run", "--statistics", "experts", "--keep", "statistics").split())
    assert "sites = 'router_topk': of a tiny minimax_m2" in said


def test_an_output_below_a_file_is_told_once_by_the_right_name(start: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = start(tmp_path / "file" / "run")
    assert "Cannot write" in said
    assert "Cannot delete" not in said
    assert "problems were found" not in said
    assert f"{tmp_path / 'file'} is no folder: choose another one." in said


def test_below_a_file_there_is_nothing_to_delete(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    LocalStore(tmp_path / "file").delete(["_probe-1", "data/x"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_store_that_cannot_be_used_is_told_of_once(start: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("no credentials are in the environment")

    monkeypatch.setattr(LocalStore, "probe", refuse)
    monkeypatch.setattr("m2ray.chain.checking.read_job", refuse)
    assert start(tmp_path / "run").count("no credentials") == 1


def test_folders_that_another_start_removes_are_made_again(tmp_path: Path) -> None:
    """Two starts at one output: the refused one tidies while the other has begun a file."""
    store = LocalStore(tmp_path / "run")
    with no_empty_folders(str(tmp_path / "run")):
        sink = store.open_part("sequences/a.parquet")
        sink.write(b"rows")
    assert not (tmp_path / "run" / "sequences").exists()
    sink.close()
    assert store.read("sequences/a.parquet") == b"rows"
    (tmp_path / "run" / "_unfinished").rmdir()
    store.create("sequences/b.parquet", b"more")
    assert store.read("sequences/b.parquet") == b"more"


def test_absent_credentials_are_told_without_the_address_of_the_metadata() -> None:
    error = GenericError("Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 4.2s, after 3 retries")
    with pytest.raises(StoreError) as raised, ObjectStore("s3://bucket/run", MemoryStore()).naming("write", "_probe"):
        raise error
    assert "169.254" not in str(raised.value)
    assert raised.value.what.startswith("Cannot write s3://bucket/run/_probe: no credentials are in the environment")
    assert "AWS_ACCESS_KEY_ID" in raised.value.remedy


def test_a_store_that_refuses_is_told_by_its_first_reason(tmp_path: Path) -> None:
    class Refusing(LocalStore):
        def create(self, key: str, data: Any) -> None:
            raise StoreError("the disk is read-only")

        def delete(self, keys: Any) -> None:
            raise StoreError("nothing can be deleted")

    with pytest.raises(StoreError, match="the disk is read-only"):
        Refusing(tmp_path).probe()


def test_layers_that_differ_are_told_as_ranges(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    job = made.job(store, layers=list(range(62)))
    with pytest.raises(RunConflictError) as raised:
        require_same(store, job, {**job.options, "layers": [0, 1, 2, 61]}, {})
    assert "layers: 0-61 in the run, 0-2, 61 now" in str(raised.value)


# -- Ray ------------------------------------------------------------------------------------------------------------------


def test_ray_gets_a_short_folder_where_the_temporary_one_has_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("a" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **given: started.append(given["_temp_dir"]))
    said: list[str] = []
    with joining.cluster(1, said.append):
        folder = Path(started[0]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert str(folder.parent) in ("/tmp", "/var/tmp")
    assert not folder.exists()
    (line,) = said
    assert str(long) in line
    assert "TMPDIR" in line
    # What Ray makes of it: ray._private.node has the names, ray._private.utils the limit.
    socket = f"{started[0]}/session_2026-11-29_20-00-00_123456_4194304/sockets/plasma_store"
    assert len(socket) <= joining._SOCKET_BYTES
    monkeypatch.setattr(joining, "_SHORT", (str(long / "none"),))
    with pytest.raises(ClusterError, match="too long a path for Ray's sockets.*Set TMPDIR"), joining.cluster(1):
        pytest.fail("it started")


def test_a_short_temporary_folder_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/short")
    assert joining._short_folder(pytest.fail) == Path("/short")


def test_a_node_without_m2ray_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Labels": {}, "Resources": {"CPU": 1.0}, "NodeID": "1"}
    trace = "The remote function failed to import on the worker.\nTraceback\nModuleNotFoundError: No module named 'm2ray'\n\n"
    for error, why, remedy in (
        (RayError(trace), "m2ray is not installed there", "Install the same m2ray on every node"),
        (RayError("The node died."), "The node died", "m2ray doctor"),
    ):
        monkeypatch.setattr(probing, "living_nodes", lambda: {"bare": node})
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "2"))
        monkeypatch.setattr(probing, "on_nodes", lambda *_, error=error: ({}, {"bare": probing._why(error)}))
        with pytest.raises(ClusterError) as raised:
            probing.probe_hardware({})
        assert f"Node bare could not be looked at: {why}." in str(raised.value)
        assert remedy in raised.value.remedy


# -- processes beside a run -----------------------------------------------------------------------------------------------


def test_a_process_that_crashes_prints_nothing_into_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    def render(row: PromptRow) -> Rendered:
        if row.sequence_id == 1:
            raise ZeroDivisionError
        return Rendered("fine")

    renderer = Renderer(render, 5.0)
    rows = [PromptRow(number, str(number), messages=[], num_bytes=1) for number in range(3)]
    first, crashed, last = renderer.rendered(rows)
    renderer.close()
    assert isinstance(first, Rendered)
    assert isinstance(last, Rendered)
    assert isinstance(crashed, RefusedError)
    assert "ended its process (exit code 1)" in str(crashed)
    assert capfd.readouterr() == ("", "")
