"""What m2ray asks of every store, over memory, a local disk and a real S3 server."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from obstore.store import MemoryStore

from m2ray.errors import AlreadyExistsError, StoreError
from m2ray.storage import ObjectStore, Store, open_store

ODD_KEYS = ("a b", "a#b", "a?b=c&d", "a%20b", "a+b", "ü水~*[]{}^`|\"<>'", "a\\b", "site=x/layer=007/é", "a:b@c,d;e$f!(g)")


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return ObjectStore("memory://", MemoryStore())
    if request.param == "local":
        return open_store(tmp_path / "root")
    return open_store(request.getfixturevalue("url"))


@pytest.fixture
def uploads(store: Store, request: pytest.FixtureRequest) -> Callable[[], list[str]]:
    """The unfinished multipart uploads, where the store has such a thing."""
    if not store.url.startswith("s3://"):
        return list
    server = request.getfixturevalue("s3")
    return lambda: server.unfinished_uploads(store.url)


def test_the_probe_accepts_it_and_leaves_nothing(store: Store) -> None:
    store.probe()
    assert list(store.list("")) == []


def test_one_of_sixteen_creators_wins(store: Store) -> None:
    for attempt in range(4):
        key = f"_commits/shard-{attempt}.json"

        def create(number: int, key: str = key) -> bool:
            try:
                store.create(key, str(number).encode())
            except AlreadyExistsError as error:
                assert key in str(error)
                return False
            return True

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        assert sum(won) == 1
        assert store.read(key) == str(won.index(True)).encode()


def test_the_sizes_of_several_are_those_of_each(store: Store) -> None:
    keys = [*ODD_KEYS, "model-00001-of-00002.safetensors", "deep/below/b.safetensors"]
    for length, key in enumerate(keys):
        store.put(key, bytes(length))
    store.put("deep/other", b"")
    absent = ["absent", "absent/too", "deep"]
    for asked in (keys + absent, keys[:1], absent[:1], []):
        size_of = store.sizes(asked)
        assert [size_of(key) for key in asked] == [store.size(key) for key in asked]


def test_a_version_is_of_what_was_written(store: Store) -> None:
    store.put("a", b"1")
    first = store.version("a")
    assert store.version("a") == first
    store.put("a", b"2")
    assert store.version("a") != first, "as large as before"
    with pytest.raises(StoreError, match="absent"):
        store.version("absent")


@pytest.mark.parametrize("row_bytes", [3, 1024, 5000])
def test_rows_are_laid_at_their_places(store: Store, row_bytes: int) -> None:
    """Neighbours, rows with gaps between them, far ones, and more of them than one system call takes; in any order."""
    rng = np.random.default_rng(row_bytes)
    content = rng.integers(0, 256, 1400 * (row_bytes + 30), dtype=np.uint8)
    store.put("part", content.tobytes())
    near = np.arange(1300) * (row_bytes + 30) + rng.integers(0, 30, 1300)
    dense = np.arange(1300) * row_bytes
    some_gaps = dense + np.arange(1300) // 100 * 30
    for offsets in (near, near[::7], near[:5], near[:1], dense, dense[:20], some_gaps, rng.permutation(near)[:40]):
        out, places = np.zeros((1500, row_bytes), np.uint8), rng.permutation(1500)[: len(offsets)]
        store.read_rows("part", offsets, out, places)
        assert all(np.array_equal(out[place], content[offset : offset + row_bytes]) for place, offset in zip(places, offsets, strict=True))
        assert not np.delete(out, places, axis=0).any()
    with pytest.raises(StoreError, match="part"):
        store.read_rows("part", np.array([0, len(content) - 1]), out, np.array([0, 1]))
    with pytest.raises(StoreError, match="absent"):
        store.read_rows("absent", near, out, np.arange(len(near)))


def test_ranges_and_pieces(store: Store) -> None:
    content = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
    store.create("part", content)
    out = bytearray(40)
    store.read_ranges("part", [0, 10, 20, 3990], 10, memoryview(out))
    assert out == content[:30] + content[-10:]
    pieces = [bytearray(size) for size in (1, 0, 100, 7, 3000)]
    with store.reading("part") as read:
        for offset in (0, 17, 4000 - 3108):
            read(offset, [memoryview(piece) for piece in pieces])
            assert b"".join(pieces) == content[offset : offset + 3108]
    with pytest.raises(StoreError, match="part ends at byte 4000"), store.reading("part") as read:
        read(893, [memoryview(piece) for piece in pieces])
    with pytest.raises(StoreError, match="absent"), store.reading("absent") as read:
        read(0, [memoryview(piece) for piece in pieces])


def test_pieces_that_the_kernel_fills_in_part_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, content = open_store(tmp_path), bytes(range(200))
    store.create("part", content)
    kernel = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, pieces, offset: kernel(fd, [pieces[0][:7]], offset))
    pieces = [bytearray(size) for size in (3, 20, 0, 30)]
    with store.reading("part") as read:
        read(5, [memoryview(piece) for piece in pieces])
    assert b"".join(pieces) == content[5:58]


def test_put_writes_and_replaces(store: Store) -> None:
    for content in (b"1", b"22", b""):
        store.put("report.json", content)
        assert store.read("report.json") == content
        assert store.size("report.json") == len(content)


@pytest.mark.parametrize("num_bytes", [4, 20 << 20])
def test_a_part_is_seen_once_closed_and_gone_when_aborted(store: Store, uploads: Callable[[], list[str]], num_bytes: int) -> None:
    kept, dropped = store.open_part("data/a.parquet"), store.open_part("data/b.parquet")
    for sink in (kept, dropped):
        sink.write(memoryview(bytes(num_bytes)))
        assert list(store.list("")) == []
        assert store.size("data/a.parquet") is None
    kept.close()
    dropped.abort()
    assert list(store.list("")) == [("data/a.parquet", num_bytes)]
    assert uploads() == []


def test_a_closed_part_can_be_aborted(store: Store) -> None:
    store.put("other", b"1")
    sink = store.open_part("part")
    sink.write(b"x")
    sink.close()
    store.delete(["part"])
    assert [key for key, _ in store.list("")] == ["other"]


def test_a_large_part_in_uneven_pieces_arrives_whole(store: Store, uploads: Callable[[], list[str]]) -> None:
    content = os.urandom(40_000_003)
    sink, scratch, start = store.open_part("large"), bytearray(9_000_000), 0
    for num_bytes in (1, 9_000_000, 5_000_000, 3, 8_388_608, 1 << 20, 0):
        scratch[:num_bytes] = content[start : start + num_bytes]
        sink.write(memoryview(scratch)[:num_bytes])
        scratch[:num_bytes] = bytes(num_bytes)  # the caller may reuse its memory at once
        start += num_bytes
    sink.write(content[start:])
    sink.close()
    assert store.size("large") == len(content)
    assert store.read("large") == content
    assert store.read_range("large", 3, 30_000_000) == content[3:30_000_003]
    assert uploads() == []


def test_ranges(store: Store) -> None:
    store.put("weights", bytes(range(100)))
    assert store.read_range("weights", 10, 5) == bytes(range(10, 15))
    assert store.read_range("weights", 0, 100) == bytes(range(100))
    assert store.read_range("weights", 40, 0) == b""


@pytest.mark.parametrize(("offset", "num_bytes"), [(90, 30), (100, 1), (200, 5), (0, 20 << 20)])
def test_a_range_past_the_end_is_an_error_that_names_both(store: Store, offset: int, num_bytes: int) -> None:
    store.put("weights", bytes(100))
    with pytest.raises(StoreError, match=rf"weights ends at byte \d+, but bytes {offset} to {offset + num_bytes} are needed"):
        store.read_range("weights", offset, num_bytes)


def test_a_listing_takes_a_folder_not_a_beginning(store: Store) -> None:
    for key in ("a/1", "a/b/2", "ab/3", "a.json", "c"):
        store.put(key, key.encode())
    assert sorted(store.list("a")) == [("a/1", 3), ("a/b/2", 5)]
    assert sorted(key for key, _ in store.list("")) == ["a.json", "a/1", "a/b/2", "ab/3", "c"]
    assert list(store.list("absent")) == []


def test_a_listing_of_many_pages_is_whole(store: Store) -> None:
    keys = [f"many/{number:05d}" for number in range(1_203)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert sorted(key for key, _ in store.list("many")) == keys
    store.delete(keys)
    assert list(store.list("")) == []


def test_deleting_what_is_gone_is_no_error(store: Store) -> None:
    store.put("a", b"")
    store.delete(["a", "a", "b"])
    store.delete([])
    assert list(store.list("")) == []


def test_odd_keys_are_taken_as_they_are(store: Store) -> None:
    for number, key in enumerate(ODD_KEYS):
        store.create(key, str(number).encode())
    assert sorted(key for key, _ in store.list("")) == sorted(ODD_KEYS)
    for number, key in enumerate(ODD_KEYS):
        assert store.read(key) == str(number).encode()
    store.delete(ODD_KEYS)
    assert list(store.list("")) == []


def test_an_absent_object(store: Store) -> None:
    assert store.size("absent/key") is None
    for read in (lambda: store.read("absent/key"), lambda: store.read_range("absent/key", 0, 3)):
        with pytest.raises(StoreError) as caught:
            read()
        assert "absent/key" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        for noise in ("Debug", "RetryError", "<?xml", "HTTP"):
            assert noise not in str(caught.value)
