"""A tokenizer against which a dump's token ids are held."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2ray.errors import CheckpointError
from m2ray.export.foreign.samples import Problem, Sample
from m2ray.prompts.own_tokenizer import PROBES, TokenizersRefusalError, ids_of_probe, own_tokenizer, refusals_named

_CUT_TOKENS = 4
"""A character takes at most four bytes, so a sequence that was cut within one ends in no more tokens than that."""


class Vocabulary:
    """A tokenizer's vocabulary, and the tokens that it makes of a text.

    Attributes:
        is_steady: whether the tokenizer makes the same tokens again of its own tokens' text; else only ids out of its vocabulary are told.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        self.is_steady = all(self._again(ids) in {None, tuple(ids)} for ids in (ids_of_probe(tokenizer, probe) for probe in PROBES))

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        """The tokenizer in a model's folder. Raises CheckpointError if there is none that can be loaded."""
        if not folder.is_dir():
            raise CheckpointError(f"The folder {folder} is absent.", "Give the folder that holds the tokenizer's files.")
        try:
            return cls(own_tokenizer(folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError, RuntimeError) as error:
            words = " ".join(str(error).split()).rstrip(".")
            raise CheckpointError(f"transformers cannot load the tokenizer of {folder}: {words}.", "Copy its files again.") from error

    def problems(self, sample: Sample) -> Iterator[Problem]:
        """Ids that the vocabulary has not; else where the tokenizer makes other ids of the same text."""
        ids = [] if sample.token_ids is None else sample.token_ids.tolist()
        if outside := [place for place, token_id in enumerate(ids) if not 0 <= token_id < self._size]:
            first = outside[0]
            yield Problem(
                "vocabulary", f"{len(outside):,} ids, the first {ids[first]} at position {first}; the tokenizer has {self._size:,}"
            )
        elif ids and self.is_steady:
            ids = self._without_cut(ids)
            again = self._again(ids)
            if again is not None and again != tuple(ids):
                yield self._difference(ids, again)

    def _again(self, ids: list[int]) -> tuple[int, ...] | None:
        """The ids of the ids' text; None where the tokenizer has none for it."""
        try:
            with refusals_named():
                found = self._tokenizer(self._text(ids), add_special_tokens=False, padding=False, truncation=False, verbose=False)
                return tuple(found["input_ids"])
        except TokenizersRefusalError:
            return None

    def _without_cut(self, ids: list[int]) -> list[int]:
        """The ids without the last ones that are part of a character."""
        for length in range(len(ids), max(len(ids) - _CUT_TOKENS, 0), -1):
            if not self._text(ids[max(length - 2 * _CUT_TOKENS, 0) : length]).endswith("\ufffd"):
                return ids[:length]
        return ids

    def _difference(self, ids: list[int], again: tuple[int, ...]) -> Problem:
        place = next((place for place, (one, other) in enumerate(zip(ids, again, strict=False)) if one != other), min(len(ids), len(again)))
        had, made = self._text(ids[place : place + 1]), self._text(list(again[place : place + 1]))
        what = f"{len(ids):,} ids, and the tokenizer makes {len(again):,}; the first other at position {place}: {had!r}, not {made!r}"
        return Problem("other_tokens", what)

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
