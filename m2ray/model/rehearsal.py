"""A tiny model with random weights: its rows as transformers computes them, and as a chain of stages does from the same checkpoint."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError
from m2ray.model.attention import resolve_attn_implementation
from m2ray.model.checkpoint import Checkpoint
from m2ray.model.decoder import DecoderSpan
from m2ray.model.families import keeps_fp32
from m2ray.model.headers import read_file_header
from m2ray.model.skeleton import QUIET, build_skeleton, find_layers, hidden_of
from m2ray.model.tiny import VOCABULARY
from m2ray.model.tiny_towers import tiny_wholes
from m2ray.model.towers import decoder_config, find_decoder, is_plain, model_class
from m2ray.model.vector_math import settle_vector_math
from m2ray.model.weight_files import SINGLE_FILE
from m2ray.model.weights import load_weights
from m2ray.sites import SITES
from m2ray.storage import open_store

SiteValues = dict[tuple[str, int | None], tuple[torch.Tensor, ...]]
"""By site and layer, None at sites of the whole model: values [B, T, ...], one tensor a column."""

_LONG, _SHORT = 24, 9
_COMMON = 12
"""Tokens of the long prompt, of the short one that is padded beside it, and of the prefix that two long ones have in common."""

_MOST_PARAMETERS = 30_000_000
"""Of a decoder; a multimodal model may have five times as many."""

NOT_RUN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What transformers' code raises where a tiny copy's sizes do not fit together, or where it does not fit what m2ray asks of it."""


_STRIDES = "transformers computes experts together, for which their widths have to be multiples of 8 in bfloat16, of 4 in float32"


class Rehearsal:
    """One tiny model in a folder of its own, and two prompts, the second right-padded.

    Attributes:
        tiny: its configuration.
        num_layers: of its decoder.
        token_counts: real tokens of each prompt.
    """

    def __init__(self, tiny: Any, seed: int, folder: Path) -> None:
        self.tiny = tiny
        self.num_layers: int = decoder_config(tiny).num_hidden_layers
        self.token_counts = (_LONG, _SHORT)
        self._folder = folder
        self._loaded: dict[torch.dtype, Any] = {}
        self._model_class = model_class(tiny)
        model = _random_model(self._model_class, tiny, seed)
        self._values = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
        self._published = {key: tensor.contiguous() for key, tensor in revert_weight_conversion(model, dict(self._values)).items()}
        save_file(self._published, folder / SINGLE_FILE)
        generator = torch.Generator().manual_seed(seed)
        self._token_ids_BT = torch.randint(3, _vocabulary(tiny), (2, _LONG), generator=generator)
        self._token_ids_BT[1, _SHORT:] = 0
        self._others_BT = self._token_ids_BT.clone()
        self._others_BT[0, _COMMON:] = torch.randint(3, _vocabulary(tiny), (_LONG - _COMMON,), generator=generator)

    def by_transformers(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Each layer's output [B, T, H], by hooks on the layers of transformers' own model as its `from_pretrained` loads it.

        Raises:
            ArithmeticError: the random weights overflow.
        """
        outputs = self.run(self.load(dtype))
        if not all(output[row, :count].isfinite().all() for output in outputs for row, count in enumerate(self.token_counts)):
            raise ArithmeticError("random weights overflow")
        return outputs

    def run(self, model: Any) -> list[torch.Tensor]:
        """Take the two prompts through a model of transformers: each layer's output [B, T, H]."""
        return _layers_outputs(model, input_ids=self._token_ids_BT)

    def moved_rows(self) -> dict[str, float]:
        """By how much of their norm, at most, rows of the last layer move that should not, by what was changed (transformers, float32)."""
        model = self.load(torch.float32)
        rows_BTH, others_BTH, alone_BTH = (
            _layers_outputs(model, input_ids=ids_BT, position_ids=torch.arange(ids_BT.shape[1])[None])[-1]
            for ids_BT in (self._token_ids_BT, self._others_BT, self._token_ids_BT[1:, :_SHORT])
        )
        return {
            "when only the tokens after them change": _moved(rows_BTH[0, :_COMMON], others_BTH[0, :_COMMON]),
            "between the prompt alone and right-padded beside a longer one": _moved(rows_BTH[1, :_SHORT], alone_BTH[0]),
        }

    def last_states(self, dtype: torch.dtype) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The model of transformers, its last layer's output, and what its decoder returns in the end; both [B, T, H]."""
        model, returned = self.load(dtype), []
        hook = find_decoder(model)[1].register_forward_hook(lambda _, __, output: returned.append(output[0].clone()))
        outputs = self.run(model)
        hook.remove()
        return model, outputs[-1], returned[-1]

    def scores(self) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Of the long prompt in float32: what the decoder of transformers' model returns in the end [N, H], the model's head, and its scores [N, V]."""
        model, returned = self.load(torch.float32), []
        hook = find_decoder(model)[1].register_forward_hook(lambda _, __, output: returned.append(output[0][0].clone()))
        with torch.inference_mode():
            scores_NV = model(input_ids=self._token_ids_BT[:1], use_cache=False).logits[0]
        hook.remove()
        return returned[-1], model.get_output_embeddings(), scores_NV

    def by_chain(self, dtype: torch.dtype, bounds: Sequence[int], *, in_waves: bool = False) -> list[torch.Tensor]:
        """Each layer's output [B, T, H] of a chain of stages, one for the layers between two `bounds`, each loaded as stages load theirs.

        `in_waves`: each layer is entered by itself, as waves do.
        """
        return [
            columns[0] for (site, _), columns in self.sites_by_chain(dtype, bounds, (), in_waves=in_waves).items() if site == "residual"
        ]

    def sites_by_chain(
        self, dtype: torch.dtype, bounds: Sequence[int], watched: Collection[str] = SITES, *, in_waves: bool = False
    ) -> SiteValues:
        """The same with all that it has of other sites."""
        store = open_store(str(self._folder))
        checkpoint = Checkpoint(store, self.tiny, {}, {}, {SINGLE_FILE: read_file_header(store, SINGLE_FILE)}, {})
        skeleton = build_skeleton(self.tiny, dtype)
        found: SiteValues = {}

        def on_site(site: str, layer: int | None, *values: torch.Tensor) -> None:
            found[site, layer] = tuple(column.clone() for column in values)

        incoming = None
        for ends in pairwise(bounds):
            decoder = DecoderSpan(deepcopy(skeleton), LayerSpan(*ends), torch.device("cpu"), with_final_norm="final_norm" in watched)
            load_weights(checkpoint, decoder, lambda *_: None)
            decoder.watch({(site, layer) for site in watched for layer in (None, *range(*ends))})
            for layers in pairwise(range(ends[0], ends[1] + 1) if in_waves else ends):
                with torch.inference_mode():
                    incoming = decoder.run(self._token_ids_BT, incoming, on_site, LayerSpan(*layers))
        return found

    def load(self, dtype: torch.dtype) -> Any:
        """The model of transformers, as its `from_pretrained` loads it."""
        if dtype in self._loaded:
            return self._loaded[dtype]
        config = deepcopy(self.tiny)
        decoder_config(config)._attn_implementation = resolve_attn_implementation(self.tiny, "auto", dtype)  # noqa: SLF001 - no public name
        with _quietly():
            model = self._model_class.from_pretrained(
                None, local_files_only=True, config=config, state_dict=dict(self._published), dtype=dtype
            ).eval()
        model.requires_grad_(requires_grad=False)  # torch sums some products in another order for weights that want gradients
        for name in filter(keeps_fp32(decoder_config(self.tiny)), self._values):  # beyond what transformers keeps
            owner, _, leaf = name.rpartition(".")
            tensor = getattr(model.get_submodule(owner), leaf)
            tensor.data = self._values[name].float()
        self._loaded[dtype] = model
        return model


def rehearse(config: Any, seed: int, folder: Path) -> Rehearsal:
    """The first of a configuration's tiny copies that transformers runs, in an empty folder.

    Raises:
        CheckpointError: it runs none of them, or none is small.
    """
    settle_vector_math()
    reasons: list[str] = []
    try:
        for tiny in tiny_wholes(config):
            try:
                rehearsal = Rehearsal(tiny, seed, folder)
                rehearsal.by_transformers(torch.float32)
            except NOT_RUN as error:
                reasons.append(told(error))
            else:
                return rehearsal
    except NOT_RUN as error:
        reasons.append(told(error))
    raise CheckpointError(
        f"config.json: no tiny copy of this {config.model_type} can be made, so nothing is proved: {' '.join('; '.join(dict.fromkeys(reasons)).split())}",
        "m2ray runs what it can prove on a tiny copy.",
    )


def told(error: Exception) -> str:
    """What transformers' code raised, in a line; and what it means where torch's words do not say it."""
    line = " ".join(f"{type(error).__name__}: {error}"[:150].split())
    return f"{line} ({_STRIDES})" if "multiple of 16 bytes" in line else line


def _random_model(made_of: Any, tiny: Any, seed: int) -> Any:
    """The model that transformers makes of a tiny configuration in float32, with weights that make every layer matter."""
    for field in QUIET:
        setattr(decoder_config(tiny), field, False)
    with torch.device("meta"):
        on_meta = made_of._from_config(deepcopy(tiny))  # noqa: SLF001 - as AutoModelForCausalLM calls it
    num_parameters = sum(parameter.numel() for parameter in on_meta.parameters())
    if num_parameters > (_MOST_PARAMETERS if is_plain(tiny) else 5 * _MOST_PARAMETERS):
        raise ValueError(f"a tiny {tiny.model_type} still has {num_parameters:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = made_of._from_config(deepcopy(tiny), dtype=torch.float32).eval()  # noqa: SLF001 - as AutoModelForCausalLM calls it
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() >= 2:
                tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.add_(torch.empty_like(tensor).normal_(0, 0.1, generator=generator))
            elif tensor.dtype == torch.int64 and tensor.dim() >= 2:  # which experts a token goes to
                tensor.random_(0, getattr(decoder_config(tiny), "num_local_experts", 1), generator=generator)
    return model


def _layers_outputs(model: Any, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's output [B, T, H] where transformers' own model is given text."""
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(hidden_of(output).clone())) for layer in find_layers(model)[1]
    ]
    hooks.append(find_decoder(model)[1].register_forward_hook(_end))
    if not is_plain(model.config):
        inputs.pop("position_ids", None)  # a multimodal model makes its own
    with suppress(_DecoderDone), torch.inference_mode():
        (model.base_model if is_plain(model.config) else model)(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


class _DecoderDone(Exception):  # noqa: N818 - no error
    """Ends a model's forward pass once its decoder has run: what the head makes of it is nobody's."""


def _end(*_: Any) -> None:
    raise _DecoderDone


def _vocabulary(tiny: Any) -> int:
    return min(VOCABULARY, int(decoder_config(tiny).vocab_size)) - 1


def _moved(one_TH: torch.Tensor, other_TH: torch.Tensor) -> float:
    return float(((one_TH - other_TH).norm(dim=-1) / other_TH.norm(dim=-1)).max())


@contextmanager
def _quietly() -> Iterator[None]:
    """Let transformers load without its progress bar and its report."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
