"""LocalStore: create-if-absent under races, nothing half-written in sight, errors that name the file."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from m2ray.errors import AlreadyExistsError, StoreError
from m2ray.storage import LocalStore, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "root")


@pytest.mark.parametrize("path", ["~nobody-of-that-name/runs", "~/runs"])
def test_a_home_that_is_not_there_is_no_trace(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(StoreError, match=rf"{path} begins with {path.partition('/')[0]}, and that user has no home folder"):
        open_store(path)


def test_one_of_many_creators_wins(store: Store) -> None:
    def create(number: int) -> bool:
        try:
            store.create("_commits/k.json", str(number).encode())
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(64)))
    assert sum(won) == 1
    assert store.read("_commits/k.json") == str(won.index(True)).encode()
    assert [key for key, _ in store.list("")] == ["_commits/k.json"]


def test_a_part_is_invisible_until_closed_and_gone_when_aborted(store: Store, tmp_path: Path) -> None:
    kept, dropped = store.open_part("data/a.parquet"), store.open_part("data/b.parquet")
    for sink in (kept, dropped):
        sink.write(memoryview(b"1234"))
    assert list(store.list("")) == []
    assert store.size("data/a.parquet") is None
    kept.close()
    dropped.abort()
    assert list(store.list("")) == [("data/a.parquet", 4)]
    assert os.listdir(tmp_path / "root" / "data") == ["a.parquet"]


def test_a_part_never_replaces_another(store: Store) -> None:
    store.put("x", b"first")
    sink = store.open_part("x")
    sink.write(b"second")
    with pytest.raises(AlreadyExistsError):
        sink.close()
    assert store.read("x") == b"first"


def test_put_replaces(store: Store) -> None:
    store.put("report.json", b"1")
    store.put("report.json", b"22")
    assert store.read("report.json") == b"22"


def test_ranges(store: Store) -> None:
    store.put("weights", bytes(range(100)))
    assert store.read_range("weights", 10, 5) == bytes(range(10, 15))
    with pytest.raises(StoreError, match="ends at byte 100, but bytes 90 to 120"):
        store.read_range("weights", 90, 30)


def test_deleting_what_is_gone_is_no_error(store: Store) -> None:
    store.put("a", b"")
    store.delete(["a", "a", "b"])
    assert list(store.list("")) == []


def test_file_and_folders_are_on_the_disk_before_a_key_counts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls in their order, each done: what a power cut would cut off."""
    calls: list[tuple[str, Path]] = []

    def watch(name: str, path_of: Callable[[Any], Path]) -> None:
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: (call(*args), calls.append((name, path_of(args[-1]))))[0])

    watch("fsync", lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")))
    watch("link", Path)
    watch("replace", Path)
    root = tmp_path / "root"
    sink = store.open_part("data/layer=000/a.parquet")
    sink.write(b"whole")
    made = [path for name, path in calls if name == "fsync"]
    assert set(made) == {tmp_path, root, root / "data"}, "each new folder lasts in the one above it"
    calls.clear()
    sink.close()
    (first, unfinished), *rest = calls
    assert (first, unfinished.parent) == ("fsync", root / "_unfinished")
    assert rest == [("link", root / "data/layer=000/a.parquet"), ("fsync", root / "data/layer=000")]
    calls.clear()
    store.put("report.json", b"1")
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[-1][1] == root


def test_errors_name_the_file_and_the_reason(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="missing.*No such file"):
        store.read("missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        open_store(tmp_path / "file").put("key", b"")


def test_a_folder_is_no_object(store: Store) -> None:
    store.put("data/a", b"1")
    assert store.size("data") is None


def test_schemes() -> None:
    assert open_store("file:///some/where").url == "/some/where"
    with pytest.raises(StoreError, match="'ftp'"):
        open_store("ftp://host/folder")
    assert open_store("file://localhost/some/where").url == "/some/where"
    with pytest.raises(StoreError, match="names the host 'some'"):
        open_store("file://some/where")


def test_what_is_being_written_is_out_of_the_way_of_globs(store: Store, tmp_path: Path) -> None:
    root = tmp_path / "root"
    sink = store.open_part("data/layer=000/a.parquet")
    sink.write(b"half")
    assert [path.name for path in (root / "data").rglob("*") if path.is_file()] == []
    assert [path.name[13:] for path in (root / "_unfinished").iterdir()] == ["a.parquet"]
    sink.close()
    assert list((root / "_unfinished").iterdir()) == []


def test_a_dead_writers_file_is_deleted_and_a_living_ones_stays(store: Store, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from m2ray.storage import open_store; sink = open_store(sys.argv[1]).open_part('data/dead.parquet');"
        "sink.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = tmp_path / "root"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script, str(root)], env=environment, timeout=60, check=False)
    assert len(list((root / "_unfinished").iterdir())) == 1
    living = store.open_part("data/living.parquet")
    living.write(b"whole")
    assert store.delete_unfinished() == 1
    assert store.delete_unfinished() == 0
    living.close()
    assert list(store.list("")) == [("data/living.parquet", 5)]
    assert list((root / "_unfinished").iterdir()) == []


def test_writers_and_a_cleaner_at_the_same_time(store: Store) -> None:
    def write(number: int) -> None:
        store.create(f"data/{number}", b"x" * 100)

    with ThreadPoolExecutor(5) as pool:
        written = [pool.submit(write, number) for number in range(200)]
        while not all(each.done() for each in written):
            store.delete_unfinished()
        for each in written:
            each.result()
    assert len(list(store.list("data"))) == 200


def test_a_probe_that_is_broken_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def created_and_stopped(self: LocalStore, key: str, data: bytes, was: Any = LocalStore.create) -> None:
        was(self, key, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStore, "create", created_and_stopped)
    with pytest.raises(KeyboardInterrupt):
        LocalStore(tmp_path / "root").probe()
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_listed_is_an_error_and_one_that_is_gone_is_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("data/a/1", "data/b/2"):
        store.put(key, b"x")
    scandir = os.scandir

    def failing(error: OSError) -> Callable[[Path], Any]:
        def listed(folder: Path) -> Any:
            if folder.name == "b":
                raise error
            return scandir(folder)

        return listed

    monkeypatch.setattr(os, "scandir", failing(FileNotFoundError(errno.ENOENT, "gone")))
    assert list(store.list("")) == [("data/a/1", 1)]
    monkeypatch.setattr(os, "scandir", failing(OSError(errno.EIO, "broken")))
    with pytest.raises(StoreError, match=r"Cannot list .*/data/b: Input/output error"):
        list(store.list("data"))


def test_links_to_folders_are_listed_as_links_and_nothing_is_deleted_behind_them(store: Store, tmp_path: Path) -> None:
    store.put("data/a/1", b"x")
    (tmp_path / "root/data/alias").symlink_to("a")
    assert [key for key, _ in store.list("data")] == ["data/alias", "data/a/1"]
    with pytest.raises(StoreError, match=r"data/alias/1 is not deleted: .*data/alias is a link to a folder"):
        store.delete(["data/alias/1"])
    assert store.read("data/a/1") == b"x"
