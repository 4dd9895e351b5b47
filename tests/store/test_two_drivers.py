"""Two drivers at one run, a lost commit and a lease that is outlived, on a disk and on a real S3 server."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2ray.activations.job import read_job
from m2ray.activations.reading.verify import verify
from m2ray.activations.records import commit_key, read_commit, read_summary
from m2ray.activations.writing.commits import Run, claim_run
from m2ray.activations.writing.lease import held, read_holder
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.errors import RunConflictError
from m2ray.storage import Store, open_store
from tests.unit import activation_runs as runs


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else str(request.getfixturevalue("url"))


def assert_closed(store: Store) -> None:
    job = read_job(store)
    assert job is not None
    found = verify(store, checksums=True)
    assert (found.damages, found.unnamed, found.is_complete) == ((), (), True)
    named = {part.key for shard in range(3) for part in read_commit(store, job, shard).parts}
    assert set(pq.read_table(pa.BufferReader(store.read("manifest.parquet")))["key"].to_pylist()) == named
    assert {key for key, _ in store.list("data")} == named


def test_two_drivers_at_work_at_once_make_one_run(place: str) -> None:
    """As if neither knew of the other's lease: each does every shard, and both finish."""
    hold_weights(open_store(place), claim_run(open_store(place), runs.job(open_store(place))).job, runs.LOADED)

    def drive(name: str) -> None:
        store = open_store(place)
        job = read_job(store)
        assert job is not None
        run = Run(store, job)
        for shard in runs.shards():
            runs.commit_shard(run, shard, f"{name}{shard.index}")
        run.finish()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(drive, ("a", "b")))
    assert_closed(open_store(place))


def test_one_driver_is_stopped_while_another_one_finishes(place: str) -> None:
    store = open_store(place)
    run = claim_run(store, runs.job(store))
    hold_weights(store, run.job, runs.LOADED)
    for shard in runs.shards():
        runs.commit_shard(run, shard, "a1")
    run.finish()
    runs.write_shard(store, run.job, runs.shard(2), "b2")  # the other one's parts; it is killed before it hears that it lost
    assert len(verify(store, checksums=False).unnamed) == 3
    Run(store, run.job).finish()
    assert_closed(store)


def test_a_lost_commit_is_made_good(place: str) -> None:
    store = open_store(place)
    job = runs.finished_run(store).job
    store.delete([commit_key(1)])
    run = claim_run(store, job)
    run.reopen_damaged()
    assert read_summary(store) is None
    assert [shard.index for shard in run.missing(runs.shards())] == [1]
    runs.commit_shard(run, runs.shard(1), "b2")
    run.finish()
    assert_closed(store)


def test_a_live_driver_is_seen_and_a_dead_one_outlived(place: str) -> None:
    lines: list[str] = []
    with held(open_store(place), lines.append, lines.append, period_s=0.5):
        with pytest.raises(RunConflictError, match="Another driver is at the run"), held(open_store(place), print, print):
            pytest.fail("two at once")
        dead = read_holder(open_store(place))
        assert dead is not None
    assert read_holder(open_store(place)) is None
    store = open_store(place)
    store.put("_lease/00000009.json", (b'{"format_version": 1, "driver": "dead", "host": "h", "pid": 1, "since": "", "period_s": 0.5}'))
    began = time.monotonic()
    with held(store, lines.append, lines.append) as is_second:
        assert is_second
        assert 2.0 <= time.monotonic() - began < 20.0
    assert read_holder(store) is None
    assert lines[-1] == "None came: this driver takes the run over."
