"""ChatTemplate: messages to text by the model's own template, with a date that does not change overnight."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, time
from functools import partial
from types import SimpleNamespace
from typing import Any

import xxhash
from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from m2ray.errors import PromptsError
from m2ray.options import TEMPLATE_TIMEOUT_S, PromptOptions
from m2ray.prompts.chat_spans import ASSISTANT, ChatSpans
from m2ray.prompts.columns import TEMPLATE_OPTIONS
from m2ray.prompts.rendering import RefusedError, Rendered, Renderer
from m2ray.prompts.rows import Message, PromptRow

# What a template written for other messages raises: its own raise_exception(), or Python's errors on their values.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)

_CLOCK = "strftime_now"
"""The function that templates ask for the date."""

_NO_TOOLS: list[Any] = []

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag by which a template marks answers, as transformers looks for it."""

_PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}]


class ChatTemplate:
    """The template of a transformers tokenizer. `digest` is xxh3-128 of its text, or "" if the model has none."""

    def __init__(self, tokenizer: Any, options: PromptOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._midnight = datetime.combine(options.template_date or datetime.now(UTC).date(), time())
        text = _text(tokenizer)
        self.digest = xxhash.xxh3_128(text.encode()).hexdigest() if text is not None else ""
        self.reads_date = text is not None and _CLOCK in text
        self._reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", _CLOCK}
        self._renderer = Renderer(self.render, options.template_timeout_s or TEMPLATE_TIMEOUT_S)

    def require(self) -> None:
        """Raise PromptsError if the model has no chat template, or one whose date cannot be set, or options that none can have."""
        if not self.digest:
            raise PromptsError(
                "The prompts are chat messages, but the model's tokenizer has no chat template.",
                "Give the prompts as text, or a model with a chat template.",
            )
        if taken := self._reserved & self._options.template_options.keys():
            raise PromptsError(
                f"template_options sets {', '.join(map(repr, sorted(taken)))}, which m2ray or transformers sets itself.", "Leave it out."
            )
        if self.reads_date:
            self._require_date()

    def require_mask(self) -> None:
        """Raise PromptsError if a loss mask is asked for, and the template gives none even of one question and one answer."""
        if self._options.mask is None:
            return
        (probe,) = self.rendered([PromptRow(0, "0", messages=_PROBE)])
        if isinstance(probe, RefusedError) or not probe.answers:
            why = f": {probe}" if isinstance(probe, RefusedError) else ""
            raise PromptsError(
                f"mask = {self._options.mask!r}, but the model's chat template does not say what the assistant says{why}.",
                "Give a template that marks answers by {% generation %} ... {% endgeneration %}, or token ids with a loss_mask.",
            )

    def rendered(self, rows: Sequence[PromptRow]) -> Iterator[Rendered | RefusedError]:
        """What the template makes of each row's messages, or why nothing, from a process of its own with limits. `close` ends it."""
        return self._renderer.rendered(rows)

    def close(self) -> None:
        """End that process, if there is one; the next row starts another."""
        self._renderer.close()

    def render(self, row: PromptRow) -> Rendered:
        """What the template makes of a row's messages, in this process and without limits. Raises RefusedError."""
        options = dict(row.template_options or {})
        if taken := sorted(self._reserved & options.keys()):
            raise RefusedError(f"{TEMPLATE_OPTIONS}: {', '.join(map(repr, taken))} cannot be set for one row")
        options = {**self._options.template_options, **options}

        def draw(messages: Sequence[Message], *, adds_prompt: bool) -> str:
            with _refusing():
                return self._render(messages, add_generation_prompt=adds_prompt, tools=row.tools, **options)

        assert row.messages is not None
        text = draw(row.messages, adds_prompt=self._options.add_generation_prompt)
        if self._options.mask is None:
            return Rendered(text)
        spans = ChatSpans(partial(draw, adds_prompt=False), partial(draw, adds_prompt=True), row.messages, text)
        tagged = self._tagged_answers(row, text, options)
        return Rendered(text, spans.answers() if tagged is None else tagged, spans.messages(), is_tagged=tagged is not None)

    def _render(self, messages: Any, **options: Any) -> str:
        with _telling(self._midnight):
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _tagged_answers(self, row: PromptRow, text: str, options: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """What transformers finds between the template's own tags; None for a template without."""
        template = self._tokenizer.get_chat_template(tools=row.tools)
        if not _GENERATION.search(template):
            return None
        with _telling(self._midnight), _refusing():
            (again,), (answers,) = chat_template_utils.render_jinja_template(
                [row.messages],
                tools=row.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=self._options.add_generation_prompt,
                **{**self._tokenizer.special_tokens_map, **options},
            )
        if again != text:
            raise RefusedError("no loss mask: the chat template writes another text when its answers are looked for")
        return [(int(start), int(stop)) for start, stop in answers]

    def _require_date(self) -> None:
        told = self._render([{"role": "user", "content": ""}], chat_template=f"{{{{ {_CLOCK}('%Y-%m-%d') }}}}")
        if told != f"{self._midnight:%Y-%m-%d}":
            raise PromptsError(
                f"The chat template reads the date, and this transformers tells it {told}, not {self._midnight:%Y-%m-%d}.",
                "Install the version of transformers that m2ray was tested with.",
            )


def _text(tokenizer: Any) -> str | None:
    """The template that apply_chat_template uses and, if there is one, that for rows with tools; None without."""
    try:
        texts = [str(tokenizer.get_chat_template(tools=tools)) for tools in (None, _NO_TOOLS)]
    except ValueError:  # transformers' word for: none, or several without a default
        return None
    return "\0".join(dict.fromkeys(texts))


@contextmanager
def _refusing() -> Iterator[None]:
    """Around a template: what it raises becomes the row's reason."""
    try:
        yield
    except _TEMPLATE_ERRORS as error:
        raise RefusedError(f"the chat template refuses it: {str(error) or type(error).__name__}") from error


@contextmanager
def _telling(now: datetime) -> Iterator[None]:
    """Tell templates another time: strftime_now of transformers asks the `datetime` of its own module for it, and can be told nowhere else."""
    real = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: now)
    try:
        yield
    finally:
        chat_template_utils.datetime = real
