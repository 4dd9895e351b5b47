"""One stage: a span of the model, loaded and ready to run micro-batches. Pure torch; no Ray, and no I/O but reading the checkpoint."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from m2ray.batches import CapturedLayer, LayerSpan, MicroBatch, PartSpec, Residency, hidden_dtype
from m2ray.errors import ConfigError, raise_all
from m2ray.model.attention import FLEX_BLOCK, require_attention_to_sinks, require_machine, resolve_attn_implementation
from m2ray.model.boundary import Boundary, blank, row_width, shapes_at, token_bytes
from m2ray.model.capture import Capture, CaptureSpec, Taking, pin_host_memory
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.eight_bits import Encoder, Losses
from m2ray.model.families import default_max_length
from m2ray.model.float8.proof import require_gpu
from m2ray.model.gpu_loading import Lanes
from m2ray.model.interpreter import quick_switches, without_collector
from m2ray.model.sending import send
from m2ray.model.site_table import refused_sites
from m2ray.model.skeleton import build_skeleton
from m2ray.model.vector_math import settle_vector_math
from m2ray.model.weights import Loaded, OnBytes, load_weights, parameter_bytes
from m2ray.sites import parts_of_run, parts_of_span
from m2ray.statistics import Place, places, statistic_sites
from m2ray.toolchain import require_triton

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float8": torch.bfloat16}
"""Of hidden states and of what is computed beside products, by compute dtype."""


@dataclass(frozen=True)
class StageSpec:
    """What a stage loads; what a job takes of it is `CaptureSpec`.

    Attributes:
        model_url: the checkpoint's folder.
        span: the layers it owns.
        compute_dtype: "bfloat16", "float16", "float32", or "float8" (m2ray.model.float8).
        attn_implementation: "auto", "eager", "sdpa", "flash_attention_2" or "flex_attention" (m2ray.model.attention).
        device: "cpu" or "cuda:0".
        threads: torch threads on the CPU, for the whole process; None leaves them as they are.
        compile: whether the layers are compiled by torch.compile, which changes results by rounding (docs/numerics.md).
        any_sites: whether compiled layers show all their sites whatever a job takes, so that no job of other sites makes another graph.
        residency: where those of its layers live that are not kept ready on the device (m2ray.model.residency).
        offload_folder: where layers that are read from files are copied first, there or yet to be made; "" to read the model's own each time.
        wave_tokens: padded tokens of the micro-batches that go through a layer before the next, at most; less than two hold: one at a time.
        with_final_norm: whether the stage of the model's last layer loads the final norm, for the site of that name.
        model_files: the files that are needed, and the digest that each has to have (`Checkpoint.digests`); None takes what is there.
    """

    model_url: str
    span: LayerSpan
    compute_dtype: str
    attn_implementation: str
    device: str
    threads: int | None
    compile: bool = False
    any_sites: bool = False
    residency: Mapping[int, Residency] = field(default_factory=dict)
    offload_folder: str = ""
    wave_tokens: int = 0
    with_final_norm: bool = False
    model_files: Mapping[str, str] | None = None


class StageOutput:
    """What one micro-batch leaves: the boundary for the next stage (None from the model's last layer), and captured rows.

    In a wave it comes in pieces, a run of layers each: `leaves` says whether this is the last, which has the boundary.

    On a GPU neither need be computed yet: `ready` is the event after which the boundary is, `on_host` and `captured`
    wait by themselves, and may be used on other threads.
    """

    def __init__(self, micro_batch: MicroBatch, boundary: Boundary | None, capture: Capture, timed: "_Timed", *, leaves: bool) -> None:
        self.micro_batch = micro_batch
        self.boundary = boundary
        self.leaves = leaves
        self.ready = timed.end
        self._capture = capture
        self._timed = timed

    @cached_property
    def captured(self) -> tuple[CapturedLayer, ...]:
        """One entry a part of these layers, on the host. Raises StageError if a row is not finite in the store dtype."""
        return self._capture.finish()

    @cached_property
    def compute_s(self) -> float:
        """Seconds between the first layer's begin and the last one's end, on the device's own clock. Waits for the end."""
        return self._timed.elapsed_s

    def on_host(self) -> Boundary:
        """The boundary in host memory; from a GPU in pinned memory, copied beside whatever is computed next."""
        assert self.boundary is not None, "the last stage has nobody to hand on to"
        if self.ready is None:
            return self.boundary
        stream = torch.cuda.Stream(self.boundary.hidden_BTH.device)
        stream.wait_event(self.ready)

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            on_host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            return on_host

        with torch.cuda.stream(stream):
            on_host = self.boundary.map(copied)
        stream.synchronize()
        return on_host


class _Timed:
    """The time that a micro-batch's layers take: CUDA events on a GPU, where calls return before the work is done."""

    end: "torch.cuda.Event | None" = None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began_s = time.perf_counter()
        self._elapsed_s = 0.0
        if device.type == "cuda":
            self._begin = self._event()

    def finish(self) -> None:
        if self._device.type == "cuda":
            self.end = self._event()
        self._elapsed_s = time.perf_counter() - self._began_s

    @property
    def elapsed_s(self) -> float:
        if self.end is None:
            return self._elapsed_s
        self.end.synchronize()
        milliseconds: float = self._begin.elapsed_time(self.end)
        return milliseconds / 1000

    def _event(self) -> "torch.cuda.Event":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Stage:
    """A loaded span, which captures nothing until `begin`. One `forward` at a time.

    Attributes:
        needed_bytes: checkpoint bytes of the span's tensors, scales included.
        digests: what was loaded of each layer (m2ray.model.digests).
        bare_last_layer: what was loaded of the model's last layer beside the final norm; None if that was not loaded.
        bytes_read: tensor bytes that were read to load them.
        parameter_bytes: bytes of the span's tensors from the checkpoint, in memory.
        handed_bytes: of one token, to the next stage, at most.
    """

    def __init__(self, spec: StageSpec, decoder: DecoderSpan, loaded: Loaded, bytes_read: int) -> None:
        config = decoder.skeleton.config
        self.is_first = spec.span.start == 0
        self.is_last = spec.span.stop == config.num_hidden_layers
        self.needed_bytes, self.digests, self.bare_last_layer = loaded
        self.bytes_read = bytes_read
        self.parameter_bytes = parameter_bytes(decoder)
        self.handed_bytes = token_bytes(config, spec.span.stop, DTYPES[spec.compute_dtype])
        self._spec = spec
        self._decoder = decoder
        self._on_gpu = decoder.device.type == "cuda"
        self._copy_in = torch.cuda.Stream(decoder.device) if self._on_gpu else None
        self._copy_out = torch.cuda.Stream(decoder.device) if self._on_gpu else None
        self._running: deque[torch.cuda.Event] = deque()
        self._full_tokens = 0
        """Of a full micro-batch, once the warm-up tells."""
        self._runs = layer_runs(spec.span, spec.residency)
        self._watching: Taking | None = None
        self.begin(CaptureSpec({}, hidden_dtype(spec.compute_dtype)))

    @property
    def parts(self) -> tuple[PartSpec, ...]:
        """Whose rows every micro-batch's capture holds, in order."""
        return self._of_the_job.parts

    @property
    def statistics(self) -> Mapping[Place, frozenset[str]]:
        """The sites and layers of which it holds statistics, with their kinds."""
        return self._of_the_job.statistics

    def begin(self, capture: CaptureSpec) -> None:
        """From the next micro-batch on, keep what `capture` asks for of the span's layers. Raises ConfigError as `taking`."""
        self._of_the_job = self.taking(capture)

    def taking(self, capture: CaptureSpec) -> Taking:
        """What `capture` asks for of the span's layers, for `forward`.

        Raises:
            ConfigError: the model has no such site or no such layer, a layer lacks the site, or the final norm was not loaded.
        """
        of_statistics, kinds = statistic_sites(capture.statistics), places(capture.statistics)
        layers_of = {site: {*capture.sites.get(site, ()), *of_statistics.get(site, ())} for site in {**capture.sites, **of_statistics}}
        raise_all([problem for site, layers in layers_of.items() for problem in self._why_not(site, sorted(layers))])
        counted = {part: kinds[part.site, part.layer] for part in self._parts(of_statistics, capture.store_dtype)}
        return Taking(self._parts(capture.sites, capture.store_dtype), counted, capture.selection, self._decoder.experts[0])

    def _parts(self, asked: Mapping[str, tuple[int, ...]], store_dtype: str) -> tuple[PartSpec, ...]:
        """Those of a job's parts that are of the span."""
        config = self._decoder.skeleton.config
        of_the_job = parts_of_run(asked, store_dtype, row_width(config), *self._decoder.experts)
        return parts_of_span(of_the_job, self._spec.span, config.num_hidden_layers)

    def _why_not(self, site: str, layers: Sequence[int]) -> Iterator[ConfigError]:
        config, there = self._decoder.skeleton.config, self._decoder.site_layers
        if site not in there:
            why = refused_sites(config).get(site)
            yield ConfigError(f"sites = {site!r}: a {config.model_type} has no such site{f': {why}' if why else ''}.")
        elif outside := [layer for layer in layers if layer >= config.num_hidden_layers]:
            yield ConfigError(f"Captured layers {outside}: the model has layers 0 to {config.num_hidden_layers - 1}.")
        elif lacking := sorted(set(layers) - set(there[site])):
            yield ConfigError(f"sites = {site!r}: layers {lacking} have no such site.")
        elif site == "final_norm" and self.is_last and not self._decoder.with_final_norm:
            yield ConfigError(f"sites = {site!r}: the stage has not loaded the final norm.")

    def forward(self, micro_batch: MicroBatch, incoming: Boundary | None, taking: Taking | None = None) -> StageOutput:
        """Take a micro-batch through the span.

        Args:
            micro_batch: whose tokens the first stage embeds, and whose lengths say which rows are real.
            incoming: what the stage before returned, on the stage's device or on the host; None for the first.
            taking: what is kept of this one alone, in place of what `begin` was given.

        Raises:
            StageError: a captured row is not finite in the store dtype; on a GPU, `StageOutput.captured` raises it.
        """
        output, _ = self._pass(micro_batch, incoming, self._spec.span, taking or self._of_the_job)
        return output

    def forward_wave(self, batches: "deque[tuple[MicroBatch, Boundary | None]]") -> Iterator[StageOutput]:
        """Take micro-batches through the span together: all of them through a run of layers before the next run (`layer_runs`).

        Args:
            batches: each with what the stage before returned, as in `forward`. Emptied as they go in, so that nothing is held twice.

        Yields:
            Run by run, what each micro-batch leaves there, in their order; computed as it is asked for. On a GPU no more than a few may be asked for
            before `captured` of the first is: rows keep their memory until then.

        Raises:
            StageError: as `forward`.
        """
        for layers in self._runs if len(batches) > 1 else (self._spec.span,):
            through: deque[tuple[MicroBatch, Boundary | None]] = deque()
            while batches:
                output, boundary = self._pass(*batches.popleft(), layers, self._of_the_job)
                if not output.leaves:
                    through.append((output.micro_batch, boundary))
                del boundary
                yield output
                del output
            batches = through

    def _pass(self, micro_batch: MicroBatch, incoming: Boundary | None, layers: LayerSpan, taking: Taking) -> tuple[StageOutput, Boundary]:
        """Take a micro-batch through some layers."""
        if incoming is not None:
            self._check(micro_batch, incoming, layers.start)
        self._wait_for_gpu()
        if taking is not self._watching:
            self._decoder.watch(taking.places)
            self._watching = taking
        parts = parts_of_span(taking.parts, layers, self._decoder.skeleton.config.num_hidden_layers)
        with torch.inference_mode(), _current(self._decoder.device):
            capture = Capture(micro_batch, parts, taking.selection, taking.encoder, self._copy_out, taking.counting, self._full_tokens)
            token_ids_BT = torch.tensor(micro_batch.token_ids_BT, dtype=torch.int64)
            if self._on_gpu:
                token_ids_BT = send(token_ids_BT, self._decoder.device)
            incoming = self._to_device(incoming)
            timed = _Timed(self._decoder.device)
            boundary = self._decoder.run(token_ids_BT, incoming, capture.keep, layers)
            timed.finish()
            capture.end()
        if timed.end is not None:
            self._running.append(timed.end)
        leaves = layers.stop == self._spec.span.stop
        output = StageOutput(micro_batch, boundary if leaves and not self.is_last else None, capture, timed, leaves=leaves)
        if not self._on_gpu:
            _ = output.captured  # what is wrong with a row is said where it was computed
        return output, boundary

    def losses(self) -> Losses:
        """What rows in 8 bits have lost since `begin`."""
        return self._of_the_job.encoder.losses()

    def warm_up(self, batch_tokens: int, waiting_bytes: int = 0, on_left: Callable[[int], None] = lambda _: None) -> None:
        """Run once for every shape that may come, so that no micro-batch has to wait for a compilation, a library's start or memory.

        torch.compile makes a first graph for one shape and, on seeing a second one, a graph for all others; a batch of one is a
        shape of its own, and so are for flex_attention sequences within one block of its mask.

        Args:
            batch_tokens: padded tokens of a full micro-batch.
            waiting_bytes: of captured rows that may wait for the store.
            on_left: called with the micro-batches that are still to run, before the first and after each.
        """
        config = self._decoder.skeleton.config
        self._full_tokens = batch_tokens
        if self._on_gpu and self.parts and self._of_the_job.selection.is_all:  # rows of chosen tokens come in pieces of any size
            num_layers = self._decoder.skeleton.config.num_hidden_layers
            of_runs = [parts_of_span(self.parts, layers, num_layers) for layers in self._runs]
            capture_bytes = batch_tokens * max(sum(part.row_bytes for part in parts) for parts in of_runs)
            columns = [column for part in self.parts for column in part.columns]
            # Beside what waits, of two micro-batches: one that is computed, and one whose rows are handed over.
            pin_host_memory(waiting_bytes + 2 * capture_bytes, batch_tokens, columns)
        longest = max(4, min(1024, default_max_length(config), batch_tokens // 2))
        full = -(-batch_tokens // longest)
        shapes = [(full, batch_tokens // full), (batch_tokens // (longest // 2), longest // 2), (1, longest)]
        if self._decoder.skeleton.attn_implementation == "flex_attention":
            short = min(longest, FLEX_BLOCK // 2)
            shapes += [(max(2, batch_tokens // short), short), (1, short)]
        try:
            self._try(shapes, on_left)
        finally:
            if self._on_gpu:
                torch.cuda.empty_cache()  # of what compiling took
        if self._on_gpu:
            # The blocks that torch's allocator keeps from the largest micro-batch serve all others; those of smaller ones would not serve it.
            self._try(shapes[:1], on_left)
        self._of_the_job.encoder = Encoder()  # these rows are nobody's

    def _try(self, shapes: Sequence[tuple[int, int]], on_left: Callable[[int], None]) -> None:
        """Run a wave of micro-batches of zeros."""
        on_left(len(shapes))
        wave = deque(self._zeros(max(num_sequences, 1), length) for num_sequences, length in shapes)
        left = len(shapes)
        for output in self.forward_wave(wave):
            _ = output.captured
            left -= output.leaves
            on_left(left)

    def _zeros(self, num_sequences: int, length: int) -> tuple[MicroBatch, Boundary | None]:
        counts = np.full(num_sequences, length, np.int32)
        shape = (num_sequences, length)
        micro_batch = MicroBatch(0, 0, True, np.arange(num_sequences), counts, np.zeros(shape, np.int32), np.ones(shape, np.bool_))
        dtype = DTYPES[self._spec.compute_dtype]
        return micro_batch, None if self.is_first else blank(self._decoder.skeleton.config, self._spec.span.start, shape, dtype)

    def _check(self, micro_batch: MicroBatch, incoming: Boundary, layer: int) -> None:
        num_sequences, length = micro_batch.token_ids_BT.shape
        wanted = shapes_at(self._decoder.skeleton.config, layer, (num_sequences, length), DTYPES[self._spec.compute_dtype])
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in incoming.tensors.items()}
        assert found == wanted, f"hidden states and what goes with them came as {found}, not as {wanted}"
        # What the host sends is copied in that mode, and so was what the warm-up ran; for other tensors the first layer is compiled again.
        here = [tensor for tensor in incoming.tensors.values() if tensor.is_cuda]
        assert all(tensor.is_inference() for tensor in here), "what comes in on a GPU has to be made in inference mode"

    def _wait_for_gpu(self) -> None:
        """Let the host run ahead of the GPU by two micro-batches, so that neither waits for the other and memory stays bounded."""
        while len(self._running) >= 2:
            self._running.popleft().synchronize()

    def _to_device(self, incoming: Boundary | None) -> Boundary | None:
        """Copy what comes in beside the computation that is still running; pinned memory makes it overlap."""
        if incoming is None or self._copy_in is None or incoming.hidden_BTH.device == self._decoder.device:
            return incoming
        with torch.cuda.stream(self._copy_in):
            on_device = incoming.map(lambda tensor: tensor.to(self._decoder.device, non_blocking=True))
        computing = torch.cuda.current_stream(self._decoder.device)
        computing.wait_stream(self._copy_in)
        for tensor in on_device.tensors.values():
            tensor.record_stream(computing)
        return on_device


def _current(device: torch.device) -> "torch.cuda.device":
    """Makes a GPU the thread's own while it lasts, as a context: Triton launches kernels there, wherever their tensors are. A CPU changes nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def layer_runs(span: LayerSpan, residency: Mapping[int, Residency]) -> tuple[LayerSpan, ...]:
    """The runs of layers that a wave goes through one after the other: one for each layer that is not ready where it runs, with the ready ones behind."""
    brought = [layer for layer in range(span.start, span.stop) if residency.get(layer, "gpu") != "gpu"]
    return tuple(LayerSpan(*ends) for ends in pairwise((span.start, *brought[1:], span.stop)))


def load_stage(spec: StageSpec, on_bytes: OnBytes) -> Stage:
    """Build the span of `spec` and read its tensors, and no others.

    Args:
        on_bytes: called as tensors arrive, with the bytes read so far and those needed.

    Raises:
        CheckpointError: files are damaged or not those of `model_files`, or the span's tensors missing, unknown or misshapen; all at once.
        ConfigError: the family, the dtype or this machine cannot have such attention, the span is not in the model, or weights or machine are none
            for FP8.
        StoreError: reading fails.
    """
    settle_vector_math()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    if device.type != "cuda":
        with without_collector():
            return _load_stage(spec, device, None, on_bytes)
    with without_collector(), quick_switches(), Lanes(device) as lanes:
        return _load_stage(spec, device, lanes, on_bytes)


def _load_stage(spec: StageSpec, device: torch.device, lanes: Lanes | None, on_bytes: OnBytes) -> Stage:
    checkpoint = open_checkpoint(spec.model_url)
    if spec.model_files is not None:
        checkpoint = checkpoint.only(spec.model_files)
    checkpoint.check()
    if spec.model_files is not None:
        checkpoint.require(spec.model_files)
    compute_dtype = DTYPES[spec.compute_dtype]
    attn_implementation = resolve_attn_implementation(checkpoint.whole_config, spec.attn_implementation, compute_dtype)
    require_machine(checkpoint.config, attn_implementation, device)
    in_float8 = spec.compute_dtype == "float8"
    if in_float8:
        require_gpu(device)
    if spec.compile and device.type == "cuda":
        require_triton("compile = true")
    skeleton = build_skeleton(checkpoint.whole_config, compute_dtype, attn_implementation)
    require_attention_to_sinks(skeleton.config, attn_implementation, skeleton.tensors)
    if spec.span.stop > len(skeleton.layers):
        raise ConfigError(f"{spec.span}: the model has layers 0 to {len(skeleton.layers) - 1}.")
    decoder = DecoderSpan(skeleton, spec.span, device, spec.residency, spec.offload_folder, with_final_norm=spec.with_final_norm)
    loaded = load_weights(checkpoint, decoder, on_bytes, lanes, in_float8=in_float8)
    if spec.compile:
        decoder.compile_layers(any_sites=spec.any_sites)
    return Stage(spec, decoder, loaded, checkpoint.bytes_read)
