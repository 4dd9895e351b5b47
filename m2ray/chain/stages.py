"""What the driver says to the stages of one chain, and what it hears of them."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import GetTimeoutError, RayError

from m2ray import __version__
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.chain import calls
from m2ray.chain.actors import START_S, ActorsOfChain
from m2ray.chain.completion import Completed
from m2ray.chain.job import Job
from m2ray.chain.status import StageStatus
from m2ray.chain.wave import most_in_chain, wave_tokens
from m2ray.model.stage import StageSpec

_POLL_S = 1.0
ASK_S = 1.0
"""How often the stages are asked how far they are; less often where there are more than _ASKED_A_S of them."""

_ASKED_A_S = 16
"""Asking a stage costs the driver as much as half a micro-batch does, however many stages that one goes through."""

_FINAL_S = 10.0
"""What the last look at the stages may take."""

_DIAGNOSIS_S = 5.0
"""What may pass until a stage counts as one that does not answer."""

_CLOSE_S = 60.0
"""What the writers may take to give up what is unfinished."""


class Stages:
    """One actor a stage. Those that are lost come back with their own layers only; the others are not touched.

    Args:
        specs: what each stage holds: one spec a device.
        actors: those of the stages, started or yet to be started.
        timeout_s: how long a stage may be silent.
        hold_weights: is given the digests of all layers once all are loaded, also after a restart; raises if they are not the run's.
        epoch: that of the actors, where they are started already.

    Attributes:
        epoch: the last one that was begun.
        window: micro-batches that may be in the chain at one time.
        reads: whether a stage reads its layers for the job: none does where all stood already.
    """

    def __init__(
        self,
        specs: Sequence[Sequence[StageSpec]],
        actors: ActorsOfChain,
        *,
        timeout_s: float,
        hold_weights: Callable[[Mapping[int | None, str]], None] = lambda _: None,
        epoch: int = 0,
    ) -> None:
        self._hold_weights = hold_weights
        self._specs = specs
        self.window = most_in_chain(specs)
        self._in_waves = any(map(wave_tokens, specs))
        self._timeout_s = timeout_s
        self._actors = actors
        self._job: Job | None = None
        self.epoch = epoch
        self._unready: set[int] = set()  # have not begun the job
        self._watches: list[Any] = []  # a call to each actor that ends when something fails in it
        self._news: Any = None  # the call to the last actor that ends when something is complete
        self.loaded_at = 0.0
        self.reads = True
        self._asked: dict[int, Any] = {}
        self._asked_at = -ASK_S
        self._answers: dict[int, StageStatus] = {}
        self._heard_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def is_loaded(self) -> bool:
        """Whether every stage has its layers."""
        return bool(self._actors.handles) and not self._unready

    @property
    def statuses(self) -> list[StageStatus]:
        """The newest answer of each stage that has answered."""
        answers = dict(self._answers)
        return [answers[index] for index in sorted(answers)]

    @property
    def work_done(self) -> tuple[float, int]:
        """Seconds that all stages have computed and bytes that they have written, as they said last. Both grow within a wave."""
        statuses = self.statuses
        return sum(status.compute_s for status in statuses), sum(status.written_bytes for status in statuses)

    def begin(self, job: Job) -> None:
        """Take on a job, once the one before is done; `load` has to follow. Stages that are loaded stay as they are."""
        self._job = job
        self.loaded_at = 0.0
        self._unready = set(range(len(self._specs)))
        self.reads = not self._actors.handles
        if not self.reads:
            self.reset(self.epoch + 1, [])  # `load` finds those that are lost

    def start(self) -> None:
        """Start all actors, unless they are there from a job before."""
        if not self._actors.handles:
            self._actors.start(self.epoch)

    def load(self, stop: threading.Event) -> None:
        """Let all stages that have not begun the job load, unless they have, and begin it, all at the same time.

        Raises:
            M2rayError: what `hold_weights` raises.
            RayError: what a stage reports, that it died, or that nothing was read for the patience that a stage gets (GetTimeoutError).
        """
        waiting = {self._begun(index): index for index in sorted(self._unready)}
        read_bytes, progressed = -1, time.monotonic()
        while waiting and not stop.is_set():
            done, _ = calls.wait(list(waiting), num_returns=len(waiting), timeout=_POLL_S)
            for ref in done:
                index = waiting.pop(ref)
                self._hear(index, calls.get(ref, timeout=self._timeout_s))
                self._asked.pop(index, None)  # what was asked before knows less
                self._unready.discard(index)
                if not self._unready:
                    self.loaded_at = self.loaded_at or time.monotonic()
            self.ask()
            now_read_bytes = sum(status.read_bytes for status in self.statuses)
            if done or now_read_bytes != read_bytes:
                read_bytes, progressed = now_read_bytes, time.monotonic()
                continue
            # Until a stage has answered, its process starts.
            patience_s = self._timeout_s + (START_S if set(waiting.values()) - self._answers.keys() else 0.0)
            if time.monotonic() - progressed > patience_s:
                stuck = ", ".join(f"stage {index} ({self.span(index)})" for index in sorted(waiting.values()))
                raise GetTimeoutError(f"Loading stood still for {patience_s:g} s in {stuck}.")
        if self.is_loaded:
            self._hold_weights({layer: digest for status in self.statuses for layer, digest in status.weights.items()})

    def _begun(self, index: int) -> Any:
        """A call that ends when a stage has begun the job."""
        assert self._job is not None, "begin() comes first"
        return self._actors.handles[index].get_ready.remote(self._job, __version__)

    def link(self, epoch: int) -> None:
        """Tell every stage which one follows, and begin to watch all. Raises RayError, GetTimeoutError or M2rayError as they do."""
        refs = [
            actor.link.remote(successor) for actor, successor in zip(self._actors.handles, [*self._actors.handles[1:], None], strict=True)
        ]
        calls.get(refs, timeout=self._timeout_s)
        self._watches = [actor.watch.remote(epoch) for actor in self._actors.handles]
        self._news = None  # an answer to an earlier epoch is nobody's

    # -- a micro-batch's way ------------------------------------------------------------------------------------------

    def take(self, epoch: int, step: int, attempt: str, micro_batch: MicroBatch) -> None:
        """Give a micro-batch to the first stage, without waiting; `failed` tells what becomes of it, or `news`. As `StageActor.take`."""
        self._actors.handles[0].take.options(num_returns=0).remote(epoch, step, attempt, micro_batch, None)

    def mark(self, epoch: int, step: int) -> None:
        """Tell all stages that nothing comes after micro-batch `step` before something has left the chain, without waiting."""
        if self._in_waves:
            self._actors.handles[0].mark.options(num_returns=0).remote(epoch, step)

    def gather(self, epoch: int, step: int, shard: int, attempt: str) -> None:
        """Ask for the receipts of a shard whose last micro-batch was `step`, without waiting; they come as `news`."""
        self._actors.handles[0].gather.remote(epoch, step, shard, attempt, ())

    def news(self, epoch: int, steps: int, shards: int, timeout_s: float) -> Completed | None:
        """What has left the chain, as soon as it is more than `steps` micro-batches and `shards` shards of an epoch.

        None after `timeout_s`, or once a stage has to tell of a failure.

        Raises:
            RayError: the last stage is lost.
        """
        if self._news is None:
            self._news = self._actors.handles[-1].completed.remote(epoch, steps, shards)
        ready, _ = calls.wait([self._news, *self._watches], num_returns=1, timeout=timeout_s)
        if ready != [self._news]:
            return None
        self._news = None
        completed: Completed = calls.get(ready[0], timeout=self._timeout_s)
        return completed

    def failed(self) -> RayError | None:
        """What a stage failed with, or None, without waiting. All are asked for: of one out of several, Ray gives any that is ready."""
        ended, _ = calls.wait(self._watches, num_returns=len(self._watches), timeout=0)
        for watch in ended:
            answer = _answer(watch, self._timeout_s)
            if isinstance(answer, RayError):
                return answer
            index = self._watches.index(watch)
            self._watches[index] = self._actors.handles[index].watch.remote(self.epoch)
        return None

    # -- how far they are ---------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Take in what the stages answered and ask again, without waiting: a busy stage may be late, a lost one never answers.

        Does nothing if it was called less than ASK_S ago.
        """
        now = time.monotonic()
        if now - self._asked_at < max(ASK_S, len(self._specs) / _ASKED_A_S):
            return
        self._asked_at = now
        asked = list(self._asked.values())
        ready = set(calls.wait(asked, num_returns=len(asked), timeout=0)[0]) if asked else set()
        for index, actor in enumerate(self._actors.handles):
            ref = self._asked.get(index)
            if ref in ready:
                answer = _answer(ref, self._timeout_s)
                if isinstance(answer, StageStatus):
                    self._hear(index, answer)
            if ref is None or ref in ready:
                self._asked[index] = actor.status.remote()

    def ask_all(self) -> None:
        """Ask every stage now and wait a short while for the answers. For another thread than the chain's, once that has no work."""
        answers = _answers_to([actor.status.remote() for actor in self._actors.handles], _FINAL_S)
        for index, answer in enumerate(answers):
            if isinstance(answer, StageStatus):
                self._hear(index, answer)

    def status(self, index: int) -> StageStatus | None:
        """What a stage said last, and how long ago."""
        answer = self._answers.get(index)
        return answer and replace(answer, silent_s=time.monotonic() - self._heard_at[index])

    def _hear(self, index: int, answer: StageStatus) -> None:
        self._heard_at[index] = time.monotonic()
        self._answers[index] = answer

    # -- after a failure -----------------------------------------------------------------------------------------------

    def reset(self, epoch: int, attempts: Sequence[tuple[int, str]]) -> dict[int, str]:
        """Let every stage begin an epoch. Gives those that could not, with what they did: died or hung."""
        self.epoch = epoch
        answers = _answers_to([actor.reset.remote(epoch, attempts) for actor in self._actors.handles], self._timeout_s)
        lost = {index: answer for index, answer in enumerate(answers) if isinstance(answer, RayError)}
        return {index: "hung" if isinstance(answer, GetTimeoutError) else "died" for index, answer in lost.items()}

    def restart(self, lost: Mapping[int, str]) -> bool:
        """Start the lost stages, as `reset` gave them, again: where they were, or elsewhere if their node is gone. `load` has to follow.

        Where that does not succeed, the chain gives all its room back, asks for it again, and starts all its stages there.

        Returns:
            Whether the other stages kept their processes.

        Raises:
            ClusterError: there is no room any more.
        """
        said = {index: self._answers.get(index) if why == "hung" else None for index, why in lost.items()}
        self._forget(lost)
        others_stay = self._actors.restart(said, self.epoch)
        if not others_stay:
            self._forget(range(len(self._specs)))
        return others_stay

    def _forget(self, stages: Iterable[int]) -> None:
        """Drop what lost stages have said: those that take their places have done none of it."""
        for index in stages:
            self._answers.pop(index, None)
            self._asked.pop(index, None)
            self._unready.add(index)
            self.reads = True

    def close(self) -> None:
        """Let the writers end, then end the actors for good, also those that another thread is about to start.

        A stage that has not begun the job has nothing to end, and may have no process: its node may be gone.
        """
        begun = [actor for index, actor in enumerate(self._actors.handles) if index not in self._unready]
        try:
            _answers_to([actor.close.remote() for actor in begun], min(self._timeout_s, _CLOSE_S))
        finally:
            self._actors.end()

    def span(self, index: int) -> str:
        """The layers of a stage, in words."""
        of_stage = self._specs[index]
        return str(LayerSpan(of_stage[0].span.start, of_stage[-1].span.stop))

    def diagnosis(self) -> str:
        """Which stages answer and which do not, in words."""
        words = []
        for index, answer in enumerate(_answers_to([actor.status.remote() for actor in self._actors.handles], _DIAGNOSIS_S)):
            if isinstance(answer, StageStatus):
                words.append(f"stage {index} ({answer.span}, node {answer.node}) has done {answer.micro_batches} micro-batches")
            else:
                words.append(f"stage {index} does not answer ({type(answer).__name__})")
        return "; ".join(words)


def _answers_to(refs: list[Any], timeout_s: float) -> list[Any]:
    """What each call gave, or the error that it ended with; GetTimeoutError if it is not done after `timeout_s` for all together."""
    if refs:
        calls.wait(refs, num_returns=len(refs), timeout=timeout_s)
    return [_answer(ref, 0.0) for ref in refs]


def _answer(ref: Any, timeout_s: float) -> Any:
    """What a call gave, or the error that it ended with."""
    try:
        return calls.get(ref, timeout=timeout_s)
    except RayError as error:  # what a stage raised is wrapped in one
        return error
