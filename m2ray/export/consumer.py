"""Consumer: what a file of this room states of a trainer, and Export: what it is handed to write that trainer's files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from m2ray.export.output import Output
from m2ray.export.samples import Sample, Samples

if TYPE_CHECKING:
    import torch

Norm = Callable[["torch.Tensor"], "torch.Tensor"]
"""The model's final norm: rows [N, H] to rows [N, H], in the same dtype."""


class Target(Protocol):
    """What trainers read of the model itself: config.json's words, and the matrices "embedding" and "head", [V, H] each."""

    @property
    def model_type(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def pieces(self, name: str, dtype: "torch.dtype") -> Iterator["torch.Tensor"]:
        """Some rows of a matrix at a time, in this dtype."""


@dataclass(frozen=True)
class Export:
    """An export to one consumer, as its functions see it.

    Attributes:
        samples: the run's sequences; its `layers` are the planes of each sample's states, in order.
        num_layers: decoder layers of the model.
        run_id: the run's, 32 hex digits.
        model: the model's name as the run's user gave it; "" where it is not known.
        context_size: tokens of a context; None where the user gave none.
        target: what is read of the model itself; None for a consumer that does not ask for it.
        compute_dtype: the run's, which is of the rows' bits and may be "float8" where these are bfloat16; "" where it is not known.
        norm: the final norm of the model; None for a consumer that does not ask for it, and where the run has its rows.
    """

    samples: Samples
    num_layers: int
    run_id: str
    model: str = ""
    context_size: int | None = None
    target: Target | None = None
    norm: Norm | None = None
    compute_dtype: str = ""

    def normed(self, sample: Sample) -> "torch.Tensor":
        """The last plane behind the final norm, [T, W], in memory of its own: the run's rows, or made of those before it."""
        last_TW = sample.states[:, -1].clone()
        if self.samples.is_normed:
            return last_TW
        assert self.norm is not None
        return self.norm(last_TW)


@dataclass(frozen=True)
class Unit:
    """Consecutive samples whose files are written, recorded and kept together: [start, stop), the `number`th of `count` units."""

    number: int
    count: int
    start: int
    stop: int


def units_by_shard(export: Export) -> list[int]:
    """Where units end that are the run's shards."""
    shards = export.samples.shards
    return [int(place) + 1 for place in (shards[1:] != shards[:-1]).nonzero()[0]] + [len(shards)]


def no_remark(_export: Export) -> str:
    """What is said of an export beforehand: nothing."""
    return ""


def no_more_files(_export: Export, _output: Output, _units: Sequence[Unit]) -> None:
    """What is written behind the last unit: nothing."""


@dataclass(frozen=True)
class Consumer:
    """A trainer, and the layout that it reads.

    Attributes:
        name: package and version.
        default_layers: the layers that its documentation has, of a model of so many, given those that the run has.
        id_of: what the consumer itself calls a layer: given the layers, their place and the model's layers.
        write: writes the files of one unit, from its samples.
        finish: writes what stands beside them, after the last unit and before the export counts as whole.
        unit_ends: cuts the samples into units: the ascending places where they end, the last one the number of samples.
        remark: what the user should know before; "" for nothing.
        needs_mask: every sequence has to have a loss mask.
        needs_last: the last plane has to be the model's last layer, behind others.
        needs_norm: the last plane is read by `Export.normed` (needs `--model` where the run has no `final_norm`).
        needs_model: `Export.target` is asked for (needs `--model`).
        needs_context_size: `Export.context_size` is asked for; of others it is refused.
        dtypes: of the states that it reads.
    """

    name: str
    default_layers: Callable[[int, Sequence[int]], list[int]]
    id_of: Callable[[Sequence[int], int, int], str]
    write: Callable[[Export, Output, Unit, Iterator[Sample]], None]
    finish: Callable[[Export, Output, Sequence[Unit]], None] = no_more_files
    unit_ends: Callable[[Export], Sequence[int]] = units_by_shard
    remark: Callable[[Export], str] = no_remark
    needs_mask: bool = False
    needs_last: bool = False
    needs_norm: bool = False
    needs_model: bool = False
    needs_context_size: bool = False
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")


def eagle_layers(num_layers: int, _of_run: Sequence[int]) -> list[int]:
    """The three layers that EAGLE-3 takes, low, middle and high, and the last one."""
    return [1, num_layers // 2 - 1, num_layers - 4, num_layers - 1]
