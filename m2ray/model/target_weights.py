"""The two matrices at a model's ends, from its checkpoint: the embedding of its tokens and the head that scores them, with its bias."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from m2ray.errors import CheckpointError, RunConflictError
from m2ray.model.checkpoint import Checkpoint, open_checkpoint
from m2ray.model.conversion import Conversion
from m2ray.model.skeleton import Skeleton, build_skeleton
from m2ray.model.tensor_table import is_of_run

_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class TargetWeights:
    """Embedding and head of one checkpoint. Where the model ties them, both are the embedding's.

    Attributes:
        model_type: config.json's.
        vocab_size: the decoder's, as config.json says; a matrix may have more rows.
        shapes: of "embedding" and of "head": [V, H].
        config: transformers' of the whole model.
        head_bias: float32 [V], of a head that has one.
    """

    model_type: str
    vocab_size: int
    shapes: Mapping[str, tuple[int, ...]]
    config: Any
    head_bias: torch.Tensor | None
    _checkpoint: Checkpoint
    _keys: Mapping[str, str]

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The rows of "embedding" or "head" in this dtype, some MiB at a time. Raises StoreError."""
        num_rows, *others = self.shapes[name]
        step = max(1, _PIECE_BYTES // (prod(others) * dtype.itemsize))
        for start in range(0, num_rows, step):
            yield self._checkpoint.read(self._keys[name], slice(start, min(start + step, num_rows))).to(dtype)


def target_weights(folder: str, fingerprint: str, layers_run: int) -> TargetWeights:
    """Embedding and head of the checkpoint in `folder`.

    Args:
        fingerprint: the run's, of its model.
        layers_run: how many layers the run loaded, by which the fingerprint is taken.

    Raises:
        RunConflictError: the checkpoint is not the run's.
        CheckpointError: it cannot be read, has no head, or holds one of the two in another shape or quantised.
        ConfigError, StoreError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(folder)
    if not is_of_run(checkpoint, layers_run, fingerprint):
        raise RunConflictError(f"The checkpoint at {folder} is not that of the run.", "Give the run's by --model.")
    skeleton = build_skeleton(checkpoint.whole_config, torch.bfloat16)
    ends = {"embedding": skeleton.model.get_input_embeddings(), "head": skeleton.model.get_output_embeddings()}
    keys = {name: _key(checkpoint, skeleton, module) for name, module in ends.items()}
    shapes = {name: checkpoint.headers[key].shape for name, key in keys.items()}
    has_bias, config = getattr(ends["head"], "bias", None) is not None, checkpoint.whole_config
    bias = checkpoint.read(_key(checkpoint, skeleton, ends["head"], "bias")).float() if has_bias else None
    return TargetWeights(config.model_type, checkpoint.config.vocab_size, shapes, config, bias, checkpoint, keys)


def _key(checkpoint: Checkpoint, skeleton: Skeleton, module: torch.nn.Module | None, leaf: str = "weight") -> str:
    """The checkpoint's key of a module's matrix, or of its bias."""
    names = [name for name, each in skeleton.model.named_modules() if each is module]
    if module is None or not names:
        raise CheckpointError(
            f"A {checkpoint.whole_config.model_type} has no head whose weights could be given.", "Choose another consumer."
        )
    name = f"{names[0]}.{leaf}"
    outside = [key for key in checkpoint.headers if skeleton.layer_of(key) is None]
    found = {target: source.key for target, source in Conversion(skeleton).sources(outside)}
    embedding = skeleton.tied.get(name, name)
    heads = [head for head, tied_to in skeleton.tied.items() if tied_to == embedding]  # its values may be there under the head's name only
    key = next((found[each] for each in (embedding, name, *heads) if each in found), None)
    if key is None:
        raise CheckpointError(f"{checkpoint.url} has no {name}.", "Copy the file that holds it into the folder.")
    tensor = getattr(module, leaf)
    assert isinstance(tensor, torch.Tensor)
    header, shape = checkpoint.headers[key], tuple(tensor.shape)
    if header.shape != shape or header.dtype not in {torch.bfloat16, torch.float16, torch.float32}:
        what = f"{key} of {checkpoint.url} is {header.dtype} {list(header.shape)}, not plain values {list(shape)}."
        raise CheckpointError(what, "Give a copy of the model that is not quantised.")
    return key
