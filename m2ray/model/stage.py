"""One stage: a span of the model, loaded and ready to run micro-batches. Pure torch; no Ray, and no I/O but reading the checkpoint."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from m2ray.batches import LayerSpan, MicroBatch, PartSpec, Residency, hidden_dtype
from m2ray.errors import ConfigError
from m2ray.model.arriving import Arriving
from m2ray.model.attention import require_attention_to_sinks, require_machine, resolve_attn_implementation
from m2ray.model.boundary import Boundary, blank, token_bytes
from m2ray.model.capture import Capture, CaptureSpec
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.eight_bits import Encoder, Losses
from m2ray.model.families import default_max_length
from m2ray.model.float8.proof import require_gpu
from m2ray.model.gpu_loading import Lanes
from m2ray.model.interpreter import quick_switches, without_collector
from m2ray.model.pinned import PinnedRuns, SharedRuns
from m2ray.model.sending import send
from m2ray.model.skeleton import build_skeleton
from m2ray.model.stage_output import StageOutput, Timed
from m2ray.model.taking import Taking, taking_of
from m2ray.model.vector_math import settle_vector_math
from m2ray.model.warm_up import rows_of_a_job, shapes_that_may_come, zeros
from m2ray.model.weights import Loaded, OnBytes, load_weights, parameter_bytes
from m2ray.sites import parts_of_span
from m2ray.statistics import Place
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
        shared: those of its layers in host memory of which one copy serves all processes of the node.
        wave_tokens: padded tokens of the micro-batches that go through a layer before the next, at most; less than two hold: one at a time.
        with_final_norm: whether the stage of the model's last layer loads the final norm, for the site of that name.
        model_files: the files that are needed, and the digest that each has to have (`Checkpoint.digests`); None takes what is there.
        weights: the digest that each layer has to have once it is loaded, and at None what runs before the first one; None takes what is there.
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
    shared: frozenset[int] = frozenset()
    wave_tokens: int = 0
    with_final_norm: bool = False
    model_files: Mapping[str, str] | None = None
    weights: Mapping[int | None, str] | None = None


class Stage:
    """A loaded span, which captures nothing until `begin`. One `forward` at a time.

    Attributes:
        needed_bytes: checkpoint bytes of the span's tensors, scales included.
        digests: what was loaded of each layer (m2ray.model.digests).
        bare_last_layer: what was loaded of the model's last layer beside the final norm; None if that was not loaded.
        bytes_read: tensor bytes that were read to load them.
        parameter_bytes: bytes of the span's tensors from the checkpoint, in memory.
        handed_bytes: of one token, to the next stage, at most.
        row_memory: where captured rows from a GPU lie on the host, from the next `warm_up` on; None for memory of torch's.
    """

    def __init__(self, spec: StageSpec, decoder: DecoderSpan, loaded: Loaded, bytes_read: int) -> None:
        config = decoder.skeleton.config
        self.is_first = spec.span.start == 0
        self.is_last = spec.span.stop == config.num_hidden_layers
        self.needed_bytes, self.digests, self.bare_last_layer = loaded
        self.bytes_read = bytes_read
        self.parameter_bytes = parameter_bytes(decoder)
        self.handed_bytes = token_bytes(config, spec.span.stop, DTYPES[spec.compute_dtype])
        self.row_memory: SharedRuns | None = None
        self._spec = spec
        self._decoder = decoder
        self._on_gpu = decoder.device.type == "cuda"
        self._arriving = Arriving(config, DTYPES[spec.compute_dtype], decoder.device)
        self._copy_out = torch.cuda.Stream(decoder.device) if self._on_gpu else None
        self._running: deque[torch.cuda.Event] = deque()
        self._pinned = PinnedRuns()
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
        return taking_of(self._decoder, capture)

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
            self._arriving.check(incoming, micro_batch, layers.start)
        self._wait_for_gpu()
        if taking is not self._watching:
            self._decoder.watch(taking.places)
            self._watching = taking
        parts = parts_of_span(taking.parts, layers, self._decoder.skeleton.config.num_hidden_layers)
        with torch.inference_mode(), _current(self._decoder.device):
            capture = Capture(
                micro_batch,
                parts,
                taking.selection,
                taking.encoder,
                self._copy_out,
                taking.counting,
                self._pinned,
                with_crcs=taking.with_crcs,
            )
            token_ids_BT = torch.tensor(micro_batch.token_ids_BT, dtype=torch.int64)
            if self._on_gpu:
                token_ids_BT = send(token_ids_BT, self._decoder.device)
            incoming = incoming and self._arriving.on_device(incoming)
            timed = Timed(self._decoder.device)
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

        Args:
            batch_tokens: padded tokens of a full micro-batch.
            waiting_bytes: of captured rows that may wait for the store.
            on_left: called with the micro-batches that are still to run, before the first and after each.
        """
        self._pinned = PinnedRuns(batch_tokens, self.row_memory)
        config, attention = self._decoder.skeleton.config, self._decoder.skeleton.attn_implementation
        if self._on_gpu:
            # Chosen tokens' rows are few: a run or two, which the first take.
            parts = self.parts if self._of_the_job.selection.is_all else ()
            of_runs = [parts_of_span(parts, layers, config.num_hidden_layers) for layers in self._runs]
            self._pinned.reserve(*rows_of_a_job(parts, of_runs, batch_tokens, waiting_bytes))
        shapes = shapes_that_may_come(batch_tokens, default_max_length(config), attention)
        try:
            self._try(shapes, on_left)
        finally:
            if self._on_gpu:
                torch.cuda.empty_cache()  # of what compiling took
        if self._on_gpu:
            # The blocks that torch's allocator keeps from the largest micro-batch serve all others; those of smaller ones would not serve it.
            self._try(shapes[:1], on_left)

    def _try(self, shapes: Sequence[tuple[int, int]], on_left: Callable[[int], None]) -> None:
        """Run a wave of micro-batches of zeros."""
        on_left(len(shapes))
        wave = deque(self._zeros(max(num_sequences, 1), length) for num_sequences, length in shapes)
        left = len(shapes)
        try:
            for output in self.forward_wave(wave):
                _ = output.captured
                left -= output.leaves
                on_left(left)
        finally:
            self._of_the_job.encoder = Encoder()  # these rows are nobody's, also where there was no room for all

    def _zeros(self, num_sequences: int, length: int) -> tuple[MicroBatch, Boundary | None]:
        dtype, shape = DTYPES[self._spec.compute_dtype], (num_sequences, length)
        return zeros(*shape), None if self.is_first else blank(self._decoder.skeleton.config, self._spec.span.start, shape, dtype)

    def _wait_for_gpu(self) -> None:
        """Let the host run ahead of the GPU by two micro-batches, so that neither waits for the other and memory stays bounded."""
        while len(self._running) >= 2:
            self._running.popleft().synchronize()


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
    decoder = DecoderSpan(
        skeleton, spec.span, device, spec.residency, spec.offload_folder, shared=spec.shared, with_final_norm=spec.with_final_norm
    )
    loaded = load_weights(checkpoint, decoder, on_bytes, lanes, in_float8=in_float8)
    if spec.compile:
        decoder.compile_layers(any_sites=spec.any_sites)
    return Stage(spec, decoder, loaded, checkpoint.bytes_read)
