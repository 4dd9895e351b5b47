"""Keeper: the one detached actor of a warm chain. It owns the stages and their room, lets jobs in one after another, and answers requests.

Stages and room are its children: Ray ends them when it ends, so that nothing of a chain is ever left behind without it. A job's driver
drives the stages itself while it is let in, as it would its own. Nothing that a run rests on is kept here.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from m2ray.batches import CapturedLayer, MicroBatch
from m2ray.chain.actors import Actors
from m2ray.chain.admission import Admission, Visitor
from m2ray.chain.failure import cause_of
from m2ray.chain.placement import reserve
from m2ray.chain.probing import Hardware
from m2ray.chain.requests import Answer, Desk, Request
from m2ray.chain.specs import stage_specs
from m2ray.chain.status import StageStatus
from m2ray.errors import ClusterError, M2rayError
from m2ray.model.capture import CaptureSpec
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.towers import placeholder_tokens
from m2ray.planning.plan import Plan
from m2ray.prompts import PromptTokenizer

if TYPE_CHECKING:
    from m2ray.model.stage import StageSpec

NAMESPACE = "m2ray"
"""Ray's, of the keepers: a chain's name is its keeper's there."""

EPOCHS_A_JOB = 1 << 20
"""A job's epochs are no other job's, also where its driver died and nobody knows how far it came."""

_TICK_S = 1.0
_HEALTH_S = 5.0
_TRIES = 3
_CLOSE_S = 90.0


class Served(NamedTuple):
    """What a chain is, for those who want to use it.

    Attributes:
        name: of the chain.
        model_url: the checkpoint's folder or URL.
        model_files: the files that it was loaded from, with their digests.
        plan: how it lies.
        hardware: what it lies on, as it was before.
        idle_timeout_s: how long it stays without a job or a request; None for ever.
        http: where its requests are answered over HTTP; "" for nowhere.
    """

    name: str
    model_url: str
    model_files: Mapping[str, str]
    plan: Plan
    hardware: Hardware
    idle_timeout_s: float | None
    http: str = ""


class ChainStatus(NamedTuple):
    """What a chain does now.

    Attributes:
        is_loaded: whether all its stages have their layers.
        job: the job that has it, in words; "" for none. waiting: jobs behind that.
        requests, answered: at work now, and so far.
        idle_s: since the last job or request ended; 0 while there is one.
        trouble: why it cannot be used now; "" if it can.
        stages: what each says, where it has answered.
    """

    is_loaded: bool
    job: str
    waiting: int
    requests: int
    answered: int
    jobs: int
    idle_s: float
    trouble: str
    stages: tuple[StageStatus, ...]


class Keeper:
    """See the module. Its methods are called by other processes, several at a time."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._timeout_s = served.plan.demand.options.stage_timeout_s
        self._room = ExitStack()
        self._changed = threading.RLock()
        self._admission = Admission()
        self._mending = threading.Lock()
        self._actors: Any = None
        self._specs: list[list[StageSpec]] = []
        self._desk: Desk | None = None
        self._statuses: dict[int, StageStatus] = {}
        self._epoch = 0
        self._jobs = 0
        self._trouble = ""
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
        self._specs = list(stage_specs(plan, 0, self._served.model_url, self._served.model_files))
        self._actors = Actors(self._specs, reservation, options.transport, self._timeout_s, options.placement_timeout_s)
        self._actors.start(self._epoch)
        self._load_stages()
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
        return Desk(tokenizer, demand.table, demand.options, self._specs[-1][-1].span.stop)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """End the stages, give their room back, and answer no more over HTTP. The keeper's own end is the caller's."""
        if self._served.http:
            from m2ray.chain.http import stop_http  # which asks keepers

            stop_http(self._served.name)
        if self._actors is not None:
            self._actors.end()
        self._room.close()

    def _load_stages(self) -> None:
        """Let all stages load that have not, and wait while something is read. Raises RayError."""
        waiting = [handle.load.remote() for handle in self._actors.handles]
        read_bytes, progressed = -1, time.monotonic()
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_TICK_S)
            ray.get(done, timeout=self._timeout_s)
            self._ask_stages()
            now_read_bytes = sum(status.read_bytes for status in self._statuses.values())
            if now_read_bytes != read_bytes:
                read_bytes, progressed = now_read_bytes, time.monotonic()
            elif time.monotonic() - progressed > self._timeout_s:
                raise GetTimeoutError(f"Loading stood still for {self._timeout_s:g} s.")

    def _ask_stages(self) -> dict[int, StageStatus | None]:
        """Those that are lost. What the others say is kept."""
        asked = {handle.status.remote(): index for index, handle in enumerate(self._actors.handles)}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_TICK_S)
        lost: dict[int, StageStatus | None] = {}
        for ref in ready:
            try:
                self._statuses[asked[ref]] = ray.get(ref, timeout=_TICK_S)
            except RayActorError:
                lost[asked[ref]] = None
            except RayError:
                continue
        return lost

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
            is_used = admitted is not None or (desk is not None and desk.at_work > 0)
            return ChainStatus(
                is_loaded=desk is not None,
                job=admitted.what if admitted else "",
                waiting=self._admission.waiting,
                requests=desk.at_work if desk else 0,
                answered=desk.answered if desk else 0,
                jobs=self._jobs,
                idle_s=0.0 if is_used else time.monotonic() - self._used_at,
                trouble=self._trouble,
                stages=tuple(self._statuses[index] for index in sorted(self._statuses)),
            )

    @ray.method(concurrency_group="control")
    def admit(self, visitor: Visitor) -> tuple[int, list[Any]] | str:
        """The epoch and the stages for a job, once it is its turn; until then what has the chain, in words. To be asked again."""
        with self._changed:
            other = self._admission.ask(visitor)
            if other is not None:
                return f"is at {other.what}"
            self._jobs += 1
            self._epoch += EPOCHS_A_JOB
            return self._epoch, list(self._actors.handles)

    @ray.method(concurrency_group="control")
    def leave(self, ticket: str) -> None:
        """A job is done with the chain, or does not wait for it any more."""
        with self._changed:
            if self._admission.leave(ticket):
                self._is_left()

    @ray.method(concurrency_group="restart")
    def restart(self, ticket: str, lost: Mapping[int, StageStatus | None], epoch: int) -> tuple[bool, list[Any]]:
        """Start lost stages of the job that has the chain again, as `Actors.restart`. Gives the stages as they are then.

        Raises:
            ClusterError: the job does not have the chain any more, or there is no room.
        """
        with self._changed:
            admitted = self._admission.admitted
            if admitted is None or admitted.ticket != ticket:
                raise ClusterError("The chain was given to another job.", "Run the same command again: finished shards are kept.")
        with self._mending:
            others_stay = self._actors.restart(lost, epoch)
            return others_stay, list(self._actors.handles)

    @ray.method(concurrency_group="requests")
    def answer(self, request: Request) -> Answer:
        """The rows of a request, computed between a job's micro-batches. Raises as `Desk.answer`, and ClusterError if the chain is not there."""
        if self._desk is None:
            raise ClusterError("The chain is being loaded.", "Ask again in a moment.")
        try:
            return self._desk.answer(request, self._compute)
        except RayError as error:
            cause = cause_of(error)
            raise cause if isinstance(cause, M2rayError) else ClusterError(f"The chain failed: {cause}.", "Ask again.") from error
        finally:
            self._used_at = time.monotonic()

    # -- a request's way ---------------------------------------------------------------------------------------------------

    def _compute(self, capture: CaptureSpec, last: int, micro_batch: MicroBatch) -> list[CapturedLayer]:
        """A micro-batch through the stages up to that of layer `last`; once more if one of them is lost meanwhile."""
        for number in range(_TRIES):
            try:
                return list(self._through(capture, last, micro_batch))
            except RayError as error:
                if not isinstance(cause_of(error), RayActorError) or number == _TRIES - 1:
                    raise
                self._come_back()
        raise AssertionError("the last try returns or raises")

    def _through(self, capture: CaptureSpec, last: int, micro_batch: MicroBatch) -> Iterator[CapturedLayer]:
        needed = [handle for handle, specs in zip(self._actors.handles, self._specs, strict=True) if specs[0].span.start <= last]
        following = needed[0].answer.remote(capture, micro_batch, None, needed[1:])
        while following is not None:
            captured, following = ray.get(following, timeout=2 * self._timeout_s)
            yield from captured

    def _come_back(self) -> None:
        """Have lost stages there again, or wait until the job that has the chain has brought them back. Raises RayError or ClusterError."""
        deadline = time.monotonic() + self._timeout_s
        while self._admission.admitted is not None and self._ask_stages():
            if time.monotonic() > deadline:
                raise ClusterError("A stage of the chain is gone.", "Ask again.")
            time.sleep(_TICK_S)
        if self._admission.admitted is None:
            self._mend()
        self._load_stages()

    # -- watching ------------------------------------------------------------------------------------------------------------

    def _mend(self) -> None:
        """Start stages that are lost again and load them. A job that has the chain does that itself."""
        with self._mending:
            lost = self._ask_stages()
            if lost and self._admission.admitted is None:
                for index in lost:
                    self._statuses.pop(index, None)
                self._actors.restart(lost, self._epoch)
                self._load_stages()

    def _watch(self) -> None:
        """Look after the chain until it was idle for too long, and end it then."""
        while not self._is_left_alone():
            time.sleep(_TICK_S)
            self._look()
        self.stop()
        ray.kill(ray.get_actor(self._served.name, NAMESPACE))

    def _is_left_alone(self) -> bool:
        limit_s = self._served.idle_timeout_s
        return limit_s is not None and self.status().idle_s > limit_s

    def _look(self) -> None:
        """Give up the places of dead drivers, and bring lost stages back now and then."""
        with self._changed:
            if self._admission.admitted is not None and self._admission.forget(dead_drivers()):
                self._is_left()
        if self._admission.admitted is None and time.monotonic() - self._looked_at > _HEALTH_S:
            self._looked_at = time.monotonic()
            self._keeping_trouble(self._mend)

    def _keeping_trouble(self, step: Callable[[], None]) -> None:
        try:
            step()
            self._trouble = ""
        except (RayError, M2rayError) as error:
            self._trouble = str(cause_of(error)).partition("\n")[0]

    def _is_left(self) -> None:
        """Give up what a job has left on its way, before another one is let in: a late call would end that one's. The lock is held."""
        self._epoch += EPOCHS_A_JOB
        asked = {handle.close.remote(): handle for handle in self._actors.handles}
        asked |= {handle.reset.remote(self._epoch, []): handle for handle in self._actors.handles}
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=_CLOSE_S)
        for ref in late:
            ray.kill(asked[ref])  # it hangs, and comes back as one that died
        self._used_at = time.monotonic()


def dead_drivers() -> set[str]:
    """Ray's ids of drivers that are gone."""
    # Ray has no public name for it; the state API that has one needs a dashboard.
    return {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}  # noqa: SLF001


def keeper_class() -> Any:
    """Keeper as a Ray actor class."""
    groups = {"load": 1, "control": 4, "restart": 1, "requests": 40}
    return ray.remote(concurrency_groups=groups, max_restarts=0, max_task_retries=0, num_cpus=0)(Keeper)
