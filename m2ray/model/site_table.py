"""Where a model's layers show the tensors of each site: module, input or output, factor. Found by the names of a layer's modules.

transformers' families agree on what they do and differ in names. A layer adds two branches to its stream, attention (or what stands for
it: a state space, a convolution) and an MLP; each may have a norm behind it and a factor. What no rule finds, a layer does not have; what a
family does otherwise than rules say stands in `_deviating`. Nothing here is believed: m2ray/model/site_proof.py holds every row against
hooks on transformers' own model, and against the additions that the layer makes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from m2ray.model.boundary import contract_of
from m2ray.model.skeleton import Skeleton

IN_LAYERS = ("residual_mid", "attention", "mlp", "mlp_in", "router_logits", "router_topk")
"""The sites of a layer but for `residual`, which is what it returns."""

_ATTENTION = ("self_attn", "linear_attn", "attn", "attention", "self_attention", "conv", "mamba", "temporal_block")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "ffn", "mlp_block", "fc2")
_AFTER_ATTENTION = ("post_self_attn_layernorm", "post_norm1", "post_operator_norm", "attn_sconv", "post_attention_layernorm")
_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2", "post_ffn_norm", "mlp_sconv")
_BEFORE_MLP = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "feedforward_layernorm",
    "ffn_norm",
    "mlp_norm",
    "channel_pre_norm",
    "ln_2",
    "norm_2",
    "final_layer_norm",
    "post_attention_layernorm",
)
_FACTORS = ("residual_multiplier", "residual_scale")
_ROUTERS = ("gate", "router")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


class Tap(NamedTuple):
    """A tensor that a module is given or returns.

    Attributes:
        module: its dotted name below the decoder layer.
        side: of what it is given the first tensor, of what it returns the one at `place`.
        factor: the layer's attribute that multiplies it; none if empty.
        is_reused: whether the layer writes into its memory later.
    """

    module: str
    side: Literal["input", "output"] = "output"
    place: int = 0
    factor: str = ""
    is_reused: bool = False

    def __str__(self) -> str:
        shown = f"into `{self.module}`" if self.side == "input" else f"`{self.module}`" + (f"[{self.place}]" if self.place else "")
        return shown + (f" x `{self.factor}`" if self.factor else "")


@dataclass(frozen=True)
class Point:
    """A site of one layer: its taps, and what is made of them.

    Attributes:
        taps: of `router_topk` the chosen experts' ids and their weights; of all others what is summed.
        factor: the layer's attribute that multiplies the sum; none if empty.
        chosen: of `router_topk`, where taps are logits and weights of all experts: how many are chosen by the largest logits.
    """

    taps: tuple[Tap, ...]
    factor: str = ""
    chosen: int = 0

    def __str__(self) -> str:
        joined = ", ".join(map(str, self.taps)) if self.is_topk else " + ".join(map(str, self.taps))
        return (f"({joined})" if self.factor and len(self.taps) > 1 else joined) + (f" x `{self.factor}`" if self.factor else "")

    @property
    def is_topk(self) -> bool:
        return len(self.taps) == 2 and self.taps[0].module == self.taps[1].module


Points = Mapping[str, Point]
"""A layer's sites in the order in which they are handed on."""


def points_of(layer: nn.Module, config: Any) -> Points:
    """Where a decoder layer shows each of the sites that it has, of `IN_LAYERS`."""
    children = dict(layer.named_children())
    found = _branches(layer, config, children)
    found |= _router(layer, found)
    found |= _deviating(layer, config, found)
    refused = refused_sites(config, layer)
    return {site: found[site] for site in IN_LAYERS if site in found and site not in refused}


def refused_sites(config: Any, layer: nn.Module | None = None) -> Mapping[str, str]:
    """Sites that a family has not or not yet, by name, and why; of a layer, or without one of all layers."""
    reasons: dict[str, str] = {}
    if contract_of(config).streams:
        what = "its layers mix several residual streams, and add nothing to one of them"
        reasons |= dict.fromkeys(("attention", "mlp"), what)
        reasons |= dict.fromkeys(("mlp_in", "final_norm"), "it is narrower than the several residual streams")
    for does, sites, reason in _REFUSED.get(config.model_type, ()):
        if does(config, layer):
            reasons |= dict.fromkeys(sites, reason)
    return reasons


def layers_of(skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    """The layers that have each site, ascending; of model-wide sites none. A site that is not there is one that the model lacks."""
    of_layers = [points_of(layer, skeleton.config) for layer in skeleton.layers]
    found = {site: tuple(number for number, points in enumerate(of_layers) if site in points) for site in IN_LAYERS}
    refused = refused_sites(skeleton.config)
    whole = [
        site for site, is_there in (("embedding", True), ("final_norm", bool(skeleton.final_norm))) if is_there and site not in refused
    ]
    return {
        "residual": tuple(range(len(of_layers))),
        **{site: layers for site, layers in found.items() if layers},
        **dict.fromkeys(whole, ()),
    }


def experts_of(skeleton: Skeleton) -> tuple[int, int]:
    """How many experts a router chooses from, and how many it chooses for a token; (0, 0) without routers."""
    for layer in skeleton.layers:
        if "router_logits" in points_of(layer, skeleton.config):
            return _first_size(skeleton.config, _EXPERTS), _first_size(skeleton.config, _CHOSEN)
    return 0, 0


def _first_size(config: Any, names: Sequence[str]) -> int:
    """The first field that has a size, or one that is the same for each layer."""
    fields = (getattr(config, name, None) for name in names)
    sizes = (value[0] if isinstance(value, list) and len(set(value)) == 1 else value for value in fields)
    return next((size for size in sizes if type(size) is int and size > 0), 0)


def _branches(layer: nn.Module, config: Any, children: Mapping[str, nn.Module]) -> dict[str, Point]:
    """The two branches, what enters the second, and the stream between them, as far as the layer has them."""
    if "mixer" in children:  # one branch a layer
        is_mlp = getattr(layer, "block_type", "linear_attention") not in ("linear_attention", "full_attention")
        mixer = Point((Tap("mixer"),))
        return {"mlp": mixer, "mlp_in": Point((Tap("mixer", "input"),))} if is_mlp else {"attention": mixer}
    attention = [name for name in _ATTENTION if name in children]
    mlp = [name for name in _MLP if name in children]
    if not attention or not mlp:
        return {}
    entrance = "fc1" if mlp == ["fc2"] else mlp[0]
    behind_mlp = [name for name in _AFTER_MLP if name in children][:1]
    behind_attention = [name for name in _AFTER_ATTENTION if name in children][:1] if behind_mlp else []
    before_mlp = [name for name in _BEFORE_MLP if name in children and name not in behind_attention][:1]
    factor = next((name for name in _FACTORS if hasattr(layer, name)), "")
    found = {
        "attention": Point(tuple(map(Tap, behind_attention or attention)), factor),
        "mlp": Point(tuple(map(Tap, behind_mlp or mlp)), factor),
        "mlp_in": Point((Tap(entrance, "input"),)),
    }
    if not is_parallel(layer, config):
        found["residual_mid"] = Point((Tap((before_mlp or [entrance])[0], "input"),))
    return found


def is_parallel(layer: nn.Module, config: Any) -> bool:
    """Whether a layer's branches both take its input, so that nothing lies between the two additions."""
    flag = getattr(layer, "use_parallel_residual", None)
    if flag is not None:
        return bool(flag)
    if config.model_type == "falcon":
        return bool(config.new_decoder_architecture or config.parallel_attn)
    norms = [name for name, _ in layer.named_children() if "norm" in name or name.startswith("ln_")]
    return len(norms) == 1


def _router(layer: nn.Module, found: Points) -> dict[str, Point]:
    """A mixture's router, beside its experts: transformers' returns logits, weights and ids."""
    blocks = dict.fromkeys([tap.module for site in ("mlp_in", "mlp") if site in found for tap in found[site].taps])
    for place in (*blocks, ""):
        children = dict(layer.get_submodule(place).named_children())
        name = next((each for each in _ROUTERS if each in children), "")
        if name and "experts" in children and type(children[name]) is not nn.Linear:
            router = f"{place}.{name}".removeprefix(".")
            return {"router_logits": Point((Tap(router),)), "router_topk": Point((Tap(router, place=2), Tap(router, place=1)))}
    return {}


def _deviating(layer: nn.Module, config: Any, found: Points) -> Mapping[str, Point]:
    """What a family does otherwise than the rules say."""
    match config.model_type:
        case "falcon" if is_parallel(layer, config):  # attention is added in the MLP's memory
            return {"mlp": Point((Tap("mlp", is_reused=True),))}
        case "gemma4_text" if "router_logits" in found:  # its router returns probabilities
            return {"router_logits": Point((Tap("router.proj"),))}
        case "llama4_text" if "router_logits" in found:  # its router returns weights of all experts, and the logits
            logits, weights = Tap("feed_forward.router", place=1), Tap("feed_forward.router", place=0)
            return {"router_logits": Point((logits,)), "router_topk": Point((logits, weights), chosen=config.num_experts_per_tok)}
        case "molmo2_text" if getattr(layer, "norm_after", False):
            behind_attention, behind_mlp = Point((Tap("input_layernorm"),)), Point((Tap("post_attention_layernorm"),))
            return {"attention": behind_attention, "mlp": behind_mlp, "residual_mid": found["mlp_in"]}
    return _OTHERWISE.get(config.model_type, {})


_MIXED = {"residual_mid": Point((Tap("ffn_hc", "input"),))}
_OTHERWISE: Mapping[str, Mapping[str, Point]] = {
    "bloom": {"attention": Point((Tap("self_attention.dense"),)), "mlp": Point((Tap("mlp.dense_4h_to_h"),))},
    "deepseek_v4": _MIXED,
    "falcon_h1": {"attention": Point((Tap("mamba", factor="ssm_out_multiplier"), Tap("self_attn", factor="attn_out_multiplier")))},
    "glm5_next_text": _MIXED,
    "hy_v4": _MIXED,
    "hy_v4_vl_text": _MIXED,
    "jetmoe": {"router_logits": Point((Tap("mlp.router", place=4),))},
    "mpt": {"mlp": Point((Tap("ffn.down_proj"),))},
}
"""Bloom's and MPT's branches add the stream themselves, behind their last projection."""


_BRANCHES = ("attention", "mlp")
_ADDITIONS = ("residual_mid", *_BRANCHES)


def _always(_: Any, __: nn.Module | None) -> bool:
    return True


_Refusal = tuple[Callable[[Any, nn.Module | None], bool], Sequence[str], str]

_NORMALISED = "it normalises its stream after each addition, so that nothing is added to what a layer is given"
_REFUSED: Mapping[str, Sequence[_Refusal]] = {
    "beam": [(_always, _BRANCHES, "it scales its stream before each addition")],
    "bloom": [(lambda config, _: config.apply_residual_connection_post_layernorm, _ADDITIONS, "it adds to its normalised stream")],
    "doge": [(_always, _BRANCHES, "it scales its stream before each addition")],
    "gemma4_text": [
        (
            lambda config, layer: config.enable_moe_block if layer is None else hasattr(layer, "experts"),
            ("mlp_in",),
            "its experts and its MLP have a norm each before them",
        )
    ],
    "gpt_neox_japanese": [(_always, ("attention",), "its attention's bias is added outside of it")],
    "jetmoe": [(_always, ("router_topk",), "its router returns tokens sorted by expert, and no ids of a token's experts")],
    "muse_spark_text": [(_always, _BRANCHES, "a gate mixes its stream with each branch")],
    "openai-gpt": [(_always, _ADDITIONS, _NORMALISED)],
    "opt": [(lambda config, _: not config.do_layer_norm_before, _ADDITIONS, _NORMALISED)],
    "trocr": [(_always, _ADDITIONS, _NORMALISED)],
}
"""Of a model type: when, which sites, why."""
