"""A warm chain from outside: found by its name, held against what a job wants, and lent to it for as long as that takes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayError

from m2ray.batches import PromptStats
from m2ray.chain.actors import START_S
from m2ray.chain.admission import Visitor
from m2ray.chain.checking import Inputs
from m2ray.chain.failure import cause_of
from m2ray.chain.probing import Hardware
from m2ray.chain.progress import Progress
from m2ray.chain.served import GOES_ON_ELSEWHERE, NAMESPACE, ChainStatus, Served
from m2ray.chain.specs import stage_specs
from m2ray.chain.status import StageStatus
from m2ray.chain.stopping import Stop
from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, ClusterError, ConfigError, M2rayError, did_you_mean, raise_all
from m2ray.model.digests import of_run
from m2ray.model.known_weights import known_weights
from m2ray.model.stage import StageSpec
from m2ray.planning.plan import Plan, of_another_job
from m2ray.sites import layers_run
from m2ray.storage import open_store

_POLL_S = 0.1
_ANSWER_S = 120.0
"""What a keeper may take to answer what needs no work: more than it waits for the stages to let go of a job (keeper.py)."""

_AGREED = ("compute_dtype", "attn_implementation", "compile", "threads_per_stage")
"""Options that decide how a chain computes: a job that names others is refused."""


class StandingActors:
    """The actors of a chain that stands already, lent to one job: they were there before, and stay.

    Args:
        timeout_s: what bringing lost ones back may take.
    """

    def __init__(self, keeper: Any, ticket: str, handles: Sequence[Any], timeout_s: float) -> None:
        self._keeper = keeper
        self._ticket = ticket
        self._timeout_s = timeout_s
        self.handles = list(handles)

    def start(self, epoch: int) -> None:
        """They have started."""

    def restart(self, lost: Mapping[int, StageStatus | None], epoch: int) -> bool:
        """As `Actors.restart`: the keeper does it. Raises ClusterError too if the chain is gone."""
        try:
            others_stay, self.handles[:] = ray.get(self._keeper.restart.remote(self._ticket, lost, epoch), timeout=self._timeout_s)
        except RayError as error:
            raise as_ours(error) from error
        return bool(others_stay)

    def end(self) -> None:
        """Nothing: the job leaves them where `Standing.lent` ends."""


@dataclass(frozen=True)
class Standing:
    """A chain that stands: its keeper, and what it is."""

    keeper: Any
    served: Served

    def require_loaded(self) -> None:
        """Raise ClusterError while it is being loaded: how it lies is not known before."""
        if not status(self).is_loaded:
            raise ClusterError(f"The chain {self.served.name} is being loaded.", "`m2ray chains` tells how far it is: ask again then.")

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Have the chain not be idle, however long it takes until the job is let in. Raises ClusterError if it is gone or is being loaded."""
        visitor = self._visitor("")
        asked(self.keeper.expect.remote(visitor))
        try:
            yield
        finally:
            self._leave(visitor)

    def agreed(self, config: ExtractConfig) -> ExtractConfig:
        """A job's configuration with what the chain decides.

        Raises:
            ConfigError: it asks for another model or another way to compute, named one by one.
        """
        options, name = self.served.plan.demand.options, self.served.name
        problems = []
        if (asked := open_store(config.model).url) != self.served.model_url:
            problems.append(
                ConfigError(f"model = {asked!r}, and the chain {name} holds {self.served.model_url!r}.", "Name that, or another chain.")
            )
        decided: dict[str, Any] = {}
        for option in _AGREED:
            wanted, has = getattr(config, option), getattr(options, option)
            decided[option] = has
            if option in config.model_fields_set and wanted not in ("auto", has):
                problems.append(
                    ConfigError(f"{option} = {wanted!r}, and the chain {name} has {has!r}.", "Leave it out, or name another chain.")
                )
        if config.replicas not in ("auto", 1):
            problems.append(ConfigError(f"replicas = {config.replicas}, and the chain {name} is one.", "Leave it out."))
        raise_all(problems)
        if config.batch_tokens == "auto":
            decided["batch_tokens"] = options.batch_tokens
        return config.model_copy(update={**decided, "stages": "auto", "replicas": 1})

    def hardware_for(self, inputs: Inputs, progress: Progress) -> Hardware:
        """What a job runs on. Where the model's files were written anew, or are another machine's own, all their weights are read first.

        Raises:
            CheckpointError, ConfigError: the model has changed since the chain loaded it, or the job wants layers which the chain has not.
        """
        name, problems = self.served.name, list[M2rayError]()
        here, there = inputs.checkpoint.digests, self.served.model_files
        if changed := sorted(file for file, digest in here.items() if there.get(file, digest) != digest):
            problems.append(
                CheckpointError(
                    f"{', '.join(changed)} changed since the chain {name} was loaded from {self.served.model_url}.", "Serve it anew."
                )
            )
        needed, has = layers_run(inputs.options.captured, inputs.table.num_layers), self._num_layers
        if needed > has:
            problems.append(ConfigError(f"Layers up to {needed - 1} are asked for, and the chain {name} has layers 0 to {has - 1}."))
        raise_all(problems)
        self._require_weights(inputs, needed, progress)
        return replace(self.served.hardware, chain=self)

    def _require_weights(self, inputs: Inputs, num_layers: int, progress: Progress) -> None:
        """Raise CheckpointError if the model's files were written anew since the chain loaded them, with other weights of the same shapes."""
        checkpoint, known = inputs.checkpoint, self.served.model_versions
        if all(known.get(file) == version for file, version in inputs.versions.items()):
            return
        progress.waiting(
            "check", f"the model's files are not those that the chain {self.served.name} has read: whether their weights are the same"
        )
        norm = any(part.site == "final_norm" for part in inputs.options.captured)
        found = known_weights(checkpoint, num_layers, with_final_norm=norm)
        if found != of_run(self.served.weights, num_layers, with_final_norm=norm):
            raise CheckpointError(
                f"{checkpoint.url} has other weights than the chain {self.served.name} has loaded from there: its files were replaced since.",
                "Serve it anew, or put the files back.",
            )

    @property
    def _num_layers(self) -> int:
        return max(stage.span.stop for stage in self.served.plan.stages)

    def plan(self, inputs: Inputs, prompts: PromptStats) -> Plan:
        """The plan of a job on this chain."""
        return of_another_job(self.served.plan, inputs.demand(prompts.longest_tokens), prompts)

    @contextmanager
    def lent(self, what: str, stop: Stop, progress: Progress) -> Iterator[tuple[list[list[StageSpec]], StandingActors, int]]:
        """Have the chain for a job, as soon as those that came before are done: what its stages hold, its actors, and their epoch.

        Raises:
            ClusterError: the chain is gone.
        """
        visitor = self._visitor(what)
        options = self.served.plan.demand.options
        try:
            admitted = self._ask(visitor)
            while isinstance(admitted, str) and not stop.asked.is_set():
                progress.waiting("queue", f"the chain {self.served.name} {admitted}")
                time.sleep(_POLL_S)
                admitted = self._ask(visitor)
            if isinstance(admitted, str):
                raise stop.error("Run the same command again.")
            epoch, handles = admitted
            specs = list(stage_specs(self.served.plan, 0, self.served.model_url, self.served.model_files))
            # Looking for lost ones, room for them elsewhere, and a start there.
            timeout_s = 2 * (options.stage_timeout_s + options.placement_timeout_s + START_S)
            yield specs, StandingActors(self.keeper, visitor.ticket, handles, timeout_s), epoch
        finally:
            self._leave(visitor)

    def _visitor(self, what: str) -> Visitor:
        return Visitor(uuid4().hex[:12], ray.get_runtime_context().get_job_id(), what)

    def _leave(self, visitor: Visitor) -> None:
        leaving = self.keeper.leave.remote(visitor.ticket)
        ray.wait([leaving], timeout=2 * _ANSWER_S)  # a keeper that is gone has nothing to be told

    def _ask(self, visitor: Visitor) -> tuple[int, list[Any]] | str:
        answer: tuple[int, list[Any]] | str = asked(self.keeper.admit.remote(visitor))
        return answer


def find(name: str) -> Standing:
    """The chain of that name in the cluster that this process has joined. Raises ClusterError if there is none."""
    try:
        keeper = ray.get_actor(name, NAMESPACE)
    except ValueError as error:
        there = names()
        listed = f"There are: {', '.join(there)}." if there else "There is none: `m2ray serve CONFIG.toml` starts one."
        raise ClusterError(f"There is no chain {name!r} in this cluster.", f"{did_you_mean(name, there)}{listed}") from error
    return Standing(keeper, asked(keeper.served.remote()))


def names() -> list[str]:
    """The names of all chains in the cluster that this process has joined."""
    return sorted(each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE)


def status(standing: Standing) -> ChainStatus:
    """What a chain does now. Raises ClusterError if it is gone."""
    found: ChainStatus = asked(standing.keeper.status.remote())
    return found


def asked(call: Any, timeout_s: float = _ANSWER_S) -> Any:
    """What a call to a keeper gives. Raises what it raised, as m2ray's own error, or ClusterError."""
    try:
        return ray.get(call, timeout=timeout_s)
    except RayError as error:
        raise as_ours(error) from error


def as_ours(error: RayError) -> M2rayError:
    """What a call to a keeper failed with, as an error for users."""
    cause = cause_of(error)
    if isinstance(cause, M2rayError):
        return cause
    if isinstance(cause, RayActorError):
        return ClusterError("The chain is gone: it was stopped, or was idle for too long, or its keeper died.", GOES_ON_ELSEWHERE)
    return ClusterError(f"The chain does not answer: {str(cause).partition(chr(10))[0]}.", "`m2ray chains` tells more.")
