"""The sites of transformers' own model by hooks on its modules, spelled out family by family: what m2ray's are compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from m2ray.batches import MicroBatch

Values = dict[tuple[str, int | None], tuple[torch.Tensor, ...]]

PRE_NORM = {"attention": "self_attn", "mlp": "mlp", "mlp_in": ">mlp", "residual_mid": ">post_attention_layernorm"}
GATE = {"router_logits": "mlp.gate 0", "router_topk": "mlp.gate 2, mlp.gate 1"}
POST_NORMS = {
    "attention": "post_attention_layernorm",
    "mlp": "post_feedforward_layernorm",
    "mlp_in": ">mlp",
    "residual_mid": ">pre_feedforward_layernorm",
}
STATE_SPACE = {"attention": "mamba", "mlp": "feed_forward", "mlp_in": ">feed_forward", "residual_mid": ">pre_ff_layernorm"}

FAMILIES: Mapping[str, Callable[[int], Mapping[str, str]]] = {
    "bamba": lambda layer: STATE_SPACE | ({"attention": "self_attn"} if layer in (1, 3) else {}),
    "deepseek_v3": lambda layer: PRE_NORM | (GATE if layer >= 1 else {}),
    "gemma3_text": lambda _: POST_NORMS,
    "gpt2": lambda _: {"attention": "attn", "mlp": "mlp", "mlp_in": ">mlp", "residual_mid": ">ln_2"},
    "gpt_neox": lambda _: {"attention": "attention", "mlp": "mlp", "mlp_in": ">mlp"},
    "gpt_oss": lambda _: PRE_NORM | {"router_logits": "mlp.router 0", "router_topk": "mlp.router 2, mlp.router 1"},
    "granite": lambda _: PRE_NORM | {"attention": "self_attn * 0.22", "mlp": "mlp * 0.22"},
    "minimax_m2": lambda _: PRE_NORM | GATE,
    "olmo2": lambda _: POST_NORMS | {"residual_mid": ">mlp"},
    "opt": lambda _: {"attention": "self_attn", "mlp": "fc2", "mlp_in": ">fc1", "residual_mid": ">final_layer_norm"},
    "phi": lambda _: {"attention": "self_attn", "mlp": "mlp", "mlp_in": ">mlp"},
    "qwen3": lambda _: PRE_NORM,
    "qwen3_moe": lambda layer: PRE_NORM | (GATE if layer != 1 else {}),
}
"""By layer: of each site the modules, what goes into them (>) or comes out, at which place of a tuple, and the factor."""


def by_hooks(model: Any, of_layer: Callable[[int], Mapping[str, str]], micro_batch: MicroBatch) -> Values:
    """The same of transformers' own model: its modules' inputs and outputs, copied as they pass by, with the factor applied."""
    base = model.base_model
    base = getattr(base, "decoder", base)
    layers = next(getattr(base, name) for name in ("layers", "h") if hasattr(base, name))
    norm = next(getattr(base, name) for name in ("norm", "final_layer_norm", "final_layernorm", "ln_f") if hasattr(base, name))
    shown: dict[tuple[str, int | None], list[torch.Tensor]] = {}
    handles = [norm.register_forward_hook(lambda _, __, output: shown.setdefault(("final_norm", None), []).append(output.clone()))]
    handles += [layers[0].register_forward_pre_hook(listening(shown, ("embedding", None), first), with_kwargs=True)]
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(showing(shown, ("residual", number), 0, 1.0)))
        for site, places in of_layer(number).items():
            for place in places.split(", "):
                name, *rest = place.split(" ")
                factor = float(rest[1]) if rest[:1] == ["*"] else 1.0
                index = int(rest[0]) if rest and not rest[0].startswith("*") else 0
                module = layer.get_submodule(name.removeprefix(">"))
                if name.startswith(">"):
                    handles.append(module.register_forward_pre_hook(listening(shown, (site, number), first), with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(showing(shown, (site, number), index, factor)))
    with torch.inference_mode():
        model.base_model(input_ids=torch.from_numpy(micro_batch.token_ids_BT).long(), use_cache=False)
    for handle in handles:
        handle.remove()
    shape = micro_batch.token_ids_BT.shape
    is_real_BT = torch.arange(shape[1]) < torch.from_numpy(micro_batch.token_counts)[:, None]
    dtypes = {"router_logits": (torch.float32,), "router_topk": (torch.int16, torch.float32)}
    return {
        (site, layer): tuple(
            column.reshape(*shape, -1)[is_real_BT].to(dtypes[site][place] if site in dtypes else column.dtype)
            for place, column in enumerate(columns)
        )
        for (site, layer), columns in shown.items()
    }


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor


def listening(shown: dict[Any, list[torch.Tensor]], key: tuple[str, int | None], of: Callable[..., torch.Tensor]) -> Callable[..., None]:
    return lambda _, args, kwargs: shown.setdefault(key, []).append(of(args, kwargs).clone())


def showing(shown: dict[Any, list[torch.Tensor]], key: tuple[str, int | None], index: int, factor: float) -> Callable[..., None]:
    def hook(_: Any, __: Any, output: Any) -> None:
        tensor = output[index] if isinstance(output, tuple) else output
        shown.setdefault(key, []).append(tensor * factor if factor != 1.0 else tensor.clone())

    return hook
