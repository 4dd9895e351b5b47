"""SIGTERM ends a run with a message and exit code 1 wherever it comes, and what must not be broken off is not."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner
from ray.exceptions import RaySystemError

import m2ray
from m2ray.activations.writing.commits import Run
from m2ray.activations.writing.lease import held
from m2ray.chain import beginning, replicas, stopping
from m2ray.chain.progress import Progress
from m2ray.chain.stopping import NOTHING_WRITTEN, sigterm_kept, spared_by_hangup, stop_on_sigterm
from m2ray.cli import main
from m2ray.errors import StageError
from m2ray.model.stage import Stage
from m2ray.sequences import SequencesWriter
from m2ray.storage import LocalStore, open_store
from m2ray.storage.hashing import HashingFile
from tests.reference import make_minimax


@pytest.fixture(autouse=True)
def survivor() -> Iterator[None]:
    """A signal that nobody takes ends the test, not pytest."""

    def ended(*_: object) -> None:
        pytest.fail("the process was ended")

    before = {one: signal.signal(one, ended) for one in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


def sigterm(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_during_the_survey_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, run = make_minimax(tmp_path / "model", "fp8"), tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text('{"text": "one two three"}\n', encoding="utf-8")
    monkeypatch.setattr(Progress, "surveying", sigterm)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # a run that gets as far as Ray fails with another error
    ended = CliRunner().invoke(main, ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(run)])
    assert ended.exit_code == 1
    assert ended.stderr == "Error: The run was stopped on request. Nothing was written: the same command begins from the start.\n"
    assert not [path for path in run.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("ends", "code"), [(KeyboardInterrupt(), 130), (RaySystemError("gone"), 1)], ids=["Ctrl-C", "Ray"])
def test_what_ends_a_run_once_the_survey_is_done_leaves_nothing(
    ends: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Ray starts, or looks at the nodes and fails."""

    def interrupted(*_: object) -> NoReturn:
        assert list((run / "sequences").iterdir())
        raise ends

    model, prompts, run = make_minimax(tmp_path / "model", "fp8"), tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text('{"text": "one two three"}\n', encoding="utf-8")
    monkeypatch.setattr(beginning, "_hardware", interrupted)
    ended = CliRunner().invoke(main, ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(run)])
    assert ended.exit_code == code
    assert not run.exists()


def test_sighup_is_heard_again_where_ctrl_c_came_just_before_it_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks first and then raises what another signal's handler raises."""
    block = signal.pthread_sigmask

    def raising(how: signal.Sigmasks, mask: Iterable[int]) -> set[int]:
        before = block(how, mask)
        if how == signal.SIG_BLOCK and signal.SIGHUP in mask:
            raise KeyboardInterrupt
        return before

    monkeypatch.setattr(signal, "pthread_sigmask", raising)
    with pytest.raises(KeyboardInterrupt), spared_by_hangup():
        raise AssertionError("it came before")
    assert signal.SIGHUP not in block(signal.SIG_BLOCK, ())


def test_every_signal_in_every_phase_leaves_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in one process, stopped again and again: what it has committed stays as it is, and the same command does the rest."""
    model, prompts, run = make_minimax(tmp_path / "model", "bf16"), tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("".join("one two three " * (1 + number % 5) + "\n" for number in range(60)))
    words = ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(run), "--shard-tokens", "64"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(replicas, "_FLUSH_S", 0.1)
    forward = Stage.forward
    monkeypatch.setattr(Stage, "forward", lambda *given: (time.sleep(0.05), forward(*given))[1])
    kept: dict[Path, bytes] = {}
    for place, by in STOPS:
        with monkeypatch.context() as patch:
            patch.setattr(*place, signalling(getattr(*place), by))
            ended = CliRunner().invoke(main, words)
        told = (place, by, ended.output)
        if by is signal.SIGINT:
            assert ended.exit_code == 130, told
            is_early = place == STOPS[0][0]  # nothing is claimed yet
            kept_words = NOTHING_WRITTEN if is_early else "Committed shards are kept: the same command goes on."
            assert f"Stopped by Ctrl-C. {kept_words}" in ended.stderr, told
        elif place == AT_ITS_END:
            assert ended.exit_code == 0, told
        else:
            assert ended.exit_code == 1, told
            assert ended.stderr == "Error: The run was stopped on request. Run the same command again: finished shards are kept.\n", told
        assert (place == AT_ITS_END and by is not signal.SIGINT) == (run / "_SUCCESS").exists(), told
        committed = {path: path.read_bytes() for path in (run / "_commits").glob("*")}
        assert committed.items() >= kept.items(), told
        assert len(committed) > len(kept) or place != IN_ITS_MIDST, told
        kept = committed
    reader = m2ray.open_run(run)
    for number, tokens in enumerate(reader.sequences["token_count"].to_pylist()):
        assert len(reader.layer(3).sequence(number)) == tokens, number


IN_ITS_MIDST, AT_ITS_END = (Run, "commit"), (Run, "_sweep")
STOPS = [
    ((Progress, "surveying"), signal.SIGINT),
    ((Progress, "loading"), signal.SIGINT),
    ((Progress, "loading"), signal.SIGHUP),
    (IN_ITS_MIDST, signal.SIGINT),
    (IN_ITS_MIDST, signal.SIGTERM),
    (AT_ITS_END, signal.SIGINT),
    (AT_ITS_END, signal.SIGTERM),
]


def signalling(method: Any, by: signal.Signals) -> Any:
    """The method, and a signal once it has done its work."""

    def signalled(*given: Any, **named: Any) -> Any:
        found = method(*given, **named)
        os.kill(os.getpid(), by)
        return found

    return signalled


def test_a_second_driver_is_refused_before_ray_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, run = make_minimax(tmp_path / "model", "fp8"), tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text('{"text": "one two three"}\n', encoding="utf-8")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # a run that gets as far as Ray fails with another error
    with held(LocalStore(run), print, print, period_s=1.0):
        refused = CliRunner().invoke(main, ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(run)])
    assert refused.exit_code == 1
    assert f"Error: Another driver is at the run at {run}: process {os.getpid()} on " in refused.stderr
    assert "or give --wait" in refused.stderr


def test_what_is_not_to_be_broken_off_goes_on_and_the_next_step_does_not_begin() -> None:
    with stop_on_sigterm() as stop:
        sigterm()
        assert stop.asked.is_set()
        with pytest.raises(StageError, match="on request. Later"), stop.at_once("Later."):
            pytest.fail("it began")


def test_a_driver_that_was_outlived_ends_with_the_reason() -> None:
    with stop_on_sigterm() as stop:
        stop.outlived("Another driver took the run over.")
        with pytest.raises(StageError, match="Another driver took the run over. What this one committed is kept"), stop.at_once("Later."):
            pytest.fail("it began")


def test_an_error_that_is_collected_does_not_hide_the_stop() -> None:
    """As checks do: each keeps its error and the next one begins."""
    with stop_on_sigterm() as stop, pytest.raises(StageError, match="stopped on request"), stop.at_once("Later."):
        try:
            sigterm()
        except Exception:  # noqa: BLE001 - the widest there is
            pytest.fail("it was taken for a failure")


def test_ctrl_c_stays_ctrl_c() -> None:
    with stop_on_sigterm() as stop, pytest.raises(KeyboardInterrupt), stop.at_once("Later."):
        raise KeyboardInterrupt


def test_the_handler_outlives_that_of_ray() -> None:
    with stop_on_sigterm() as stop:
        with pytest.raises(StageError, match="stopped on request"), stop.at_once("Later."), sigterm_kept():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as ray.init begins
            sigterm()
        assert signal.getsignal(signal.SIGTERM) == stop.ask


def test_the_alarm_of_rays_handler_is_put_off() -> None:
    with stop_on_sigterm() as stop:
        signal.alarm(60)  # it sets one before it hands the signal on
        sigterm()
        assert stop.asked.is_set()
        assert signal.alarm(0) == 0


def test_the_handler_outlives_that_of_a_ray_that_starts_in_a_thread() -> None:
    """Its C++ code sets one without asking Python, which aborted the process at SIGTERM, without a word."""

    def init() -> None:
        with sigterm_kept():
            stopping._set_handler(signal.SIGTERM, signal.SIG_IGN)

    with stop_on_sigterm() as stop:
        starting = threading.Thread(target=init)
        starting.start()
        starting.join()
        sigterm()
        assert stop.asked.is_set()


def test_a_survey_that_is_broken_off_as_its_file_appears_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def published_and_stopped(self: HashingFile, was: Any = HashingFile.publish) -> None:
        was(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(HashingFile, "publish", published_and_stopped)
    row = {"sequence_id": [0], "row_id": ["a"], "prompt_digest": [None], "token_count": [0], "shard": [None]}
    with pytest.raises(KeyboardInterrupt), SequencesWriter(open_store(tmp_path), "attempt") as writer:
        writer.write(
            {
                **row,
                "status": ["quarantined"],
                "reason": ["empty"],
                "loss_mask": [None],
                "roles": [None],
                "row_count": [0],
                "documents": [None],
            }
        )
        writer.finish()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
