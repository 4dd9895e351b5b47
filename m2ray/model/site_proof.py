"""Proof that a configuration's sites are what they are said to be, on the tiny copy of it that m2ray/model/proof.py tries.

Each site of each layer has to have, in chains of one, three and as many stages as layers, in float32 and bfloat16, the bits that hooks on
transformers' own modules show. And what they show has to be what the layer computes with: its branches, added to its stream in its own
order, give its output bit by bit, and its experts were given the very ids and weights of the router.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from m2ray.errors import CheckpointError, raise_all
from m2ray.model.proof import DTYPES, cuts, once
from m2ray.model.rehearsal import NOT_RUN, Rehearsal, SiteValues, rehearse
from m2ray.model.site_hooks import values_of
from m2ray.model.site_table import Points, Tap, experts_of, points_of
from m2ray.model.skeleton import build_skeleton, find_layers
from m2ray.model.towers import decoder_config

_OWN_INPUT = Tap("per_layer_input_gate", "input")
"""Of Gemma 4: its layer adds a third branch behind the two, of an input of its own."""


class _Shown(NamedTuple):
    """What one layer of transformers' model shows: the stream that it is given and returns, its taps, and all that its experts are given."""

    layer: nn.Module
    points: Points
    given: list[torch.Tensor]
    returned: list[torch.Tensor]
    taps: dict[Tap, torch.Tensor]
    experts: list[torch.Tensor]


def prove_sites(config: Any, sites: Collection[str]) -> None:
    """Try the sites of a configuration on a tiny copy of it; what was proved once is remembered in the user's cache folder.

    Args:
        config: transformers' configuration, as `parse_config` gives it.
        sites: that are wanted, of those that the model has.

    Raises:
        CheckpointError: what is taken at one of them is not the model's own.
    """
    if set(sites) <= {"residual"}:
        return
    wanted = sorted(set(sites) - {"residual"})
    once(config, " ".join(wanted), lambda: _require(config, wanted))


def _require(config: Any, sites: Collection[str]) -> None:
    raise_all([_refusal(config, site, what) for site, what in doubts(config).items() if site in sites])


def doubts(config: Any) -> dict[str, str]:
    """The sites that are not what they are said to be, by name, and what differs. Raises CheckpointError if no tiny copy can be made."""
    with TemporaryDirectory(prefix="m2ray-sites-") as folder:
        rehearsal = rehearse(config, 0, Path(folder))
        return dict(_doubts(rehearsal))


def _refusal(config: Any, site: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: sites = {site!r}: of a tiny {config.model_type} with its fields, {what}.",
        "m2ray captures a site only if it is the model's own, bit by bit. Leave it out.",
    )


def _doubts(rehearsal: Rehearsal) -> Iterator[tuple[str, str]]:
    real = list(enumerate(rehearsal.token_counts))
    num_experts, chosen = experts_of(build_skeleton(rehearsal.tiny, torch.float32))
    for name, dtype in DTYPES.items():
        expected, shown = _by_transformers(rehearsal, dtype)
        for number, each in enumerate(shown):
            values = {site: expected[site, number] for site in each.points}
            for site in (*_wrong_additions(each, values, real), *_wrong_experts(each, values, num_experts, chosen)):
                yield site, f"layer {number} does not compute with it in {name}"
        for bounds in cuts(rehearsal.num_layers):
            where = f"in a chain of {len(bounds) - 1} in {name}"
            try:
                found = rehearsal.sites_by_chain(dtype, bounds)
            except NOT_RUN as error:
                yield from ((site, f"a layer fails {where}: {type(error).__name__}: {error}") for site in {site for site, _ in expected})
                return
            for (site, layer), theirs in expected.items():
                if not _same(rehearsal, theirs, found.get((site, layer), ())):
                    yield site, f"it differs from transformers' own {where}" + ("" if layer is None else f", layer {layer}")


def _by_transformers(rehearsal: Rehearsal, dtype: torch.dtype) -> tuple[SiteValues, list[_Shown]]:
    """Every site of every layer, [B, T, ...] a column, by hooks on the modules of transformers' own model, and what else these show."""
    model = rehearsal.load(dtype)
    norm, normed = build_skeleton(rehearsal.tiny, dtype).final_norm, list[torch.Tensor]()
    shown, handles = [], []
    for layer in find_layers(model)[1]:
        each = _Shown(layer, points_of(layer, decoder_config(model.config)), [], [], {}, [])
        shown.append(each)
        handles += _listen(each)
    if norm:
        handles.append(model.get_submodule(norm).register_forward_hook(lambda _, __, output: normed.append(output.clone())))
    outputs = rehearsal.run(model)
    for handle in handles:
        handle.remove()
    values: SiteValues = {("residual", number): (output,) for number, output in enumerate(outputs)}
    values["embedding", None] = (shown[0].given[0],)
    if normed and normed[-1].shape == outputs[-1].shape:
        values["final_norm", None] = (normed[-1],)
    for number, (each, output) in enumerate(zip(shown, outputs, strict=True)):
        each.returned.append(output)
        for site, point in each.points.items():
            values[site, number] = values_of(each.layer, point, each.taps.__getitem__, site, tuple(output.shape))
    return values, shown


def _listen(each: _Shown) -> list[Any]:
    """Hooks that keep copies of all that a layer shows."""

    def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        each.given.append((args[0] if args else kwargs["hidden_states"]).clone())

    def experts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        each.experts.extend(value.clone() for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))

    handles: list[Any] = [each.layer.register_forward_pre_hook(given, with_kwargs=True)]
    modules = dict(each.layer.named_modules())
    taps = {tap for point in each.points.values() for tap in point.taps} | {tap for tap in (_OWN_INPUT,) if tap.module in modules}
    handles += [_listen_to(modules[tap.module], tap, each.taps) for tap in taps]
    if "router_topk" in each.points:
        beside = each.points["router_topk"].taps[0].module.rpartition(".")[0]
        handles.append(modules[f"{beside}.experts".removeprefix(".")].register_forward_pre_hook(experts, with_kwargs=True))
    return handles


def _listen_to(module: nn.Module, tap: Tap, into: dict[Tap, torch.Tensor]) -> Any:
    def output(_: nn.Module, __: Any, shown: Any) -> None:
        into[tap] = (shown[tap.place] if isinstance(shown, tuple | list) else shown).clone()

    def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into[tap] = (args[0] if args else kwargs["hidden_states"]).clone()

    return module.register_forward_hook(output) if tap.side == "output" else module.register_forward_pre_hook(given, with_kwargs=True)


def _wrong_additions(each: _Shown, values: Mapping[str, tuple[torch.Tensor, ...]], real: list[tuple[int, int]]) -> Iterator[str]:
    """The sites of which the layer's own additions say otherwise."""
    branches = {site: values[site][0] for site in ("attention", "mlp") if site in values}
    stream, end = each.given[0], each.returned[0]

    def gives(result: torch.Tensor, *sums: torch.Tensor) -> bool:
        return any(all(torch.equal(one[row, :count], result[row, :count]) for row, count in real) for one in sums)

    if "residual_mid" in values:
        middle = values["residual_mid"][0]
        if "attention" in branches and not gives(middle, _plus(stream, branches["attention"], middle.dtype)):
            yield from ("attention", "residual_mid")
        if "mlp" in branches and not gives(_before_the_rest(each, end), _scaled(each, _plus(middle, branches["mlp"], end.dtype))):
            yield "mlp"
    elif len(branches) == 2:
        attention, mlp = branches.values()
        both = _plus(attention, mlp, end.dtype)
        if not gives(end, _plus(_plus(stream, attention, end.dtype), mlp, end.dtype), _plus(both, stream, end.dtype)):
            yield from branches
    else:
        yield from (site for site, branch in branches.items() if not gives(end, _plus(stream, branch, end.dtype)))


def _plus(stream: torch.Tensor, branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some families keep their stream in float32."""
    return stream.to(dtype) + branch


def _before_the_rest(each: _Shown, end: torch.Tensor) -> torch.Tensor:
    return each.taps.get(_OWN_INPUT, end)


def _scaled(each: _Shown, stream: torch.Tensor) -> torch.Tensor:
    """Gemma 4 scales its stream at a layer's end."""
    scalar = getattr(each.layer, "layer_scalar", None)
    return stream * scalar if isinstance(scalar, torch.Tensor) and _OWN_INPUT not in each.taps else stream


def _wrong_experts(each: _Shown, values: Mapping[str, tuple[torch.Tensor, ...]], num_experts: int, chosen: int) -> Iterator[str]:
    """The sites of the router that are of another width than planned, or that the experts were not given."""
    if "router_logits" in values and values["router_logits"][0].shape[-1] != num_experts:
        yield "router_logits"
    if "router_topk" not in values:
        return
    ids, weights = values["router_topk"]
    was_given = [any(_are_equal(tensor, wanted) for tensor in each.experts) for wanted in (ids, weights)]
    if ids.shape[-1] != chosen or not (all(was_given) or each.points["router_topk"].chosen):
        yield "router_topk"


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.to(other.dtype).flatten(), other.flatten())


def _same(rehearsal: Rehearsal, theirs: tuple[torch.Tensor, ...], ours: tuple[torch.Tensor, ...]) -> bool:
    """The same bits at every real token."""
    if [(column.shape, column.dtype) for column in theirs] != [(column.shape, column.dtype) for column in ours]:
        return False
    return all(
        torch.equal(one[row, :count].contiguous().view(torch.uint8), other[row, :count].contiguous().view(torch.uint8))
        for one, other in zip(theirs, ours, strict=True)
        for row, count in enumerate(rehearsal.token_counts)
    )
