"""What a stage does before its first micro-batch: look at its node, load and warm up its spans, open the writer."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from m2ray.activations.schema import Compression
from m2ray.activations.writer import ActivationWriter
from m2ray.errors import StageError, StoreError
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.model.weights import OnBytes
from m2ray.storage import Store, open_store


@dataclass(frozen=True)
class WriterSpec:
    """Where and how a stage writes: the run folder, what every part's footer says, and the writer's bounds.

    `batch_tokens` are the padded tokens of a full micro-batch.
    """

    output: str
    run_metadata: Mapping[str, str]
    queue_bytes: int
    threads: int
    timeout_s: float
    batch_tokens: int
    compression: Compression = "none"


def open_run_folder(output: str, node: str) -> Store:
    """The run folder, as the driver left it.

    Raises:
        StoreError: it is not visible from this node.
    """
    store = open_store(output)
    if store.size("job.json") is None:
        raise StoreError(
            f"{store.url} on node {node} has no job.json, though the driver wrote it.",
            "Give an output folder on a disk that all nodes share.",
        )
    return store


def require_gpus(num_gpus: int, node: str) -> None:
    """Raise StageError if torch does not see the GPUs that Ray gave."""
    if torch.cuda.device_count() < num_gpus:
        raise StageError(
            f"Ray gave {num_gpus} GPUs on node {node}, torch {torch.__version__} sees {torch.cuda.device_count()}.",
            "Install torch for the driver's CUDA there; `m2ray doctor` tells more.",
        )


def load_warm(spec: StageSpec, batch_tokens: int, waiting_bytes: int, on_bytes: OnBytes) -> Stage:
    """Load one device's span and run it for every shape that may come, where that saves time later.

    Args:
        batch_tokens: padded tokens of a full micro-batch.
        waiting_bytes: of its captured rows that may wait for the store.

    Raises:
        CheckpointError, ConfigError, StoreError: as `load_stage`.
    """
    stage = load_stage(spec, on_bytes)
    on_bytes(stage.bytes_read, stage.needed_bytes)
    if torch.device(spec.device).type == "cuda" or spec.compile:
        # A size that finds no room here finds none later: the driver halves it then.
        with suppress(torch.OutOfMemoryError):
            stage.warm_up(batch_tokens, waiting_bytes)
    return stage


def open_writer(spec: WriterSpec, store: Store, stages: Sequence[Stage]) -> ActivationWriter:
    """The writer of what all devices' spans capture."""
    return ActivationWriter(
        store,
        spec.run_metadata,
        [part for stage in stages for part in stage.parts],
        queue_bytes=spec.queue_bytes,
        threads=spec.threads,
        compression=spec.compression,
    )
