"""torch.compile of decoder layers, and two settings without which a mixture of experts would be slow."""

import inspect
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from m2ray.model.experts import use_kernels
from m2ray.model.faster_graph import FasterGraph, replacements
from m2ray.model.float8.modules import Float8Experts, Float8Linear
from m2ray.model.kept import kept_folder

_ADVICE = ("TensorFloat32 tensor cores for float32", "Dynamo detected a call to a `functools.lru_cache`")
"""Warnings of torch.compile for authors of models; they say nothing to a user of m2ray, whose float32 products stay float32."""

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""Some imports of torch set it to torch's own choice."""

_OPTIONS: dict[str, Any] = {"unroll_reductions_threshold": 17}
"""Sums of up to 16 terms are written out, as a mixture's over the experts of a token. torch.compile does so below 8 of its own accord,
and makes a reduction of 8, in a kernel of its own."""

_VARIANTS = 64
"""Of one kind of layer, that may be compiled: layers of a class that differ, shapes, combinations of sites. torch's own limit is 8."""


def compile_layers(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Compile each layer's forward pass for this device; layers of one kind share their graphs. Hooks stay outside of what is compiled.

    torch keeps their graphs for the next process, by code, versions and shapes: in `TORCHINDUCTOR_CACHE_DIR`, or the user's cache folder.
    """
    _keep_graphs()
    allow_variants()
    for advice in _ADVICE:
        warnings.filterwarnings("ignore", advice, UserWarning)
    modules = [module for layer in layers for module in layer.modules()]
    replacing = replacements(device, rounds=any(isinstance(module, Float8Linear | Float8Experts) for module in modules))
    options = _OPTIONS | ({"post_grad_custom_pre_pass": FasterGraph(replacing)} if replacing else {})
    for module in modules:
        is_experts = "top_k_weights" in inspect.signature(module.forward).parameters
        if is_experts and not (module.use_kernels(device) if isinstance(module, Float8Experts) else use_kernels(module, device)):
            module.register_forward_pre_hook(_write_out, with_kwargs=True)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, options=options)


def _keep_graphs() -> None:
    """Choose the folder, unless the user did. torch's own choice is in the temporary folder, which is emptied and others' to write in."""
    folder = kept_folder("compiled")
    if folder and os.access(folder, os.W_OK) and os.environ.get(_FOLDER) in (None, str(Path(default_cache_dir()).absolute())):
        os.environ[_FOLDER] = str(folder)


def allow_variants() -> None:
    """Let torch compile as many variants of a function as m2ray may need, in this process, and say in m2ray's words where they do not suffice."""
    dynamo: Any = torch._dynamo  # noqa: SLF001 - has no public name
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _VARIANTS)
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_tell_of_the_limit)


def _tell_of_the_limit(record: logging.LogRecord) -> bool:
    """Where torch says that it compiles no more variants of something, say what that means. What was compiled is used on, all else is computed as
    without: the same rows within rounding.
    """
    if record.msg.startswith("torch._dynamo hit config."):
        _, limit, function, reason, _ = map(str, record.args or ())
        record.msg = (
            "m2ray: torch has compiled %s variants of %s, and computes further ones uncompiled from here on: their rows are right, within "
            "rounding, and take longer. Ask for fewer combinations of sites, or set compile = false. Last reason: %s"
        )
        record.args = (limit, function, reason.partition("\n")[0])
    return True


def _write_out(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let experts find what they are given in memory.

    Left alone, torch.compile normalises a token's hidden state again for each of its experts, where it sorts tokens by expert, and
    computes the experts' weights again for each hidden dimension, where it sums over them.
    """
    return tuple(written_out(value) for value in args), {name: written_out(value) for name, value in kwargs.items()}


@torch.library.custom_op("m2ray::written_out", mutates_args=())
def written_out(values: torch.Tensor) -> torch.Tensor:
    """The same values, in memory: nothing before it is fused with what comes after it."""
    return values.clone()


@written_out.register_fake
def _(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values)
