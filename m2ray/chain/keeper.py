"""Keeper: the one detached actor of a warm chain. It owns the stages and their room, lets jobs in one after another, and answers requests.

Stages and room are its children: Ray ends them when it ends, so that nothing of a chain is ever left behind without it. A job's driver
drives the stages itself while it is let in, as it would its own. Nothing that a run rests on is kept here.
"""

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from m2ray.batches import CapturedLayer, MicroBatch
from m2ray.chain.actors import Actors
from m2ray.chain.admission import Admission, Visitor
from m2ray.chain.failure import cause_of
from m2ray.chain.placement import reserve
from m2ray.chain.requests import Answer, Desk, Request
from m2ray.chain.served import GOES_ON_ELSEWHERE, NAMESPACE, ChainStatus, Served
from m2ray.chain.specs import stage_specs
from m2ray.chain.standing_stages import StandingStages, of_any_sites
from m2ray.chain.status import StageStatus
from m2ray.errors import ClusterError, M2rayError
from m2ray.model.capture import CaptureSpec
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.towers import placeholder_tokens
from m2ray.prompts import PromptTokenizer

EPOCHS_A_JOB = 1 << 20
"""A job's epochs are no other job's, also where its driver died and nobody knows how far it came."""

_TICK_S = 1.0
_HEALTH_S = 5.0
_TRIES = 3


class Keeper:
    """See the module. Its methods are called by other processes, several at a time."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._timeout_s = served.plan.demand.options.stage_timeout_s
        self._room = ExitStack()
        self._changed = threading.RLock()
        self._admission = Admission()
        self._stages: StandingStages | None = None
        self._desk: Desk | None = None
        self._epoch = 0
        self._jobs = 0
        self._trouble = ""
        self._has_ended = False
        self._used_at = time.monotonic()
        self._looked_at = 0.0

    # -- beginning and ending -------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="load")
    def load(self) -> Served:
        """Take the room, start the stages and load them. Returns the chain as it lies.

        Raises:
            M2rayError, RayError: what fails in that; nothing is kept then.
        """
        options = self._served.plan.demand.options
        plan, (reservation,) = self._room.enter_context(reserve(self._served.plan, self._served.hardware, options.placement_timeout_s))
        self._served = self._served._replace(plan=plan)
        specs = of_any_sites(list(stage_specs(plan, 0, self._served.model_url, self._served.model_files)))
        actors = Actors(specs, reservation, options.transport, self._timeout_s, options.placement_timeout_s)
        actors.start(self._epoch)
        self._stages = StandingStages(specs, actors, self._timeout_s)
        self._stages.load()
        self._served = self._served._replace(weights=self._stages.weights)
        self._desk = self._new_desk()
        self._used_at = time.monotonic()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self._served

    def _new_desk(self) -> Desk:
        demand = self._served.plan.demand
        checkpoint = open_checkpoint(self._served.model_url)
        tokenizer = PromptTokenizer.load(
            self._served.model_url, demand.options.prompts, checkpoint.config.vocab_size, placeholder_tokens(checkpoint.whole_config)
        )
        return Desk(tokenizer, demand.table, demand.options, self._served.plan.stages[-1].span.stop)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """End the stages, give their room back, and answer no more over HTTP. The keeper's own end is the caller's."""
        with self._changed:
            self._has_ended = True
        try:
            if self._served.http:
                from m2ray.chain.http import stop_http  # which asks keepers

                stop_http(self._served.name)
        finally:
            if self._stages is not None:
                self._stages.end()
            self._room.close()

    # -- what others ask -------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def served(self) -> Served:
        """What the chain is."""
        return self._served

    @ray.method(concurrency_group="control")
    def status(self) -> ChainStatus:
        """What the chain does now."""
        with self._changed:
            admitted, desk = self._admission.admitted, self._desk
            statuses = self._stages.statuses if self._stages else {}
            is_used = self._admission.is_expected or (desk is not None and desk.at_work > 0)
            return ChainStatus(
                is_loaded=desk is not None,
                job=admitted.what if admitted else "",
                waiting=self._admission.waiting,
                requests=desk.at_work if desk else 0,
                answered=desk.answered if desk else 0,
                jobs=self._jobs,
                idle_s=0.0 if is_used else time.monotonic() - self._used_at,
                trouble=self._trouble,
                stages=tuple(statuses[index] for index in sorted(statuses)),
            )

    @ray.method(concurrency_group="control")
    def expect(self, visitor: Visitor) -> None:
        """A job is coming, whose prompts are looked at yet: until it leaves the chain is not idle. Raises ClusterError if it has to ask again."""
        with self._changed:
            self._require_there()
            self._admission.expect(visitor)

    @ray.method(concurrency_group="control")
    def admit(self, visitor: Visitor) -> tuple[int, list[Any]] | str:
        """The epoch and the stages for a job, once it is its turn; until then what has the chain, in words. To be asked again.

        Raises:
            ClusterError: the chain has been stopped.
        """
        with self._changed:
            self._require_there()
            other = self._admission.ask(visitor)
            if other is not None:
                return f"is at {other.what}"
            self._jobs += 1
            self._epoch += EPOCHS_A_JOB
            return self._epoch, self._loaded.handles

    @ray.method(concurrency_group="control")
    def leave(self, ticket: str) -> None:
        """A job is done with the chain, or does not wait for it any more."""
        with self._changed:
            if self._admission.leave(ticket):
                self._is_left()
            self._used_at = time.monotonic()

    @ray.method(concurrency_group="restart")
    def restart(self, ticket: str, lost: Mapping[int, StageStatus | None], epoch: int) -> tuple[bool, list[Any]]:
        """Start lost stages of the job that has the chain again, as `Actors.restart`. Gives the stages as they are then.

        Raises:
            ClusterError: the job does not have the chain any more, the chain has been stopped, or there is no room.
        """
        with self._changed:
            self._require_there()
            admitted = self._admission.admitted
            if admitted is None or admitted.ticket != ticket:
                raise ClusterError("The chain was given to another job.", "Run the same command again: finished shards are kept.")
        return self._loaded.restart(lost, epoch)

    @ray.method(concurrency_group="requests")
    def answer(self, request: Request) -> Answer:
        """The rows of a request, computed between a job's micro-batches. Raises as `Desk.answer`, and ClusterError if the chain is not there."""
        try:
            return self._require_there().answer(request, self._compute)
        except RayError as error:
            cause = cause_of(error)
            raise cause if isinstance(cause, M2rayError) else ClusterError(f"The chain failed: {cause}.", "Ask again.") from error
        finally:
            self._used_at = time.monotonic()

    @property
    def _loaded(self) -> StandingStages:
        assert self._stages is not None, "load() comes first"
        return self._stages

    def _require_there(self) -> Desk:
        """Raise ClusterError unless the chain is loaded and has not ended."""
        name = self._served.name
        if self._has_ended:
            raise ClusterError(f"The chain {name} has ended: it was stopped, or idle for too long.", GOES_ON_ELSEWHERE)
        if self._desk is None:
            raise ClusterError(f"The chain {name} is being loaded.", "`m2ray chains` tells how far it is: ask again then.")
        return self._desk

    # -- a request's way ---------------------------------------------------------------------------------------------------

    def _compute(self, capture: CaptureSpec, last: int, micro_batch: MicroBatch) -> list[CapturedLayer]:
        """A micro-batch through the stages up to that of layer `last`; once more if one of them is lost meanwhile."""
        for number in range(_TRIES):
            try:
                return list(self._loaded.through(capture, last, micro_batch))
            except RayError as error:
                if not isinstance(cause_of(error), RayActorError) or number == _TRIES - 1:
                    raise
                self._require_there()
                self._come_back()
        raise AssertionError("the last try returns or raises")

    def _come_back(self) -> None:
        """Have lost stages there again, or wait until the job that has the chain has brought them back. Raises RayError or ClusterError."""
        deadline = time.monotonic() + self._timeout_s
        while self._admission.admitted is not None and self._loaded.ask():
            if time.monotonic() > deadline:
                raise ClusterError("A stage of the chain is gone.", "Ask again.")
            time.sleep(_TICK_S)
        if self._is_free():
            self._mend()
        self._loaded.load()

    # -- watching ------------------------------------------------------------------------------------------------------------

    def _mend(self) -> None:
        """Bring lost stages back. A job that has the chain does that itself."""
        self._loaded.mend(self._epoch, self._is_free)

    def _is_free(self) -> bool:
        return self._admission.admitted is None

    def _watch(self) -> None:
        """Look after the chain until it was idle for too long, and end it then; or until somebody else ends it."""
        while not self._ends_alone():
            time.sleep(_TICK_S)
            if self._has_ended:
                return
            self._look()
        try:
            self.stop()
        finally:
            ray.kill(ray.get_actor(self._served.name, NAMESPACE))

    def _ends_alone(self) -> bool:
        """Whether it was idle for too long: from then on it lets nobody in."""
        limit_s = self._served.idle_timeout_s
        with self._changed:
            is_left_alone = limit_s is not None and self.status().idle_s > limit_s
            self._has_ended = self._has_ended or is_left_alone
            return is_left_alone

    def _look(self) -> None:
        """Give up the places of dead drivers, and bring lost stages back now and then; what fails in that is kept as trouble, and tried again."""
        try:
            with self._changed:
                if self._admission.is_expected:
                    self._used_at = time.monotonic()
                    if self._admission.forget(dead_drivers()):
                        self._is_left()
            if self._is_free() and time.monotonic() - self._looked_at > _HEALTH_S:
                self._looked_at = time.monotonic()
                self._mend()
                self._trouble = ""
        except (RayError, M2rayError) as error:
            self._trouble = str(cause_of(error)).partition("\n")[0]

    def _is_left(self) -> None:
        """Give up what a job has left on its way, before another one is let in: a late call would end that one's. The lock is held."""
        self._epoch += EPOCHS_A_JOB
        self._loaded.give_up(self._epoch)
        self._used_at = time.monotonic()


def dead_drivers() -> set[str]:
    """Ray's ids of drivers that are gone."""
    # Ray has no public name for it; the state API that has one needs a dashboard.
    return {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}  # noqa: SLF001


def keeper_class() -> Any:
    """Keeper as a Ray actor class."""
    groups = {"load": 1, "control": 4, "restart": 1, "requests": 40}
    return ray.remote(concurrency_groups=groups, max_restarts=0, max_task_retries=0, num_cpus=0)(Keeper)
