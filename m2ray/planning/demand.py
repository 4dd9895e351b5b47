"""What is asked of a run, and what that asks of each device: tensors, parts and bytes of any span."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from m2ray.batches import ITEMSIZE_BYTES, LayerSpan, PartSpec, PromptStats, Residency, TensorRow, TensorTable
from m2ray.options import RunOptions
from m2ray.planning.devices import Device
from m2ray.planning.memory import (
    CAPTURE_BUFFERS,
    CONTEXT_BYTES,
    ENCODING_BYTES,
    OFFLOAD_BUFFERS,
    STAGING_BYTES,
    STATISTICS_MICRO_BATCHES,
    STATISTICS_SHARDS,
    UNUSABLE_BYTES,
    ModelShape,
    Workload,
    gpu_overhead,
    span_rows,
)
from m2ray.planning.output import OutputPlan, plan_output
from m2ray.planning.partition import DeviceMap, partition, short_by_bytes
from m2ray.planning.profile import Profile
from m2ray.sites import EIGHT_BITS, layers_run, parts_of_span
from m2ray.statistics import contribution_bytes, device_bytes, merged_bytes, micro_batch_bytes, shard_bytes, widths


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
    """A model, its dimensions, what is asked of it, and under which assumptions."""

    table: TensorTable
    shape: ModelShape
    options: RunOptions
    assumed: Assumptions = field(default_factory=Assumptions)

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
        return ITEMSIZE_BYTES[self.options.compute_dtype]

    @cached_property
    def workload(self) -> Workload:
        longest_tokens = self.assumed.longest_tokens or self.options.batch_tokens
        padded_tokens = max(self.options.batch_tokens, longest_tokens)
        shape = replace(self.shape, attn_implementation=self.options.attn_implementation)
        transient_bytes = shape.compiled_transient_bytes if self.options.compile else shape.transient_bytes
        return Workload(
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
        """Bytes of the weights of the layers that live in `place`."""
        return sum(self._costs[0][layer] for layer, where in residency.items() if where == place)

    def parts(self, span: LayerSpan) -> tuple[PartSpec, ...]:
        """What a stage of `span` stores rows of."""
        return self._here(self.options.parts, span)

    def row_bytes(self, span: LayerSpan) -> list[int]:
        """Bytes of a row of each part of `span` whose rows are stored."""
        return [part.row_bytes for part in self.parts(span)]

    def column_bytes(self, span: LayerSpan) -> list[int]:
        """The same of each column of each part."""
        return [column.row_bytes for part in self.parts(span) for column in part.columns]

    def captured_row_bytes(self, span: LayerSpan | None = None) -> int:
        """Bytes of one token's captured rows, stored or for their statistics, that are on a GPU of `span`, or any, at one time."""
        of_layers = _by_layer(self._here(self.options.captured, span))
        return CAPTURE_BUFFERS * max((sum(part.row_bytes for part in parts) for parts in of_layers), default=0)

    def statistics_on_host(self, span: LayerSpan) -> int:
        """Host memory for the statistics of `span`: of the shards that are summed up, and of the micro-batches that are on their way to them."""
        return sum(
            STATISTICS_SHARDS * shard_bytes(kinds, width) + STATISTICS_MICRO_BATCHES * micro_batch_bytes(kinds, width)
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

    def short_bytes(self, devices: Sequence[Device]) -> int:
        """Bytes of one chain's weights that these devices have no room for; 0 if it fits."""
        short = short_by_bytes(*self._costs, self._caps_bytes(devices))
        if not short or self.options.offload == "none":
            return short
        return sum(self._too_much_bytes(span, devices[place]) for place, span in self.split(devices).items())

    def split(self, devices: Sequence[Device]) -> dict[int, LayerSpan]:
        """Deal the layers out over one chain's devices: the span of each that gets some, by its place. Raises ClusterError where `short_bytes` is not 0."""
        options = self.options
        device_map = "sequential" if options.device_map.startswith("cuda:") else cast("DeviceMap", options.device_map)
        # A GPU may stay free, but a number of stages that was asked for is one of stages with layers.
        least_first = int(options.stages is not None and (devices[0].gpu is None or options.gpus_per_stage == 1))
        if devices[0].gpu is None:  # no cap on any: layers are dealt out by their time, and the embedding takes none
            layers, _, _ = self._costs
            return partition(layers, 0, 0, [None] * len(devices), device_map, least_first)
        caps_bytes = self._caps_bytes(devices)
        if self.options.offload != "none" and short_by_bytes(*self._costs, caps_bytes):
            return partition(*self._costs, [None] * len(devices), "balanced")
        return partition(*self._costs, caps_bytes, device_map, least_first)

    def layers_outside(self, span: LayerSpan, device: Device) -> range:
        """The layers at a span's end whose weights find no room on the device."""
        (cap_bytes,) = self._caps_bytes([device])
        if self.options.offload == "none" or cap_bytes is None or self._span_bytes(span) <= cap_bytes:
            return range(0)
        room_bytes = cap_bytes - self.buffers_bytes(span)
        kept = next(stop for stop in range(span.stop - 1, span.start - 1, -1) if stop == span.start or self._fits(span, stop, room_bytes))
        return range(kept, span.stop)

    def buffers_bytes(self, span: LayerSpan) -> int:
        """The buffers on a GPU into which layers that live elsewhere are brought."""
        layers, _, _ = self._costs
        return OFFLOAD_BUFFERS * max(layers[number] for number in range(span.start, span.stop))

    def _fits(self, span: LayerSpan, stop: int, room_bytes: int) -> bool:
        return self._span_bytes(LayerSpan(span.start, stop)) <= room_bytes

    def _too_much_bytes(self, span: LayerSpan, device: Device) -> int:
        """What a device lacks for the least that it must hold where layers live elsewhere: buffers, and weights of no layer."""
        (cap_bytes,) = self._caps_bytes([device])
        layers, _, _ = self._costs
        least_bytes = self.buffers_bytes(span) + self._span_bytes(span) - sum(layers[span.start : span.stop])
        return 0 if cap_bytes is None else max(0, least_bytes - cap_bytes)

    def _span_bytes(self, span: LayerSpan) -> int:
        layers, first, last = self._costs
        return sum(layers[span.start : span.stop]) + (first if span.start == 0 else 0) + (last if span.stop == self.table.num_layers else 0)

    @cached_property
    def overhead(self) -> dict[str, int]:
        """What a GPU holds besides weights, whichever span it gets."""
        return gpu_overhead(self.workload, self.captured_row_bytes(), self.statistics_on_device())

    @cached_property
    def _costs(self) -> tuple[Sequence[int], int, int]:
        """(bytes of each layer that is run, those that live with the first, with the last)."""
        layers = self.table.layer_bytes(self.itemsize_bytes)[: self.num_layers]
        last = self.table.role_bytes("final_norm", self.itemsize_bytes) if self.with_final_norm else 0
        return layers, self.table.role_bytes("embedding", self.itemsize_bytes), last

    def _caps_bytes(self, devices: Sequence[Device]) -> list[int | None]:
        """Room for weights on each device, so that neither running nor loading exceeds what may be used."""
        loading = STAGING_BYTES["device"] + UNUSABLE_BYTES + CONTEXT_BYTES
        reserved = max(sum(self.overhead.values()), loading)
        return [None if device.usable_bytes is None else device.usable_bytes - reserved for device in devices]


def _by_layer(parts: Iterable[PartSpec]) -> Collection[list[PartSpec]]:
    """The parts of each layer, and those of the whole model."""
    of_layers: dict[int | None, list[PartSpec]] = {}
    for part in parts:
        of_layers.setdefault(part.layer, []).append(part)
    return of_layers.values()
