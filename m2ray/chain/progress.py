"""What a person sees while a run goes on: bars on a terminal, plain lines in a job's log."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from m2ray.errors import shown
from m2ray.sizes import bytes_in_words, seconds_in_words

if TYPE_CHECKING:  # what only looks at a run needs no Ray
    from m2ray.chain.status import RunStatus, StageStatus

_LINE_EVERY_S = 5.0
_PHASE_WIDTH = 7
_WIDE = 100
"""Columns of a terminal from which on bars are long."""


class Progress:
    """Bars where the stream is a terminal; elsewhere a line at most every few seconds, and one at each phase's end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False)
        self._bars: Bars | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn(f"{{task.description:<{_PHASE_WIDTH}}}"),
                BarColumn(self._bar_width),
                TextColumn("{task.fields[words]}", markup=False),
            )
            # What others print meanwhile goes where it would go without the bars: rich would let its colours through.
            self._bars = Bars(*columns, console=self._console, redirect_stdout=False, redirect_stderr=False)
        self._tasks: dict[str, TaskID] = {}
        self._said_at: dict[str, float] = {}
        self._loading: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, line: str) -> None:
        """A line that stays; one only, whatever it holds of text from outside. A terminal breaks it between words."""
        self._console.print(shown(line), markup=False, emoji=False, soft_wrap=not self._console.is_terminal)

    def waiting(self, phase: str, what: str) -> None:
        """What is done now, where nothing can be counted and it may take a minute."""
        self._show(phase, [what], None)

    def surveying(self, rows: int, counted: str = "prompts", *, is_done: bool = False) -> None:
        """Prompt rows, or what was packed of them, read and tokenised so far, or in all."""
        self._show("survey", [f"{rows:,} {counted}"], 1.0 if is_done else None)

    def loading(self, statuses: Sequence["StageStatus"], *, compiles: bool = False, are_there: bool = False) -> None:
        """Bytes of weights read, by stage, and how fast since the first look; none while the first actors' processes start. Then what their
        warm-up has left, which is all where the weights `are_there` already.
        """
        now, read_bytes = time.monotonic(), sum(status.read_bytes for status in statuses)
        began_at, before_bytes = self._loading = self._loading or (now, read_bytes)
        if not (are_there or any(status.needed_bytes for status in statuses)):
            self._show("load", ["starting the stages"], None)
            return
        left = [status.warm_up_left for status in statuses]
        if any(left):
            words = ["compiling and warming up" if compiles else "warming up", f"micro-batches left by stage: {' '.join(map(str, left))}"]
            self._show("load", words, None)
            return
        if are_there:
            return
        needed_bytes = sum(status.needed_bytes for status in statuses)
        words = [f"{bytes_in_words(read_bytes)} of {bytes_in_words(needed_bytes)}"]
        if now > began_at:
            words.append(f"{bytes_in_words(max(0, read_bytes - before_bytes) / (now - began_at))}/s")
        words.append(f"stages: {' '.join(f'{status.read_bytes / max(status.needed_bytes, 1):.0%}' for status in statuses)}")
        self._show("load", words, read_bytes / max(needed_bytes, 1))

    def extracting(self, run: "RunStatus") -> None:
        """Shards, tokens, rates and the time left."""
        elapsed_s = max(run.extract_s, 1e-3)
        rate, tokens = run.tokens / elapsed_s, run.tokens_before + run.tokens
        words = [
            f"{run.shards:,} of {run.all_shards:,} shards",
            f"{seconds_in_words(run.left_s)} left" if run.left_s is not None else "time left unknown",
            f"{rate:,.0f} tokens/s",
        ]
        if run.gpu_busy is not None:
            used_bytes = max(gpu.used_bytes for stage in run.statuses for gpu in stage.gpus)
            words.append(f"GPU {run.gpu_busy:.0%} busy, {bytes_in_words(used_bytes)} taken")
        write_wait_s = max((stage.write_wait_s for stage in run.statuses), default=0.0)
        if write_wait_s > 0.01 * elapsed_s:
            words.append(f"waited {seconds_in_words(write_wait_s)} for the disk")
        words += [f"{bytes_in_words(run.written_bytes / elapsed_s)}/s written", f"{tokens:,} of {run.all_tokens:,} tokens"]
        self._show("extract", words, tokens / max(run.all_tokens, 1))

    def following(self, words: Sequence[str], fraction: float) -> None:
        """A run that is looked at from outside, in words, the most important first."""
        self._show("run", words, fraction)

    def exporting(self, samples: int, all_samples: int, written_bytes: int, kept_bytes: int, elapsed_s: float) -> None:
        """Sequences of a run that are exported, and what was written and kept of it."""
        words = [f"{samples:,} of {all_samples:,} sequences", f"{bytes_in_words(written_bytes)} written"]
        words += [f"{bytes_in_words(kept_bytes)} kept"] if kept_bytes else []
        words.append(f"{bytes_in_words(written_bytes / max(elapsed_s, 1e-3))}/s")
        self._show("export", words, samples / max(all_samples, 1))

    def _show(self, phase: str, words: Sequence[str], fraction: float | None) -> None:
        """`words`, the most important first: a narrow terminal shows as many as it has room for. A phase ends all that began before it."""
        now = time.monotonic()
        if self._bars:
            task = self._tasks.get(phase)
            if task is None:
                for other in self._tasks.values():
                    self._bars.update(other, total=1.0, completed=1.0)
                task = self._tasks[phase] = self._bars.add_task(phase, total=None, words="")
            fitting = _fitting(words, self._console.width - _PHASE_WIDTH - self._bar_width - 2)
            self._bars.update(task, total=None if fraction is None else 1.0, completed=fraction or 0.0, words=fitting)
        elif now - self._said_at.get(phase, 0.0) >= _LINE_EVERY_S or fraction == 1.0:
            self._said_at[phase] = now
            self.say(f"{phase}: {', '.join(words)}")

    @property
    def _bar_width(self) -> int:
        return 10 if self._console.width < _WIDE else 30


def _fitting(words: Sequence[str], width: int) -> str:
    """As many of the words as go into a line, at least the first; those that are too long are left out."""
    line = words[0]
    for more in words[1:]:
        if len(line) + 2 + len(more) <= width:
            line = f"{line}, {more}"
    return line
