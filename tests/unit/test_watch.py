"""`m2ray inspect`: a run followed from its folder alone, live drivers told from dead ones, and the runs of a folder listed."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from obstore.store import MemoryStore

from m2ray.activations.json_record import to_json
from m2ray.activations.schema import FORMAT_VERSION
from m2ray.activations.writing import commits, pulse
from m2ray.activations.writing.commits import Run, claim_run
from m2ray.activations.writing.holder import Holder
from m2ray.activations.writing.lease import held
from m2ray.activations.writing.pulse import Pulse
from m2ray.chain.progress import Progress
from m2ray.cli import main, watch
from m2ray.errors import StoreError
from m2ray.storage import LocalStore, ObjectStore
from tests.unit import activation_runs as made

PERIOD_S = 0.2
ELSEWHERE = Holder(FORMAT_VERSION, "d1", "other", 7, "2026-01-01T00:00:00+00:00", PERIOD_S)
"""A driver of another machine, of whose process nothing can be seen here."""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "runs" / "one")


def commit(run: Run, number: int) -> None:
    shard = made.shard(number)
    receipts = made.write_shard(run.store, run.job, shard, f"a{number}")
    run.commit(shard, f"a{number}", receipts, [(len(shard.sequence_ids), int(shard.token_counts.max()))], 1.0)


def begun(store: LocalStore, num_shards: int, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of three shards of which some are committed, ten seconds apart."""
    run = claim_run(store, made.job(store))
    for number in range(num_shards):
        monkeypatch.setattr(commits, "utc_now", lambda number=number: f"2026-01-01T00:01:{10 * number:02d}+00:00")
        commit(run, number)
    return run


def say_sign(store: LocalStore, number: int, holder: Holder = ELSEWHERE) -> None:
    store.create(f"_lease/{number:08d}.json", to_json(holder))
    store.delete([f"_lease/{number - 1:08d}.json"])


@contextmanager
def beating(store: LocalStore, holder: Holder = ELSEWHERE) -> Iterator[None]:
    """Another machine's driver at work: its next number every tenth of a second."""
    ended = threading.Event()

    def beat() -> None:
        number = 1
        while not ended.wait(PERIOD_S / 2):
            number += 1
            say_sign(store, number, holder)

    say_sign(store, 1, holder)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def inspect(*words: object) -> str:
    done = CliRunner().invoke(main, ["inspect", *map(str, words)])
    assert done.exit_code in (0, 1), done.output
    assert "Traceback" not in done.output
    return done.output


def test_how_far_a_run_is_and_what_its_last_commits_took(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(store, 2, monkeypatch)
    look = watch.Look(store, run.job)
    seen = look.look()
    tokens = [made.shard(number).num_tokens for number in range(3)]
    assert (seen.shards, seen.all_shards, seen.tokens, seen.all_tokens) == (2, 3, sum(tokens[:2]), sum(tokens))
    assert seen.tokens_per_s == tokens[1] / 10
    assert seen.left_s == pytest.approx(tokens[2] / (tokens[1] / 10))
    assert seen.last_commit == "2026-01-01T00:01:10+00:00"
    assert look.look("2026-01-01T00:01:05+00:00").tokens_per_s is None, "a driver's rate is of its own commits"
    read: list[int] = []
    monkeypatch.setattr(watch, "read_commits", lambda _, __, shards: read.extend(shards) or [])
    look.look()
    assert read == [], "a commit is read once"
    store.delete(["_commits/shard-000001.json"])
    assert look.look().shards == 1, "one that was taken back does not count"


def test_a_run_is_followed_to_its_end(store: LocalStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(store, 2, monkeypatch)
    looks: list[int] = []

    def next_look(_: float) -> None:
        looks.append(len(looks))
        commit(run, 2)
        run.finish()

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=next_look))
    with beating(store):
        assert watch.watch(store, Progress())
    printed = capsys.readouterr().out
    assert looks == [0]
    assert "run: 2 of 3 shards" in printed
    assert "Complete: 3 of 3 shards" in printed
    assert "same command" not in printed


def test_watching_ends_where_no_driver_is_left(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(store, 1, monkeypatch)
    ended = CliRunner().invoke(main, ["inspect", str(store.folder), "--watch"])
    assert (ended.exit_code, "no driver is at it: run the same command again" in ended.output) == (1, True)


def test_a_folder_without_run_and_driver_cannot_be_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is anybody told to finish it; a driver that looks at its model still is not there yet."""
    with pytest.raises(StoreError, match="There is no run at .* just been started"):
        watch.watch(LocalStore(tmp_path), Progress())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("is_here", [False, True])
def test_a_live_driver_is_never_told_to_be_run_again(store: LocalStore, monkeypatch: pytest.MonkeyPatch, *, is_here: bool) -> None:
    begun(store, 0, monkeypatch)
    with held(store, print, print, period_s=PERIOD_S) if is_here else beating(store):
        printed = inspect(store.folder)
        told = json.loads(inspect(store.folder, "--json"))
    assert "not complete: a driver is at it (process" in printed
    assert "same command" not in printed
    assert told["driver"]["life"] == "alive"


def test_a_driver_without_signs_is_not_taken_for_a_live_one(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(store, 0, monkeypatch)
    say_sign(store, 5)
    looked = Pulse(store)
    assert looked.look() == "unsure"
    now = time.monotonic()
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: now + ELSEWHERE.patience_s))
    assert looked.look() == "silent"
    assert "run the same command again" in looked.in_words()
    say_sign(store, 6)
    assert looked.look() == "alive"


def test_a_dead_driver_of_this_machine_is_known_at_once(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(store, 0, monkeypatch)
    with held(store, print, print, period_s=PERIOD_S):
        holder = pulse.read_lease(store)[1]
    say_sign(store, 9, replace(holder, pid=10**12))
    printed = inspect(store.folder)
    assert "not complete: its last driver ended without a word" in printed
    assert "run the same command again" in printed


def test_the_runs_of_a_folder_are_listed(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # of whoever runs the tests: a table is as wide as it says
    begun(store, 1, monkeypatch)
    done = LocalStore(store.folder.parent / "two")
    begun(done, 3, monkeypatch).finish()
    bad = store.folder.parent / "three"
    bad.mkdir()
    (bad / "job.json").write_text("{")
    (store.folder.parent / "notes").mkdir()
    with beating(store):
        lines = [line.split() for line in inspect(store.folder.parent).splitlines()]
        runs = json.loads(inspect(store.folder.parent, "--json"))["runs"]
    tokens = made.shard(0).num_tokens
    assert [line[0] for line in lines] == ["run", "one", "three", "two"]
    assert lines[1][1:7] == ["m", "residual", "0,", "7,", "11", "1/3"]
    assert lines[1][7] == str(tokens)
    assert lines[1][-2:] == ["at", "work"]
    assert lines[3][-1] == "complete"
    assert [run["run"] for run in runs] == [str(store.folder.parent / name) for name in ("one", "three", "two")]
    assert (runs[0]["tokens"], runs[0]["driver"], runs[0]["is_complete"]) == (tokens, "alive", False)
    assert "job.json" in runs[1]["problem"]
    assert "follows one run" in CliRunner().invoke(main, ["inspect", str(store.folder.parent), "--watch"]).output


def test_the_tokens_of_a_run_of_few_rows_add_up(store: LocalStore) -> None:
    """Commits count rows; of which shard the tokens are is not in them."""
    counts, shards = made.job(store).counts, 7
    rows = [1, 2, 2, 1, 2, 1, 2]
    look = watch.Look(store, replace(made.job(store), counts=replace(counts, tokens=305, rows=sum(rows)), num_shards=shards))
    look._commits = {number: (f"2026-01-01T00:01:{number:02d}+00:00", count, 0) for number, count in enumerate(rows)}
    assert look._standing(None, "").tokens == 305


def test_the_folders_of_a_bucket() -> None:
    memory = ObjectStore("memory://", MemoryStore())
    for key in ("a/job.json", "a/data/deep/x", "b/y", "top"):
        memory.put(key, b"")
    assert list(memory.folders()) == ["a", "b"]
