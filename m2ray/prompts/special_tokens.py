"""The special tokens that a tokenizer puts around a text, such as BOS, and texts that have them already."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from m2ray.errors import PromptsError
from m2ray.prompts.own_tokenizer import ids_of_probe

SpecialTokensRule = Literal["add_where_absent", "add", "none"]
"""What is done to each text: a prefix or suffix that it has already is not doubled; the tokenizer's own way; nothing."""

_PROBE = "a"


@dataclass
class SpecialTokens:
    """What a tokenizer adds before and after a text, and how many of the texts had it already."""

    prefix: list[int]
    suffix: list[int]
    num_texts: int = 0
    num_begun: int = 0
    num_ended: int = 0

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Those that transformers' tokenizer adds. Raises PromptsError if it does more than add."""
        bare, whole = (ids_of_probe(tokenizer, _PROBE, add_special_tokens=adds) for adds in (False, True))
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return cls(whole[:start], whole[start + len(bare) :])
        raise PromptsError(
            f"The tokenizer gives the text {_PROBE!r} the token ids {bare} without special tokens and {whole} with them: "
            "which of them it adds cannot be told.",
            'Set special_tokens = "add" or "none".',
        )

    def around(self, token_ids: list[int]) -> list[int]:
        """A text's own token ids, with the prefix and the suffix, each left out if it is there already."""
        begun = bool(self.prefix) and token_ids[: len(self.prefix)] == self.prefix
        ended = bool(self.suffix) and token_ids[-len(self.suffix) :] == self.suffix
        self.num_texts += 1
        self.num_begun += begun
        self.num_ended += ended
        return [*([] if begun else self.prefix), *token_ids, *([] if ended else self.suffix)]


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids of all tokens that a tokenizer calls special, ascending: its named ones, and added ones that are marked so."""
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return tuple(sorted({*tokenizer.all_special_ids, *added}))
