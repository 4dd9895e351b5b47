"""TextTokens: texts to token ids as transformers' tokenizer makes them, on all cores."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from m2ray.batches import Int32Array
from m2ray.prompts.own_tokenizer import TokenizersRefusalError, refusals_named

Made = TypeVar("Made")


class TextTokens:
    """The Rust tokenizer inside transformers' one, where that does nothing beside it; else transformers' one itself.

    Of each text transformers makes Python lists that nobody reads here, for longer than the Rust code takes on several cores.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)

    @property
    def has_offsets(self) -> bool:
        """Whether `located` can be asked."""
        return self._backend is not None

    def ids(self, texts: list[str], *, adds_special_tokens: bool = False) -> list[list[int] | str]:
        """Each text's token ids, or why it has none."""
        backend = self._backend
        if backend is None:
            return _each(lambda some: self._slowly(some, adds_special_tokens=adds_special_tokens), texts)
        return _each(
            lambda some: [found.ids for found in backend.encode_batch_fast(some, add_special_tokens=adds_special_tokens)],
            texts,
        )

    def located(self, texts: list[str]) -> list[tuple[list[int], Int32Array] | str]:
        """Each text's token ids without special tokens, and which characters [start, stop) each is of, int32 [T, 2]; or why it has none."""
        backend = self._backend
        assert backend is not None, "there are offsets"
        return _each(
            lambda some: [
                (found.ids, np.array(found.offsets, np.int32).reshape(-1, 2))
                for found in backend.encode_batch(some, add_special_tokens=False)
            ],
            texts,
        )

    def _slowly(self, texts: list[str], *, adds_special_tokens: bool) -> list[list[int]]:
        encoding = self._tokenizer(
            texts,
            add_special_tokens=adds_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        token_ids: list[list[int]] = encoding["input_ids"]
        return token_ids


def _backend(tokenizer: Any) -> Tokenizer | None:
    """The Rust tokenizer, set as transformers sets it; None where the class has a way of its own to call it, or is Python."""
    ways = {"__call__": PreTrainedTokenizerBase, "_encode_plus": PreTrainedTokenizerFast}
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    if any(getattr(type(tokenizer), name) is not getattr(owner, name) for name, owner in ways.items()):
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _each(work: Callable[[list[str]], list[Made]], texts: list[str]) -> list[Made | str]:
    """What `work` makes of each text. One that is refused fails its whole batch: the halves are tried, down to the text."""
    if not texts:
        return []
    try:
        with refusals_named():
            return [*work(texts)]
    except TokenizersRefusalError as error:
        if len(texts) == 1:
            return [f"the tokenizer refuses it: {error}"]
    half = len(texts) // 2
    return [*_each(work, texts[:half]), *_each(work, texts[half:])]
