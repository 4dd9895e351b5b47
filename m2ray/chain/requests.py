"""Requests to a warm chain: a few prompts whose rows come back to whoever asked, and are written nowhere.

A request is never merged with another: it is shards and micro-batches of its own, those of a run of the same prompts, so that its rows are
that run's bit for bit.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from m2ray.batches import Bits, CapturedLayer, Column, MicroBatch, PartSpec
from m2ray.errors import BusyError, ConfigError, M2rayError, PromptsError, TooLargeError, did_you_mean, raise_all
from m2ray.model.capture import CaptureSpec
from m2ray.option_text import parse_tokens
from m2ray.options import RunOptions
from m2ray.prompts import PromptTokenizer, RequestedPrompts
from m2ray.prompts.rows import Kind
from m2ray.selection import Selection
from m2ray.sites import asked_sites, last_layer, parts_of_run, present_sites
from m2ray.tensor_rows import TensorTable

MAX_REQUEST_BYTES = 4 << 20
"""Of a request as it is sent."""

MAX_TOKENS = 1 << 15
"""Of all prompts of a request together."""

MAX_ANSWER_BYTES = 256 << 20
MAX_HELD_BYTES = 1 << 30
"""Of the answers to all requests that are at work at one time."""

MAX_REQUESTS = 32
"""At one time."""

_MAX_SITES_CHARACTERS = 10_000
"""Of what names sites and their layers."""

_MAX_DEPTH = 100
"""Of lists and objects in one another: Python's own pickling, on the way to the chain, ends at some 400."""

_NAMED = 10
"""Unknown names that an error lists; looking for what was meant takes time."""

_USE_A_RUN = "Ask for fewer prompts, sites, layers or tokens at a time, or extract them into a run (m2ray extract --chain)."

_KINDS: Mapping[str, Kind] = {"prompts": "text", "messages": "messages", "input_ids": "input_ids"}


class Request(NamedTuple):
    """What is asked: prompts of one kind, the sites with their layers, and the choice of tokens, as the options of these names have them."""

    prompts: Sequence[Any]
    kind: Kind
    sites: str
    tokens: str = "all"

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> "Request":
        """From JSON: {"prompts" | "messages" | "input_ids": ..., "sites": ..., "tokens": ...}. Raises ConfigError or PromptsError, all problems at once."""
        known = (*_KINDS, "sites", "tokens")
        problems: list[M2rayError] = [
            ConfigError(f"A request has no {name!r}.", f"{did_you_mean(name, known)}It has: {', '.join(known)}.")
            for name in islice((name for name in asked if name not in known), _NAMED)
        ]
        given = [name for name in _KINDS if asked.get(name) is not None]
        if len(given) != 1:
            problems.append(PromptsError(f"A request has one of {', '.join(_KINDS)}; this one has {' and '.join(given) or 'none'}."))
        prompts = asked[given[0]] if given else []
        if given and not (isinstance(prompts, list) and prompts):
            problems.append(PromptsError(f"{given[0]} has to be a list that is not empty, not {type(prompts).__name__}."))
        elif _is_deep(prompts):
            problems.append(
                PromptsError(f"{given[0]} has lists or objects in one another, more than {_MAX_DEPTH} deep.", "Send flat ones.")
            )
        sites, tokens = asked.get("sites", ""), asked.get("tokens", "all")
        if not (isinstance(sites, str) and sites.strip()):
            problems.append(ConfigError("sites has to name what is asked for.", 'Such as "residual:30" or "residual:0-5, mlp:2".'))
        elif len(sites) > _MAX_SITES_CHARACTERS:
            problems.append(
                ConfigError(f"sites has {len(sites):,} characters, more than {_MAX_SITES_CHARACTERS:,}.", "Name layers by ranges.")
            )
        if not isinstance(tokens, str):
            problems.append(ConfigError(f"tokens = {tokens!r} is no text.", 'Such as "all" or "last".'))
        raise_all(problems)
        return cls(prompts, _KINDS[given[0]], sites, tokens)


class Answer(NamedTuple):
    """The rows of a request, by sequence and position: their identities, TOKEN_ROW [N], and each column, by name, its dtype and its bytes [N, ...];
    and `compute_dtype`, the chain's, which may be "float8" where rows are bfloat16.
    """

    token_rows: npt.NDArray[Any]
    columns: Mapping[str, tuple[str, Bits]]
    compute_dtype: str = ""

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, such as `residual.30` [N, W]; with them `sequence`, the prompt's place in the request, `position` and `token_id`, each [N]."""
        values = {name: torch.from_numpy(bits.copy()).view(getattr(torch, dtype)) for name, (dtype, bits) in self.columns.items()}
        identities = {"sequence": "sequence_id", "position": "position", "token_id": "token_id"}
        return {**values, **{name: torch.from_numpy(self.token_rows[field].copy()) for name, field in identities.items()}}


Compute = Callable[[CaptureSpec, int, MicroBatch], Sequence[CapturedLayer]]
"""What the chain makes of a micro-batch, up to the layer of that number."""


class Desk:
    """Answers requests to a chain, several at a time: which prompts they are, what is captured, and whether there is room. Any thread may call.

    Args:
        table: the model's tensors, up to the last layer that the chain has.
        options: those that the chain was started with.
    """

    def __init__(self, tokenizer: PromptTokenizer, table: TensorTable, options: RunOptions, num_layers: int) -> None:
        self._tokenizer = tokenizer
        self._tokenizing = threading.Lock()
        self._table = table
        self._options = options
        self._num_layers = num_layers
        self._changed = threading.Lock()
        self._held_bytes = 0
        self.at_work = 0
        self.answered = 0

    def answer(self, request: Request, compute: Compute) -> Answer:
        """The rows of a request.

        Raises:
            ConfigError, PromptsError: what it asks for is not there, or a prompt cannot be run.
            TooLargeError: it is too large for one answer.
            BusyError: too many others are at work.
            M2rayError, RayError: what `compute` raises.
        """
        with self._counted():
            _require_short(request)
            capture, parts = self._capture(request)
            with self._tokenizing:
                prompts = RequestedPrompts(self._tokenizer, request.prompts, request.kind, capture.selection)
            num_bytes = prompts.num_rows * sum(part.row_bytes for part in parts)
            _require_size(int(prompts.token_counts.sum()), num_bytes)
            with self._room(num_bytes):
                last = last_layer(capture.sites, self._table.num_layers)
                batches = list(prompts.micro_batches(self._options.shard_tokens, self._options.batch_tokens))
                computed = [compute(capture, last, micro_batch) for micro_batch in batches]
                joined = _joined(parts, capture.selection, batches, computed)
                return joined._replace(compute_dtype=self._options.compute_dtype)

    def _capture(self, request: Request) -> tuple[CaptureSpec, tuple[PartSpec, ...]]:
        """What is taken, and the parts that a run would have."""
        table, options = self._table, self._options
        parse_tokens(request.tokens)
        sites = present_sites(asked_sites(request.sites, "all", self._num_layers), table)
        selection = Selection(request.tokens, self._tokenizer.selection.skip_ids)
        parts = parts_of_run(sites, options.store_dtype, table.hidden_size, table.num_experts, table.experts_per_token)
        if selection.is_mean and "router_topk" in sites:
            raise ConfigError(f"tokens = {request.tokens!r}, and router_topk has numbers of experts, which have no mean.", "Leave it out.")
        return CaptureSpec(sites, options.store_dtype, selection), parts

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._changed:
            if self.at_work >= MAX_REQUESTS:
                raise BusyError(f"{self.at_work} requests are at work, as many as may be.", "Ask again in a moment.")
            self.at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self.at_work -= 1
                self.answered += 1

    @contextmanager
    def _room(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            if self._held_bytes and self._held_bytes + num_bytes > MAX_HELD_BYTES:
                raise BusyError(
                    f"Answers of {self._held_bytes:,} bytes are at work, of {MAX_HELD_BYTES:,} at most.", "Ask again in a moment."
                )
            self._held_bytes += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held_bytes -= num_bytes


def _is_deep(prompts: list[Any]) -> bool:
    """Whether lists and dicts lie deeper in one another than may be."""
    level: list[Any] = [prompts]
    for _ in range(_MAX_DEPTH):
        inside = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inside if isinstance(item, list | dict)]
        if not level:
            return False
    return True


def _require_short(request: Request) -> None:
    """Raise TooLargeError before anything is tokenised for nothing."""
    if len(request.prompts) > MAX_TOKENS:
        raise TooLargeError(f"{len(request.prompts):,} prompts have a token each at least, and {MAX_TOKENS:,} are the most.", _USE_A_RUN)
    num_bytes = len(json.dumps(request.prompts, default=str))
    if num_bytes > MAX_REQUEST_BYTES:
        raise TooLargeError(f"The prompts are {num_bytes:,} bytes as JSON, more than {MAX_REQUEST_BYTES:,}.", _USE_A_RUN)


def _require_size(num_tokens: int, num_bytes: int) -> None:
    """Raise TooLargeError, all at once, for what no answer may hold."""
    problems = []
    if num_tokens > MAX_TOKENS:
        problems.append(TooLargeError(f"The prompts have {num_tokens:,} tokens, more than {MAX_TOKENS:,}.", _USE_A_RUN))
    if num_bytes > MAX_ANSWER_BYTES:
        problems.append(TooLargeError(f"The rows are {num_bytes:,} bytes, more than {MAX_ANSWER_BYTES:,}.", _USE_A_RUN))
    raise_all(problems)


def _joined(
    parts: Sequence[PartSpec], selection: Selection, batches: Sequence[MicroBatch], computed: Sequence[Sequence[CapturedLayer]]
) -> Answer:
    """All rows by sequence and position, whichever micro-batch they were in."""
    token_rows = np.concatenate([selection.token_rows(micro_batch) for micro_batch in batches])
    order = np.argsort(token_rows["sequence_id"], kind="stable")
    columns: dict[str, tuple[str, Bits]] = {}
    for part in parts:
        captured = [next(each for each in found if (each.site, each.layer) == (part.site, part.layer)) for found in computed]
        for number, column in enumerate(part.columns):
            bits = np.concatenate([each.columns[number] for each in captured])
            columns[_name(part, column)] = column.dtype, bits[order]
    return Answer(token_rows[order], columns)


def _name(part: PartSpec, column: Column) -> str:
    """`residual.30`, `final_norm`; behind it the column's own name where a part has several."""
    place = part.site if part.layer is None else f"{part.site}.{part.layer}"
    return place if len(part.columns) == 1 else f"{place}.{column.name}"
