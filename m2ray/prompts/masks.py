"""Loss masks and roles: from characters of a chat's text to its tokens."""

from typing import NamedTuple

import numpy as np

from m2ray.batches import Int32Array
from m2ray.prompts.rendering import Rendered

Role = tuple[str, int, int]
"""A message's role, and its tokens [start, stop)."""


class Document(NamedTuple):
    """A document in a context: it begins at the context's token `start`, with its own token `offset` (BOS before it counts as its own)."""

    row_id: str
    start: int
    offset: int


class Marked(NamedTuple):
    """A row's token ids, int32 [T], and what is known of them: the loss mask, one byte 0 or 1 a token, the roles of a chat, and the documents
    of a context.
    """

    token_ids: Int32Array
    loss_mask: bytes | None = None
    roles: list[Role] | None = None
    documents: tuple[Document, ...] | None = None


def loss_mask(chat: Rendered, offsets_T2: Int32Array) -> bytes | str:
    """The mask of a chat's tokens, or why there is none. `offsets_T2`: which characters of its text each token is of.

    Between the template's own tags it is every token that overlaps them, as in transformers. An answer that was found by rendering
    beginnings must begin and end between two tokens, and white space at its end is the template's.
    """
    mask = np.zeros(len(offsets_T2), np.uint8)
    for start, stop in chat.answers or ():
        if not chat.is_tagged and (_is_within_token(start, offsets_T2) or _is_within_token(stop, offsets_T2)):
            return "no loss mask: a token lies across the beginning or the end of an answer"
        first, last = _overlapping(start, stop, offsets_T2)
        mask[first : last if chat.is_tagged else _without_space(chat.text, first, last, offsets_T2)] = 1
    return mask.tobytes()


def roles(chat: Rendered, offsets_T2: Int32Array, kept: range) -> list[Role] | None:
    """The tokens of a chat's messages among those of `kept`, counted from its beginning; None if a token lies across two messages."""
    found: list[Role] = []
    for role, start, stop in chat.messages or ():
        if _is_within_token(start, offsets_T2) or _is_within_token(stop, offsets_T2):
            return None
        first, last = _overlapping(start, stop, offsets_T2)
        if first < kept.stop and max(last, first + 1) > kept.start:
            found.append((role, max(first - kept.start, 0), min(last, kept.stop) - kept.start))
    return None if chat.messages is None else found


def _overlapping(start: int, stop: int, offsets_T2: Int32Array) -> tuple[int, int]:
    """The tokens [first, last) of which a part lies in [start, stop)."""
    return int(np.searchsorted(offsets_T2[:, 1], start, side="right")), int(np.searchsorted(offsets_T2[:, 0], stop, side="left"))


def _is_within_token(place: int, offsets_T2: Int32Array) -> bool:
    ended, begun = _overlapping(place, place, offsets_T2)
    return ended < begun


def _without_space(text: str, first: int, last: int, offsets_T2: Int32Array) -> int:
    while last > first and not text[slice(*offsets_T2[last - 1].tolist())].strip():
        last -= 1
    return last
