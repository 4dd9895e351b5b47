"""What a person sees while a run goes on: bars on a terminal, plain lines in a job's log."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from m2ray.chain.status import RunStatus, StageStatus
from m2ray.errors import shown

_LINE_EVERY_S = 5.0


class Progress:
    """Bars where the stream is a terminal; elsewhere a line at most every few seconds, and one at each phase's end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._bars: Bars | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}", markup=False))
            # What others print meanwhile goes where it would go without the bars: rich would let its colours through.
            self._bars = Bars(*columns, console=self._console, redirect_stdout=False, redirect_stderr=False)
        self._tasks: dict[str, TaskID] = {}
        self._said_at: dict[str, float] = {}
        self._loading_at: float | None = None

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, line: str) -> None:
        """A line that stays; one only, whatever it holds of text from outside."""
        self._console.print(shown(line), markup=False, emoji=False)

    def surveying(self, rows: int) -> None:
        """Prompt rows read and tokenised so far."""
        self._show("survey", f"{rows:,} prompts", None)

    def loading(self, statuses: Sequence[StageStatus]) -> None:
        """Bytes of weights read, by stage; none while the first actors' processes start."""
        self._loading_at = self._loading_at or time.monotonic()
        if not any(status.needed_bytes for status in statuses):
            self._show("load", "starting the stages", None)
            return
        read_bytes = sum(status.read_bytes for status in statuses)
        needed_bytes = sum(status.needed_bytes for status in statuses)
        rate = read_bytes / max(time.monotonic() - self._loading_at, 1e-3)
        stages = ", ".join(f"{status.read_bytes / max(status.needed_bytes, 1):.0%}" for status in statuses)
        words = f"{_bytes(read_bytes)} of {_bytes(needed_bytes)}, {_bytes(rate)}/s (stages: {stages})"
        self._show("load", words, read_bytes / max(needed_bytes, 1))

    def extracting(self, run: RunStatus) -> None:
        """Shards, tokens, rates and the time left."""
        elapsed_s = max(run.extract_s, 1e-3)
        rate, tokens = run.tokens / elapsed_s, run.tokens_before + run.tokens
        left_words = f"{_seconds((run.all_tokens - tokens) / rate)} left" if rate else "time left unknown"
        words = (
            f"{run.shards:,} of {run.all_shards:,} shards, {tokens:,} of {run.all_tokens:,} tokens, "
            f"{rate:,.0f} tokens/s, {_bytes(run.written_bytes / elapsed_s)}/s written, {left_words}"
        )
        write_wait_s = max((stage.write_wait_s for stage in run.statuses), default=0.0)
        if write_wait_s > 0.01 * elapsed_s:
            words += f", waited {_seconds(write_wait_s)} for the disk"
        if run.gpu_busy is not None:
            used_bytes = max(gpu.used_bytes for stage in run.statuses for gpu in stage.gpus)
            words += f", GPU {run.gpu_busy:.0%} busy, {_bytes(used_bytes)} taken"
        self._show("extract", words, tokens / max(run.all_tokens, 1))

    def exporting(self, samples: int, all_samples: int, written_bytes: int, kept_bytes: int, elapsed_s: float) -> None:
        """Sequences of a run that are exported, and what was written and kept of it."""
        kept = f", {_bytes(kept_bytes)} kept" if kept_bytes else ""
        rate = _bytes(written_bytes / max(elapsed_s, 1e-3))
        words = f"{samples:,} of {all_samples:,} sequences, {_bytes(written_bytes)} written{kept}, {rate}/s"
        self._show("export", words, samples / max(all_samples, 1))

    def _show(self, phase: str, words: str, fraction: float | None) -> None:
        now = time.monotonic()
        if self._bars:
            total = None if fraction is None else 1.0
            task = self._tasks.get(phase)
            if task is None:
                task = self._tasks[phase] = self._bars.add_task(phase, total=total, words=words)
            self._bars.update(task, completed=fraction or 0.0, words=words)
        elif now - self._said_at.get(phase, 0.0) >= _LINE_EVERY_S or fraction == 1.0:
            self._said_at[phase] = now
            self.say(f"{phase}: {words}")


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
