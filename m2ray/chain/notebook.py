"""Progress in a notebook: one bar a phase, drawn again in place by the notebook itself."""

import sys
import time
from collections.abc import Callable, Sequence
from html import escape
from types import TracebackType
from typing import Any

from m2ray.chain.progress import Progress
from m2ray.errors import shown

_EVERY_S = 0.2
_ROW = (
    '<tr><td style="text-align:left">{phase}</td><td><progress max="1"{value} style="width:16em"></progress></td>'
    '<td style="text-align:left">{words}</td></tr>'
)


class NotebookProgress(Progress):
    """The same phases and words as on a terminal.

    Args:
        display: IPython's.
    """

    def __init__(self, display: Callable[..., Any]) -> None:
        super().__init__()
        self._display = display
        self._handle: Any = None
        self._phases: dict[str, tuple[Sequence[str], float | None]] = {}
        self._drawn_at = 0.0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._phases:
            self._draw()

    def say(self, line: str) -> None:
        print(shown(line))  # noqa: T201 - a cell's output is where a person looks

    def _show(self, phase: str, words: Sequence[str], fraction: float | None) -> None:
        """A phase ends all that began before it."""
        is_new = phase not in self._phases
        if is_new:
            self._phases = {earlier: (told, 1.0) for earlier, (told, _) in self._phases.items()}
        self._phases[phase] = words, fraction
        if is_new or fraction == 1.0 or time.monotonic() - self._drawn_at >= _EVERY_S:
            self._draw()

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        bars = _Bars(self._phases)
        if self._handle is None:
            self._handle = self._display(bars, display_id=True)
        else:
            self._handle.update(bars)


class _Bars:
    """What a notebook is given to show: as HTML, or as text where it shows none."""

    def __init__(self, phases: dict[str, tuple[Sequence[str], float | None]]) -> None:
        self._phases = dict(phases)

    def __repr__(self) -> str:
        return "\n".join(f"{phase}: {', '.join(words)}" for phase, (words, _) in self._phases.items())

    def _repr_html_(self) -> str:
        rows = (
            _ROW.format(
                phase=escape(phase), value="" if fraction is None else f' value="{fraction:.4f}"', words=escape(shown(", ".join(words)))
            )
            for phase, (words, fraction) in self._phases.items()
        )
        return f"<table>{''.join(rows)}</table>"


def progress_here() -> Progress:
    """A notebook's own bars in a notebook, else those of a terminal, or lines."""
    ipython = sys.modules.get("IPython")  # in a notebook it is there
    shell = ipython.get_ipython() if ipython else None
    return Progress() if getattr(shell, "kernel", None) is None else NotebookProgress(ipython.display.display)  # type: ignore[union-attr]
