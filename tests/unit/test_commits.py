"""Exactly once: who claims a run, whose attempt counts, and that the account closes."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from m2ray.activations import records
from m2ray.activations.job import Counts, read_job
from m2ray.activations.json_record import digest
from m2ray.activations.manifest import manifest_file
from m2ray.activations.reading.reader import open_run
from m2ray.activations.reading.verify import verify
from m2ray.activations.records import SUCCESS_KEY, commit_key, committed_and_void, committed_shards, read_commit, read_summary, swept_key
from m2ray.activations.resumable import require_same
from m2ray.activations.writing.commits import Run, claim_run, reopen
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.batches import PartReceipt
from m2ray.errors import RunConflictError, RunDamagedError, StageError, StoreError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def data_keys(store: LocalStore) -> set[str]:
    return {key for key, _ in store.list("data")}


# -- claiming ---------------------------------------------------------------------------------------------------------


def test_a_new_folder_is_claimed_and_a_resume_finds_the_same_job(store: LocalStore) -> None:
    assert read_job(store) is None
    record = runs.job(store)
    for name in ("_probe-1234", "_doctor-1234"):
        store.put(name, b"first")
    assert read_job(store) is None, "a survey, a probe or a doctor that was cut off keeps nobody out"
    assert claim_run(store, record).job == record
    assert read_job(store) == record
    resumed = claim_run(store, replace(record, run_id="f" * 32, created_at="later", m2ray_version="9"))
    assert resumed.job == record


def test_of_many_claims_one_creates_the_job_and_all_go_on_with_it(store: LocalStore) -> None:
    records = [runs.job(store) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(lambda record: claim_run(store, record), records))
    assert len({record.run_id for record in records}) == 16
    assert {run.job.run_id for run in claimed} == {read_job(store).run_id}


def test_another_job_is_refused_with_every_field_that_differs(store: LocalStore) -> None:
    record = runs.job(store, max_length=512)
    claim_run(store, record)
    other = replace(
        record,
        options={"model": "/models/m", "max_length": 1024, "layers": "0-5", "tokens": "all"},
        fingerprints=record.fingerprints | {"prompts": "ee"},
        counts=Counts(13, 11, 2, 67),
    )
    with pytest.raises(RunConflictError) as caught:
        claim_run(store, other)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1:-1] == [
        "max_length: 512 in the run, 1024 now",
        'layers: "all" in the run, "0-5" now',
        "batch_tokens: 16384 in the run, absent now",
        'fingerprints.prompts: "dd" in the run, "ee" now',
        "counts.sequences: 12 in the run, 13 now",
        "counts.ready: 10 in the run, 11 now",
        'tokens: absent in the run, "all" now',
    ]
    assert read_job(store) == record


def test_options_are_compared_before_the_survey(store: LocalStore) -> None:
    record = runs.job(store)
    require_same(store, record, dict(record.options), {"model": "aa"})
    with pytest.raises(RunConflictError, match='fingerprints.model: "aa" in the run, "zz" now'):
        require_same(store, record, dict(record.options), {"model": "zz"})


def test_a_folder_of_something_else_is_refused(store: LocalStore) -> None:
    store.put("holiday/photo.jpg", b"")
    with pytest.raises(RunConflictError, match=r"is not empty.*holiday/photo.jpg"):
        read_job(store)
    with pytest.raises(RunConflictError, match="is not empty"):
        claim_run(store, runs.job(store))
    assert store.size("job.json") is None


def test_a_newer_format_is_refused(store: LocalStore) -> None:
    record = json.loads(runs.job(store).to_json()) | {"format_version": 3, "fingerprints": "of another shape"}
    store.put("job.json", json.dumps(record).encode())
    with pytest.raises(RunConflictError, match="format 3.*up to 2.*Upgrade"):
        read_job(store)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda _: b"",
        lambda _: b"[]",
        lambda _: b"\xff\xfe",
        lambda _: b"null",
        lambda data: data.replace(b'"num_shards": 3', b'"num_shards": "3"'),
        lambda data: data.replace(b'"run_id"', b'"run"'),
        lambda data: data.replace(b'"ready": 10', b'"ready": 9'),
        lambda data: data.replace(b'"format_version": 2', b'"format_version": "2"'),
    ],
)
def test_a_damaged_job_is_refused_by_name(store: LocalStore, damage: Callable[[bytes], bytes]) -> None:
    good = runs.job(store).to_json()
    assert damage(good) != good
    store.put("job.json", damage(good))
    with pytest.raises(RunDamagedError, match=r"job\.json of the run at .*run is damaged"):
        read_job(store)


# -- committing -------------------------------------------------------------------------------------------------------


def test_missing_shrinks_as_shards_are_committed(store: LocalStore) -> None:
    run = claim_run(store, runs.job(store))
    assert [shard.index for shard in run.missing(runs.shards())] == [0, 1, 2]
    assert runs.commit_shard(run, runs.shard(1), "a1")
    assert [shard.index for shard in run.missing(runs.shards())] == [0, 2]
    assert claim_run(store, run.job).committed == {1}
    record = read_commit(store, run.job, 1)
    assert (record.attempt, record.num_sequences, record.rows, record.micro_batches) == ("a1", 3, 18, ((2, 8), (1, 3)))
    assert {part.key for part in record.parts} == data_keys(store)


def test_of_two_attempts_one_counts(store: LocalStore) -> None:
    first, second = (claim_run(store, runs.job(store)) for _ in range(2))
    shard = runs.shard(0)
    attempts = {"a1": runs.write_shard(store, first.job, shard, "a1"), "b2": runs.write_shard(store, second.job, shard, "b2")}

    def commit(run: Run, attempt: str) -> bool:
        return run.commit(shard, attempt, attempts[attempt], [(4, 8)], 1.0)

    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(commit, (first, second), attempts))
    assert sorted(won) == [False, True]
    winner = list(attempts)[won.index(True)]
    assert read_commit(store, first.job, 0).attempt == winner
    assert first.committed == second.committed == {0}
    assert data_keys(store) == {part.key for attempt in attempts.values() for part in attempt}, "the end of the run deletes the loser's"
    for other in runs.shards()[1:]:
        runs.commit_shard(first, other, "a1")
    second.finish()
    assert_closed(store)


def test_repeating_a_commit_is_a_success(store: LocalStore) -> None:
    run = claim_run(store, runs.job(store))
    assert runs.commit_shard(run, runs.shard(0), "a1")
    receipts = read_commit(store, run.job, 0).receipts()
    before = store.read(commit_key(0))
    assert run.commit(runs.shard(0), "a1", receipts, [(4, 14)], 1.0)
    assert store.read(commit_key(0)) == before
    assert len(data_keys(store)) == 3


def swapped(receipts: list[PartReceipt], **changed: object) -> list[PartReceipt]:
    return [*receipts[:-1], replace(receipts[-1], **changed)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda parts: parts[:-1], "residual of layer 11 is missing"),
        (lambda parts: [*parts, parts[0]], "residual of layer 0 came 2 times"),
        (lambda parts: swapped(parts, layer=5), "residual of layer 11 is missing.*residual of layer 5 is none of the run's"),
        (lambda parts: swapped(parts, rows=parts[0].rows - 1), "has 24 rows; the shard has 25"),
        (lambda parts: swapped(parts, token_digest="0" * 32), "hold different tokens"),
        (lambda parts: swapped(parts, attempt="b2"), "is of shard 0, attempt b2"),
        (lambda parts: swapped(parts, shard=2), "is of shard 2, attempt a1"),
        (lambda _: [], "residual of layer 7 is missing"),
    ],
)
def test_a_shard_that_is_not_whole_is_never_committed(store: LocalStore, spoil, message: str) -> None:
    run = claim_run(store, runs.job(store))
    shard = runs.shard(0)
    assert shard.num_tokens == 25
    receipts = list(runs.write_shard(store, run.job, shard, "a1"))
    with pytest.raises(StageError, match=f"(?s)Shard 0, attempt a1: .*{message}"):
        run.commit(shard, "a1", spoil(receipts), [(4, 14)], 1.0)
    with pytest.raises(StageError, match="do not add up to 4 sequences"):
        run.commit(shard, "a1", receipts, [(3, 14)], 1.0)
    assert committed_shards(store) == set()


def test_a_commit_of_another_run_is_refused(store: LocalStore, tmp_path: Path) -> None:
    run = claim_run(store, runs.job(store))
    other = claim_run(LocalStore(tmp_path / "other"), runs.job(LocalStore(tmp_path / "other")))
    runs.commit_shard(other, runs.shard(0), "a1")
    store.put(commit_key(0), other.store.read(commit_key(0)))
    with pytest.raises(RunDamagedError, match=r"_commits/shard-000000.json.*of run " + other.job.run_id):
        read_commit(store, run.job, 0)
    store.put(commit_key(1), b"{")
    with pytest.raises(RunDamagedError, match=r"_commits/shard-000001.json.*damaged"):
        read_commit(store, run.job, 1)


OUTSIDE = (
    "/data/site=residual/layer=000/shard-000000-a1.parquet",
    "data/site=residual/../../../other/shard-000000-a1.parquet",
    "data/./layer=000/shard-000000-a1.parquet",
    "data//shard-000000-a1.parquet",
    "../data/site=residual/layer=000/shard-000000-a1.parquet",
    "sequences/shard-000000-a1.parquet",
    "data/shard-000000-a1.parquet",
    "",
)


@pytest.mark.parametrize("key", [*OUTSIDE, "data/site=residual/layer=000/shard-000001-a1.parquet", "data/x/shard-000000-b2.parquet"])
def test_a_commit_that_names_a_file_outside_of_its_attempt_is_refused(store: LocalStore, key: str) -> None:
    run = claim_run(store, runs.job(store))
    runs.commit_shard(run, runs.shard(0), "a1")
    commit = read_commit(store, run.job, 0)
    store.put(commit_key(0), replace(commit, parts=(*commit.parts[:-1], replace(commit.parts[-1], key=key))).to_json())
    for read in (lambda: read_commit(store, run.job, 0), lambda: open_run(store.folder), run.reopen_damaged):
        with pytest.raises(RunDamagedError, match=r"_commits/shard-000000\.json.*names .*" + re.escape(repr(key))):
            read()


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_manifest_that_names_a_file_outside_of_the_run_is_refused(store: LocalStore, key: str) -> None:
    runs.finished_run(store)
    table = pq.read_table(store.path("manifest.parquet"))
    keys = [*table["key"].to_pylist()[:-1], key]
    table = table.set_column(table.schema.get_field_index("key"), table.schema.field("key"), [keys])
    store.put("manifest.parquet", manifest_file(table, read_job(store).run_id))
    with pytest.raises(RunDamagedError, match=r"manifest\.parquet.*names " + re.escape(repr(key))):
        open_run(store.folder)


@pytest.mark.parametrize("key", ["/sequences/a.parquet", "sequences/../../a.parquet", "sequences/..", "data/a.parquet"])
def test_a_job_whose_sequences_lie_elsewhere_is_refused(store: LocalStore, key: str) -> None:
    record = json.loads(runs.job(store).to_json())
    record["sequence_files"][1]["key"] = key
    store.put("job.json", json.dumps(record | {"digest": digest(record)}).encode())
    with pytest.raises(RunDamagedError, match=r"job\.json.*" + re.escape(repr(key))):
        read_job(store)


# -- finishing --------------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_the_commits_say(store: LocalStore) -> None:
    run = runs.finished_run(store)
    assert read_summary(store)
    rows = pq.read_table(store.path("manifest.parquet")).to_pylist()
    committed = [asdict(receipt) for shard in range(3) for receipt in read_commit(store, run.job, shard).receipts()]
    assert len(rows) == 9
    assert sorted(rows, key=str) == sorted(committed, key=str)
    assert [(row["layer"], row["shard"]) for row in rows] == [(layer, shard) for layer in (0, 7, 11) for shard in range(3)]
    assert {(row["key"], row["num_bytes"]) for row in rows} == set(store.list("data"))


def test_the_account_closes(store: LocalStore) -> None:
    runs.finished_run(store)
    summary = read_summary(store)
    assert (summary.sequences, summary.committed, summary.quarantined) == (12, 10, 2)
    assert (summary.tokens, summary.shards, summary.parts) == (67, 3, 9)
    assert summary.num_bytes == sum(num_bytes for _, num_bytes in store.list("data"))


def test_finishing_twice_changes_nothing(store: LocalStore) -> None:
    run = runs.finished_run(store)
    earlier = replace(read_summary(store), finished_at="2026-01-01T00:00:00+00:00")
    store.put("_SUCCESS", earlier.to_json())
    before = {key: store.read(key) for key, _ in store.list("")}
    assert claim_run(store, run.job).finish() == earlier
    assert {key: store.read(key) for key, _ in store.list("")} == before


def test_a_run_with_missing_shards_is_not_finished(store: LocalStore) -> None:
    run = claim_run(store, runs.job(store))
    runs.commit_shard(run, runs.shard(1), "a1")
    with pytest.raises(StageError, match="2 of 3 shards are not committed, the first is 0"):
        run.finish()
    assert read_summary(store) is None
    assert store.size("manifest.parquet") is None


def test_an_account_that_does_not_close_is_no_success(store: LocalStore) -> None:
    record = runs.job(store)
    run = claim_run(store, replace(record, counts=Counts(13, 11, 2, 67)))
    for shard in runs.shards():
        runs.commit_shard(run, shard, "a1")
    with pytest.raises(RunDamagedError, match="does not close: 3 shards with 10 sequences and 67 rows a part .*13 sequences and 67 rows"):
        run.finish()
    assert read_summary(store) is None


def test_finishing_leaves_only_what_records_name_and_what_is_not_of_the_run(store: LocalStore) -> None:
    run = claim_run(store, runs.job(store))
    surveyed = {file.key for file in run.job.sequence_files}
    runs.survey(store, "b9")
    for shard in runs.shards():
        runs.write_shard(store, run.job, shard, "c3")
        runs.commit_shard(run, shard, "a1")
    store.put("data/site=residual/README.txt", b"a user's own")
    run.finish()
    named = {part.key for shard in range(3) for part in read_commit(store, run.job, shard).receipts()}
    assert data_keys(store) == named | {"data/site=residual/README.txt"}
    assert {key for key, _ in store.list("sequences")} == surveyed


def again(store: LocalStore, attempt: str) -> list[int]:
    """What the same command does: the damaged and the missing shards, and the end. Gives the shards that it did."""
    job = read_job(store)
    assert job is not None
    run = claim_run(store, job)
    run.reopen_damaged()
    missing = run.missing(runs.shards())
    for shard in missing:
        assert runs.commit_shard(run, shard, attempt)
    run.finish()
    return [shard.index for shard in missing]


def assert_closed(store: LocalStore) -> None:
    """Commits, manifest, account and files say the same, and the rows are right."""
    job = read_job(store)
    assert job is not None
    receipts = [receipt for shard in range(3) for receipt in read_commit(store, job, shard).receipts()]
    named = {(receipt.key, receipt.num_bytes) for receipt in receipts}
    table = pq.read_table(store.path("manifest.parquet"))
    assert set(zip(table["key"].to_pylist(), table["num_bytes"].to_pylist(), strict=True)) == named == set(store.list("data"))
    assert read_summary(store).num_bytes == sum(num_bytes for _, num_bytes in named)
    rows = b"".join(runs.bits(runs.PARTS[1], i).tobytes() for ids in runs.SHARD_SEQUENCES for i in ids)
    assert open_run(store.folder).layer(7).tensor().view(torch.uint8).numpy().tobytes() == rows


def test_a_finished_run_that_lost_a_commit_is_closed_again_without_the_old_parts(store: LocalStore) -> None:
    runs.finished_run(store)
    store.delete([commit_key(1)])
    assert again(store, "b2") == [1]
    assert_closed(store)
    assert read_commit(store, read_job(store), 1).attempt == "b2"


def test_a_run_that_lost_a_commit_is_not_finished_while_it_is_done_again(store: LocalStore) -> None:
    run = runs.finished_run(store)
    store.delete([commit_key(1)])
    assert claim_run(store, run.job).reopen_damaged() == []
    assert read_summary(store) is None
    assert [shard.index for shard in open_run(store.folder).layer(7).shards()] == [0, 2]


@pytest.mark.parametrize("records", [("manifest.parquet",), ("_SUCCESS",), ("manifest.parquet", "_SUCCESS")])
@pytest.mark.parametrize("damage", [lambda _: None, lambda data: data[: len(data) // 2], lambda _: b"{}"])
def test_what_follows_from_the_commits_is_written_again(
    store: LocalStore, records: tuple[str, ...], damage: Callable[[bytes], bytes | None]
) -> None:
    runs.finished_run(store)
    for key in records:
        changed = damage(store.read(key))
        store.delete([key])
        if changed is not None:
            store.put(key, changed)
    assert again(store, "b2") == []
    assert_closed(store)


def test_a_manifest_of_other_attempts_is_written_again(store: LocalStore) -> None:
    """A commit was lost, its shard done again, and the driver killed before the end: everything is there, and the manifest is stale."""
    run = runs.finished_run(store)
    stale, success = store.read("manifest.parquet"), store.read("_SUCCESS")
    store.delete([commit_key(2)])
    runs.commit_shard(claim_run(store, run.job), runs.shard(2), "b2")
    store.put("manifest.parquet", stale)
    store.put("_SUCCESS", success)
    assert again(store, "c3") == []
    assert_closed(store)


@pytest.mark.parametrize("cut", [None, 100])
def test_the_end_refuses_lost_parts_by_name_and_the_same_command_does_their_shards_again(store: LocalStore, cut: int | None) -> None:
    run = committed_run(store)
    lost = store.path(read_commit(store, run.job, 1).parts[2].key)
    whole = lost.read_bytes()
    lost.unlink()
    if cut is not None:
        lost.write_bytes(whole[:cut])
    with pytest.raises(RunDamagedError, match=f"1 of 9 parts are gone.*(?s:.*){lost}(?s:.*)the first are 1"):
        run.finish()
    assert read_summary(store) is None
    assert again(store, "b2") == [1]
    assert_closed(store)


def test_a_part_lost_from_a_finished_run_is_done_again(store: LocalStore) -> None:
    run = runs.finished_run(store)
    store.path(read_commit(store, run.job, 0).parts[0].key).unlink()
    assert again(store, "b2") == [0]
    assert_closed(store)


def test_another_name_of_a_folder_of_parts_is_none_of_the_runs(store: LocalStore) -> None:
    """Deleting what no commit names would delete the committed parts through it."""
    run = runs.finished_run(store)
    (store.folder / "data/site=residual/alias").symlink_to("layer=007")
    copy = "data/site=other/shard-000001-000000000001.parquet"
    store.put(copy, b"a user's own")
    before = {key: store.read(key) for key in data_keys(store) if key.endswith(".parquet")}
    assert Run(store, run.job).finished()
    store.delete(["_SUCCESS"])
    assert again(store, "b2") == []
    assert {key: store.read(key) for key in data_keys(store) if key.endswith(".parquet")} == before


@pytest.mark.parametrize("name", ["data/site=residual", "data/site=residual/layer=007"])
def test_a_link_in_the_place_of_a_folder_of_parts_is_refused_before_anything_is_deleted(
    store: LocalStore, name: str, tmp_path: Path
) -> None:
    runs.finished_run(store)
    store.path(name).rename(tmp_path / "elsewhere")
    store.path(name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=f"{name} is a link .*in its place"):
        again(store, "b2")
    assert committed_shards(store) == {0, 1, 2}
    assert read_summary(store)


def test_shards_committed_while_the_end_looks_are_no_lost_parts(store: LocalStore) -> None:
    """The parts are listed first; another driver commits the last shard before the commits are listed."""
    run = claim_run(store, runs.job(store))
    for shard in runs.shards()[:2]:
        runs.commit_shard(run, shard, "a1")

    class Late(LocalStore):
        def list(self, prefix: str) -> Iterator[tuple[str, int]]:
            found = list(super().list(prefix))
            if prefix == "data" and len(committed_shards(store)) == 2:
                runs.commit_shard(run, runs.shard(2), "b2")
            return iter(found)

    claim_run(Late(store.folder), run.job).finish()
    assert_closed(store)


def test_a_driver_that_stood_still_sweeps_nothing_that_came_to_count_meanwhile(store: LocalStore) -> None:
    """It has read the commits; then one is lost, and the shard is done again by another driver; then it deletes what it knows no name of."""
    run = claim_run(store, runs.job(store))
    for shard in runs.shards():
        runs.commit_shard(run, shard, "a1")

    class Paused(LocalStore):
        def delete_unfinished(self) -> int:
            store.delete([commit_key(1)])
            assert again(store, "b2") == [1]
            return super().delete_unfinished()

    paused = Run(Paused(store.folder), run.job)
    paused.finish()
    kept = read_commit(store, run.job, 1)
    assert kept.attempt == "b2"
    assert all(store.size(part.key) == part.num_bytes for part in kept.parts)
    again(store, "c3")
    assert_closed(store)


def test_an_attempt_that_was_swept_never_comes_to_count(store: LocalStore) -> None:
    """A driver stands still just before its commit; another one finishes the run, and the commit of that shard is lost."""
    late = claim_run(store, runs.job(store))
    hold_weights(store, late.job, runs.LOADED)
    receipts = runs.write_shard(store, late.job, runs.shard(1), "late")
    committed_run(store).finish()
    assert data_keys(store).isdisjoint(part.key for part in receipts)
    store.delete([commit_key(1)])

    assert late.commit(runs.shard(1), "late", receipts, [(3, 8)], 1.0)
    assert committed_and_void(store) == ({0, 2}, {1})
    assert open_run(store.folder).num_shards == 3, "a finished run is read by its manifest"
    found = verify(store, checksums=False)
    assert [(damage.key, damage.shard) for damage in found.damages] == [(commit_key(1), 1)]
    assert "came after the parts" in found.damages[0].problem
    store.delete([SUCCESS_KEY])
    assert open_run(store.folder).num_shards == 2
    with pytest.raises(StageError, match="1 of 3 shards are not committed, the first is 1"):
        late.finish()
    assert again(store, "b2") == [1]
    assert committed_and_void(store) == ({0, 1, 2}, set())
    assert_closed(store)


def test_a_commit_that_a_repair_takes_away_between_listing_and_look_is_no_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that follow a run list its commits every second."""
    committed_run(store)
    store.create(swept_key(1, "b2"), b"")
    read = records.read_record

    def taken_away(store: LocalStore, key: str, adapter: Any) -> Any:
        store.delete([key])
        return read(store, key, adapter)

    monkeypatch.setattr(records, "read_record", taken_away)
    assert committed_and_void(store) == ({0, 1, 2}, set()), "as they were listed"
    assert committed_and_void(store) == ({0, 2}, set())


def committed_run(store: LocalStore) -> Run:
    run = claim_run(store, runs.job(store))
    for shard in runs.shards():
        runs.commit_shard(run, shard, "a1")
    return run


class StandsStill(LocalStore):
    """A disk before which a driver stands still once, as it is about to create a certain key, while `meanwhile` happens."""

    def __init__(self, folder: Path, key: str, meanwhile: Callable[[], object]) -> None:
        super().__init__(folder)
        self._key, self._meanwhile = key, meanwhile

    def create(self, key: str, data: bytes) -> None:
        if key == self._key:
            self._key = ""
            self._meanwhile()
        super().create(key, data)


def test_the_manifest_of_a_driver_that_stood_still_does_not_replace_a_newer_one(store: LocalStore) -> None:
    run = committed_run(store)

    def repaired_and_done_again() -> None:
        reopen(store, run.job, [1])
        assert again(store, "b2") == [1]

    Run(StandsStill(store.folder, "manifest.parquet", repaired_and_done_again), run.job).finish()
    assert read_commit(store, run.job, 1).attempt == "b2"
    assert_closed(store)


@pytest.mark.parametrize("key", ["manifest.parquet", "_SUCCESS"])
def test_a_run_is_not_finished_by_a_driver_that_stood_still_during_a_repair(store: LocalStore, key: str) -> None:
    run = committed_run(store)
    with pytest.raises(StageError, match="1 of 3 shards are not committed, the first is 1"):
        Run(StandsStill(store.folder, key, lambda: reopen(store, run.job, [1])), run.job).finish()
    assert read_summary(store) is None
    assert again(store, "b2") == [1]
    assert_closed(store)


def test_an_attempt_that_stood_still_during_a_repair_keeps_its_parts(store: LocalStore) -> None:
    """It has written all of them when its driver stops; another driver commits the shard, a repair takes that back, and the first goes on."""
    run = claim_run(store, runs.job(store))
    receipts = runs.write_shard(store, run.job, runs.shard(1), "a1")
    other = claim_run(store, run.job)
    for shard in runs.shards():
        runs.commit_shard(other, shard, "b2")
    reopen(store, run.job, [1])
    assert run.commit(runs.shard(1), "a1", receipts, [(3, 8)], 1.0)
    run.finish()
    assert read_commit(store, run.job, 1).attempt == "a1"
    assert_closed(store)


class Disk:
    """What of a folder a loss of power would leave at this moment: the bytes and the names that were synced."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, on_link: Callable[[Path, Path], None]) -> None:
        self._folder = folder
        self._bytes: dict[int, int] = {}
        self._names: set[Path] = set()
        fsync, link = os.fsync, os.link

        def synced(fd: int) -> None:
            fsync(fd)
            found, path = os.fstat(fd), Path(os.readlink(f"/proc/self/fd/{fd}"))
            if path.is_dir():
                self._names |= {path / name for name in os.listdir(path)}
            self._bytes[found.st_ino] = found.st_size

        def linked(source: Path, target: Path) -> None:
            on_link(Path(source), Path(target))
            link(source, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "link", linked)

    def has_bytes(self, path: Path) -> bool:
        found = path.stat()
        return self._bytes.get(found.st_ino) == found.st_size

    def has(self, key: str) -> bool:
        """Whether an object would be there, whole, under its name."""
        path = self._folder / key
        above = path.relative_to(self._folder.parent).parents[:-1]
        return self.has_bytes(path) and {path, *(self._folder.parent / folder for folder in above)} <= self._names


def test_what_a_commit_names_is_durable_before_the_commit_is_visible(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is with `_SUCCESS` and all that it vouches for."""
    seen: list[str] = []

    def look(source: Path, target: Path) -> None:
        key = target.relative_to(store.folder).as_posix()
        named = {"job.json"}
        if key.startswith("_commits/"):
            named |= {part["key"] for part in json.loads(source.read_bytes())["parts"]}
            assert len(named) == 1 + len(runs.PARTS)
        elif key == "_SUCCESS":
            named |= {"manifest.parquet", *map(commit_key, range(3))}
        else:
            return
        assert disk.has_bytes(source), f"{key} is not durable itself when it appears"
        assert {name for name in named if not disk.has(name)} == set(), f"not durable when {key} appears"
        seen.append(key)

    disk = Disk(store.folder, monkeypatch, look)
    run = claim_run(store, runs.job(store))
    for shard in runs.shards():
        assert runs.commit_shard(run, shard, "a1")
    run.finish()
    assert seen == [*map(commit_key, range(3)), "_SUCCESS"]


KILLED_DRIVER = """
    import os, signal, sys
    from m2ray.activations.writing.commits import claim_run
    from m2ray.storage import LocalStore
    from tests.unit import activation_runs as runs

    class Killed(LocalStore):
        left = int(sys.argv[2])
        def hit(self):
            Killed.left -= 1
            if Killed.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        def create(self, key, data):
            self.hit(); super().create(key, data); self.hit()
        def put(self, key, data):
            self.hit(); super().put(key, data); self.hit()
        def open_part(self, key):
            self.hit()
            sink = super().open_part(key)
            def close(inner=sink.close):
                self.hit(); inner(); self.hit()
            sink.close = close
            return sink

    store = Killed(__import__("pathlib").Path(sys.argv[1]))
    from m2ray.activations.job import read_job
    run = claim_run(store, read_job(store) or runs.job(store))
    for shard in run.missing(runs.shards()):
        runs.commit_shard(run, shard, os.urandom(6).hex())
    run.finish()
"""


@pytest.mark.parametrize("nth", [1, 3, 6, 9, 14, 20, 27, 33, 41])
def test_a_kill_at_any_store_operation_leaves_a_run_that_resumes(tmp_path: Path, nth: int) -> None:
    """A real process is killed before or after its nth change; this one goes on with what it left."""
    folder, script = tmp_path / "run", textwrap.dedent(KILLED_DRIVER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", script, str(folder), str(nth)], env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    store = LocalStore(folder)
    record = read_job(store)
    if record is not None:
        for shard in committed_shards(store):
            assert all(store.size(part.key) == part.num_bytes for part in read_commit(store, record, shard).receipts())
    run = claim_run(store, record or runs.job(store))
    for shard in run.missing(runs.shards()):
        assert runs.commit_shard(run, shard, "ffff")
    run.finish()
    assert data_keys(store) == {part.key for shard in range(3) for part in read_commit(store, run.job, shard).receipts()}
    rows = b"".join(runs.bits(runs.PARTS[1], i).tobytes() for ids in runs.SHARD_SEQUENCES for i in ids)
    assert open_run(folder).layer(7).tensor().view(torch.uint8).numpy().tobytes() == rows


def test_records_survive_the_trip_through_json(store: LocalStore) -> None:
    record = runs.job(store)
    store.put("job.json", record.to_json())
    assert read_job(store) == record
