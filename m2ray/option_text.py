"""Options that are written in a form of their own: layers, sites, tokens, node labels."""

import re
from typing import Literal, NamedTuple, cast, get_args

from m2ray.errors import ConfigError, raise_all

SiteName = Literal["residual", "residual_mid", "attention", "mlp", "mlp_in", "router_logits", "router_topk", "embedding", "final_norm"]

CHOICES = "all, last, last:k, first:k, every:n, mask, mask:last:k, mean, mean:mask"
TokenKind = Literal["all", "last", "first", "every", "mean"]


class TokenChoice(NamedTuple):
    """Which of a sequence's tokens are chosen: `number` is k or n, `in_mask` leaves only those of the loss mask to choose from."""

    kind: TokenKind
    number: int = 0
    in_mask: bool = False


_CHOICES_BY_WORD = {
    "all": TokenChoice("all"),
    "last": TokenChoice("last", 1),
    "mask": TokenChoice("all", in_mask=True),
    "mean": TokenChoice("mean"),
    "mean:mask": TokenChoice("mean", in_mask=True),
}
"""Those without a number."""


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layer numbers that `layers` names, ascending: "all", "0", "0-5" (both ends in), "0,7,20-61".

    Raises:
        ConfigError: malformed, empty range, or out of the model's `num_layers`.
    """
    if text.strip() == "all":
        return tuple(range(num_layers))
    chosen: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", piece)
        if not match:
            raise ConfigError(
                f"layers = {text!r}: {piece.strip()!r} is neither a layer nor a range.", 'Write "all", "0", "0-5" or "0,7,20-61".'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ConfigError(f"layers = {text!r}: the range {piece.strip()!r} runs backwards.", f'Write "{last}-{first}".')
        if last >= num_layers:
            raise ConfigError(f"layers = {text!r}: layer {last} is out of range.", f"The model has layers 0 to {num_layers - 1}.")
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def parse_sites(text: str) -> dict[str, str | None]:
    """The sites that `sites` names, in its order, and the layers that stand behind each, if any: "residual", "residual:all, mlp:0,20-30".

    Raises:
        ConfigError: a site that there is not, or one that is named twice; all at once.
    """
    chosen: dict[str, str | None] = {}
    problems = []
    # A comma that is followed by a number goes on with the layers of the site before it.
    for piece in re.split(r",\s*(?![\s\d])", text):
        name, colon, layers = (part.strip() for part in piece.partition(":"))
        if name not in get_args(SiteName):
            problems.append(ConfigError(f"There is no site {name!r}.", f"There are: {', '.join(get_args(SiteName))}."))
        elif name in chosen:
            problems.append(ConfigError(f"{name} is named twice.", f'Write its layers together: "{name}:0,20-30".'))
        else:
            chosen[name] = layers if colon else None
    raise_all(problems)
    return chosen


def parse_tokens(text: str) -> TokenChoice:
    """What the option `tokens` says. Raises ConfigError."""
    if text in _CHOICES_BY_WORD:
        return _CHOICES_BY_WORD[text]
    match = re.fullmatch(r"(?:(mask):(?=last))?(last|first|every):([1-9]\d{0,8})", text)
    if not match:
        raise ConfigError(f"tokens = {text!r} is no choice of tokens.", f"Write {CHOICES}; k and n are from 1 on.")
    return TokenChoice(cast("TokenKind", match[2]), int(match[3]), in_mask=match[1] is not None)


def parse_labels(text: str | None) -> dict[str, str]:
    """Ray's node labels from "zone=a,kind=h100"; none from None. Raises ConfigError."""
    labels = {}
    for piece in text.split(",") if text else []:
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not (name and equals and value):
            raise ConfigError(f"node_labels = {text!r}: {piece.strip()!r} is not NAME=VALUE.", 'Write "zone=a,kind=h100".')
        labels[name] = value
    return labels
