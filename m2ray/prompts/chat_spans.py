"""Where in a rendered chat its messages and answers are, found by rendering how it begins; for templates that do not mark answers themselves."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from m2ray.prompts.rendering import RefusedError
from m2ray.prompts.rows import Message

ASSISTANT = "assistant"

Draw = Callable[[Sequence[Message]], str]
"""Messages to text. Raises RefusedError."""


class ChatSpans:
    """Where messages begin and end in `text`, which is all of them rendered with the run's options.

    `draw` renders messages alone, `draw_asking` with what begins an answer after them. `_ends[k]` is where the first k messages end; None
    where the template writes them otherwise once the chat goes on. Before the first message a template may write what belongs to none (BOS,
    a system prompt of its own, tools), so _ends[0] is not known.
    """

    def __init__(self, draw: Draw, draw_asking: Draw, messages: Sequence[Message], text: str) -> None:
        self._draw = draw
        self._draw_asking = draw_asking
        self._messages = messages
        self._text = text
        self._ends: list[int | None] = [None]
        for count in range(1, len(messages) + 1):
            self._ends.append(self._end_of(count))

    def answers(self) -> list[tuple[int, int]]:
        """What the assistant says in each of its messages: from where an answer would begin to the message's end. Raises RefusedError."""
        found = []
        for number, message in enumerate(self._messages):
            if message["role"] == ASSISTANT:
                begin, end = self._begin_of_answer(number), self._ends[number + 1]
                if begin is None or end is None or begin > end:
                    raise RefusedError(_why_no_mask(number))
                found.append((begin, end))
        return found

    def messages(self) -> list[tuple[str, int, int]] | None:
        """Each message's role and span, or None. A message begins where the one before ends; the first with its content, and ends with it."""
        first = self._content_of_first()
        ends = [end for end in self._ends[1:] if end is not None]
        if first is None or len(ends) < len(self._messages) or ends != sorted(ends):
            return None
        spans = [first, *pairwise(ends)]
        return [(message["role"], start, stop) for message, (start, stop) in zip(self._messages, spans, strict=True)]

    def _end_of(self, count: int) -> int | None:
        return self._length(_tried(self._draw, self._messages[:count])) or self._end_without_answer(count)

    def _end_without_answer(self, count: int) -> int | None:
        """Of templates that leave out an answer's thinking once the chat goes on: where the next message, as it is without the answer, begins."""
        before = self._ends[count - 1]
        if before is None or count == len(self._messages):
            return None
        following = self._messages[count]
        gone_on = _tried(self._draw, self._messages[: count + 1])
        skipped = _tried(self._draw, [*self._messages[: count - 1], following])
        beginning = self._text[:before]
        if gone_on is None or skipped is None or not skipped.startswith(beginning):
            return None
        next_message = skipped[before:]
        end = len(gone_on) - len(next_message)
        fits = bool(next_message) and gone_on.endswith(next_message) and end >= before
        return end if fits and self._text.startswith(gone_on[:end]) else None

    def _begin_of_answer(self, number: int) -> int | None:
        return self._length(_tried(self._draw_asking, self._messages[:number])) if number else None

    def _content_of_first(self) -> tuple[int, int] | None:
        """Where the first message's content is: the only part of the text that another content changes."""
        first = self._messages[0]
        content = first.get("content")
        if not isinstance(content, str) or self._ends[1] is None:
            return None
        ends_of_words = {*content.strip()[:1], *content.strip()[-1:]}
        other = next(word for word in "abc" if word not in ends_of_words)
        changed = _tried(self._draw, [{**first, "content": other}])
        if changed is None:
            return None
        text = self._text[: self._ends[1]]
        start = _num_alike(text, changed)
        stop = len(text) - _num_alike(text[start:][::-1], changed[start:][::-1])
        return (start, stop)

    def _length(self, beginning: str | None) -> int | None:
        """How long it is, if the whole text begins with it."""
        return len(beginning) if beginning and self._text.startswith(beginning) else None


def _tried(draw: Draw, messages: Sequence[Message]) -> str | None:
    try:
        return draw(messages)
    except RefusedError:  # many a template wants messages in a certain order, or refuses a system prompt alone
        return None


def _num_alike(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), min(len(one), len(other)))


def _why_no_mask(number: int) -> str:
    if number == 0:
        return "no loss mask: its first message is the assistant's, and the template does not say where that begins"
    return (
        f"no loss mask: the template writes the messages up to number {number} otherwise than within the whole chat, "
        "and does not mark answers by {% generation %}"
    )
