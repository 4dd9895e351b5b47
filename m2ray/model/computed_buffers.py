"""The buffers that no checkpoint holds (rotary frequencies, embedding scales): transformers' own code gives them their values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from m2ray.errors import CheckpointError


def build_buffers(base: Any) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, embedding scales) memory and values, on the CPU.

    transformers' own `_init_weights` computes them, as its loading does: of the module that has them, or of one around it. It leaves
    parameters on the meta device alone.

    Raises:
        CheckpointError: it left one without values.
    """
    modules = dict(base.named_modules())
    empty = {prefix: names for prefix, module in modules.items() if (names := computed_buffers(module))}
    for prefix, names in empty.items():
        for name in names:
            buffers = modules[prefix]._buffers  # noqa: SLF001 - buffers that are not saved are in no public list
            buffers[name] = torch.empty_like(buffers[name], device="cpu")
    _compute(base, modules, empty, list(empty))
    if empty:
        _compute(base, modules, empty, sorted({around for prefix in empty for around in _around(prefix)}, key=len))
    if empty:
        problems = [f"{prefix}.{name}" for prefix, names in empty.items() for name in names]
        raise CheckpointError(f"transformers gives no values to the buffers {', '.join(problems)}.")


def computed_buffers(module: nn.Module) -> list[str]:
    """The names of a module's buffers that no checkpoint holds."""
    return [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]  # noqa: SLF001


def _compute(base: Any, modules: Mapping[str, nn.Module], empty: dict[str, list[str]], of: list[str]) -> None:
    """Let transformers initialise the modules named in `of`; what it gave no value stays in `empty`."""
    found: list[dict[tuple[str, str], torch.Tensor]] = []
    for marker in (0, 1):  # what is left as it was is told by another value
        buffers = {(prefix, name): modules[prefix]._buffers[name] for prefix, names in empty.items() for name in names}  # noqa: SLF001
        for buffer in buffers.values():
            assert buffer is not None
            buffer.fill_(marker)
        for prefix in of:
            base._init_weights(modules[prefix])  # noqa: SLF001 - the rule has no public name
        found.append({place: modules[place[0]]._buffers[place[1]].clone() for place in buffers})  # type: ignore[union-attr]  # noqa: SLF001
    for prefix, name in found[0]:
        if torch.equal(found[0][prefix, name], found[1][prefix, name]):
            empty[prefix].remove(name)
            if not empty[prefix]:
                del empty[prefix]


def _around(prefix: str) -> list[str]:
    """The names of the modules that hold a module, from the outermost, the base model, on."""
    steps = prefix.split(".")
    return [".".join(steps[:number]) for number in range(len(steps))]
