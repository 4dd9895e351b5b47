"""A micro-batch's way through a stage: taken over in its turn, computed in a wave, sent on, its rows given to the job's writers."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import GetTimeoutError

from m2ray.batches import MicroBatch
from m2ray.chain.answering import Answering
from m2ray.chain.door import Door
from m2ray.chain.failure import as_memory_error
from m2ray.chain.job import JobHere
from m2ray.chain.status import StageStatus
from m2ray.chain.transport import Incoming, Outgoing, Payload
from m2ray.chain.turns import Turns
from m2ray.chain.wave import Entered, Gathering, compute, wave_tokens
from m2ray.model.boundary import Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec
from m2ray.model.stage_output import StageOutput
from m2ray.option_types import Transport
from m2ray.planning.memory import MOST_BATCHES

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_AHEAD = 2
"""Micro-batches at each of a stage's doors, at most: received and not computed, computed and not sent, sent and not taken by the next
stage, computed and not with the writer."""

_POLL_S = 0.5


class Passage:
    """Takes micro-batches through a stage, on one device or over several.

    A micro-batch is received on the caller's thread when its turn comes, in the order of `step`. Then it goes through four doors, each
    with a thread of its own: it is computed, sent to the next stage, awaited until the next stage has taken it, and given to the writer.
    So none of these waits for another: while the next stage takes one over, the next is sent (cuda_ipc's one slot has to be empty first).
    Where the layers are not all ready, those that are received gather for a wave (wave.py); else each is a wave of its own.

    Attributes:
        stages: the loaded spans, one a device; none until then.
        job: the last that was begun; None before the first, and while one is taken on.
        successor: the next stage's actor; None: this is the last.
        limit_s: what a micro-batch may wait for.
        compute, send, arrive, capture: the doors.
        incoming, outgoing: the ways from the stage before and to the next.
    """

    def __init__(self, specs: Sequence[StageSpec], turns: Turns, where: StageStatus, transport: Transport, timeout_s: float) -> None:
        """Args:
        specs: one a device, in the order of the layers.
        where: says which stage that is, in errors.
        timeout_s: how long the driver lets a stage be silent.
        """
        self.stages: list[Stage] = []
        self.job: JobHere | None = None
        self.successor: Any = None
        # More than a wave may take, here or in the next stage, each of whose micro-batches has the watchdog's limit: the driver is the one that decides.
        self.limit_s = 2 * MOST_BATCHES * timeout_s
        self._turns = turns
        self._where = where
        self._timeout_s = timeout_s
        devices = [torch.device(spec.device) for spec in specs]
        self._on_gpu = devices[0].type == "cuda"
        self._answering = Answering()
        self._wave_tokens = wave_tokens(specs)
        self._gathering = Gathering(self._wave_tokens)
        # On a GPU `_run` returns when the computation is queued there: one more at the door suffices. While a wave runs, another comes in.
        places = self._wave_tokens or (1 if self._on_gpu else _AHEAD)
        self.compute = self._door("compute", places, "an earlier micro-batch to be computed")
        self.send = self._door("send", _AHEAD, "hidden states to be sent")
        self.arrive = self._door("arrive", _AHEAD, "the next stage to take hidden states over")
        self.capture = self._door("capture", _AHEAD * len(specs), "captured rows to find their way to the writer")
        self.incoming = Incoming(devices[0])
        self.outgoing = Outgoing(turns, devices[-1], transport, self.limit_s)

    def begin(self, job: JobHere) -> None:
        """From the next micro-batch on, work for this job. Waves are as large as ever: its micro-batches, and what else is there, may take less."""
        self.job = job
        if self._wave_tokens:
            self._limit_waves(self._wave_tokens)

    def _door(self, name: str, places: int, awaited: str) -> Door:
        return Door(self._turns, name, places, awaited, self.limit_s)

    def take(self, epoch: int, step: int, attempt: str, micro_batch: MicroBatch, payload: Payload | None) -> None:
        """Take one micro-batch over, as soon as there is room for it; it goes on by itself. As `StageActor.take`."""
        turns, limit_tokens = self._turns, self._gathering.limit_tokens
        size = micro_batch.padded_tokens if limit_tokens else 1
        with turns.guarded(epoch), turns.turn(epoch, step, self.limit_s), self.compute.place(epoch, size) as hand_over:
            with self._finding_room(micro_batch, limit_tokens if limit_tokens >= 2 * size else 0):
                boundary = None if payload is None else self.incoming.receive(epoch, payload)
            hand_over(self._join, Entered(step, attempt, micro_batch, boundary))

    def mark(self, epoch: int, step: int) -> None:
        """Nothing comes after `step` before something has left the chain. As `StageActor.mark`."""
        self.compute.thread.submit(self._begin_marked, epoch, step)

    def _begin_marked(self, epoch: int, step: int) -> None:
        with self._turns.guarded(epoch):
            self._turns.require(epoch)
            for wave in self._gathering.mark(step):
                self._run(epoch, wave)

    def _join(self, epoch: int, entered: Entered) -> None:
        self._turns.require(epoch)
        for wave in self._gathering.join(entered):
            self._run(epoch, wave)

    def _run(self, epoch: int, wave: list[Entered]) -> None:
        """Compute a wave, or on a GPU begin to. Whatever comes of a run of layers goes on at once: to the writer, and from the last to the next stage."""
        assert self.job is not None, "begin() comes first"
        self.job.begin_to_compute()
        padded_tokens = sum(each.micro_batch.padded_tokens for each in wave) if len(wave) > 1 else 0
        turn, last = cycle([(each.step, each.attempt) for each in wave]), wave[-1].micro_batch
        computing = compute(self.stages, deque((each.micro_batch, each.boundary) for each in wave))
        wave.clear()  # the computation lets go of each boundary that it is done with
        while True:
            with self.capture.place(epoch) as capture, self.send.place(epoch) as send:
                self._turns.require(epoch)
                with self._finding_room(last, padded_tokens):
                    output, leaves = next(computing)
                step, attempt = next(turn)
                if leaves:
                    send(self._send_on, step, attempt, output)
                capture(self._give_to_writer, attempt, output, leaves)
                is_over = leaves and output.micro_batch is last
                del output  # what is computed next needs the room
            if is_over:
                return

    def _send_on(self, epoch: int, step: int, attempt: str, output: StageOutput) -> None:
        if self.successor is None:
            return
        with self.arrive.place(epoch) as arrive:
            payload = self.outgoing.payload(epoch, output)
            output.boundary = None  # whoever still waits for its rows needs it no more, and what is computed next needs the room
            arrive(self._wait_until_taken, self.successor.take.remote(epoch, step, attempt, output.micro_batch, payload))

    def _wait_until_taken(self, epoch: int, taken: Any) -> None:
        """Wait until the next stage has taken the micro-batch, or a reset. Raises what was lost on the way there."""
        self._turns.require(epoch)
        while not ray.wait([taken], timeout=_POLL_S)[0]:
            self._turns.require(epoch)
        ray.get(taken, timeout=self.limit_s)

    def _give_to_writer(self, epoch: int, attempt: str, output: StageOutput, leaves: bool) -> None:  # noqa: FBT001 - private
        job = self.job
        assert job is not None
        job.give(attempt, output, partial(self._turns.require, epoch), self._timeout_s, leaves=leaves)
        if leaves:
            self._turns.finish_step(epoch)

    def answer(self, capture: CaptureSpec, micro_batch: MicroBatch, boundary: Boundary | None) -> list[StageOutput]:
        """What each device's span leaves of a request's micro-batch, computed when its turn comes between those of a job.

        Raises:
            GetTimeoutError: its turn does not come.
            ConfigError, StageError: as `Stage.taking` and `Stage.forward`.
        """
        computed = self.compute.thread.submit(self._compute_answer, capture, micro_batch, boundary)
        try:
            return computed.result(2 * self._timeout_s)
        except TimeoutError as error:
            raise GetTimeoutError(f"A request waited {2 * self._timeout_s:g} s for its turn in the {self._where.span}.") from error

    def _compute_answer(self, capture: CaptureSpec, micro_batch: MicroBatch, boundary: Boundary | None) -> list[StageOutput]:
        with self._finding_room(micro_batch):
            return self._answering.compute(self.stages, capture, micro_batch, boundary)

    def empty(self, attempts: Sequence[tuple[int, str]]) -> None:
        """An epoch is over: drop what waits, wait for the end of what is under way, and give these attempts up.

        Raises:
            TimeoutError: the micro-batch that is being computed does not end.
        """
        # Also of a job that has been closed: what waits, and the last mark, would go into the next one's waves. What comes later comes behind it.
        dropped = self.compute.thread.submit(self._gathering.drop)
        job = self.job  # the computing thread may take the next one on meanwhile
        if job is None or job.is_closed:
            return  # it is still loading, or taking a job on, which goes on in any epoch
        limit_s = self._timeout_s / 4  # a reset has to end within `timeout_s`
        job.abandon(attempts, limit_s)
        for door in self._doors:
            door.drain(self._timeout_s)
        dropped.result(self._timeout_s)
        job.abandon(attempts, limit_s)  # what was being computed may have opened its attempt again

    @property
    def threads(self) -> "list[ThreadPoolExecutor]":
        """Those behind its doors."""
        return [door.thread for door in self._doors]

    @property
    def _doors(self) -> list[Door]:
        return [self.compute, self.send, self.arrive, self.capture]

    @contextmanager
    def _finding_room(self, micro_batch: MicroBatch, in_wave_tokens: int = 0) -> Iterator[None]:
        """Turn a lack of memory into the error that the driver acts on, and free what this micro-batch has taken.

        Where it was in a wave of so many tokens with others, waves have half of them from here on.
        """
        try:
            yield
        except RuntimeError as error:
            memory_error = as_memory_error(error, micro_batch, self._where, in_wave_tokens)
            if memory_error is None:
                raise
            if in_wave_tokens:
                self._limit_waves(in_wave_tokens // 2)
            if self._on_gpu:
                torch.cuda.empty_cache()
            raise memory_error from error

    def _limit_waves(self, padded_tokens: int) -> None:
        self._gathering.limit_tokens = padded_tokens
        self.compute.resize(padded_tokens)
