"""The commits of a run as one table: the same as one by one, and whatever is wrong is said as one by one."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from m2ray.activations import commit_table
from m2ray.activations.commit_table import read_committed
from m2ray.activations.job import JobRecord
from m2ray.activations.json_record import digest, to_json
from m2ray.activations.manifest import manifest_table
from m2ray.activations.records import commit_key, read_commit
from m2ray.errors import M2rayError, RunDamagedError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def job(store: LocalStore) -> JobRecord:
    return runs.finished_run(store).job


def one_by_one(store: LocalStore, job: JobRecord) -> Any:
    return manifest_table(read_commit(store, job, shard).columns() for shard in range(3))


def test_it_is_what_the_commits_say_one_by_one(store: LocalStore, job: JobRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_by_one(store, job)
    commits = [read_commit(store, job, shard) for shard in range(3)]
    store.put(commit_key(1), to_json(replace(commits[1], parts=commits[1].parts[::-1])))  # in another order
    monkeypatch.setattr(commit_table, "read_commit", lambda *_: pytest.fail("plain commits are taken apart by Arrow"))
    monkeypatch.setattr(commit_table, "_PARTS_A_TASK", 2 * len(job.parts))
    found = read_committed(store, job, {2, 0, 1})
    assert found.parts.equals(expected)
    assert found[1:] == (3, sum(commit.num_sequences for commit in commits), sum(commit.rows for commit in commits))
    assert read_committed(store, job, ()).parts.equals(expected.slice(0, 0))


def test_commits_are_not_read_far_ahead_of_those_that_parse_them(
    store: LocalStore, job: JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commits of a large run, as bytes, would be more than the table that becomes of them."""
    read: list[object] = []
    ahead: list[int] = []
    was_read, was_table = commit_table._read, commit_table._table

    def reading(*given: Any) -> list[bytes]:
        read.append(given)
        return was_read(*given)

    def parsing(*given: Any) -> tuple[Any, int, int]:
        time.sleep(0.01)
        ahead.append(len(read) - len(ahead))
        return was_table(*given)

    monkeypatch.setattr(commit_table, "_read", reading)
    monkeypatch.setattr(commit_table, "_table", parsing)
    monkeypatch.setattr(commit_table, "_PARTS_A_TASK", 1)
    assert read_committed(store, job, [0] * 40).num_shards == len(ahead) == 40
    assert max(ahead) <= commit_table._FILES_AT_ONCE + 2 * commit_table._PARSED_AT_ONCE + 1


def test_one_that_is_written_otherwise_is_the_same(store: LocalStore, job: JobRecord) -> None:
    expected = one_by_one(store, job)
    fields = json.loads(store.read(commit_key(1)))
    store.put(commit_key(1), json.dumps(fields, indent=2).encode())
    assert read_committed(store, job, range(3)).parts.equals(expected)


def _of_part(**changed: object) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["parts"][0].update(changed)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda fields: fields.update(shard=2),
        lambda fields: fields.update(run_id="0" * 32),
        lambda fields: fields.update(format_version=99),
        lambda fields: fields.update(rows=None),
        lambda fields: fields.update(rows="many"),
        lambda fields: fields.pop("attempt"),
        lambda fields: fields["parts"].pop(),
        lambda fields: fields["parts"].append(fields["parts"][0]),
        lambda fields: fields["parts"].__setitem__(1, fields["parts"][0]),
        _of_part(key="/etc/passwd"),
        _of_part(key="data/../../x/shard-000001-a1.parquet"),
        _of_part(layer=61),
        _of_part(layer=None),
        _of_part(site="mlp"),
        _of_part(num_bytes=None),
        lambda fields: fields.update(elapsed_s=None),
        lambda fields: fields.update(committed_at=1),
        lambda fields: fields.update(computed_on=1),
        lambda fields: fields.update(micro_batches=[[1, 2], [3]]),
        lambda fields: fields.update(micro_batches=[[1, None]]),
    ],
)
def test_what_is_wrong_is_said_as_of_one(store: LocalStore, job: JobRecord, spoil: Callable[[dict[str, Any]], object]) -> None:
    fields = asdict(read_commit(store, job, 1))
    fields["parts"] = list(fields["parts"])
    spoil(fields)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    store.put(commit_key(1), b'%b,"digest":"%b"}' % (canonical[:-1], digest(json.loads(canonical)).encode()))  # sealed all the same
    with pytest.raises(M2rayError) as alone:
        read_commit(store, job, 1)
    with pytest.raises(type(alone.value)) as found:
        read_committed(store, job, range(3))
    assert str(found.value) == str(alone.value)


def test_a_number_of_more_than_64_bits_is_damage(store: LocalStore, job: JobRecord) -> None:
    store.put(commit_key(1), to_json(replace(read_commit(store, job, 1), num_sequences=2**63)))
    with pytest.raises(RunDamagedError, match="shards 0 to 2 .* more than 64 bits"):
        read_committed(store, job, range(3))


def test_a_flipped_bit_is_found(store: LocalStore, job: JobRecord) -> None:
    data = bytearray(store.read(commit_key(1)))
    data[data.index(b'"num_bytes":') + 12] ^= 1
    store.put(commit_key(1), bytes(data))
    with pytest.raises(M2rayError, match=r"_commits/shard-000001\.json"):
        read_committed(store, job, range(3))
