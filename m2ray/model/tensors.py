"""The checkpoint's tensors matched with the model's: the plan that loading follows."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError, raise_all
from m2ray.model.computed_buffers import computed_buffers
from m2ray.model.conversion import Conversion, Placement, Source
from m2ray.model.headers import TensorHeader
from m2ray.model.quantization.layout import UNREAD, Layout
from m2ray.model.quantization.layouts import READ, layout_of
from m2ray.model.quantization.stored import MISMATCH, StoredTensor
from m2ray.model.skeleton import ModelTensor, Skeleton
from m2ray.tensor_rows import Role

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EXTRA_LAYERS = re.compile(r"(?:^|\.)mtp[._]")
EXTRA_HEADS = re.compile(r"^(?:score|classifier|classification_head|v_head|value_head|reward_head|regression_head|medusa_heads?)\.")
"""Names of heads that judge, score or draft, behind the last layer."""

OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.masked_bias$")
"""Buffers that older versions of transformers saved, where today's have none: frequencies in each layer, what GPT-2's and GPT-Neo's masks were filled with."""

SHOWN_PROBLEMS = 20

_IGNORED = "_keys_to_ignore_on_load_unexpected"


@dataclass(frozen=True)
class MatchedTensor:
    """One model tensor, the parts of it that are placed, and the checkpoint's tensor of each of these."""

    tensor: ModelTensor
    placements: tuple[Placement, ...]
    stored: tuple[StoredTensor, ...]

    @property
    def lies_as(self) -> torch.dtype | None:
        """The dtype in which the checkpoint has its values as they lie in memory, each placement's in one piece; None where it has not."""
        dtypes = {
            None if stored.unpack or stored.swapped or not placement.is_one_piece else stored.dtype
            for placement, stored in zip(self.placements, self.stored, strict=True)
        }
        return dtypes.pop() if len(dtypes) == 1 else None


def match_by_layer(
    skeleton: Skeleton,
    headers: Mapping[str, TensorHeader],
    span: LayerSpan | None = None,
    unread: dict[str, tuple[Role, StoredTensor]] | None = None,
    *,
    with_final_norm: bool = False,
) -> Iterator[list[MatchedTensor]]:
    """Find every model tensor's checkpoint tensors, a layer at a time, so that the first can be read while the next are matched.

    Those of no layer come first.

    Args:
        span: the layers that are wanted; all without it.
        unread: is given the checkpoint's tensors that no model tensor is made of, and why: the "head" of tied embeddings, "unused".
        with_final_norm: whether a span that ends with the last layer has it.

    Raises:
        CheckpointError: tensors are missing (but for the head's), unknown, of a wrong shape or dtype, without their scales or packed otherwise than
            config.json says; all at once, after all that do match.
    """
    unread = {} if unread is None else unread
    layout = layout_of(skeleton.config_on_disk)
    if not layout.methods and any(header.dtype in FP8 for header in headers.values()):
        raise CheckpointError("The checkpoint holds FP8 tensors, but config.json has no quantization_config.", MISMATCH)
    conversion = Conversion(skeleton)
    wanted = {
        tensor.name: tensor
        for tensor in (skeleton.tensors.values() if span is None else skeleton.needed(span, with_final_norm=with_final_norm))
    }
    sources: dict[str, list[Source]] = {name: [] for name in wanted}
    by_layer = _headers_by_layer(skeleton, headers, span)
    tensors: dict[int | None, list[ModelTensor]] = {}
    for tensor in wanted.values():
        tensors.setdefault(tensor.layer, []).append(tensor)
    problems: list[CheckpointError] = []
    stored: dict[str, StoredTensor] = {}
    for layer in sorted(by_layer.keys() | tensors.keys(), key=lambda layer: -1 if layer is None else layer):
        here = layout.stored(by_layer.get(layer, {}))
        stored.update(here)
        for name, source in _leading(conversion, here, of_engines := _of_engines(layout, here), tensors.get(layer, ()), sources):
            of_engines.discard(source.key)
            if name in wanted:
                sources[name].append(source)
            elif reason := _unread_reason(skeleton, name, is_quantised=bool(layout.methods)):
                unread[source.key] = reason, here[source.key]
            elif name not in skeleton.tensors:
                problems.append(CheckpointError(f"{source.key}: a {skeleton.config.model_type} model has no such tensor."))
        unread.update({key: ("unused", here[key]) for key in of_engines})
        if layer is None:
            _use_tied(skeleton, sources, unread)
        matched = []
        for tensor in tensors.get(layer, ()):
            if tensor.role == "head" and not sources[tensor.name]:
                continue  # never loaded, so it need not be there
            try:
                matched.append(_match(conversion, tensor, sources[tensor.name], stored))
                problems += _check(matched[-1])
            except CheckpointError as problem:
                problems.append(problem)
        if not problems:
            yield matched
    _raise_shortened(problems)


def _of_engines(layout: Layout, keys: Iterable[str]) -> set[str]:
    """Those that are named as what engines have beside quantised weights, a quarter of NVFP4's tensors."""
    return {key for key in keys if UNREAD.search(key)} if layout.methods else set()


def _leading(
    conversion: Conversion, keys: Iterable[str], last: Collection[str], tensors: Iterable[ModelTensor], sources: Mapping[str, list[Source]]
) -> Iterator[tuple[str, Source]]:
    """`Conversion.sources` of a layer's keys, and of the `last` only where one of its tensors has found nothing in `sources` by then: gemma3n
    has a `correct_output_scale` of its own.
    """
    yield from conversion.sources(key for key in keys if key not in last)
    if not all(sources[tensor.name] for tensor in tensors):
        yield from conversion.sources(tuple(last))


def _match(conversion: Conversion, tensor: ModelTensor, sources: list[Source], stored: Mapping[str, StoredTensor]) -> MatchedTensor:
    placements = conversion.place(tensor, sources, {source.key: stored[source.key].shape for source in sources})
    return MatchedTensor(tensor, tuple(placements), tuple(stored[placement.key] for placement in placements))


def needed_files(skeleton: Skeleton, weight_map: Mapping[str, str], span: LayerSpan, *, with_final_norm: bool = False) -> set[str]:
    """The files that hold tensors which a stage of `span` computes with.

    Args:
        weight_map: the file of each checkpoint key.
        with_final_norm: whether a span that ends with the last layer has it.
    """
    files: set[str] = set()
    outside: dict[str, str] = {}
    in_a_layer = f"{skeleton.layers_name.rpartition('.')[2]}."
    for key, file in weight_map.items():
        if file in files and in_a_layer in key:
            continue  # there may be 100,000 keys
        layer = skeleton.layer_of(key)
        if layer is None:
            outside[key] = file
        elif layer in span:
            files.add(file)
    inputs = [tensor.name for tensor in skeleton.needed(span, with_final_norm=with_final_norm) if tensor.layer is None]
    if inputs:
        groups = layout_of(skeleton.config_on_disk).group(outside)
        found = {name: groups[source.key] for name, source in Conversion(skeleton).sources(groups)}
        heads = {embedding: head for head, embedding in skeleton.tied.items()}  # its values may be there under the head's name only
        names = (each if each in found else heads.get(each) for each in inputs)
        files |= {outside[key] for name in names if name in found for key in found[name]}
    return files


def disk_bytes(matched: MatchedTensor) -> int:
    """Bytes that one model tensor has in the checkpoint, scales and other parts included."""
    return sum(
        stored.num_bytes if placement.rows is None else stored.bytes_of(*placement.rows)
        for placement, stored in zip(matched.placements, matched.stored, strict=True)
    )


def _headers_by_layer(
    skeleton: Skeleton, headers: Mapping[str, TensorHeader], span: LayerSpan | None
) -> dict[int | None, dict[str, TensorHeader]]:
    """The headers to be matched: those of layers that another stage owns are left out."""
    by_layer: dict[int | None, dict[str, TensorHeader]] = {}
    for key, header in headers.items():
        layer = skeleton.layer_of(key)
        if span is None or layer is None or layer in span:
            by_layer.setdefault(layer, {})[key] = header
    return by_layer


def _unread_reason(skeleton: Skeleton, name: str, *, is_quantised: bool) -> Role | None:
    """Why the model needs no tensor of this name; None if it is not known to be unneeded."""
    if name in skeleton.tied:
        return "head"
    if is_quantised and UNREAD.search(name):
        return "unused"
    return "unused" if name not in skeleton.tensors and _is_unused(skeleton, name) else None


def _is_unused(skeleton: Skeleton, name: str) -> bool:
    """Whether a name is known to be of no use: layers past the last (multi-token prediction), other heads, what is
    beside a multimodal model's decoder, what the model computes itself, and what transformers ignores.
    """
    layer = skeleton.layer_of(name)
    if (
        name.startswith(skeleton.not_text)
        or EXTRA_LAYERS.search(name)
        or EXTRA_HEADS.search(name)
        or (layer is not None and layer >= len(skeleton.layers))
        or _is_computed(skeleton, name)
    ):
        return True
    # Patterns that name a layer by number stand for sizes of the model whose last layer it is; the rule above covers those.
    models = {type(skeleton.model), type(skeleton.decoder)}
    patterns = [pattern for model in models for pattern in model._keys_to_ignore_on_load_unexpected or ()]  # noqa: SLF001 - not public
    if any(re.search(rf"{re.escape(pattern)}\.", name) for pattern in vars(skeleton.decoder).get(_IGNORED, ())):
        return True  # what a base model says of itself, it says of this configuration
    ignored = (pattern for pattern in patterns if not re.search(r"layers\\?\.\d", pattern))
    return any(re.search(pattern, name) for pattern in (*ignored, *OLD_BUFFERS))


def _is_computed(skeleton: Skeleton, name: str) -> bool:
    """Whether it is a buffer that the model makes itself, such as GPT-Neo's causal masks: older versions of transformers saved them."""
    prefix, _, buffer = name.rpartition(".")
    try:
        return buffer in computed_buffers(skeleton.model.get_submodule(prefix))
    except AttributeError:  # no such module
        return False


def _use_tied(skeleton: Skeleton, sources: dict[str, list[Source]], unread: dict[str, tuple[Role, StoredTensor]]) -> None:
    """Tied embeddings may be on disk under the head's name only."""
    for head, embedding in skeleton.tied.items():
        if head in unread and sources.get(embedding) == []:
            sources[embedding].append(Source(head, None))
            del unread[head]


def _check(matched: MatchedTensor) -> Iterator[CheckpointError]:
    """What is wrong with the checkpoint's tensors of one model tensor, and with what has to be done to them."""
    for placement, stored in zip(matched.placements, matched.stored, strict=True):
        problems = stored.problems or tuple(_check_dtype(matched.tensor, stored))
        yield from problems
        if not problems and placement.rows is not None and stored.unpack is not None:
            yield from _check_cut(matched.tensor, placement.rows, stored)


def _check_dtype(tensor: ModelTensor, stored: StoredTensor) -> Iterator[CheckpointError]:
    if not tensor.dtype.is_floating_point:  # a table of numbers, which nothing may round
        if stored.unpack is not None or (stored.dtype != tensor.dtype and (stored.dtype, tensor.dtype) != (torch.int32, torch.int64)):
            yield CheckpointError(f"{stored.key} is of dtype {stored.dtype}, the model needs {tensor.dtype}.", MISMATCH)
    elif stored.dtype not in WEIGHTS:
        yield CheckpointError(f"{stored.key} is of dtype {stored.dtype}, which is no weight as config.json has them.", READ)


def _check_cut(tensor: ModelTensor, rows: tuple[int, int], stored: StoredTensor) -> Iterator[CheckpointError]:
    step = stored.step_rows
    if stored.swapped is not None or not step or any(row % step and row != stored.num_rows for row in rows):
        yield CheckpointError(
            f"{stored.key} is {stored.method}, and transformers takes rows {rows[0]} to {rows[1] - 1} of it to make {tensor.name}.",
            f"m2ray cuts it at multiples of {step} rows only." if step and stored.swapped is None else "m2ray reads it as a whole only.",
        )


def _raise_shortened(problems: list[CheckpointError]) -> None:
    shown = problems[:SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(CheckpointError(f"... and {len(problems) - len(shown)} more like these."))
    raise_all(shown)
