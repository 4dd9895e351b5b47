"""One span of a model: the base model's own forward pass, entered at the span's first layer and left after its last."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from m2ray.batches import LayerSpan, Residency
from m2ray.errors import CheckpointError, raise_all
from m2ray.model.attention import avoid_plans_by_shape
from m2ray.model.compilation import compile_layers
from m2ray.model.families import expected_rotary_dim
from m2ray.model.residency import BroughtLayers, WeightsInHost, WeightsOnDisk
from m2ray.model.skeleton import ModelTensor, Skeleton

OnLayer = Callable[[int, torch.Tensor], None]


class DecoderSpan:
    """The layers of `span`, run by transformers' own code, which makes masks and rotary embeddings as for the whole model.

    Layers before the span hand through what they get; the hidden states that come in are put in front of the span's first
    layer, so nothing that a family does to its embeddings touches them. One call at a time.

    Attributes:
        skeleton: emptied of all other layers; the span's parameters are filled in by `m2ray.model.weights`.
        residency: where those of its layers live that are on `device` only while they run.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        span: LayerSpan,
        device: torch.device,
        residency: Mapping[int, Residency] | None = None,
        offload_folder: str = "",
    ) -> None:
        self.skeleton = skeleton
        self.span = span
        self.device = device
        self.residency = residency or {}
        self._offload_folder = offload_folder
        self._outside: dict[int, WeightsInHost] = {}
        self._base = skeleton.decoder
        self._incoming_BTH: torch.Tensor | None = None
        self._on_layer: OnLayer = _ignore
        if device.type == "cuda":
            avoid_plans_by_shape()
        self._cut()
        _build_buffers(self._base, device)
        _check_rotary(self._base, skeleton.config)
        skeleton.layers[span.start].register_forward_pre_hook(self._inject, with_kwargs=True)
        for layer in range(span.start, span.stop):
            skeleton.layers[layer].register_forward_hook(self._leave(layer))

    def run(self, token_ids_BT: torch.Tensor, hidden_BTH: torch.Tensor | None, on_layer: OnLayer) -> torch.Tensor:
        """Take a right-padded micro-batch through the span.

        Args:
            token_ids_BT: int64, on the span's device; looked at by the first span only.
            hidden_BTH: what the span before returned; None for the first.
            on_layer: called with each layer's number and output, hidden states [B, T, H], before the next layer runs.

        Returns:
            The last layer's output [B, T, H]: before the final norm, for the model's last layer too.
        """
        assert (hidden_BTH is None) == (self.span.start == 0), "the first span takes tokens, every other one hidden states"
        self._incoming_BTH, self._on_layer = hidden_BTH, on_layer
        source = {"input_ids": token_ids_BT} if hidden_BTH is None else {"inputs_embeds": hidden_BTH}
        position_ids = torch.arange(token_ids_BT.shape[1], device=self.device)[None]
        try:
            # Right-padding under causal attention needs no mask: what is real never looks at what comes after it.
            self._base(**source, position_ids=position_ids, attention_mask=None, use_cache=False)
        except _SpanDone as done:
            return done.hidden_BTH
        finally:
            self._incoming_BTH, self._on_layer = None, _ignore
        raise AssertionError("the forward pass went past the span's last layer")

    def compile_layers(self) -> None:
        """Compile the span's layers. Call it once, before the first pass."""
        compile_layers([self.skeleton.layers[number] for number in range(self.span.start, self.span.stop)])

    def allocate(self, tensor: ModelTensor) -> torch.Tensor:
        """Memory without values for one of the span's tensors: on the device, or where its layer lives.

        Raises:
            StageError: the disk has no room for the layer.
        """
        if tensor.layer is None or self.residency.get(tensor.layer, "gpu") == "gpu":
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        weights = self._outside.get(tensor.layer) or self._make_room(tensor.layer)
        return weights.views(weights.memory)[tensor.name]

    def bring_layers(self) -> None:
        """Have the layers that live elsewhere, once they are loaded, brought to the device just before they run."""
        if self._outside:
            layers = sorted(self._outside)
            prefixes = [f"{self.skeleton.layers_name}.{layer}." for layer in layers]
            weights = [self._outside[layer] for layer in layers]
            BroughtLayers([self.skeleton.layers[layer] for layer in layers], prefixes, weights, self.device)

    def _make_room(self, layer: int) -> WeightsInHost:
        tensors = [tensor for tensor in self.skeleton.needed(self.span) if tensor.layer == layer]
        on_disk = self.residency[layer] == "disk"
        self._outside[layer] = WeightsOnDisk(tensors, self._offload_folder) if on_disk else WeightsInHost(tensors)
        return self._outside[layer]

    def check_complete(self) -> None:
        """Raise CheckpointError if any tensor that the span computes with has no memory."""
        never_run = {name for name, tensor in self.skeleton.tensors.items() if tensor.role == "final_norm"}
        names = [name for name, tensor in _tensors_in(self.skeleton.model) if tensor.is_meta and name not in never_run]
        names = [name for name in names if name.startswith(f"{self.skeleton.decoder_name}.")]
        if names:
            raise CheckpointError(f"After loading, {len(names)} tensors have no values: {', '.join(names[:8])}.")

    def _cut(self) -> None:
        """Keep the span's layers as they are; empty the others, and the embeddings unless the span is the first."""
        for number, layer in enumerate(self.skeleton.layers):
            if number in self.span:
                del layer.forward  # the skeleton's pass_through: the class's own forward comes back
            else:
                layer._modules.clear()  # noqa: SLF001 - attributes that the model's loop reads stay
                layer._parameters.clear()  # noqa: SLF001
                layer._buffers.clear()  # noqa: SLF001
        if self.span.start > 0:
            for name in self.skeleton.inputs:
                replaced = self.skeleton.model.get_submodule(name)
                self.skeleton.model.set_submodule(name, _Placeholder(adds=isinstance(replaced, nn.Embedding)))

    def _inject(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._incoming_BTH is None:
            return args, kwargs
        if args:
            return (self._incoming_BTH, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._incoming_BTH}

    def _leave(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                raise CheckpointError(
                    f"Layer {number} of {type(self._base).__name__} returns a {type(output).__name__}, not hidden states."
                )
            self._on_layer(number, output)
            if number == self.span.stop - 1:
                raise _SpanDone(output)

        return hook


class _SpanDone(Exception):  # noqa: N818 - it carries the result, it is no error
    """Ends the base model's forward pass after the span's last layer."""

    def __init__(self, hidden_BTH: torch.Tensor) -> None:
        super().__init__()
        self.hidden_BTH = hidden_BTH


class _Placeholder(nn.Module):
    """In the place of a module before the layers whose weights another stage has. Its output is replaced.

    For an embedding it adds nothing; for a projection or a norm it returns its input.
    """

    def __init__(self, *, adds: bool) -> None:
        super().__init__()
        self._adds = adds

    def forward(self, first: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return first.new_zeros((), dtype=torch.get_default_dtype()) if self._adds else first


def _ignore(_: int, __: torch.Tensor) -> None:
    pass


def _tensors_in(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, buffer and plain tensor attribute of `model`, by its dotted name."""
    for prefix, module in model.named_modules():
        owned = {**module._parameters, **module._buffers, **vars(module)}  # noqa: SLF001 - plain attributes are in no public list
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in owned.items() if isinstance(tensor, torch.Tensor))


def _build_buffers(base: Any, device: torch.device) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, embedding scales) memory and values.

    transformers' own `_init_weights` computes them, as its loading does; it leaves parameters on the meta device alone.

    Raises:
        CheckpointError: it left one without values.
    """
    problems = []
    for prefix, module in base.named_modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]  # noqa: SLF001
        if not names:
            continue
        for name in names:
            buffer = module._buffers[name]  # noqa: SLF001
            assert buffer.is_floating_point(), f"{prefix}.{name} cannot be marked as empty"
            module._buffers[name] = torch.full(buffer.shape, float("nan"), dtype=buffer.dtype, device="cpu")  # noqa: SLF001
        base._init_weights(module)  # noqa: SLF001 - the rule has no public name
        problems += [f"{prefix}.{name}" for name in names if module._buffers[name].isnan().any()]  # noqa: SLF001
        for name in names:
            module._buffers[name] = module._buffers[name].to(device)  # noqa: SLF001
    if problems:
        raise CheckpointError(f"transformers gives no values to the buffers {', '.join(problems)}.")


def _check_rotary(base: nn.Module, config: Any) -> None:
    """Older transformers turned every dimension of a head where the model turns some: finite rows, all wrong."""
    expected = expected_rotary_dim(config)
    if expected is None:
        return
    found = {name: buffer.numel() for name, buffer in base.named_buffers() if name.endswith("inv_freq")}
    problems = [
        CheckpointError(
            f"{name} turns {2 * number} dimensions of each head, config.json says {expected}.",
            "Use a transformers version that m2ray asks for.",
        )
        for name, number in found.items()
        if number != (expected + 1) // 2
    ]
    if not found:
        problems = [
            CheckpointError(f"config.json says that {expected} dimensions of each head turn, but the model has no rotary frequencies.")
        ]
    raise_all(problems)
