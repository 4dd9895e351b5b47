"""RunOptions: one extraction with everything decided. What a user leaves to "auto" is decided in m2ray.planning.resolve, nowhere else.

In three fields a choice is left to the place where it is made: `device_map` = "auto" is one of the ways to deal layers out, `transport` =
"auto" lets each two stages find out what works between them, and `stages` is None for as many as the cluster's GPUs come to.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, Self

from m2ray.batches import PartSpec
from m2ray.config import ExtractConfig
from m2ray.option_types import OffloadTo, Transport, Weights
from m2ray.selection import Selection
from m2ray.sites import LayersOfSites
from m2ray.sizes import MaxMemory
from m2ray.statistics import Asked
from m2ray.storage import local_folder, with_home

TEMPLATE_TIMEOUT_S = 10.0

WRITER_QUEUE_BYTES = 2 << 30
"""Captured bytes that may wait for the store, a stage."""


@dataclass(frozen=True)
class PromptOptions:
    """What decides the sequences: as it is asked for, or as source and tokenizer settled it.

    Attributes:
        prompts: file, folder, glob or saved dataset.
        max_length: in tokens.
        pack: tokens of the sequences that prompts are joined to and cut into; None where each prompt is a sequence.
        tokens, skip_ids: which tokens become rows (m2ray.selection.Selection).
        skip_special_tokens: whether the tokenizer's special ids are `skip_ids`.
        split: of a dataset's folder; None where the user named none.
        encoding: what text files are written in, by Python's name.
        chat_template: the file whose template takes the place of the model's, or None.
        steady_positions: a longer prompt would change rows of its neighbours in a batch, or they its own; None where none does.
        limit: rows of the source that are read, its first ones, good or bad; None for all.
        text_column, messages_column, input_ids_column, tools_column, id_column, keep_columns: None where the user named none.
        add_generation_prompt: whether chats end with the words that begin an assistant's answer.
        template_options: variables of every chat's template.
        mask: of which messages a chat's loss mask is made; None for no mask.
        special_tokens: what is put around a text; "add_where_absent" is what "auto" comes to where the tokenizer adds any.
        template_date: the day that chat templates are told, UTC; None where none is.
        template_timeout_s: processor time that a chat template may take for a row; None where there is none.
        quarantine_limit: the share of the rows, 0 to 1, that may be quarantined.
    """

    prompts: str
    max_length: int
    steady_positions: int | None = None
    split: str | None = None
    encoding: str = "utf-8"
    text_column: str | None = None
    messages_column: str | None = None
    input_ids_column: str | None = None
    tools_column: str | None = None
    id_column: str | None = None
    keep_columns: tuple[str, ...] | None = None
    limit: int | None = None
    truncation: Literal["refuse", "cut", "cut_left"] = "refuse"
    pack: int | None = None
    tokens: str = "all"
    skip_special_tokens: bool = False
    skip_ids: tuple[int, ...] = ()
    special_tokens: Literal["auto", "add_where_absent", "add", "none"] = "auto"
    add_generation_prompt: bool = False
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    mask: Literal["assistant"] | None = None
    template_date: date | None = None
    template_timeout_s: float | None = TEMPLATE_TIMEOUT_S
    quarantine_limit: float = 1.0

    @classmethod
    def of(cls, config: ExtractConfig, longest: int, recorded_date: str | None = None, steady_positions: int | None = None) -> Self:
        """The options of a run, for a model that takes `longest` tokens. `recorded_date` is that of the run's record, if there is one."""
        given = None if config.template_date == "auto" else config.template_date
        return cls(
            prompts=config.prompts or "",
            max_length=config.pack or config.max_length or longest,
            steady_positions=steady_positions,
            split=config.split,
            encoding=config.encoding,
            text_column=config.text_column,
            messages_column=config.messages_column,
            input_ids_column=config.input_ids_column,
            tools_column=config.tools_column,
            id_column=config.id_column,
            keep_columns=config.keep_columns,
            limit=config.limit,
            truncation=config.truncation,
            pack=config.pack,
            tokens=config.tokens,
            skip_special_tokens=config.skip_special_tokens,
            special_tokens=config.special_tokens,
            add_generation_prompt=config.add_generation_prompt,
            chat_template=config.chat_template,
            template_options=config.template_options,
            mask=config.mask,
            template_date=given or (date.fromisoformat(recorded_date) if recorded_date else datetime.now(UTC).date()),
            template_timeout_s=config.template_timeout_s,
            quarantine_limit=config.quarantine_limit,
        )

    @property
    def selection(self) -> Selection:
        """Which tokens become rows."""
        return Selection(self.tokens, self.skip_ids)


@dataclass(frozen=True)
class RunOptions:
    """What a run does, the same value for `m2ray plan` and `m2ray extract`.

    Attributes:
        prompts: what decides the sequences, as the prompts settled it.
        layers: those at which rows are kept or statistics taken of a site, ascending.
        sites: the layers of each, as they have it; none at sites of the whole model.
        parts: what every shard has rows of, in order, as m2ray.sites derives it.
        statistics: what is summed up of which sites and layers (m2ray.statistics).
        keep: what is stored: "rows", "statistics" (there are no `parts` then) or "both".
        of_statistics: the parts that statistics are taken of, whether their rows are kept or not.
        batch_tokens: padded tokens in a micro-batch, at most, unless a single sequence is longer.
        shard_tokens: tokens in a shard.
        threads_per_stage: torch threads of a stage on a CPU.
        output: the run folder; None for a plan without one.
        stages: of each chain; None where no number was asked for: then as many as there are GPUs, some of which the device map may
            leave without layers, and one without GPUs.
        replicas: chains.
        gpus_per_stage: GPUs of one actor, all on one node.
        device_map: "auto", "balanced", "balanced_low_0", "sequential", or "cuda:N": GPU N of the first node that has any.
        max_memory: GPUs that it leaves out are not used.
        weights: how quantised layers lie on their GPU: "bf16" ready, "packed" as on disk, "auto" packed where not all fits ready.
        offload: where layers stay that find no room there: "none" for nowhere, "cpu" for host memory, "disk" for the model's files,
            "auto" for host memory and what finds no room there for the model's files.
        offload_folder: where each node copies those layers to that would be read from the model's files; None for no copy.
        node_labels: Ray's labels that a node must have.
        in_flight_bytes: hidden states between the stages of a chain at one time, at most.
    """

    prompts: PromptOptions
    layers: tuple[int, ...]
    sites: LayersOfSites
    parts: tuple[PartSpec, ...]
    compute_dtype: str
    store_dtype: str
    batch_tokens: int
    shard_tokens: int
    attn_implementation: str
    compile: bool
    threads_per_stage: int
    output: str | None
    compression: Literal["none", "planes"]
    stages: int | None
    replicas: int
    gpus_per_stage: int
    device_map: str
    max_memory: MaxMemory
    weights: Weights
    offload: OffloadTo
    offload_folder: str | None
    node_labels: Mapping[str, str]
    in_flight_bytes: int
    transport: Transport
    placement_timeout_s: float
    stage_timeout_s: float
    writer_queue_bytes: int = WRITER_QUEUE_BYTES
    statistics: Asked = field(default_factory=dict)
    keep: Literal["rows", "statistics", "both"] = "rows"
    of_statistics: tuple[PartSpec, ...] = ()

    @property
    def with_crcs(self) -> bool:
        """Whether a GPU makes the CRC32 of each row. Compressed pages have others, and of few rows a core makes them in less time than a kernel's launch takes."""
        return self.compression == "none" and self.prompts.selection.is_all

    @property
    def captured(self) -> tuple[PartSpec, ...]:
        """The parts that the stages capture, to store their rows or for their statistics."""
        return tuple(dict.fromkeys((*self.parts, *self.of_statistics)))

    @property
    def offload_path(self) -> str:
        """Where layers are copied to that are read each time, the same path on every node; "" where they are not copied."""
        return str(with_home(Path(self.offload_folder)).absolute()) if self.offload_folder else ""

    @property
    def watched_folder(self) -> str:
        """Of whose disk every node says what is free: that of layers which are copied there, else the run's, else the temporary one."""
        if self.offload_folder:
            return self.offload_path
        folder = local_folder(self.output) if self.output else None
        return str(folder.absolute()) if folder else tempfile.gettempdir()

    def row_options(self) -> dict[str, Any]:
        """What decides the rows, as job.json keeps it: by the names in ExtractConfig and in their order, as plain JSON values.

        The model, the prompts and the template file are left out: their digests say more than their paths. The special ids that are skipped come last.
        """
        values = {each.name: getattr(owner, each.name) for owner in (self.prompts, self) for each in fields(owner)}
        names = [name for name in (*ExtractConfig.row_options(), "skip_ids") if name not in ("model", "prompts", "chat_template")]
        return {name: _plain(values[name]) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, date) else value
