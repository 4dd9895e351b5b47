"""What is asked of a run, and what that asks of each device: tensors, parts and bytes of any span."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

from m2ray.batches import LayerSpan, PartSpec, TensorRow, TensorTable
from m2ray.planning.devices import ChainOptions, Device
from m2ray.planning.memory import CONTEXT_BYTES, STAGING_BYTES, UNUSABLE_BYTES, ModelShape, Workload, gpu_overhead, span_rows
from m2ray.planning.output import ITEMSIZE_BYTES, row_bytes
from m2ray.planning.partition import DeviceMap, DeviceSpan, partition, short_by_bytes
from m2ray.planning.profile import Profile


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of the run.

    Attributes:
        parts: what is captured, one for each site and layer; the last of the layers is the last that is run.
        compute_dtype: "bfloat16", "float16" or "float32".
        batch_tokens: padded tokens in a micro-batch, at most, unless a single sequence is longer.
        longest_tokens: of one sequence; None where it is not known: then one may be as long as a micro-batch.
        chains: stages, replicas, device map, limits.
        in_flight_bytes: hidden states between the stages of a chain at one time, at most.
        writer_queue_bytes: captured bytes that may wait for the store, a stage.
        disk_free_bytes: what the disk of the output has left; None for a bucket, or where it is not known.
        price_per_gb_month: of the output's store, for a GB of 10^9 bytes.
        tokens_per_s: real tokens a second that all chains together are assumed to do; None for an estimate from the GPUs' names.
        store_bytes_per_s: what the store is known to take.
        compiled: whether layers are compiled, as far as speed goes.
        profile: what `m2ray bench` measured, instead of estimates from the GPUs' names.
    """

    parts: tuple[PartSpec, ...]
    compute_dtype: str = "bfloat16"
    batch_tokens: int = 16_384
    longest_tokens: int | None = None
    chains: ChainOptions = field(default_factory=ChainOptions)
    in_flight_bytes: int = 4 << 30
    writer_queue_bytes: int = 2 << 30
    disk_free_bytes: int | None = None
    price_per_gb_month: float | None = None
    tokens_per_s: float | None = None
    store_bytes_per_s: float | None = None
    compiled: bool = False
    profile: Profile | None = None


@dataclass(frozen=True)
class Demand:
    """A model, its dimensions, and what is asked of it."""

    table: TensorTable
    shape: ModelShape
    options: PlanOptions

    @property
    def num_layers(self) -> int:
        """Layers that are run: up to the last that is captured."""
        if self.with_final_norm:
            return self.table.num_layers
        return max((part.layer for part in self.options.parts if part.layer is not None), default=0) + 1

    @property
    def with_final_norm(self) -> bool:
        return any(part.site == "final_norm" for part in self.options.parts)

    @property
    def itemsize_bytes(self) -> int:
        return ITEMSIZE_BYTES[self.options.compute_dtype]

    @cached_property
    def workload(self) -> Workload:
        longest_tokens = self.options.longest_tokens or self.options.batch_tokens
        return Workload(
            padded_tokens=max(self.options.batch_tokens, longest_tokens),
            longest_tokens=longest_tokens,
            hidden_size=self.table.hidden_size,
            itemsize_bytes=self.itemsize_bytes,
            writer_queue_bytes=self.options.writer_queue_bytes,
        )

    def rows(self, span: LayerSpan) -> tuple[TensorRow, ...]:
        """The tensors that a stage of `span` loads."""
        return span_rows(self.table, span, with_final_norm=self.with_final_norm)

    def parts(self, span: LayerSpan) -> tuple[PartSpec, ...]:
        """What a stage of `span` captures."""
        return tuple(
            part
            for part in self.options.parts
            if part.layer in span
            or (part.site == "embedding" and span.start == 0)
            or (part.site == "final_norm" and span.stop == self.table.num_layers)
        )

    def row_bytes(self, span: LayerSpan) -> list[int]:
        """Bytes of a row of each part that `span` captures."""
        return [row_bytes(part) for part in self.parts(span)]

    def short_bytes(self, devices: Sequence[Device]) -> int:
        """Bytes of one chain's weights that these devices have no room for; 0 if it fits."""
        return short_by_bytes(*self._costs, self._caps_bytes(devices))

    def split(self, devices: Sequence[Device]) -> tuple[DeviceSpan, ...]:
        """Deal the layers out over one chain's devices. Raises ClusterError where `short_bytes` is not 0."""
        is_one_gpu = self.options.chains.device_map.startswith("cuda:")
        device_map = "sequential" if is_one_gpu else cast("DeviceMap", self.options.chains.device_map)
        return partition(*self._costs, self._caps_bytes(devices), device_map)

    @cached_property
    def overhead(self) -> dict[str, int]:
        """What a GPU holds besides weights, whichever span it gets."""
        return gpu_overhead(self.workload, self.shape.transient_bytes, [row_bytes(part) for part in self.options.parts])

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
