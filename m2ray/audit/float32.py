"""A transformers model that computes in float32 for a while, with the very weights of its own dtype, where they lie and without a second copy."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

_HALVES_ONLY = "flash_attention_2"
_FLOAT32_BYTES = 4


@contextmanager
def in_float32(model: nn.Module, layers: Collection[nn.Module], decoder_config: Any) -> Iterator[None]:
    """Within, weights are widened while the layer runs that they are of; those that accelerate keeps elsewhere, while it has brought them.

    Memory holds the weights of one of `layers` in float32 beside those of the model. Attention that knows no float32 gives way to torch's.
    """
    with ExitStack() as undo:
        chosen = decoder_config._attn_implementation  # noqa: SLF001 - transformers' only name of it
        undo.callback(setattr, decoder_config, "_attn_implementation", chosen)
        decoder_config._attn_implementation = "sdpa" if chosen == _HALVES_ONLY else chosen  # noqa: SLF001
        for module in model.modules():
            # accelerate brings weights around the forward pass that it has put away under this name.
            name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
            owners = [*module.modules()] if module in layers else [module]
            undo.callback(_reset, module, name, vars(module).get(name))
            setattr(module, name, partial(_widened, getattr(module, name), owners))
        yield


def _reset(module: nn.Module, name: str, forward: Any) -> None:
    delattr(module, name)
    if forward is not None:
        setattr(module, name, forward)


def _widened(forward: Callable[..., Any], owners: Collection[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Run `forward` with the weights of `owners` that are here in float32."""
    with ExitStack() as undo:
        for owner in owners:
            for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                if tensor.is_floating_point() and tensor.itemsize < _FLOAT32_BYTES and not tensor.is_meta:
                    wide = tensor.detach().float()
                    setattr(owner, name, nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide)
                    undo.callback(setattr, owner, name, tensor)
        return forward(*args, **kwargs)
