"""What a stage checks and does before its first micro-batch, besides loading."""

from contextlib import suppress

import torch

from m2ray.errors import StageError, StoreError
from m2ray.model.stage import Stage, StageSpec
from m2ray.storage import open_store


def require_run_folder(output: str, node: str) -> None:
    """Raise StoreError unless the run folder is visible from this node, as the driver left it."""
    store = open_store(output)
    if store.size("job.json") is None:
        raise StoreError(
            f"{store.url} on node {node} has no job.json, though the driver wrote it.",
            "Give an output folder on a disk that all nodes share.",
        )


def require_gpus(num_gpus: int, node: str) -> None:
    """Raise StageError if torch does not see the GPUs that Ray gave."""
    if torch.cuda.device_count() < num_gpus:
        raise StageError(
            f"Ray gave {num_gpus} GPUs on node {node}, torch {torch.__version__} sees {torch.cuda.device_count()}.",
            "Install torch for the driver's CUDA there; `m2ray doctor` tells more.",
        )


def warm_up(stage: Stage, spec: StageSpec, batch_tokens: int, waiting_bytes: int) -> None:
    """Run a device's span for every shape that may come, where that saves time later.

    Args:
        batch_tokens: padded tokens of a full micro-batch.
        waiting_bytes: of its captured rows that may wait for the store.
    """
    if torch.device(spec.device).type == "cuda" or spec.compile:
        # A size that finds no room here finds none later: the driver halves it then.
        with suppress(torch.OutOfMemoryError):
            stage.warm_up(batch_tokens, waiting_bytes)
