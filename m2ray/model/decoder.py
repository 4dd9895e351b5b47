"""One span of a model: the base model's own forward pass, entered at the span's first layer and left after its last."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from m2ray.batches import LayerSpan, Residency
from m2ray.errors import CheckpointError, raise_all
from m2ray.model.attention import avoid_plans_by_shape
from m2ray.model.boundary import Boundary, contract_of, crossing
from m2ray.model.compilation import compile_layers
from m2ray.model.families import expected_rotary_dim
from m2ray.model.residency import BroughtLayers, WeightsInHost, WeightsOnDisk
from m2ray.model.skeleton import ModelTensor, Skeleton, hidden_of

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
        self._contract = contract_of(skeleton.config)
        self._token_ids_BT = torch.empty(0)
        self._incoming: Boundary | None = None
        self._prepared: torch.Tensor | None = None
        self._on_layer: OnLayer = _ignore
        if device.type == "cuda":
            avoid_plans_by_shape()
        _build_buffers(self._base, device, [layer for number, layer in enumerate(skeleton.layers) if number not in span])
        self._cut()
        _check_rotary(self._base, skeleton.config)
        skeleton.layers[span.start].register_forward_pre_hook(self._inject, with_kwargs=True)
        for layer in range(span.start, span.stop):
            if self._contract.input_ids and span.start > 0:
                skeleton.layers[layer].register_forward_pre_hook(self._give_token_ids, with_kwargs=True)
            skeleton.layers[layer].register_forward_hook(self._leave(layer), with_kwargs=True)
        if self._contract.prepared[1]:
            self._prepare = getattr(self._base, self._contract.prepared[1])
            setattr(self._base, self._contract.prepared[1], self._prepare_once)

    def run(self, token_ids_BT: torch.Tensor, incoming: Boundary | None, on_layer: OnLayer) -> Boundary:
        """Take a right-padded micro-batch through the span.

        Args:
            token_ids_BT: int64, on the span's device.
            incoming: what the span before returned; None for the first.
            on_layer: called with each layer's number and output, hidden states [B, T, H] or [B, T, S, H], before the next layer runs.

        Returns:
            What the next span needs; the hidden states are the last layer's output: before the final norm, for the model's last layer too.
        """
        assert (incoming is None) == (self.span.start == 0), "the first span takes tokens, every other one hidden states"
        self._token_ids_BT, self._incoming, self._on_layer = token_ids_BT, incoming, on_layer
        source = {"input_ids": token_ids_BT} if incoming is None else self._in_place_of_tokens(incoming)
        position_ids = torch.arange(token_ids_BT.shape[1], device=self.device)[None]
        try:
            # Right-padding under causal attention needs no mask: what is real never looks at what comes after it.
            self._base(**source, position_ids=position_ids, attention_mask=None, use_cache=False)
        except _SpanDone as done:
            return done.boundary
        finally:
            self._incoming, self._prepared, self._on_layer = None, None, _ignore
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

    def _in_place_of_tokens(self, incoming: Boundary) -> dict[str, torch.Tensor]:
        """What the base model is called with: it makes masks and rotary embeddings for hidden states of this shape."""
        hidden_BTH = incoming.hidden_BTH
        source = {"inputs_embeds": hidden_BTH[:, :, 0] if self._contract.streams else hidden_BTH}
        name, _ = self._contract.prepared
        if name in incoming.beside:  # the layers that have run are not there; each takes its own by its number
            source[name] = nn.functional.pad(incoming.beside[name], (0, 0, self.span.start, 0))
        return source

    def _prepare_once(self, *args: Any) -> torch.Tensor:
        """In place of the base model's method: a later span was given what the first one made."""
        self._prepared = self._prepare(*args) if self._incoming is None else args[-1]
        assert self._prepared is not None
        return self._prepared

    def _inject(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._incoming is None:
            return args, kwargs
        hidden_BTH, beside = self._incoming
        name, argument = self._contract.second
        if name in beside:
            kwargs = {**kwargs, argument: beside[name]}
        if self._contract.shared:
            kinds = {name.partition(".")[0] for name in beside if name.endswith(".keys")}
            kwargs[self._contract.shared].update(
                {kind: tuple(beside[f"{kind}.{part}"].transpose(1, 2) for part in ("keys", "values")) for kind in kinds}
            )
        if args:
            return (hidden_BTH, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_BTH}

    def _give_token_ids(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "input_ids": self._token_ids_BT}

    def _leave(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden_BTH = hidden_of(output)
            self._on_layer(number, hidden_BTH)
            if number == self.span.stop - 1:
                raise _SpanDone(Boundary(hidden_BTH, self._beside(output, kwargs)))

        return hook

    def _beside(self, output: Any, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the next span's layers need of this one's beside the hidden states, [B, T, ...] each."""
        stop = self.span.stop
        if not (wanted := crossing(self.skeleton.config, stop)):
            return {}
        found: dict[str, torch.Tensor] = {}
        if self._contract.second[0]:
            found[self._contract.second[0]] = output[1]
        if self._contract.shared:
            for kind, (keys_BATD, values_BATD) in kwargs[self._contract.shared].items():
                found |= {f"{kind}.keys": keys_BATD.transpose(1, 2), f"{kind}.values": values_BATD.transpose(1, 2)}
        if self._contract.prepared[0] and self._prepared is not None:
            found[self._contract.prepared[0]] = self._prepared[:, :, stop:]
        return {name: found[name] for name in wanted}


class _SpanDone(Exception):  # noqa: N818 - it carries the result, it is no error
    """Ends the base model's forward pass after the span's last layer."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__()
        self.boundary = boundary


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


def _build_buffers(base: Any, device: torch.device, left_out: Iterable[nn.Module]) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, embedding scales) memory and values, but those of layers `left_out`.

    transformers' own `_init_weights` computes them, as its loading does; it leaves parameters on the meta device alone.

    Raises:
        CheckpointError: it left one without values.
    """
    others = {id(module) for layer in left_out for module in layer.modules()}
    problems = []
    for prefix, module in base.named_modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]  # noqa: SLF001
        if not names or id(module) in others:
            continue
        empty = _fill(module, names, lambda module=module: base._init_weights(module))  # type: ignore[misc]  # noqa: SLF001
        if empty:  # some families compute those of their layers for the whole model at once
            empty = _fill(module, names, lambda: base._init_weights(base))  # noqa: SLF001
        problems += [f"{prefix}.{name}" for name in empty]
        for name in names:
            module._buffers[name] = module.get_buffer(name).to(device)  # noqa: SLF001
    if problems:
        raise CheckpointError(f"transformers gives no values to the buffers {', '.join(problems)}.")


def _fill(module: nn.Module, names: Sequence[str], compute: Callable[[], None]) -> list[str]:
    """Let transformers compute a module's buffers on the CPU. Returns the names of those that it left as they were."""
    found = []
    for marker in (0, 1):
        for name in names:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu").fill_(marker)  # noqa: SLF001
        compute()
        found.append({name: module.get_buffer(name).clone() for name in names})
    return [name for name in names if not torch.equal(found[0][name], found[1][name])]


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
