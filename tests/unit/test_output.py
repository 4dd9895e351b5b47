"""Text from outside reaches a terminal or a log as escapes, on the line where it belongs, whatever prints it."""

import errno
import io
import pickle
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from m2ray.chain import checking
from m2ray.chain.progress import Progress
from m2ray.cli import Command, main
from m2ray.cli.output import Printed, escaped_output, say, terminal
from m2ray.errors import CheckpointError, ConfigError, M2rayError, StageMemoryError, raise_all, shown
from tests.reference import make_minimax

COLOUR = "\x1b[31mred\x1b[0m"
FORGED = "x\nComplete: 9 sequences"
CURSOR = "\x9b2Kgone\x07\r"
TURNED = "\u202egnp.exe"
LONE = "\udc80"
NASTY = f"{COLOUR}{FORGED}{CURSOR}{TURNED}"
ESCAPED = r"\x1b[31mred\x1b[0mx\nComplete: 9 sequences\x9b2Kgone\x07\r\u202egnp.exe"


def is_plain(text: str) -> bool:
    return all(line.isprintable() for line in text.replace("\t", " ").split("\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NASTY, ESCAPED),
        ("河水 é 🙂 a b", "河水 é 🙂 a b"),
        (LONE, r"\udc80"),
        ("a\u2028b\x00", r"a\u2028b\x00"),
    ],
)
def test_what_cannot_be_printed_is_shown_as_python_writes_it(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_a_text_without_end_is_cut_in_its_middle() -> None:
    text = shown("a" * 3_000_000 + "z")
    assert len(text) < 5000
    assert "3,000,001 characters" in text
    assert text.endswith("z")


def test_an_error_keeps_its_own_lines_and_no_others() -> None:
    error = ConfigError(f"The name {NASTY}:", f"Rename {NASTY}.", [f"first {NASTY}", "second"])
    assert str(error).split("\n") == [f"The name {ESCAPED}:", f"  first {ESCAPED}", "  second", f"Rename {ESCAPED}."]
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), type(copy)) == (str(error), ConfigError)
    assert ConfigError(*error.args).what == error.what


def test_an_error_of_several_lists_each_and_cuts_the_list() -> None:
    with pytest.raises(CheckpointError) as raised:
        raise_all([CheckpointError(f"bad {FORGED}", "Copy."), CheckpointError("worse:", "", ["a", "b"])])
    assert str(raised.value).split("\n") == [
        "2 problems were found:",
        r"  1. bad x\nComplete: 9 sequences Copy.",
        "  2. worse:",
        "    a",
        "    b",
    ]
    with pytest.raises(CheckpointError) as many:
        raise_all([CheckpointError(f"file {number}") for number in range(10_000)])
    assert len(str(many.value)) < 1000
    assert "9,970 lines more" in str(many.value)


def test_an_error_of_memory_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(StageMemoryError("what", "remedy", 3, 5)))
    assert (str(error), error.num_sequences, error.length) == ("what remedy", 3, 5)


def test_a_line_of_progress_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say(f"quarantined: row {NASTY} [bold]:smile:")
    assert capsys.readouterr().out == f"quarantined: row {ESCAPED} [bold]:smile:\n"


@click.command(cls=Command)
@click.option("--how")
def prints(how: str) -> None:
    """What a library does that knows nothing of this."""
    if how == "print":
        print(NASTY)  # noqa: T201
    elif how == "say":
        say(NASTY)
        say(NASTY, err=True)
    elif how == "write":
        sys.stderr.write(NASTY)
        sys.stdout.writelines(["\x1b[2J", "é\t\n"])
    elif how == "error":
        raise M2rayError(NASTY)
    elif how == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", f"/tmp/{NASTY}")
    else:
        raise KeyboardInterrupt


@pytest.fixture
def printing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2ray.cli._COMMANDS", ("prints",))
    monkeypatch.setitem(sys.modules, "m2ray.cli.prints", type(sys)("m2ray.cli.prints"))
    sys.modules["m2ray.cli.prints"].command = prints  # type: ignore[attr-defined]


@pytest.mark.usefixtures("printing")
@pytest.mark.parametrize("how", ["print", "say", "write", "error", "disk"])
def test_nothing_that_a_command_prints_holds_a_control_character(how: str) -> None:
    printed = CliRunner().invoke(main, ["prints", "--how", how])
    assert r"\x1b[" in printed.output
    assert is_plain(printed.output)
    assert "Traceback" not in printed.output


@pytest.mark.usefixtures("printing")
def test_an_error_of_the_system_is_a_paragraph() -> None:
    ended = CliRunner().invoke(main, ["prints", "--how", "disk"])
    assert (ended.exit_code, ended.stderr) == (1, f"Error: No space left on device: /tmp/{ESCAPED}.\n")


@pytest.mark.usefixtures("printing")
def test_ctrl_c_is_said_with_the_exit_code_of_shells() -> None:
    ended = CliRunner().invoke(main, ["prints"])
    assert (ended.exit_code, ended.stderr) == (130, "\nStopped by Ctrl-C.\n")


def test_ctrl_c_in_an_extraction_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    model, prompts = make_minimax(tmp_path / "model", "fp8"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "one two three"}\n', encoding="utf-8")
    monkeypatch.setattr(Progress, "surveying", interrupted)
    ended = CliRunner().invoke(main, ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "run")])
    assert ended.exit_code == 130
    assert ended.stderr == "\nStopped by Ctrl-C. Nothing was written: the same command begins from the start.\n"
    monkeypatch.undo()
    monkeypatch.setattr(checking, "open_checkpoint", interrupted)
    ended = CliRunner().invoke(main, ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "run")])
    assert ended.stderr == "\nStopped by Ctrl-C. Nothing was written by now: run the same command again.\n"
    assert not (tmp_path / "run").exists()


def test_rows_of_strangers_can_forge_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey's lines and its error: ids and reasons of quarantined rows, in the real command."""
    model, prompts = make_minimax(tmp_path / "model", "fp8"), tmp_path / f"p{COLOUR}.csv"
    prompts.write_text(f'id,text\n"{NASTY}",\n', encoding="utf-8")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    words = ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "run"), "--id-column", "id"]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 1
    assert is_plain(ended.output)
    assert "\nComplete" not in ended.output
    assert r"\x1b[31mred" in ended.stderr


class ClosedTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def flush(self) -> None:
        self.write("")

    def isatty(self) -> bool:
        return True


def test_a_closed_terminal_is_no_error() -> None:
    stream = Printed(ClosedTerminal())
    assert stream.write("text") == len("text")
    stream.bare().write("\x1b[2K")
    Progress(stream.bare()).say("line")  # type: ignore[arg-type]


def test_bars_are_drawn_on_a_terminal_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    with escaped_output():
        print("\x1b[31m")  # noqa: T201
        terminal().write("\x1b[2K")
    assert screen.getvalue() == "\\x1b[31m\n\x1b[2K"


def test_the_end_of_colours_that_a_library_writes_at_exit_is_not_shown() -> None:
    """Ray imports colorama, which writes it to whatever was standard output then."""
    screen = io.StringIO()
    Printed(screen).write("\x1b[0m")
    assert screen.getvalue() == ""


def test_what_an_encoding_lacks_is_an_escape() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Printed(file).write("é\udc80\n")
    file.flush()
    assert file.buffer.getvalue() == b"\\xe9\\udc80\n"  # type: ignore[attr-defined]
