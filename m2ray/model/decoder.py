"""One span of a model: the base model's own forward pass, entered at the span's first layer and left after its last, or at any between them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from m2ray.batches import LayerSpan, Residency
from m2ray.errors import CheckpointError, raise_all
from m2ray.model.attention import avoid_plans_by_shape, positions_of_one_sequence
from m2ray.model.boundary import Boundary, contract_of, crossing
from m2ray.model.compilation import compile_layers
from m2ray.model.computed_buffers import build_buffers, computed_buffers
from m2ray.model.families import expected_rotary_dim
from m2ray.model.site_hooks import OnSite, SiteHooks
from m2ray.model.site_table import IN_LAYERS, experts_of, layers_of, points_of
from m2ray.model.skeleton import Skeleton, hidden_of


class DecoderSpan:
    """The layers of `span`, run by transformers' own code, which makes masks and rotary embeddings as for the whole model.

    Layers before the span hand through what they get; the hidden states that come in are put in front of the layer that is entered, so
    nothing that a family does to its embeddings touches them. One call at a time.

    Attributes:
        skeleton: emptied of all other layers; the span's parameters are filled in by `m2ray.model.weights`.
        residency, offload_folder, shared: where those of its layers live that are not kept ready on `device` (m2ray.model.residency).
        with_final_norm: whether the final norm is loaded: if it is asked for, and the span ends with the model's last layer.
        site_layers, experts: of the whole model: the layers that have each site, and (experts, those chosen for a token).
    """

    def __init__(
        self,
        skeleton: Skeleton,
        span: LayerSpan,
        device: torch.device,
        residency: Mapping[int, Residency] | None = None,
        offload_folder: str = "",
        *,
        shared: Collection[int] = (),
        with_final_norm: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.span = span
        self.device = device
        self.with_final_norm = with_final_norm and bool(skeleton.final_norm) and span.stop == len(skeleton.layers)
        self.residency = residency or {}
        self.offload_folder = offload_folder
        self.shared = shared
        self.site_layers, self.experts = layers_of(skeleton), experts_of(skeleton)
        self._base = skeleton.decoder
        self._layers = span
        self._stand_ins: list[_StandIn] = []
        self._contract = contract_of(skeleton.config)
        self._token_ids_BT = torch.empty(0)
        self._incoming: Boundary | None = None
        self._prepared: torch.Tensor | None = None
        self._on_site: OnSite = _ignore
        self._asked: Collection[tuple[str, int | None]] = ()
        self._shows_all = False
        self._last: Boundary | None = None
        if device.type == "cuda":
            avoid_plans_by_shape()
        build_buffers(self._base)
        self._cut()
        for module in self._base.modules():
            for name in computed_buffers(module):
                module._buffers[name] = module._buffers[name].to(device)  # noqa: SLF001
        _check_rotary(self._base, skeleton.config)
        self._hooks = {number: SiteHooks(layer, points_of(layer, skeleton.config)) for number, layer in self._own_layers()}
        for number, layer in self._own_layers():
            layer.register_forward_pre_hook(partial(self._inject, number), with_kwargs=True)
            if self._contract.input_ids:
                layer.register_forward_pre_hook(self._give_token_ids, with_kwargs=True)
            layer.register_forward_hook(self._leave(number), with_kwargs=True)
        if self.with_final_norm:
            skeleton.model.get_submodule(skeleton.final_norm).register_forward_hook(self._leave_final_norm)
        if self._contract.prepared[1]:
            self._prepare = getattr(self._base, self._contract.prepared[1])
            setattr(self._base, self._contract.prepared[1], self._prepare_once)

    def watch(self, asked: Collection[tuple[str, int | None]]) -> None:
        """From the next pass on, hand out these sites and layers beside "residual", as far as the span has them."""
        self._asked = asked
        kept = IN_LAYERS if self._shows_all else {site for site, _ in asked}
        for number, hooks in self._hooks.items():
            hooks.watch(kept, {site for site, layer in asked if layer == number})

    def run(self, token_ids_BT: torch.Tensor, incoming: Boundary | None, on_site: OnSite, layers: LayerSpan | None = None) -> Boundary:
        """Take a right-padded micro-batch through the span, or some of its layers.

        Args:
            token_ids_BT: int64, on the span's device.
            incoming: what the layers before returned; None for the model's first.
            layers: of the span, those that it goes through; None for all.
            on_site: called with "residual" and each layer's number and output, hidden states [B, T, H] or [B, T, S, H], and with what else is
                watched, before the next layer runs.

        Returns:
            What the layers behind need; the hidden states are the last layer's output: before the final norm, for the model's last layer too.
        """
        self._layers = layers = layers or self.span
        assert (incoming is None) == (layers.start == 0), "the first span takes tokens, every other one hidden states"
        self._token_ids_BT, self._incoming, self._on_site = token_ids_BT, incoming, on_site
        source = {"input_ids": token_ids_BT} if incoming is None else self._in_place_of_tokens(incoming)
        position_ids = torch.arange(token_ids_BT.shape[1], device=self.device)[None]
        try:
            with self._passing(), positions_of_one_sequence():
                # Right-padding under causal attention needs no mask: what is real never looks at what comes after it.
                self._base(**source, position_ids=position_ids, attention_mask=None, use_cache=False)
        except _SpanDone as done:
            return done.boundary
        finally:
            self._incoming, self._prepared, self._on_site, self._last = None, None, _ignore, None
            for number in range(layers.start, layers.stop):
                self._hooks[number].let_go()
        raise AssertionError("the forward pass went past the span's last layer")

    def compile_layers(self, *, any_sites: bool = False) -> None:
        """Compile the span's layers. Call it once, before the first pass.

        Args:
            any_sites: keep all sites of a layer until it has run, whichever are watched, so that watching others makes no further graph.
        """
        self._shows_all = any_sites
        compile_layers([layer for _, layer in self._own_layers()], self.device)

    def _own_layers(self) -> list[tuple[int, nn.Module]]:
        return [(number, self.skeleton.layers[number]) for number in range(self.span.start, self.span.stop)]

    def check_complete(self) -> None:
        """Raise CheckpointError if any tensor that the span computes with has no memory."""
        never_run = {name for name, tensor in self.skeleton.tensors.items() if tensor.role == "final_norm" and not self.with_final_norm}
        names = [name for name, tensor in _tensors_in(self.skeleton.model) if tensor.is_meta and name not in never_run]
        names = [name for name in names if name.startswith(f"{self.skeleton.decoder_name}.")]
        if names:
            raise CheckpointError(f"After loading, {len(names)} tensors have no values: {', '.join(names[:8])}.")

    def _cut(self) -> None:
        """Keep the span's layers as they are; empty the others, and the embeddings unless the span is the first."""
        for number, layer in enumerate(self.skeleton.layers):
            if number in self.span:
                self._stand_ins.append(_StandIn(number, self.skeleton.layers._modules, str(number), _emptied(layer)))  # noqa: SLF001
                del layer.forward  # the skeleton passes hidden states through: the class's own forward comes back
            else:
                layer._modules.clear()  # noqa: SLF001 - attributes that the model's loop reads stay
                layer._parameters.clear()  # noqa: SLF001
                layer._buffers.clear()  # noqa: SLF001
        for name in _outermost([name for name in self.skeleton.inputs if not self.skeleton.layers_name.startswith(f"{name}.")]):
            owner, _, own_name = name.rpartition(".")
            modules = self.skeleton.model.get_submodule(owner)._modules  # noqa: SLF001
            placeholder = _Placeholder(adds=isinstance(modules[own_name], nn.Embedding))
            if self.span.start > 0:
                modules[own_name] = placeholder
            else:
                self._stand_ins.append(_StandIn(0, modules, own_name, placeholder))

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """While it lasts, what runs before the layer that is entered hands through what it gets, as where another stage has it."""
        before = [each for each in self._stand_ins if self._layers.start > each.layer]
        own = [each.owner[each.name] for each in before]
        try:
            for each in before:
                each.owner[each.name] = each.module
            yield
        finally:
            for each, module in zip(before, own, strict=True):
                each.owner[each.name] = module

    def _in_place_of_tokens(self, incoming: Boundary) -> dict[str, torch.Tensor]:
        """What the base model is called with: it makes masks and rotary embeddings for hidden states of this shape."""
        hidden_BTH = incoming.hidden_BTH
        source = {"inputs_embeds": hidden_BTH[:, :, 0] if self._contract.streams else hidden_BTH}
        name, _ = self._contract.prepared
        if name in incoming.beside:  # the layers that have run are not there; each takes its own by its number
            source[name] = nn.functional.pad(incoming.beside[name], (0, 0, self._layers.start, 0))
        return source

    def _prepare_once(self, *args: Any) -> torch.Tensor:
        """In place of the base model's method: a later span was given what the first one made."""
        self._prepared = self._prepare(*args) if self._incoming is None else args[-1]
        assert self._prepared is not None
        return self._prepared

    def _inject(
        self, number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if number != self._layers.start:
            return None
        if self._incoming is None:
            if ("embedding", None) in self._asked:
                self._on_site("embedding", None, args[0] if args else kwargs["hidden_states"])
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
            self._hooks[number].hand_on(number, tuple(hidden_BTH.shape), self._on_site)
            self._on_site("residual", number, hidden_BTH)
            if number == self._layers.stop - 1:
                self._last = Boundary(hidden_BTH, self._beside(output, kwargs))
                if number < self.span.stop - 1 or not (self.with_final_norm and ("final_norm", None) in self._asked):
                    raise _SpanDone(self._last)

        return hook

    def _leave_final_norm(self, _: nn.Module, __: Any, normed_BTH: torch.Tensor) -> None:
        if self._last is None:  # NanoChat's runs before the layers too
            return
        self._on_site("final_norm", None, normed_BTH)
        raise _SpanDone(self._last)

    def _beside(self, output: Any, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the layers behind need of these beside the hidden states, [B, T, ...] each."""
        stop = self._layers.stop
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
    """Ends the base model's forward pass after the last layer that is run."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__()
        self.boundary = boundary


class _StandIn(NamedTuple):
    """A module that hands through what it gets, in the place of the one that `owner` has by this name, once `layer` is behind."""

    layer: int
    owner: dict[str, Any]
    name: str
    module: nn.Module


class _Placeholder(nn.Module):
    """In the place of a module before the layers whose weights another stage has. Its output is replaced.

    For an embedding it adds nothing; for a projection or a norm it returns its input.
    """

    def __init__(self, *, adds: bool) -> None:
        super().__init__()
        self._adds = adds

    def forward(self, first: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return first.new_zeros((), dtype=torch.get_default_dtype()) if self._adds else first


def _emptied(layer: nn.Module) -> nn.Module:
    """The layer without its weights, modules and hooks. Attributes that the model's loop reads stay."""
    empty = copy(layer)
    vars(empty).update({name: type(value)() for name, value in vars(layer).items() if isinstance(value, dict)})
    return empty


def _outermost(names: Sequence[str]) -> list[str]:
    """Those of no module inside another of them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _ignore(*_: Any) -> None:
    pass


def _tensors_in(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, buffer and plain tensor attribute of `model`, by its dotted name."""
    for prefix, module in model.named_modules():
        owned = {**module._parameters, **module._buffers, **vars(module)}  # noqa: SLF001 - plain attributes are in no public list
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in owned.items() if isinstance(tensor, torch.Tensor))


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
    if not found and config.model_type == "minimax_m2":  # in others a span may have no layer that turns
        problems = [
            CheckpointError(f"config.json says that {expected} dimensions of each head turn, but the model has no rotary frequencies.")
        ]
    raise_all(problems)
