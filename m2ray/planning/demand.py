"""What is asked of a run, and what that asks of each device: tensors, parts and bytes of any span."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from m2ray.batches import ITEMSIZE_BYTES, LayerSpan, PartSpec, PromptStats, Residency, hidden_dtype
from m2ray.options import RunOptions
from m2ray.planning.devices import Device
from m2ray.planning.hardware import Node
from m2ray.planning.memory import (
    CAPTURE_BUFFERS,
    CONTEXT_BYTES,
    CRC_BYTES,
    ENCODING_BYTES,
    MOST_BATCHES,
    STAGING_BYTES,
    STATISTICS_MICRO_BATCHES,
    STATISTICS_SHARDS,
    UNUSABLE_BYTES,
    Memory,
    Workload,
    cpu_memory,
    gpu_overhead,
    process_bytes,
    readers_on_cpu_bytes,
    span_rows,
    staging_bytes,
)
from m2ray.planning.output import OutputPlan, plan_output
from m2ray.planning.profile import Profile
from m2ray.planning.shape import ModelShape, all_plain
from m2ray.planning.unpacking import unpacking_bytes
from m2ray.sites import EIGHT_BITS, layers_run, parts_of_span
from m2ray.statistics import contribution_bytes, device_bytes, merged_bytes, micro_batch_bytes, shard_bytes, widths
from m2ray.tensor_rows import TensorRow, TensorTable

USUAL_WAVE_TOKENS = 131_072
"""Unpacking a layer of MiniMax-M2 then takes 3 % beside computing with it."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan assumes of the world around the run; None where nothing is known.

    Attributes:
        longest_tokens: of one sequence; where it is not known, one may be as long as a micro-batch.
        disk_free_bytes: what the disk of the output has left; None for a bucket too.
        tokens_per_s: real tokens a second that all chains together do; else estimated from the GPUs' names.
        store_bytes_per_s: what the store takes.
        price_per_gb_month: of the output's store, for a GB of 10^9 bytes.
        price_gpu_hour: of a GPU for an hour.
        threads: that the user allows a process of his machine (OMP_NUM_THREADS).
        profile: what `m2ray bench` measured, instead of estimates from the GPUs' names.
    """

    longest_tokens: int | None = None
    disk_free_bytes: int | None = None
    tokens_per_s: float | None = None
    store_bytes_per_s: float | None = None
    price_per_gb_month: float | None = None
    price_gpu_hour: float | None = None
    profile: Profile | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Demand:
    """A model, its dimensions, what is asked of it, and under which assumptions.

    `wave_tokens` are those that a stage whose layers are not all ready takes through one of them before the next; 0 for a micro-batch's.
    """

    table: TensorTable
    shape: ModelShape
    options: RunOptions
    assumed: Assumptions = field(default_factory=Assumptions)
    wave_tokens: int = 0

    def asking(self, **changed: Any) -> "Demand":
        """The same with other values of some options."""
        return replace(self, options=replace(self.options, **changed))

    def assuming(self, **changed: Any) -> "Demand":
        """The same under other assumptions."""
        return replace(self, assumed=replace(self.assumed, **changed))

    @property
    def num_layers(self) -> int:
        """Layers that are run: up to the last that is captured."""
        return max(1, layers_run(self.options.captured, self.table.num_layers))

    @property
    def with_final_norm(self) -> bool:
        return any(part.site == "final_norm" for part in self.options.captured)

    @property
    def itemsize_bytes(self) -> int:
        """Of hidden states, and of weights but those that stay packed."""
        return ITEMSIZE_BYTES[hidden_dtype(self.options.compute_dtype)]

    @cached_property
    def workload(self) -> Workload:
        longest_tokens = self.assumed.longest_tokens or self.options.batch_tokens
        padded_tokens = max(self.options.batch_tokens, longest_tokens)
        is_plain = all_plain(self.table.rows, self.table.num_layers)
        shape = replace(self.shape, attn_implementation=self.options.attn_implementation, is_plain=is_plain)
        transient_bytes = shape.compiled_transient_bytes if self.options.compile else shape.transient_bytes
        return Workload(
            batch_tokens=self.options.batch_tokens,
            padded_tokens=padded_tokens,
            longest_tokens=longest_tokens,
            token_bytes=self.table.handed_bytes(self.itemsize_bytes),
            itemsize_bytes=self.itemsize_bytes,
            transient_bytes=transient_bytes(padded_tokens, longest_tokens, self.itemsize_bytes) + padded_tokens * self._shown_bytes,
            writer_queue_bytes=self.options.writer_queue_bytes,
            encoding_bytes=self._encoding_bytes(padded_tokens),
        )

    @property
    def _shown_bytes(self) -> int:
        """Of a token, what the sites within a layer keep until it has run (m2ray.model.site_hooks). The stream is there anyway."""
        captured = {part.site for part in self.options.captured}
        hidden, routers = captured & {"attention", "mlp_in", "mlp"}, captured & {"router_logits", "router_topk"}
        return len(hidden) * self.table.hidden_size * self.itemsize_bytes + len(routers) * self.table.num_experts * 4

    def _encoding_bytes(self, padded_tokens: int) -> int:
        """Of rows that are stored in 8 bits: as they were computed, and what encoding them takes."""
        if self.options.store_dtype not in EIGHT_BITS:
            return 0
        row_bytes = self.table.hidden_size * self.itemsize_bytes
        return padded_tokens * row_bytes + ENCODING_BYTES

    def rows(self, span: LayerSpan) -> tuple[TensorRow, ...]:
        """The tensors that a stage of `span` loads."""
        return span_rows(self.table, span, with_final_norm=self.with_final_norm)

    def bytes_in(self, residency: Mapping[int, Residency], place: Residency) -> int:
        """Packed bytes of the layers that live in `place`."""
        return sum(self.packed_bytes[layer] for layer, where in residency.items() if where == place)

    def parts(self, span: LayerSpan) -> tuple[PartSpec, ...]:
        """What a stage of `span` stores rows of."""
        return self._here(self.options.parts, span)

    def row_bytes(self, span: LayerSpan) -> list[int]:
        """Bytes of a row of each part of `span` whose rows are stored."""
        return [part.row_bytes for part in self.parts(span)]

    def column_bytes(self, span: LayerSpan) -> list[int]:
        """The same of each column of each part, and of its CRC, as a GPU hands them over."""
        return [num_bytes for part in self.parts(span) for column in part.columns for num_bytes in (column.row_bytes, CRC_BYTES)]

    def captured_row_bytes(self, span: LayerSpan | None = None) -> int:
        """Bytes of one token's captured rows, stored or for their statistics, that are on a GPU of `span`, or any, at one time."""
        of_layers = _by_layer(self._here(self.options.captured, span))
        layers_bytes = (sum(part.row_bytes + CRC_BYTES * len(part.columns) for part in parts) for parts in of_layers)
        return CAPTURE_BUFFERS * max(layers_bytes, default=0)

    def statistics_on_host(self, span: LayerSpan) -> int:
        """Host memory for the statistics of `span`: of the shards that are summed up, and of the micro-batches that are on their way to them."""
        return sum(
            (STATISTICS_SHARDS + self.wave_tokens // self.options.shard_tokens) * shard_bytes(kinds, width)
            + STATISTICS_MICRO_BATCHES * micro_batch_bytes(kinds, width)
            for kinds, width in self._taken(span)
        )

    def statistics_on_device(self, span: LayerSpan | None = None) -> int:
        """Device memory for the statistics of `span`, or of any: one part's while they are taken, and results on their way to the host."""
        rows = self.workload.padded_tokens
        of_layers = [list(self._kinds(parts)) for parts in _by_layer(self._here(self.options.of_statistics, span))]
        copied = CAPTURE_BUFFERS * max((sum(micro_batch_bytes(*each) for each in taken) for taken in of_layers), default=0)
        return copied + max((device_bytes(*each, rows) for taken in of_layers for each in taken), default=0)

    def output(self, prompts: PromptStats) -> OutputPlan:
        """What the run folder will hold for these prompts."""
        taken = self._taken(None)
        merged, shards = sum(merged_bytes(*each) for each in taken), prompts.shards * sum(contribution_bytes(*each) for each in taken)
        options = self.options
        return plan_output(options.parts, prompts, self.assumed.price_per_gb_month, options.compression, merged, shards)

    def _taken(self, span: LayerSpan | None) -> list[tuple[frozenset[str], int]]:
        """The statistics of each part of `span`, or of all: their kinds, and how wide they are."""
        return list(self._kinds(self._here(self.options.of_statistics, span)))

    def _kinds(self, parts: Sequence[PartSpec]) -> Iterator[tuple[frozenset[str], int]]:
        return widths(self.options.statistics, parts, self.table.num_experts)

    def _here(self, parts: Sequence[PartSpec], span: LayerSpan | None) -> tuple[PartSpec, ...]:
        return tuple(parts) if span is None else parts_of_span(parts, span, self.table.num_layers)

    def is_whole(self, span: LayerSpan) -> bool:
        """Whether these are all of the model's layers: a device with them hands nothing on, and gets nothing handed."""
        return len(span) == self.table.num_layers

    def room_bytes(self, device: Device, span: LayerSpan, residency: Mapping[int, Residency], *, is_alone: bool) -> int | None:
        """What a device has for weights, so that neither running nor loading exceeds what may be used; None where that is not known."""
        if device.usable_bytes is None:
            return None
        if device.gpu is None:
            return device.usable_bytes - self.cpu_memory({}, device.node, span, residency).peak_bytes
        loading = STAGING_BYTES["device"] + UNUSABLE_BYTES + CONTEXT_BYTES
        handed_bytes = self.overhead["hidden_states"] if is_alone else 0
        return device.usable_bytes - max(sum(self.overhead.values()) - handed_bytes, loading)

    def cpu_memory(self, held: Mapping[str, int], node: Node, span: LayerSpan, residency: Mapping[int, Residency]) -> Memory:
        """Of a stage of `span` without a GPU, whose weights are `held`. Layers that are not ready are read as they lie on disk, not unpacked."""
        statistics_bytes = self.statistics_on_host(span) + self.statistics_on_device(span)
        made_ready = [row for row in self.rows(span) if row.role != "layer" or row.layer not in residency]
        staging = staging_bytes(made_ready, self.options.compute_dtype) + readers_on_cpu_bytes(node, self.bytes_in(residency, "host"))
        num_tokens = max((row.shape[0] for row in self.table.rows if row.role == "embedding"), default=0)
        beside = {"process": process_bytes(node, num_tokens), "staging": staging}
        return cpu_memory({**held, **beside}, self.workload, self.row_bytes(span), statistics_bytes)

    def span_bytes(self, span: LayerSpan) -> int:
        """What a stage of `span` loads, ready."""
        first, last = self.end_bytes
        ends = (first if span.start == 0 else 0) + (last if span.stop == self.table.num_layers else 0)
        return sum(self.layer_bytes[span.start : span.stop]) + ends

    def wave_bytes(self, span: LayerSpan) -> int:
        """Hidden states of a wave that a stage of `span` takes through its layers, and of the next one, which waits for its turn there."""
        tokens = min(self.wave_tokens, MOST_BATCHES * self.workload.padded_tokens)
        return tokens * self.workload.token_bytes * (2 if span.start else 1)

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """Of each layer that is run, ready."""
        return self.table.layer_bytes(self.itemsize_bytes)[: self.num_layers]

    @cached_property
    def packed_bytes(self) -> tuple[int, ...]:
        """Of each layer that is run, as it lies in the files, and elsewhere where it does not lie ready."""
        return self.table.packed_bytes()[: self.num_layers]

    @cached_property
    def end_bytes(self) -> tuple[int, int]:
        """Of what lives with the first layer, and with the last."""
        last = self.table.role_bytes("final_norm", self.itemsize_bytes) if self.with_final_norm else 0
        return self.table.role_bytes("embedding", self.itemsize_bytes), last

    @cached_property
    def is_quantised(self) -> tuple[bool, ...]:
        """Of each layer that is run, whether any of its tensors is packed on disk, and not computed with so."""
        quantised = {row.layer for row in self.table.rows if row.role == "layer" and row.method and not row.stays_packed}
        return tuple(layer in quantised for layer in range(self.num_layers))

    @property
    def is_packed(self) -> bool:
        """Whether any layer that is run is."""
        return any(self.is_quantised)

    @cached_property
    def unpacked_bytes(self) -> tuple[int, ...]:
        """Of each layer that is run, what is unpacked of it before it runs, where it does not lie ready."""
        return self.table.unpacked_bytes(self.options.compute_dtype)[: self.num_layers]

    @cached_property
    def unpacking_bytes(self) -> tuple[float, ...]:
        """Of each layer that is run, what a GPU's memory could move in the time in which it is unpacked."""
        return unpacking_bytes(self.table.rows, self.num_layers, self.options.compute_dtype)

    def narrowed(self) -> "Iterator[Demand]":
        """The same with less and less of a choice where weights live, from what runs fastest on: all ready, all on the devices, as asked for.

        Where not all are ready there is room for a wave, but in the last of these.
        """
        on_devices = self.asking(offload="none", offload_folder=None)
        if self.options.weights == "auto":
            yield on_devices.asking(weights="bf16")
        for asked in (on_devices, self) if self.options.offload != "none" else (self,):
            yield replace(asked, wave_tokens=USUAL_WAVE_TOKENS)
        yield self

    @cached_property
    def overhead(self) -> dict[str, int]:
        """What a GPU holds besides weights, whichever span it gets."""
        return gpu_overhead(self.workload, self.captured_row_bytes(), self.statistics_on_device())


def _by_layer(parts: Iterable[PartSpec]) -> Collection[list[PartSpec]]:
    """The parts of each layer, and those of the whole model."""
    of_layers: dict[int | None, list[PartSpec]] = {}
    for part in parts:
        of_layers.setdefault(part.layer, []).append(part)
    return of_layers.values()
