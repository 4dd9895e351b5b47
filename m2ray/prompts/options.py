"""PromptOptions: the options of an extraction that decide its sequences."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, Literal, Self

from m2ray.config import ExtractConfig


@dataclass(frozen=True)
class PromptOptions:
    """What the source and the tokenizer need to know.

    Attributes:
        prompts: file, folder, glob or saved dataset.
        max_length: in tokens.
        text_column, messages_column, input_ids_column, tools_column, id_column: None where the user named none.
        add_generation_prompt: whether chats end with the words that begin an assistant's answer.
        template_options: variables of every chat's template.
        template_date: the day that chat templates are told, UTC; None: today.
        quarantine_limit: the share of the rows, 0 to 1, that may be quarantined.
    """

    prompts: str
    max_length: int
    text_column: str | None = None
    messages_column: str | None = None
    input_ids_column: str | None = None
    tools_column: str | None = None
    id_column: str | None = None
    truncation: Literal["refuse", "cut"] = "refuse"
    special_tokens: Literal["auto", "add", "none"] = "auto"
    add_generation_prompt: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    template_date: date | None = None
    quarantine_limit: float = 1.0

    @classmethod
    def of(cls, config: ExtractConfig, longest: int, recorded_date: str | None = None) -> Self:
        """The options of a run, for a model that takes `longest` tokens. `recorded_date` is that of the run's record, if there is one."""
        given = None if config.template_date == "auto" else config.template_date
        return cls(
            config.prompts,
            config.max_length or longest,
            config.text_column,
            config.messages_column,
            config.input_ids_column,
            config.tools_column,
            config.id_column,
            config.truncation,
            config.special_tokens,
            config.add_generation_prompt,
            config.template_options,
            given or (date.fromisoformat(recorded_date) if recorded_date else datetime.now(UTC).date()),
            config.quarantine_limit,
        )
