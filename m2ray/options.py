"""RunOptions: one extraction with everything decided. What a user leaves to "auto" is decided in m2ray.planning.resolve, nowhere else."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from m2ray.batches import PartSpec
from m2ray.config import ExtractConfig, OffloadTo, Transport
from m2ray.sizes import MaxMemory

WRITER_QUEUE_BYTES = 2 << 30
"""Captured bytes that may wait for the store, a stage."""


@dataclass(frozen=True)
class PromptOptions:
    """What decides the sequences. `prompts` is a file, folder or glob, `max_length` is in tokens."""

    prompts: str
    max_length: int
    text_column: str = "text"
    messages_column: str = "messages"
    id_column: str | None = None
    truncation: Literal["refuse", "cut"] = "refuse"


@dataclass(frozen=True)
class RunOptions:
    """What a run does, the same value for `m2ray plan` and `m2ray extract`.

    Attributes:
        prompts: what decides the sequences; a plan may have no prompts (`prompts.prompts` is "" then).
        layers: captured ones, ascending.
        parts: what every shard consists of, in order, as m2ray.sites derives it; the last of the layers is the last that is run.
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
        offload: where layers stay that find no room on a GPU: "none" for nowhere, "cpu" for host memory, "disk" for host memory
            and what finds no room there on the node's disk, in `offload_folder`, the same path on every node.
        node_labels: Ray's labels that a node must have.
        in_flight_bytes: hidden states between the stages of a chain at one time, at most.
    """

    prompts: PromptOptions
    layers: tuple[int, ...]
    sites: str
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
    offload: OffloadTo
    offload_folder: str
    node_labels: Mapping[str, str]
    in_flight_bytes: int
    transport: Transport
    placement_timeout_s: float
    stage_timeout_s: float
    writer_queue_bytes: int = WRITER_QUEUE_BYTES

    @property
    def watched_folder(self) -> str:
        """Of whose disk every node says what is free: that of layers which are kept there, else the run's, else the temporary one."""
        if self.offload == "disk":
            return self.offload_folder
        is_local = self.output is not None and "://" not in self.output
        return str(Path(self.output or "").expanduser().absolute()) if is_local else tempfile.gettempdir()

    def row_options(self) -> dict[str, Any]:
        """What decides the rows, as job.json keeps it: by the names in ExtractConfig and in their order, as plain JSON values.

        The model and the prompts are left out: their digests say more than their paths.
        """
        values = {field.name: getattr(owner, field.name) for owner in (self.prompts, self) for field in fields(owner)}
        names = [name for name in ExtractConfig.row_options() if name not in ("model", "prompts")]
        return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in names}
