"""Which tool's layout a folder has, and its samples one at a time."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from m2ray.errors import ConfigError
from m2ray.export.foreign import speculators
from m2ray.export.foreign.samples import Problem, Sample
from m2ray.export.foreign.torch_files import UnreadableError, opened, tensors_of
from m2ray.export.output import SUMMARY_KEY

_KNOWN = (
    "speculators (hidden_states/hs_0.safetensors), SpecForge (rows_0-2000/data_0.ckpt, also .ckpt.gz), or files of torch.save "
    "(.pt: ModelOpt, activault)"
)

_TORCH_FILES: dict[str, tuple[str, ...]] = {"SpecForge": (".ckpt", ".ckpt.gz"), "activault": (".saved.pt",), ".pt files": (".pt",)}


_MOST_SUMMARY_BYTES = 1 << 20


@dataclass(frozen=True)
class Dump:
    """A folder of samples. `samples` reads one at a time: its tensors are there until the next is asked for.

    `num_files` hold samples; `num_others` are of other kinds and not looked at. `export` is what `m2ray_export.json` says of a dump that
    m2ray export wrote, nothing of others.
    """

    layout: str
    num_files: int
    num_others: int
    samples: Callable[[], Iterator[Sample]] = field(repr=False)
    export: Mapping[str, str] = field(default_factory=dict)


def open_dump(folder: Path) -> Dump:
    """Find a folder's layout by its files' names; none is read yet.

    Raises:
        ConfigError: there is no such folder, or none of its files is of a layout that m2ray looks at.
    """
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.", "Give one on this machine's disks.")
    files = [path for path in _natural(folder.rglob("*")) if path.is_file()]
    if states := [path for path in files if speculators.number_of(folder, path) is not None]:
        return Dump("speculators", len(states), len(files) - len(states), partial(speculators.samples, folder, states), _export(folder))
    for layout, endings in _TORCH_FILES.items():
        if chosen := [path for path in files if path.name.endswith(endings)]:
            named = _by_hook(folder, chosen) if layout == "activault" else [(_below(folder, path), {"": path}) for path in chosen]
            return Dump(layout, len(chosen), len(files) - len(chosen), partial(_torch_samples, named), _export(folder))
    raise ConfigError(f"{folder} holds no dump that m2ray looks at.", f"It knows those of {_KNOWN}.")


def _export(folder: Path) -> dict[str, str]:
    """The run that an export is of, and what its rows were computed in; one of an earlier m2ray does not say that. Raises ConfigError."""
    path = folder / SUMMARY_KEY
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_MOST_SUMMARY_BYTES))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not what m2ray export writes: {error}.", "Restore it, or move it away.") from error
    if not isinstance(said, dict):
        raise ConfigError(f"{path} is not what m2ray export writes.", "Restore it, or move it away.")
    return {name: str(said[name]) for name in ("run_id", "compute_dtype") if name in said}


def _torch_samples(files: Sequence[tuple[str, Mapping[str, Path]]]) -> Iterator[Sample]:
    """The samples of each file; of a hook's folder each, where several folders have a file of one name."""
    for name, paths in files:
        with ExitStack() as stack:
            try:
                by_hook = {hook: tensors_of(stack.enter_context(opened(path))) for hook, path in paths.items()}
                found = _in_file(name, by_hook)
            except UnreadableError as error:
                found = [Sample(name, problems=(Problem("unreadable", str(error)),))]
            yield from found


def _in_file(name: str, by_hook: Mapping[str, Mapping[str, torch.Tensor]]) -> list[Sample]:
    """A file's samples: states [T, W], or [N, T, W] of N samples. What is no float is passed over.

    Raises:
        UnreadableError: it has no states, or of another number of axes.
    """
    states = {
        f"{hook} {key}".strip(): tensor
        for hook, tensors in by_hook.items()
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and key != "loss_mask"
    }
    if not states or any(tensor.ndim not in {2, 3} for tensor in states.values()):
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for tensors in by_hook.values() for key, tensor in tensors.items())
        raise UnreadableError(f"there are no states of shape [tokens, width] or [samples, tokens, width] in it: {shapes}")
    num_samples = max(len(tensor) if tensor.ndim == 3 else 1 for tensor in states.values())
    if not num_samples:
        raise UnreadableError("its states are of no sample")
    return [
        Sample(
            name if num_samples == 1 else f"{name} [{place}]",
            token_ids=_one(next(iter(by_hook.values())).get("input_ids"), place, 1),
            loss_mask=_one(next(iter(by_hook.values())).get("loss_mask"), place, 1),
            planes=_planes({key: one for key, tensor in states.items() if (one := _one(tensor, place, 2)) is not None}),
            problems=tuple(_disagreements(by_hook, place)),
        )
        for place in range(num_samples)
    ]


def _one(tensor: torch.Tensor | None, place: int, axes: int) -> torch.Tensor | None:
    """The sample at a place of a tensor that may have an axis of samples before its own; None if it has none there."""
    if tensor is None or tensor.ndim == axes:
        return tensor if place == 0 else None
    return tensor[place] if tensor.ndim == axes + 1 and place < len(tensor) else None


def _disagreements(by_hook: Mapping[str, Mapping[str, torch.Tensor]], place: int) -> Iterator[Problem]:
    """Hooks whose file of one name is of other tokens."""
    (first, tensors), *others = by_hook.items()
    expected = _one(tensors.get("input_ids"), place, 1)
    for hook, other in others:
        found = _one(other.get("input_ids"), place, 1)
        if expected is not None and found is not None and not torch.equal(found, expected):
            yield Problem("tokens_disagree", f"{hook} has other input_ids than {first}")


def _planes(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """States [T, k * W] as k planes [T, W], W being the smallest width; what lies side by side comes before the last layer's."""
    width = min(tensor.shape[1] for tensor in states.values())
    planes: dict[str, torch.Tensor] = {}
    for name, tensor in sorted(states.items(), key=lambda item: -item[1].shape[1]):
        if width and tensor.shape[1] > width and tensor.shape[1] % width == 0:
            planes |= {f"{name}[{index}]": part for index, part in enumerate(tensor.split(width, dim=1))}
        else:
            planes[name] = tensor
    return planes


def _by_hook(folder: Path, files: Sequence[Path]) -> list[tuple[str, Mapping[str, Path]]]:
    """The batches of activault: a folder a hook, in each a file of the same name."""
    named: dict[str, dict[str, Path]] = {}
    for path in files:
        named.setdefault(path.name, {})[_below(folder, path.parent)] = path
    return list(named.items())


def _below(folder: Path, path: Path) -> str:
    return "" if path == folder else path.relative_to(folder).as_posix()


def _natural(paths: Iterator[Path]) -> list[Path]:
    """Sorted with numbers as numbers: layer 2 before layer 10."""
    return sorted(paths, key=lambda path: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))])
