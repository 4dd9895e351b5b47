"""What a warm chain says of itself to those who want to use it: what it is, and what it does now."""

from collections.abc import Mapping
from typing import NamedTuple

from m2ray.chain.probing import Hardware
from m2ray.chain.status import StageStatus
from m2ray.planning.plan import Plan

NAMESPACE = "m2ray"
"""Ray's, of the keepers: a chain's name is its keeper's there."""

GOES_ON_ELSEWHERE = (
    "`m2ray chains` lists those that are there. What a job has finished is kept: the same command goes on, on another chain or without one."
)


class Served(NamedTuple):
    """What a chain is, for those who want to use it.

    Attributes:
        name: of the chain.
        model_url: the checkpoint's folder or URL.
        model_files: the files that it was loaded from, with their digests: of weight files that of their header.
        model_versions: of its weight files, what changes when one is written anew (`Checkpoint.versions`), from before they were loaded.
        plan: how it lies.
        hardware: what it lies on, as it was before.
        idle_timeout_s: how long it stays without a job or a request; None for ever.
        http: where its requests are answered over HTTP; "" for nowhere.
        weights: what its stages have loaded, by layer (m2ray.model.digests); nothing before.
    """

    name: str
    model_url: str
    model_files: Mapping[str, str]
    model_versions: Mapping[str, str]
    plan: Plan
    hardware: Hardware
    idle_timeout_s: float | None
    http: str = ""
    weights: Mapping[int | None, str] = {}


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
