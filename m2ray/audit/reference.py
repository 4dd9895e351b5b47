"""transformers' own whole model of a checkpoint, loaded by transformers and accelerate: none of m2ray's code computes here."""

import json
import re
import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import get_max_memory
from safetensors import safe_open
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.logging import disable_progress_bar

from m2ray.audit.branches import Branches
from m2ray.audit.float32 import in_float32
from m2ray.audit.routers import Router
from m2ray.errors import CheckpointError

_ROUTERS: dict[str, tuple[str, ...]] = {"minimax_m2": ("gate.weight", "e_score_correction_bias")}
"""Of each layer's `mlp`, tensors that are float32 on disk and that transformers rounds, by which other experts are chosen (docs/numerics.md)."""

_OTHER_RELEASE = "--sample needs a layout that it reads: extract from the BF16 or FP8 release of the same model, or verify without it."

_MODELOPT_FILE = "hf_quant_config.json"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SCALE = re.compile(r"weight_scale(?:_inv|_2)?$|_scales$")
_INDEX, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

Places = Collection[tuple[str, int | None]]
"""Sites, each with a layer, or None of the whole model."""

OnSite = Callable[..., None]
"""Takes a site, its layer and what stands there, a tensor [B, T, W] for each column; of several residual streams all of them, side by side."""

_OF_ROUTERS = {"router_logits", "router_topk"}


class Reference:
    """The model, on the devices that accelerate's "auto" deals it out to: GPUs, then host memory, then a temporary folder.

    Args:
        folder: the checkpoint's.
        compute_dtype: "float32", "bfloat16" or "float16".
        attn_implementation: transformers' name of the attention.
        on_cpu: leave the GPUs alone: then it is host memory, and a temporary folder.

    Attributes:
        config: transformers' configuration of the decoder: of a multimodal model, its text tower's.
        in_memory: whether all of it lies in the host's memory, every parameter at a multiple of 64 bytes as torch allocates it: kernels
            choose their way by alignment, and files are mapped at any place.

    Raises:
        CheckpointError: transformers cannot load it, or leaves tensors of its layers without values.
    """

    def __init__(self, folder: str, compute_dtype: str, attn_implementation: str, *, on_cpu: bool) -> None:
        whole = _read_whole(folder)
        self.config = whole.get_text_config(decoder=True)
        self._offload = tempfile.TemporaryDirectory(prefix="m2ray-audit-")
        try:
            self._model = _load(folder, whole, compute_dtype, attn_implementation, self._offload.name, on_cpu=on_cpu)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            self._offload.cleanup()
            raise CheckpointError(f"transformers cannot load {folder}: {' '.join(str(error).split())}.") from error
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self.in_memory = all(tensor.device.type == "cpu" for tensor in tensors)
        for tensor in tensors:
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._model
        self._offload.cleanup()

    def run(self, token_ids_BT: torch.Tensor, places: Places, on_site: OnSite, *, disturbed_by: torch.Generator | None = None) -> None:
        """Take right-padded sequences, int64 [B, T], through the model, and call `on_site` with each of `places` that is found there.

        Found are `residual`, `embedding`, `final_norm`, where `Branches` tells them `attention`, `mlp`, `residual_mid` and `mlp_in`, and where
        `Router` does `router_logits` and `router_topk`. The model ends with the last layer of `places`, or with its decoder.

        Args:
            disturbed_by: changes each value of the tokens' embeddings by up to half a step of its dtype, as rounding does.
        """
        decoder = _decoder(self._model)
        layers = _decoder_layers(decoder)
        with ExitStack() as hooks:
            for number, layer in enumerate(layers):
                if wanted := {site for site, at in places if at == number}:
                    _hook(hooks, layer, number, wanted, on_site)
            if ("embedding", None) in places:
                handle = layers[0].register_forward_pre_hook(
                    lambda _, *given: on_site("embedding", None, _entering(*given)), with_kwargs=True
                )
                hooks.callback(handle.remove)
            ends_with: nn.Module = layers[max((at for _, at in places if at is not None), default=0)]
            if ("final_norm", None) in places:
                hooks.callback(decoder.register_forward_hook(lambda *called: on_site("final_norm", None, called[-1][0])).remove)
                ends_with = decoder
            hooks.callback(ends_with.register_forward_hook(_end).remove)
            embedding = self._model.get_input_embeddings()
            if disturbed_by is not None:
                hooks.callback(embedding.register_forward_hook(lambda *called: _disturbed(called[-1], disturbed_by)).remove)
            with torch.inference_mode(), suppress(_DoneError):
                at = embedding.weight.device if embedding.weight.device.type != "meta" else torch.device("cpu")
                self._model(input_ids=token_ids_BT.to(at), use_cache=False)

    def in_float32(self) -> AbstractContextManager[None]:
        """Within, the model computes in float32, with its weights as the compute dtype has them."""
        decoder = _decoder(self._model)
        return in_float32(self._model, list(_decoder_layers(decoder)), decoder.config)


def read_config(folder: str) -> Any:
    """config.json by transformers itself: the decoder's configuration, a multimodal model's text tower's. Raises CheckpointError."""
    return _read_whole(folder).get_text_config(decoder=True)


def _read_whole(folder: str) -> Any:
    """Without what is a caller's to choose."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers cannot read the configuration of {folder}: {' '.join(str(error).split())}.",
            "Give the model's folder by --model.",
        ) from error
    config._experts_implementation = None  # noqa: SLF001 - whoever saved it may have chosen one
    rotary_dim = getattr(config, "rotary_dim", None)
    if config.model_type == "minimax_m2" and rotary_dim is not None:  # transformers before 5.23 overlooks it
        config.rope_parameters["partial_rotary_factor"] = rotary_dim / config.head_dim
    if getattr(config, "quantization_config", None):
        config.quantization_config["dequantize"] = True
    _require_reader(folder, config)
    return config


def _require_reader(folder: str, config: Any) -> None:
    """Raise CheckpointError where transformers would take packed numbers for weights, without a word or with a warning."""
    in_own_file = (Path(folder) / _MODELOPT_FILE).is_file()
    quantised = getattr(config, "quantization_config", None) or ({"quant_method": "modelopt"} if in_own_file else None)
    if quantised and quantised.get("quant_method") not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers does not read {quantised.get('quant_method')}, as {folder} is quantised.",
            _OTHER_RELEASE,
        )
    groups = (quantised or {}).get("config_groups") or {}
    formats = {(quantised or {}).get("format"), *(group.get("format") for group in groups.values())}
    if "nvfp4-pack-quantized" in formats and any(getattr(config.get_text_config(decoder=True), name, None) for name in _EXPERTS):
        raise CheckpointError(
            f"transformers unpacks experts in NVFP4 of compressed-tensors, as {folder} has them, without their global scale: "
            "its rows would be another model's (findings/transformers_nvfp4_experts_lose_global_scale.sh).",
            _OTHER_RELEASE,
        )


def _load(folder: str, config: Any, compute_dtype: str, attn_implementation: str, offload_folder: str, *, on_cpu: bool) -> Any:
    dtype = getattr(torch, compute_dtype)
    disable_progress_bar()  # the audit has its own
    decoder_config = config.get_text_config(decoder=True)
    decoder_config._attn_implementation = attn_implementation  # noqa: SLF001 - of the decoder alone: another tower may not have it
    auto = AutoModelForCausalLM if decoder_config is config else AutoModelForMultimodalLM
    model, info = auto.from_pretrained(
        folder,
        config=config,
        # FP8 becomes bfloat16 first, whatever the compute dtype is, as m2ray does
        dtype=torch.bfloat16 if getattr(config, "quantization_config", None) else dtype,
        device_map="auto",
        max_memory={"cpu": get_max_memory()["cpu"]} if on_cpu else None,
        offload_folder=offload_folder,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    decoder = _decoder(model)
    of_layers = next(name for name, module in model.named_modules() if module is decoder) + "."
    lacking = sorted({str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind] if str(name).startswith(of_layers)})
    if scales := [key for key in info["unexpected_keys"] if _SCALE.search(str(key))]:
        raise ValueError(f"it leaves scales of weights unread, such as {min(map(str, scales))}")
    if lacking:
        raise ValueError(f"it gives no values to {', '.join(lacking[:5])}")
    for name, tensor in model.named_parameters():
        if tensor.dtype == torch.bfloat16 and tensor.dtype != dtype:
            if tensor.is_meta:
                raise ValueError(
                    f"{name} is kept on a disk in bfloat16, and is to be computed with in {compute_dtype}: it needs more memory"
                )
            tensor.data = tensor.data.to(dtype)
    _put_routers_back(model, Path(folder))
    return model.eval().requires_grad_(requires_grad=False)


def _put_routers_back(model: Any, folder: Path) -> None:
    """Give the routers of some families the float32 values that they have on disk."""
    names = _ROUTERS.get(model.config.model_type, ())
    if not names:
        return
    index = folder / _INDEX
    file_of = json.loads(index.read_bytes())["weight_map"] if index.exists() else dict.fromkeys(_keys(folder / _SINGLE_FILE), _SINGLE_FILE)
    wanted = re.compile(rf"model\.layers\.(\d+)\.\w+\.({'|'.join(map(re.escape, names))})")
    layers, num_put = _decoder_layers(_decoder(model)), 0
    for key, file in file_of.items():
        if (found := wanted.fullmatch(key)) and int(found[1]) < len(layers):
            with safe_open(folder / file, framework="pt") as tensors:
                value = tensors.get_tensor(key).float()
            owner, _, name = found[2].rpartition(".")
            moe: Any = layers[int(found[1])].mlp
            _put(moe.get_submodule(owner), name, value)
            num_put += 1
    if num_put != len(names) * len(layers):
        raise ValueError(f"it has {num_put} tensors of routers for {len(layers)} layers of {len(names)}")


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _put(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a module's tensor. One that accelerate brings from elsewhere stays on its device from now on: routers are small."""
    held = getattr(owner, name)
    device = held.device
    if held.is_meta:
        device = owner._hf_hook.execution_device  # type: ignore[union-attr]  # noqa: SLF001 - accelerate's, it has no other name
        remove_hook_from_module(owner)
    if isinstance(held, nn.Parameter):
        setattr(owner, name, nn.Parameter(value.to(device), requires_grad=False))
    else:
        setattr(owner, name, value.to(device))


def _decoder(model: Any) -> Any:
    """The module that runs the layers: the base of a causal language model, a multimodal one's text tower."""
    is_plain = model.config.get_text_config(decoder=True) is model.config
    decoder = model if is_plain else model.get_decoder()
    while decoder.base_model is not decoder:
        decoder = decoder.base_model
    base_class = MODEL_MAPPING.get(type(decoder.config), ())  # Llama-4's language model calls itself its base
    return next((child for child in decoder.children() if isinstance(child, base_class)), decoder)


def _decoder_layers(decoder: Any) -> nn.ModuleList:
    """The one list of as many modules as there are layers that lies in no other such list: experts may be as many."""
    num_layers = decoder.config.num_hidden_layers
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    lists = {name: module for name, module in lists.items() if len(module) == num_layers}
    found = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(found) != 1:
        raise CheckpointError(f"{type(decoder).__name__} has {len(found)} lists of {num_layers} decoder layers.")
    return found[0]


def _hook(hooks: ExitStack, layer: nn.Module, number: int, wanted: Collection[str], on_site: OnSite) -> None:
    """Hand on what is wanted of a layer, once it has run."""
    branches = Branches(layer) if set(wanted) - {"residual"} - _OF_ROUTERS else None
    router = Router(layer) if set(wanted) & _OF_ROUTERS else None
    entered: list[torch.Tensor] = []

    def enter(_: nn.Module, *given: Any) -> None:
        if branches is not None:
            entered.append(_entering(*given).clone())

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        leaving = output[0] if isinstance(output, tuple | list) else output
        found = {"residual": leaving} | (dict(branches.found(entered[-1], leaving)) if branches is not None else {})
        values = {site: (value.flatten(2),) for site, value in found.items()} | (dict(router.found(len(leaving))) if router else {})
        for site in values.keys() & set(wanted):
            on_site(site, number, *values[site])

    hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
    hooks.callback(layer.register_forward_hook(leave).remove)
    for each in (branches, router):
        if each is not None:
            hooks.callback(each.close)


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _disturbed(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each value times a number between 1 and 1 +- half a step, uniformly, and rounded again."""
    share = (2 * torch.rand(values.shape, generator=generator) - 1) * torch.finfo(values.dtype).eps / 2
    return (values.float() * (1 + share.to(values.device))).to(values.dtype)


class _DoneError(Exception):
    """Ends a model's forward pass once all that was asked for has run: nobody asks what the head makes of it."""


def _end(*_: Any) -> None:
    raise _DoneError
