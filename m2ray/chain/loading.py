"""What a stage checks and does before its first micro-batch, and the paths by which it finds its folders."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from m2ray import __version__
from m2ray.activations.job import JOB_KEY, read_job
from m2ray.activations.resumable import require_resumable
from m2ray.chain.status import StageStatus
from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, ClusterError, StageError, StoreError, in_ranges
from m2ray.model.digests import BARE_LAST_LAYER
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.storage import open_store


def absolute(config: ExtractConfig) -> ExtractConfig:
    """The options with the paths of folders as every process finds them: the stages of a cluster are started elsewhere than this process."""
    folders = {name: getattr(config, name) for name in ("model", "output", "offload_folder")}
    relative = {name: path for name, path in folders.items() if path is not None and "://" not in path and not path.startswith("~")}
    return config.model_copy(update={name: str(Path(path).absolute()) for name, path in relative.items()})


def require_run_folder(output: str, node: str, driver_version: str) -> None:
    """Look at the run from a stage's node, which may have joined after the driver had looked at all.

    Raises:
        StoreError: the run folder is not visible from here, as the driver left it.
        RunConflictError: torch, transformers or tokenizers are of other versions here than in the run.
        ClusterError: m2ray is of another version here than the driver's, which need not be the one that began the run.
    """
    if __version__ != driver_version:
        raise ClusterError(f"Node {node} has m2ray {__version__}, the driver {driver_version}.", "Install the same everywhere.")
    store = open_store(output)
    recorded = None if store.size(JOB_KEY) is None else read_job(store)
    if recorded is None:
        raise StoreError(
            f"{store.url} on node {node} has no {JOB_KEY}, though the driver wrote it.",
            "Give an output folder on a disk that all nodes share.",
        )
    require_resumable(store, recorded, f"on node {node}")


def require_gpus(num_gpus: int, node: str) -> None:
    """Raise StageError if torch does not see the GPUs that Ray gave."""
    if torch.cuda.device_count() < num_gpus:
        raise StageError(
            f"Ray gave {num_gpus} GPUs on node {node}, torch {torch.__version__} sees {torch.cuda.device_count()}.",
            "Install torch for the driver's CUDA there; `m2ray doctor` tells more.",
        )


class OtherWeightsError(CheckpointError):
    """A stage has read other weights than those that it has to have: the chain would be of two models."""


class Refusals:
    """Of a stage's process: the files whose weights it has refused are not read again before one of them is written anew.

    To read them may take minutes, while the keeper of a chain looks every few seconds whether the stage can be loaded, and requests ask for it.
    """

    def __init__(self) -> None:
        self._refused: tuple[Mapping[str, str], str, str] | None = None

    @contextmanager
    def heeded(self, spec: StageSpec) -> Iterator[None]:
        """Raise OtherWeightsError if the files of `spec` were refused as they are; else remember it if that is raised inside. Raises StoreError."""
        if spec.weights is None:
            yield
            return
        store, files = open_store(spec.model_url), spec.model_files or {}
        versions = {file: store.version(file) for file in files if store.size(file) is not None}
        if self._refused is not None and self._refused[0] == versions:
            raise OtherWeightsError(*self._refused[1:])
        try:
            yield
        except OtherWeightsError as error:
            self._refused = versions, error.what, error.remedy  # not the error: it holds on to all that was loaded
            raise


def load_spans(specs: Sequence[StageSpec], status: StageStatus, tell: Callable[[StageStatus], None]) -> list[Stage]:
    """Load the spans of all devices; `tell` is given the status as tensors arrive and at the end. Raises as `load_stage` does, and OtherWeightsError
    if weights are not those that their spec wants.
    """
    began_at = time.monotonic()
    stages: list[Stage] = []
    for spec in specs:
        before = status

        def count(read_bytes: int, needed_bytes: int, before: StageStatus = before) -> None:
            nonlocal status
            status = replace(before, read_bytes=before.read_bytes + read_bytes, needed_bytes=before.needed_bytes + needed_bytes)
            tell(status)

        stages.append(load_stage(spec, count))
        _require_weights(spec, stages[-1].digests)
        count(stages[-1].bytes_read, stages[-1].needed_bytes)
    digests = [each for stage in stages for each in (*stage.digests.items(), (BARE_LAST_LAYER, stage.bare_last_layer))]
    tell(
        replace(
            status,
            parameter_bytes=sum(stage.parameter_bytes for stage in stages),
            load_s=time.monotonic() - began_at,
            weights={layer: digest for layer, digest in digests if digest},
        )
    )
    return stages


def _require_weights(spec: StageSpec, found: Mapping[int | None, str]) -> None:
    """Raise OtherWeightsError if a span's weights are not those that it has to have."""
    if spec.weights is None:
        return
    differing = [layer for layer, digest in found.items() if spec.weights.get(layer) != digest]
    if differing:
        layers = in_ranges([layer for layer in differing if layer is not None])
        words = " and ".join([*(["the embedding"] if None in differing else []), *([f"layers {layers}"] if layers else [])])
        raise OtherWeightsError(
            f"The weights at {spec.model_url} are not those that the other stages have loaded: they were replaced meanwhile ({words}).",
            "Put the files back, or load the chain anew.",
        )


def warm_up(stage: Stage, spec: StageSpec, batch_tokens: int, waiting_bytes: int, on_left: Callable[[int], None]) -> None:
    """Run a device's span for every shape that may come, where that saves time later.

    Args:
        batch_tokens: padded tokens of a full micro-batch.
        waiting_bytes: of its captured rows that may wait for the store.
        on_left: is told the micro-batches that are still to run.
    """
    if torch.device(spec.device).type == "cuda" or spec.compile:
        # A size that finds no room here finds none later: the driver halves it then.
        with suppress(torch.OutOfMemoryError):
            stage.warm_up(batch_tokens, waiting_bytes, on_left)
