"""The options as keywords: ExtractConfig's and PlanConfig's once more for editors and type checkers, and Python's values as options take them."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from os import PathLike, fspath
from typing import Any, Literal, TypedDict, TypeVar

from m2ray.config import ExtractConfig
from m2ray.option_types import Attention, OffloadTo, Transport, Weights

Layers = str | int | Sequence[int]
"""Layers as text ("0,7,20-61"), or their numbers."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """All options of ExtractConfig but `model`, `prompts` and `output`; what each means stands there."""

    split: str | None
    encoding: str
    text_column: str | None
    messages_column: str | None
    input_ids_column: str | None
    tools_column: str | None
    id_column: str | None
    keep_columns: str | Sequence[str] | None
    limit: int | None
    max_length: int | None
    truncation: Literal["refuse", "cut", "cut_left"]
    pack: int | None
    special_tokens: Literal["auto", "add", "none"]
    add_generation_prompt: bool
    chat_template: str | PathLike[str] | None
    template_options: Mapping[str, Any]
    mask: Literal["assistant"] | None
    template_date: date | str
    template_timeout_s: float
    layers: Layers
    sites: str | Sequence[str] | Mapping[str, Layers]
    tokens: str
    skip_special_tokens: bool
    statistics: str | None
    keep: Literal["rows", "statistics", "both", "auto"]
    compute_dtype: Literal["bfloat16", "float16", "float32", "float8"]
    store_dtype: Literal["bfloat16", "float16", "float32", "float8", "int8"]
    batch_tokens: int | Literal["auto"]
    shard_tokens: int | Literal["auto"]
    attn_implementation: Attention
    compile: bool | Literal["auto"]
    threads_per_stage: int | Literal["auto"]
    compression: Literal["none", "planes"]
    quarantine_limit: float
    stages: int | Literal["auto"]
    replicas: int | Literal["auto"]
    gpus_per_stage: int
    device_map: str
    max_memory: str | None
    weights: Weights
    offload: OffloadTo
    offload_folder: str | PathLike[str] | None
    node_labels: str | None
    in_flight: str
    transport: Transport
    placement_timeout_s: float
    stage_timeout_s: float
    ray: bool
    wait: bool
    chain: str | None


class PlanOptions(Options, total=False):
    """Those of PlanConfig."""

    gpus: str | None
    longest_tokens: int | None
    profile: str | PathLike[str] | None
    tokens_per_s: float | None
    store_gb_per_s: float | None
    price_per_gb_month: float | None
    price_gpu_hour: float | None


def as_written(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with Python's values as a TOML file has them: paths and lists of layers or sites as text. What is None is left out."""
    given = {name: fspath(value) if isinstance(value, PathLike) else value for name, value in options.items() if value is not None}
    if "layers" in given:
        given["layers"] = _layers(given["layers"])
    sites = given.get("sites")
    if isinstance(sites, Mapping):
        given["sites"] = ", ".join(f"{site}:{_layers(layers)}" for site, layers in sites.items())
    elif isinstance(sites, Iterable) and not isinstance(sites, str):
        given["sites"] = ", ".join(map(str, sites))
    return given


def _layers(layers: Any) -> Any:
    return ",".join(map(str, layers)) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers


def documented(config: type[ExtractConfig]) -> Callable[[_Function], _Function]:
    """Give a function that takes a configuration's options as keywords their names and defaults as its signature, and their meaning as words."""

    def with_options(function: _Function) -> _Function:
        fields = config.model_fields
        parameters = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if field.is_required() else field.default
            )
            for name, field in sorted(fields.items(), key=lambda each: not each[1].is_required())
        ]
        # It outlives `from __future__` and TypedDict: what help() and a notebook show.
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        listed = "\n".join(f"        {name}: {field.description}" for name, field in fields.items())
        function.__doc__ = f"{inspect.getdoc(function)}\n\n    Options:\n{listed}\n"
        return function

    return with_options
