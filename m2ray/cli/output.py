"""Where all that a command prints passes: text from outside can neither colour a terminal nor forge a line there."""

import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from m2ray.errors import shown

if TYPE_CHECKING:
    from rich.console import Console

_ROOM_COLUMNS = 10_000
_COLOURS_OFF = "\x1b[0m"
"""What a library that Ray imports writes when the process ends, terminal or not. No text."""


class Printed:
    """A text stream of the command: control characters are written as escapes, whoever prints them; line ends stay.

    A terminal that was closed takes nothing, and that is no error: the run goes on to its end.

    Args:
        stream: what it writes to.
        escapes: whether control characters become escapes; not so for what draws on a terminal and shows nothing from outside.
    """

    def __init__(self, stream: TextIO, *, escapes: bool = True) -> None:
        self._stream = stream
        self._escapes = escapes

    def write(self, text: str) -> int:
        if self._escapes and text == _COLOURS_OFF:
            return len(text)
        if self._escapes and not text.isprintable():
            text = "\n".join("\t".join(map(_escaped, line.split("\t"))) for line in text.split("\n"))
        encoding = self._stream.encoding or "utf-8"
        with _open_terminal():
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with _open_terminal():
            self._stream.flush()

    def bare(self) -> "Printed":
        """The same stream for what draws on a terminal: see `escapes`."""
        return Printed(self._stream, escapes=False)

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's, but for its bytes, which would go past this class."""
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)


def say(line: str, *, err: bool = False) -> None:
    """Print one line, and one only, whatever it holds."""
    click.echo(between_words(shown(line), sys.stderr if err else sys.stdout), err=err)


def between_words(text: str, stream: Any) -> str:
    """The text as it is, or on a terminal with its lines broken between words, where the terminal itself would break them anywhere."""
    if not stream.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(
            line,
            columns,
            subsequent_indent=" " * (len(line) - len(line.lstrip())),
            break_long_words=False,  # a path can be copied as it is
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def console_of_tables() -> "Console":
    """Where tables are printed: as wide as the terminal; elsewhere nothing is ever broken for lack of room."""
    from rich.console import Console

    console = Console(highlight=False, color_system=None, markup=False, emoji=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = _ROOM_COLUMNS
    return console


@contextmanager
def escaped_output() -> Iterator[None]:
    """For the length of a command: all that anybody prints goes through `Printed`, warnings and Ray's workers too."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Printed(sys.stdout), Printed(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def terminal() -> Any:
    """Standard output for progress bars, which are drawn by control characters; what they show of text is escaped where it comes in."""
    stream: Any = sys.stdout
    return stream.bare() if isinstance(stream, Printed) and stream.isatty() else stream


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(map(shown, text))


@contextmanager
def _open_terminal() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:  # what Linux says of a terminal that is gone
            raise
