"""A format: what config.json says of it, and which tensors it stores for a weight."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from m2ray.errors import ConfigError
from scripts.checkpoint_formats.stored import Fill, Piece, StoredTensor

Config = dict[str, Any]


class Format(ABC):
    """A format that packs weights.

    Attributes:
        multiple_of: what a weight's (rows, columns) have to be multiples of.
    """

    multiple_of: tuple[int, int] = (1, 1)

    @abstractmethod
    def quantization_config(self) -> Config:
        """The field of config.json."""

    @abstractmethod
    def tensors(self, piece: Piece) -> Iterable[StoredTensor]:
        """What is stored for a weight that the format packs."""

    def other_files(self) -> Mapping[str, Config]:
        """JSON files beside config.json."""
        return {}

    def packs(self, piece: Piece) -> bool:
        """Whether the format packs this weight."""
        return piece.in_blocks

    def misfit(self, piece: Piece) -> ConfigError | None:
        """What is wrong with a weight's shape."""
        if all(side % multiple == 0 for side, multiple in zip(piece.shape[-2:], self.multiple_of, strict=True)):
            return None
        rows, columns = self.multiple_of
        return ConfigError(
            f"{piece.name} would be {' x '.join(map(str, piece.shape))}.",
            f"The format needs multiples of {rows} x {columns}: change the sizes, or choose --format bf16.",
        )


def part(piece: Piece, ending: str, dtype: str, shape: tuple[int, ...], fill: Fill) -> StoredTensor:
    """A tensor that stands for a weight: `ending` goes behind its name or, if it begins with a dot, in the place of `.weight`."""
    name = piece.name.removesuffix(".weight") + ending if ending.startswith(".") else piece.name + ending
    return StoredTensor(name, shape, dtype, (piece,), fill)
