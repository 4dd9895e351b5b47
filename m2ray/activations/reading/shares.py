"""Shares: each worker of each rank is a consumer, and takes its share of an epoch; and states, by which it goes on with it elsewhere."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import get_worker_info

from m2ray.errors import ConfigError


def consumer_of(rank: int, world_size: int) -> dict[str, int]:
    """Which consumer this process is, out of how many."""
    worker = get_worker_info()
    workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
    return {"consumer": rank * workers + number, "consumers": world_size * workers}


def require_share(rank: int, world_size: int, seed: int) -> None:
    """Raise ConfigError for a rank or a seed that there cannot be."""
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank = {rank} of world_size = {world_size}: ranks go from 0 to world_size - 1.")
    if seed < 0:
        raise ConfigError(f"seed = {seed} is negative.")


def require_positive(**sizes: float) -> None:
    """Raise ConfigError for the first that is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} = {value} is not at least 1.")


def require_same(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a state was taken of what is there now, naming all that differs."""
    differing = [f"{name} was {state.get(name, 'absent')}, is {value}" for name, value in now.items() if state.get(name) != value]
    if differing:
        raise ConfigError(
            f"This state is of another one: {'; '.join(differing)}.",
            "Make it as it was, or leave its state out and begin with an epoch's first row.",
        )
