"""Waves: the micro-batches that a stage takes through its layers together, and when it begins with them (docs/decisions/waves.md)."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from m2ray.batches import MicroBatch
from m2ray.model.boundary import Boundary
from m2ray.model.stage import Stage, StageSpec
from m2ray.model.stage_output import StageOutput
from m2ray.planning.memory import MOST_BATCHES, window


class Entered(NamedTuple):
    """A micro-batch in a stage: its place in the order of its epoch, the try at its shard, and what the stage before handed on."""

    step: int
    attempt: str
    micro_batch: MicroBatch
    boundary: Boundary | None


class Gathering:
    """The micro-batches that wait for a wave. It begins when another one like the last would not fit, or when nothing more can come.

    One thread calls; any may halve it.

    Attributes:
        limit_tokens: padded tokens of a wave, at most, unless one micro-batch has more; with less than two hold, each is a wave of its own.
    """

    def __init__(self, limit_tokens: int) -> None:
        self.limit_tokens = limit_tokens
        self._waiting: list[Entered] = []
        self._marked = -1

    def join(self, entered: Entered) -> Iterator[list[Entered]]:
        """Let a micro-batch wait. Gives the waves that begin by it."""
        if self._waiting and not self._has_room_for(entered):
            yield self._begin()
        self._waiting.append(entered)
        if not self._has_room_for(entered) or self._is_marked():
            yield self._begin()

    def mark(self, step: int) -> Iterator[list[Entered]]:
        """Nothing comes after `step` before something has left the chain. Gives the wave that begins by it, if that micro-batch is here."""
        self._marked = max(self._marked, step)
        if self._is_marked():
            yield self._begin()

    def drop(self) -> None:
        """What waits is of no use any more, and steps count from 0 again."""
        self._waiting, self._marked = [], -1

    def _has_room_for(self, entered: Entered) -> bool:
        padded_tokens = sum(each.micro_batch.padded_tokens for each in self._waiting) + entered.micro_batch.padded_tokens
        return padded_tokens <= self.limit_tokens and len(self._waiting) < MOST_BATCHES

    def _is_marked(self) -> bool:
        return bool(self._waiting) and self._waiting[0].step <= self._marked <= self._waiting[-1].step

    def _begin(self) -> list[Entered]:
        wave, self._waiting = self._waiting, []
        return wave


def wave_tokens(specs: Iterable[StageSpec]) -> int:
    """Padded tokens of a wave, at most, of a stage with these devices."""
    return max(spec.wave_tokens for spec in specs)


def most_in_chain(specs: Sequence[Sequence[StageSpec]]) -> int:
    """Micro-batches that may be in a chain of these stages at one time: with waves one for each stage, and one to spare."""
    in_waves = any(wave_tokens(of_stage) for of_stage in specs)
    return (len(specs) + 1) * MOST_BATCHES if in_waves else window(len(specs))


def compute(stages: Sequence[Stage], batches: "deque[tuple[MicroBatch, Boundary | None]]") -> Iterator[tuple[StageOutput, bool]]:
    """Take a wave through the spans of all devices: what comes of each run of layers, and whether it leaves the last device. As `Stage.forward_wave`."""
    for stage in stages:
        through: deque[tuple[MicroBatch, Boundary | None]] = deque()
        is_last = stage is stages[-1]
        for output in stage.forward_wave(batches):
            if output.leaves and not is_last:
                through.append((output.micro_batch, output.boundary))
            yield output, output.leaves and is_last
            del output  # what is computed next needs the room
        batches = through
