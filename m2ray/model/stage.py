"""One stage: a span of the model, loaded and ready to run micro-batches. Pure torch; no Ray, and no I/O but reading the checkpoint."""

from dataclasses import dataclass

import torch

from m2ray.batches import CapturedLayer, LayerSpan, MicroBatch, PartSpec
from m2ray.errors import ConfigError
from m2ray.model.capture import ResidualCapture
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.skeleton import build_skeleton
from m2ray.model.weights import OnBytes, load_weights, parameter_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StageSpec:
    """All that a stage needs to know to build itself.

    Attributes:
        model_url: the checkpoint's folder.
        span: the layers it owns.
        capture_layers: those of them whose output is kept, ascending.
        sites: what is kept there; "residual".
        compute_dtype, store_dtype: "bfloat16", "float16" or "float32".
        attn_implementation: "auto" (the family's own), "eager" or "sdpa".
        device: "cpu" or "cuda:0".
        threads: torch threads on the CPU, for the whole process; None leaves them as they are.
    """

    model_url: str
    span: LayerSpan
    capture_layers: tuple[int, ...]
    sites: tuple[str, ...]
    compute_dtype: str
    store_dtype: str
    attn_implementation: str
    device: str
    threads: int | None


@dataclass(frozen=True)
class StageOutput:
    """What one micro-batch leaves: hidden states [B, T, H] for the next stage (None from the last), and captured rows."""

    hidden_BTH: torch.Tensor | None
    captured: tuple[CapturedLayer, ...]


class Stage:
    """A loaded span. One `forward` at a time.

    Attributes:
        parts: what every micro-batch's capture consists of, in order.
        needed_bytes: checkpoint bytes of the span's tensors, scales included.
        bytes_read: tensor bytes that were read to load them.
        parameter_bytes: bytes of the span's parameters and buffers in memory.
    """

    def __init__(self, spec: StageSpec, decoder: DecoderSpan, needed_bytes: int, bytes_read: int) -> None:
        config = decoder.skeleton.config
        self.is_first = spec.span.start == 0
        self.is_last = spec.span.stop == config.num_hidden_layers
        self.parts = tuple(PartSpec("residual", layer, spec.store_dtype, config.hidden_size) for layer in spec.capture_layers)
        self.needed_bytes = needed_bytes
        self.bytes_read = bytes_read
        self.parameter_bytes = parameter_bytes(decoder)
        self._spec = spec
        self._decoder = decoder

    def forward(self, micro_batch: MicroBatch, hidden_BTH: torch.Tensor | None) -> StageOutput:
        """Take a micro-batch through the span.

        Args:
            micro_batch: whose tokens the first stage embeds, and whose lengths say which rows are real.
            hidden_BTH: what the stage before returned, in the compute dtype; None for the first.

        Raises:
            StageError: a captured row is not finite in the store dtype.
        """
        if hidden_BTH is not None:
            expected = (*micro_batch.token_ids_BT.shape, self._decoder.skeleton.config.hidden_size)
            assert tuple(hidden_BTH.shape) == expected, f"hidden states {list(hidden_BTH.shape)} for a micro-batch of {list(expected)}"
            assert hidden_BTH.dtype == DTYPES[self._spec.compute_dtype], f"hidden states in {hidden_BTH.dtype}"
        capture = ResidualCapture(micro_batch, self._spec.capture_layers, DTYPES[self._spec.store_dtype], self._decoder.device)
        with torch.inference_mode():
            token_ids_BT = torch.tensor(micro_batch.token_ids_BT, dtype=torch.int64, device=self._decoder.device)
            computed_BTH = self._decoder.run(token_ids_BT, hidden_BTH, capture)
            captured = capture.finish()
        return StageOutput(None if self.is_last else computed_BTH, captured)


def load_stage(spec: StageSpec, on_bytes: OnBytes) -> Stage:
    """Build the span of `spec` and read its tensors, and no others.

    Args:
        on_bytes: called as tensors arrive, with the bytes read so far and those needed.

    Raises:
        CheckpointError: files are damaged, or the span's tensors missing, unknown or misshapen; all at once.
        ConfigError: the family has no such attention, or the span is not in the model.
        StoreError: reading fails.
    """
    if spec.sites != ("residual",):
        raise ConfigError(f"sites = {', '.join(spec.sites)!r}: only 'residual' can be captured.")
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    checkpoint = open_checkpoint(spec.model_url)
    checkpoint.check()
    skeleton = build_skeleton(checkpoint.config, DTYPES[spec.compute_dtype], spec.attn_implementation)
    outside = [layer for layer in spec.capture_layers if layer not in spec.span]
    if spec.span.stop > len(skeleton.layers) or outside:
        raise ConfigError(
            f"{spec.span} with captured layers {list(spec.capture_layers)}: the model has layers 0 to {len(skeleton.layers) - 1}."
        )
    decoder = DecoderSpan(skeleton, spec.span, torch.device(spec.device))
    needed_bytes = load_weights(checkpoint, decoder, on_bytes)
    return Stage(spec, decoder, needed_bytes, checkpoint.bytes_read)
