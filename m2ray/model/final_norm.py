"""The final norm by itself: what a model does to the last layer's output before its head, put on recorded rows."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from m2ray.errors import CheckpointError, RunConflictError
from m2ray.model.checkpoint import Checkpoint, open_checkpoint
from m2ray.model.filling import assign
from m2ray.model.rehearsal import NOT_RUN, rehearse
from m2ray.model.skeleton import Skeleton, build_skeleton
from m2ray.model.tensor_table import is_of_run, tensor_table


def final_norm(folder: str, fingerprint: str, layers_run: int, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm of the checkpoint in `folder`, with its weights, on the CPU: rows [N, H] to rows [N, H] of that dtype.

    It is transformers' own module. On a tiny copy of the configuration it has to give, from the last layer's rows, the very bits that the
    whole decoder returns.

    Args:
        fingerprint: the run's, of its model.
        layers_run: how many layers the run loaded, by which the fingerprint is taken.
        dtype: in which the run computed.

    Raises:
        RunConflictError: the checkpoint is not the run's.
        CheckpointError: it cannot be read; or its decoder ends with more than one norm of the last layer's rows.
        ConfigError, StoreError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(folder)
    if not is_of_run(checkpoint, layers_run, fingerprint):
        raise RunConflictError(f"The checkpoint at {folder} is not that of the run.", "Give the run's by --model.")
    _prove(checkpoint.whole_config, dtype)
    skeleton = build_skeleton(checkpoint.whole_config, dtype)
    _load(checkpoint, skeleton)
    return _applied(skeleton.model.get_submodule(_name(skeleton)))


def _applied(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(rows_NH: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            normed: torch.Tensor = norm(rows_NH)
        return normed

    return apply


def _name(skeleton: Skeleton) -> str:
    """Raises CheckpointError if what runs after the layers is not one module with weights."""
    if not skeleton.final_norm:
        after = sorted(name for name, tensor in skeleton.tensors.items() if tensor.role == "final_norm")
        raise _refusal(skeleton.config, f"after its layers come {', '.join(after) or 'nothing'}, not one norm")
    return skeleton.final_norm


def _load(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    for row in tensor_table(checkpoint).rows:
        if row.role == "final_norm":
            (key,) = row.sources
            assign(skeleton.model, row.name, checkpoint.read(key).to(skeleton.tensors[row.name].dtype))


def _prove(config: Any, dtype: torch.dtype) -> None:
    with TemporaryDirectory(prefix="m2ray-norm-") as folder:
        rehearsal = rehearse(config, 0, Path(folder))
        model, last_BTH, final_BTH = rehearsal.last_states(dtype)
        norm = _applied(model.get_submodule(_name(build_skeleton(rehearsal.tiny, dtype))))
        for prompt, count in enumerate(rehearsal.token_counts):
            try:
                found_NH, expected_NH = norm(last_BTH[prompt, :count]), final_BTH[prompt, :count]
            except NOT_RUN as error:
                raise _refusal(config, f"the norm fails on rows: {type(error).__name__}: {error}") from error
            if found_NH.dtype != expected_NH.dtype or not torch.equal(found_NH, expected_NH):
                raise _refusal(config, "what the decoder returns is not the norm of its last layer's rows")


def _refusal(config: Any, what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: of a {config.model_type}, {what}, bit by bit.",
        "An export that needs the normed last state cannot be made of its runs.",
    )
