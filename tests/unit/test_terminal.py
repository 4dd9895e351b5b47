"""What a person sees at a terminal of 80 columns or in a pipe, and what is said of a misspelt word."""

import io
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from m2ray.batches import LayerSpan
from m2ray.chain.progress import Progress
from m2ray.chain.status import RunStatus, StageStatus
from m2ray.cli import main
from m2ray.cli.output import between_words, console_of_tables
from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError, did_you_mean, in_ranges
from m2ray.export.exporting import consumer_of
from m2ray.option_types import legal_values
from m2ray.planning.hardware import Cluster, Gpu, Node, parse_gpus
from m2ray.planning.layout import render
from m2ray.planning.rates import RatePlan
from tests.unit.test_plan import PROMPTS, plan

GB = 10**9


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(terminal: Terminal) -> list[str]:
    """The lines of the last picture: what was drawn after the cursor went up for the last time, without colours."""
    last = re.split(r"(?:\r|\x1b\[\d*A|\x1b\[2K)+", terminal.getvalue().rstrip("\n"))
    return [line for line in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", "\n".join(last)).split("\n") if line.strip()]


@pytest.fixture(params=[80, 120])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    return int(request.param)


def a_run(tokens: int) -> RunStatus:
    stage = StageStatus(LayerSpan(0, 2), "here", "cpu", write_wait_s=40.0, written_bytes=9 * GB)
    return RunStatus(123, 4567, tokens, 0, 90_000_000, 10.0, 600.0, 9 * GB, ((None, stage),))  # type: ignore[arg-type]


def test_labels_and_the_time_left_are_whole_on_a_narrow_terminal(columns: int) -> None:
    terminal = Terminal()
    with Progress(terminal) as progress:
        progress.surveying(123_456)
        progress.surveying(1_234_567, is_done=True)
        progress.loading([StageStatus(LayerSpan(0, 2), "here", "cpu", needed_bytes=400 * GB, read_bytes=123 * GB)] * 16)
        progress.extracting(a_run(12_345_678))
    lines = screen(terminal)[-3:]
    assert [line.split()[0] for line in lines] == ["survey", "load", "extract"]
    assert max(map(len, lines)) <= columns
    assert "1,234,567 prompts" in lines[0]
    assert "123 of 4,567 shards, 1 h 02 min left, 20,576 tokens/s" in lines[2]
    assert ("12,345,678 of 90,000,000 tokens" in lines[2]) is False, "what has no room is left out whole"
    assert all("…" not in line for line in lines)


def test_what_cannot_be_counted_is_said_as_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().waiting("cluster", "starting Ray on this machine")
    assert capsys.readouterr().out == "cluster: starting Ray on this machine\n"


def test_a_phase_that_is_over_does_not_pulse_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    progress = Progress(Terminal())
    bars: Any = progress._bars
    progress.surveying(10)
    assert [task.total for task in bars.tasks] == [None], "nobody knows how many there are"
    progress.surveying(12, is_done=True)
    assert [task.finished for task in bars.tasks] == [True]
    progress.loading([])
    assert bars.tasks[1].total is None
    progress.loading([StageStatus(LayerSpan(0, 2), "here", "cpu", needed_bytes=4, read_bytes=3)])
    assert (bars.tasks[1].total, bars.tasks[1].completed) == (1.0, 0.75)
    progress.extracting(a_run(5))
    assert [task.finished for task in bars.tasks] == [True, True, False], "what comes next ends what was before"


def test_a_warm_up_is_named_as_such_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    read = {"needed_bytes": 4, "read_bytes": 4}
    statuses = [StageStatus(LayerSpan(0, 2), "here", "cuda:0", **read, warm_up_left=left) for left in (3, 0)]
    for compiles, words in ((True, "compiling and warming up"), (False, "warming up")):
        said = io.StringIO()
        Progress(said).loading(statuses, compiles=compiles)
        assert said.getvalue().split(": ", 1)[1].strip() == f"{words}, micro-batches left by stage: 3 0"


def test_a_rate_of_loading_is_of_what_was_read_since_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    clock = iter([100.0, 100.0, 110.0, 110.0])
    monkeypatch.setattr("m2ray.chain.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    said = io.StringIO()
    progress = Progress(said)
    for read_bytes in (20 * GB, 40 * GB):
        progress.loading([StageStatus(LayerSpan(0, 2), "here", "cpu", needed_bytes=80 * GB, read_bytes=read_bytes)])
    assert said.getvalue().splitlines() == ["load: 20.0 GB of 80.0 GB, stages: 25%", "load: 40.0 GB of 80.0 GB, 2.0 GB/s, stages: 50%"]


def test_in_a_pipe_a_line_of_progress_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    said = io.StringIO()
    Progress(said).extracting(a_run(12_345_678))
    (line,) = said.getvalue().splitlines()
    for words in ("123 of 4,567 shards", "left", "tokens/s", "waited 40 s for the disk", "12,345,678 of 90,000,000 tokens"):
        assert words in line


def test_lines_are_broken_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "  one two three four five six\n/a/very/long/path/that/stays/whole end"
    assert between_words(text, io.StringIO()) == text
    assert between_words(text, Terminal()) == "  one two three four\n  five six\n/a/very/long/path/that/stays/whole\nend"


# -- the plan -------------------------------------------------------------------------------------------------------------


def drawn(planned: Any, columns: int) -> list[str]:
    console = Console(width=columns, file=io.StringIO(), color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(render(planned, columns, chose_batch_tokens=True))
    return capture.get().splitlines()


def words(lines: list[str]) -> list[str]:
    return sorted(re.findall(r"[^\s█▓▒░]+", "\n".join(lines)))


def test_the_plan_breaks_no_word_at_80_columns() -> None:
    gpus = tuple(Gpu(index, "NVIDIA A100-SXM4-80GB", 81_920 << 20, 81_920 << 20) for index in range(4))
    nodes = tuple(Node(f"node-{number}.cluster.example", gpus, 64, 900 * GB, 800 * GB, 400 * GB) for number in range(2))
    planned = plan(Cluster(nodes), prompts=PROMPTS, replicas=2, offload="cpu", price_per_gb_month=0.02, price_gpu_hour=2.5)
    narrow, wide = drawn(planned, 80), drawn(planned, 10_000)
    assert max(len(line.rstrip()) for line in narrow) <= 80
    assert words(narrow) == words(wide)


def test_a_plan_in_a_pipe_has_its_sentences_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert console_of_tables().width > 1000
    offload = next(remedy.text for remedy in plan("1xH200").remedies if remedy.option == "offload")
    assert f"  {offload}" in drawn(plan("1xH200"), console_of_tables().width)


def rates(planned: Any) -> RatePlan:
    found: RatePlan = planned.rates
    return found


def test_what_gpus_cost_and_how_long_it_takes() -> None:
    asked = plan("2 nodes of 8xH200", stages=9, prompts=PROMPTS, tokens_per_s=500.0, price_gpu_hour=3.0)
    hours = PROMPTS.tokens / 500.0 / 3600
    assert rates(asked).gpu_hours == pytest.approx(9 * hours), "the nine GPUs of its stages"
    assert rates(asked).gpu_cost == pytest.approx(27 * hours)
    text = "\n".join(drawn(asked, 200))
    assert f"{27 * hours:.2f} for {9 * hours:.2f} GPU hours at 3 each; loading is not counted" in text
    assert "about 40 seconds" in text
    cheap = "\n".join(drawn(plan("8xH200", prompts=PROMPTS, tokens_per_s=1e9, price_gpu_hour=3.0), 200))
    assert "less than 0.01 for less than 0.01 GPU hours at 3 each" in cheap, "no 6.2e-07"
    assert rates(plan("8xH200", prompts=PROMPTS)).gpu_cost is None
    assert rates(plan("8xH200", tokens_per_s=500.0, price_gpu_hour=3.0)).gpu_hours is None, "without prompts nobody knows"
    assert not re.search(r"\b0\.0 minutes|\b0 seconds", "\n".join(drawn(plan("8xH200", prompts=PROMPTS, tokens_per_s=1e6), 200)))


# -- legal values, and words that are misspelt ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["extract", "submit", "plan"])
def test_help_names_all_legal_values(command: str) -> None:
    help_text = CliRunner().invoke(main, [command, "--help"], terminal_width=200).output
    for name, field in ExtractConfig.model_fields.items():
        shown = re.search(rf"--{name.replace('_', '-')} +(\S*)", help_text)
        assert shown, name
        if field.annotation is not bool or command == "plan":
            assert shown[1] == "|".join(legal_values(field.annotation))
    assert "--truncation refuse|cut" in re.sub(r" +", " ", help_text)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["extrat"], "'extract'"),
        (["inpsect", "x"], "'inspect'"),
        (["extract", "--stagse", "5"], "'--stages'"),
        (["plan", "--model", "m", "--gpus", "8xH2000"], "'H200'"),
        (["plan", "--model", "m", "--gpus", "a100-08GB"], "'A100-80GB'"),
        (["plan", "--model", "m", "--gpus", "8xH200", "{toml}"], "'batch_tokens'"),
    ],
)
def test_a_misspelt_word_is_answered_by_the_right_one(arguments: list[str], meant: str, tmp_path: Path) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text("batch_token = 5\n")
    assert tomllib.loads(toml.read_text())
    done = CliRunner().invoke(main, [word.format(toml=toml) for word in arguments])
    assert done.exit_code in (1, 2)
    said = " ".join(done.output.split())
    assert re.search(rf"Did you mean (one of: )?[^?]*{meant}", said), said


def test_a_misspelt_consumer() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'saelens'"):
        consumer_of("SAELense")


def test_what_is_like_no_known_word_gets_no_guess() -> None:
    assert did_you_mean("zebra", ["H200", "A100"]) == ""
    with pytest.raises(ConfigError) as raised:
        parse_gpus("8xQ7")
    assert "Did you mean" not in str(raised.value)


@pytest.mark.parametrize(("numbers", "text"), [(range(62), "0-61"), ([0], "0"), ([0, 7, 8, 9, 61], "0, 7-9, 61"), ([], "")])
def test_layers_in_words(numbers: list[int], text: str) -> None:
    assert in_ranges(numbers) == text
