"""verify: names exactly the damaged files; after a repair the same command makes the run whole and equal."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from m2ray.activations.job import read_job
from m2ray.activations.reading.reader import open_run
from m2ray.activations.reading.verify import verify
from m2ray.activations.records import CommitRecord, commit_key, read_commit
from m2ray.activations.schema import part_key
from m2ray.activations.writing.commits import claim_run, reopen
from m2ray.batches import PartSpec
from m2ray.cli import main
from m2ray.errors import RunDamagedError, StoreError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.finished_run(LocalStore(folder))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def key_of(spec: PartSpec, shard: int) -> str:
    return part_key(spec, shard, f"{0xA0 + shard:012x}")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def command(run: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(run), "--json", *more])


def extract_again(run: Path) -> None:
    """What the extract command does with a run: the missing shards, then the end."""
    store = LocalStore(run)
    job = read_job(store)
    assert job is not None
    claimed = claim_run(store, job)
    claimed.reopen_damaged()
    for shard in claimed.missing(runs.shards()):
        assert runs.commit_shard(claimed, shard, f"{0xB0 + shard.index:012x}")
    claimed.finish()


def assert_whole(run: Path) -> None:
    reader = open_run(run)
    assert reader.is_complete
    for spec in runs.PARTS:
        rows = b"".join(runs.bits(spec, i).tobytes() for ids in runs.SHARD_SEQUENCES for i in ids)
        assert reader.layer(spec.layer).tensor().view(torch.uint8).numpy().tobytes() == rows
    found = verify(LocalStore(run), checksums=True)
    assert (found.damages, found.unnamed) == ((), ())


def test_a_sound_run_is_sound(run: Path) -> None:
    seen: list[tuple[int, ...]] = []
    found = verify(LocalStore(run), checksums=True, threads=3, on_progress=lambda *done: seen.append(done))
    num_bytes = sum(path.stat().st_size for path in (run / "data").rglob("*.parquet"))
    assert (found.damages, found.files, found.num_bytes, found.is_complete) == ((), 9, num_bytes, True)
    assert [files for files, *_ in seen] == list(range(1, 10))
    assert seen[-1] == (9, 9, num_bytes, num_bytes)
    assert command(run).exit_code == 0


def test_exactly_the_damaged_parts_are_named_and_a_repair_makes_the_run_whole(run: Path) -> None:
    flipped, truncated, absent = key_of(runs.PARTS[1], 0), key_of(runs.PARTS[2], 0), key_of(runs.PARTS[0], 2)
    at_a_row = (run / flipped).read_bytes().index(runs.bits(runs.PARTS[1], 5).tobytes()[:40])
    flip(run / flipped, at_a_row + 7)
    (run / truncated).write_bytes((run / truncated).read_bytes()[:-1])
    (run / absent).unlink()
    untouched = {path.name: path.stat().st_mtime_ns for path in (run / "data").rglob("shard-000001*")}
    quick = json.loads(command(run).stdout)
    assert {damage["key"] for damage in quick["damaged"]} == {truncated, absent}, "sizes do not show a flipped bit"
    result = command(run, "--checksums", "--repair")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    problems = {damage["key"]: damage["problem"] for damage in facts["damaged"]}
    assert problems.keys() == {flipped, truncated, absent}
    assert "do not have the CRC in its header" in problems[flipped]
    assert all(str(run / key) in problem for key, problem in problems.items())
    assert facts["reopened_shards"] == [0, 2]
    reader = open_run(run)
    assert not reader.is_complete
    assert [shard.index for shard in reader.layer(7).shards()] == [1], "the damaged shards do not count, the sound one does"
    extract_again(run)
    assert_whole(run)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "data").rglob("shard-000001*")} == untouched


@pytest.mark.parametrize("place", range(4, 1700, 100))
def test_any_flipped_byte_of_a_part_is_found(run: Path, place: int) -> None:
    key = key_of(runs.PARTS[1], 1)
    flip(run / key, place)
    assert [damage.key for damage in verify(LocalStore(run), checksums=True).damages] == [key]


def test_a_commit_with_another_digest_than_its_rows_is_found(run: Path) -> None:
    """All bytes are as they were written, but they are not the tokens that were committed."""
    store = LocalStore(run)
    job = read_job(store)
    assert job is not None
    record: CommitRecord = read_commit(store, job, 1)
    store.put(commit_key(1), replace(record, token_digest="0" * 32).to_json())
    (run / "_SUCCESS").unlink()
    assert {damage.key for damage in verify(store, checksums=True).damages} == {key_of(spec, 1) for spec in runs.PARTS}
    assert verify(store, checksums=False).damages == ()


@pytest.mark.parametrize(
    ("damage", "shards"),
    [
        (lambda run: (run / commit_key(1)).write_bytes(b"{"), [1]),
        (lambda run: (run / commit_key(1)).unlink(), [1]),
        (lambda run: (run / "manifest.parquet").write_bytes(b"PAR1"), []),
        (lambda run: (run / "manifest.parquet").unlink(), []),
        (lambda run: (run / "_SUCCESS").write_bytes(b"{}"), []),
    ],
)
def test_damaged_records_are_found_and_repaired(run: Path, damage: Callable[[Path], object], shards: list[int]) -> None:
    damage(run)
    result = command(run, "--repair")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert len(facts["damaged"]) == 1
    assert facts["reopened_shards"] == shards
    extract_again(run)
    assert_whole(run)


def leftovers(run: Path) -> set[str]:
    """What a driver leaves that lost, or was stopped while another one finished: parts of another attempt, and another survey."""
    store = LocalStore(run)
    job = read_job(store)
    assert job is not None
    parts = runs.write_shard(store, job, runs.shard(1), "dead")
    return {part.key for part in parts} | {file.key for file in runs.survey(store, "dead")}


def test_files_that_no_record_names_are_reported_until_the_same_command_deletes_them(run: Path) -> None:
    expected = leftovers(run)
    (run / "data/notes.txt").write_text("a user's own")
    result = command(run)
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert facts["damaged"] == []
    assert {file["key"] for file in facts["unnamed"]} == expected | {"data/notes.txt"}
    assert {file["num_bytes"] for file in facts["unnamed"]} == {(run / file["key"]).stat().st_size for file in facts["unnamed"]}
    shown = CliRunner().invoke(main, ["verify", str(run)]).stdout
    assert "6 files with" in shown
    assert "named by no record" in shown
    assert all(key in shown for key in expected)
    before = {name: (run / name).read_bytes() for name in ("manifest.parquet", "_SUCCESS")}
    extract_again(run)
    assert {name: (run / name).read_bytes() for name in before} == before, "nothing was wrong with them"
    assert command(run).exit_code == 0
    assert (run / "data/notes.txt").exists()
    (run / "data/notes.txt").unlink()
    assert_whole(run)


def test_parts_of_a_run_that_is_not_finished_are_reported_and_no_fault(run: Path) -> None:
    reopen(LocalStore(run), read_job(LocalStore(run)), [1])
    expected = leftovers(run) | {key_of(spec, 1) for spec in runs.PARTS}
    result = command(run)
    assert result.exit_code == 0
    assert {file["key"] for file in json.loads(result.stdout)["unnamed"]} == expected
    assert "the end of the run deletes" in CliRunner().invoke(main, ["verify", str(run)]).stdout


@pytest.mark.parametrize("key", ["/etc/shard-000001-0000000000a1.parquet", "data/../../other/data/shard-000001-0000000000a1.parquet"])
def test_verify_follows_no_key_out_of_the_run(run: Path, key: str) -> None:
    store = LocalStore(run)
    job = read_job(store)
    assert job is not None
    commit = read_commit(store, job, 1)
    store.put(commit_key(1), replace(commit, parts=(replace(commit.parts[0], key=key), *commit.parts[1:])).to_json())
    (damage,) = verify(store, checksums=True).damages
    assert damage.key == commit_key(1)
    assert repr(key) in damage.problem


def test_a_damaged_sequences_file_is_named_and_nothing_is_deleted(run: Path) -> None:
    file = min((run / "sequences").iterdir())
    flip(file, 50)
    before = sorted(path.name for path in run.rglob("*") if path.is_file())
    result = CliRunner().invoke(main, ["verify", str(run), "--repair"])
    assert result.exit_code == 1
    assert str(file) in result.stdout
    assert "restore them from a copy" in result.stdout
    assert sorted(path.name for path in run.rglob("*") if path.is_file()) == before


def test_a_sequences_file_that_goes_bad_while_verify_reads_is_named_too(run: Path) -> None:
    class Rotting(LocalStore):
        num_reads = 0

        def read(self, key: str) -> bytes:
            data = super().read(key)
            self.num_reads += key == file.key
            return data[:50] + bytes([data[50] ^ 1]) + data[51:] if key == file.key and self.num_reads > 1 else data

    job = read_job(LocalStore(run))
    assert job is not None
    file = job.sequence_files[0]
    (damage,) = verify(Rotting(run), checksums=True).damages
    assert (damage.key, damage.shard) == (file.key, None)
    assert "the xxh3 of its bytes is" in damage.problem


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "is absent"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"eeee", b"eeef", 1)), "does not have the digest that it names"),
    ],
)
def test_a_damaged_record_of_the_weights_is_named_and_nothing_is_deleted(run: Path, damage: Callable[[Path], object], problem: str) -> None:
    """Without it the same command does not go on: a shard that was opened again would stay so."""
    damage(run / "weights.json")
    (run / key_of(runs.PARTS[1], 0)).unlink()
    before = sorted(path.name for path in run.rglob("*") if path.is_file())
    result = command(run, "--repair")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    found = {each["key"]: each["problem"] for each in facts["damaged"]}
    assert found.keys() == {"weights.json", key_of(runs.PARTS[1], 0)}
    assert problem in found["weights.json"]
    assert facts["reopened_shards"] == []
    shown = CliRunner().invoke(main, ["verify", str(run), "--repair"]).stdout
    assert "restore them from a copy" in shown
    assert "Opened again" not in shown
    assert sorted(path.name for path in run.rglob("*") if path.is_file()) == before


def test_an_unfinished_run_is_verified_too(run: Path) -> None:
    reopen(LocalStore(run), read_job(LocalStore(run)), [1])
    found = verify(LocalStore(run), checksums=True)
    assert (found.files, found.damages, found.is_complete) == (6, (), False)


class Interrupted(LocalStore):
    """A disk that fails after so many deletions."""

    left = 0

    def delete(self, keys) -> None:
        for key in keys:
            if self.left == 0:
                raise StoreError("cut off")
            self.left -= 1
            super().delete([key])


@pytest.mark.parametrize("num_deletions", range(4))
def test_a_repair_cut_off_anywhere_leaves_whole_shards_and_can_be_repeated(run: Path, num_deletions: int) -> None:
    store = Interrupted(run)
    store.left = num_deletions
    with pytest.raises(StoreError, match="cut off"):
        reopen(store, read_job(store), [0, 2])
    seen = {shard.index: shard.activations for shard in open_run(run).layer(7).shards()}
    assert seen.keys() >= {1}
    store.left = 100
    reopen(store, read_job(store), [0, 2])
    extract_again(run)
    assert_whole(run)


def test_what_is_no_run(tmp_path: Path) -> None:
    result = command(tmp_path)
    assert result.exit_code == 1
    assert "There is no run" in result.stderr
    LocalStore(tmp_path).put("job.json", b"{}")
    with pytest.raises(RunDamagedError, match=r"job\.json"):
        verify(LocalStore(tmp_path), checksums=False)
