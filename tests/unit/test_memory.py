"""Bytes that a stage takes: weights against transformers' own parameters, the transient bound against tensors that are alive at once."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
from transformers.masking_utils import create_sliding_window_causal_mask

from m2ray.batches import LayerSpan
from m2ray.model import pieces, pinned, weights
from m2ray.model.capture import COPYING_LAYERS
from m2ray.model.extents import EXTENT_BYTES
from m2ray.model.float8.modules import SCALES, use_float8
from m2ray.model.float8.rounding import FP8
from m2ray.model.gpu_loading import LANES
from m2ray.model.quantization.scaled import scale_shape
from m2ray.model.statistics import experts_statistics, rows_statistics
from m2ray.options import WRITER_QUEUE_BYTES
from m2ray.planning.hardware import Node
from m2ray.planning.memory import (
    ALIGNMENT_BYTES,
    CAPTURE_BUFFERS,
    CONTEXT_BYTES,
    GROWN_BYTES,
    HEAP_BYTES,
    LOADING_THREADS,
    STAGING_BYTES,
    UNUSABLE_BYTES,
    UNUSABLE_SHARE,
    Workload,
    cpu_memory,
    gpu_host_memory,
    gpu_memory,
    process_bytes,
    span_rows,
    staging_bytes,
    weight_bytes,
)
from m2ray.planning.shape import ModelShape
from m2ray.statistics import device_bytes
from m2ray.tensor_rows import TensorRow, TensorTable

M2 = ModelShape(3072, num_heads=48, num_kv_heads=8, head_dim=128, num_experts=256, experts_per_token=8, expert_size=1536)
FAMILIES = [
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "gpt2",
    "gpt_oss",
    "granite",
    "llama",
    "minimax_m2",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
]
DENSE = [family for family in FAMILIES if family not in ("deepseek_v3", "glm4_moe", "gpt_oss", "minimax_m2", "mixtral", "qwen3_moe")]


def table() -> TensorTable:
    """Two layers of 100 and 50 elements, the second with a router that keeps float32."""
    return TensorTable(
        2,
        4,
        (
            TensorRow("embed", "embedding", None, (10, 4), None, 80, ("embed",)),
            TensorRow("0.w", "layer", 0, (10, 10), None, 100, ("0.w",)),
            TensorRow("1.w", "layer", 1, (10, 4), None, 40, ("1.w",)),
            TensorRow("1.gate", "layer", 1, (10,), 4, 40, ("1.gate",)),
            TensorRow("norm", "final_norm", None, (4,), None, 8, ("norm",)),
            TensorRow("head", "head", None, (10, 4), None, 80, ("head",)),
            TensorRow("mtp", "unused", None, (7,), None, 14, ("mtp",)),
        ),
    )


def names(span: LayerSpan, *, with_final_norm: bool) -> list[str]:
    return [row.name for row in span_rows(table(), span, with_final_norm=with_final_norm)]


def test_a_span_has_its_layers_and_what_lives_with_them_and_never_the_head():
    assert names(LayerSpan(0, 1), with_final_norm=True) == ["embed", "0.w"]
    assert names(LayerSpan(1, 2), with_final_norm=True) == ["1.w", "1.gate", "norm"]
    assert names(LayerSpan(0, 2), with_final_norm=False) == ["embed", "0.w", "1.w", "1.gate"]


def test_weights_count_float32_tensors_apart():
    rows = span_rows(table(), LayerSpan(0, 2), with_final_norm=False)
    assert weight_bytes(rows, 2) == 2 * (40 + 100 + 40) + 4 * 10
    assert weight_bytes(rows, 4) == 4 * (40 + 100 + 40 + 10)


def test_allowances_are_what_the_model_takes():
    assert CAPTURE_BUFFERS == COPYING_LAYERS
    assert (ALIGNMENT_BYTES, GROWN_BYTES) == (pinned._ALIGNMENT, pinned._GROWN_BYTES)
    most_lanes_bytes = 16 * (EXTENT_BYTES + 16)
    assert LANES <= 16
    assert {"host": most_lanes_bytes, "device": 2 * most_lanes_bytes} == STAGING_BYTES  # and there what is converted without the kernel


def test_items_of_a_gpu_and_of_hosts():
    rows = span_rows(table(), LayerSpan(0, 2), with_final_norm=False)
    work = Workload(1000, 1000, longest_tokens=100, token_bytes=8, itemsize_bytes=2, transient_bytes=200_000, writer_queue_bytes=5000)
    held = {"weights": weight_bytes(rows, 2)}
    on_gpu = gpu_memory(held, work, 48)
    assert on_gpu.running == {
        "weights": 400,
        "transient": 200_000,
        "unusable": int(200_000 * UNUSABLE_SHARE) + UNUSABLE_BYTES,
        "hidden_states": 4 * 8000,
        "capture": 48_000,
        "context": CONTEXT_BYTES,
    }
    assert on_gpu.loading == {"weights": 400, "staging": STAGING_BYTES["device"], "unusable": UNUSABLE_BYTES, "context": CONTEXT_BYTES}
    assert on_gpu.peak_bytes == sum(on_gpu.loading.values())  # so little transient memory that loading is the peak
    assert "hidden_states" not in gpu_memory(held, work, 48, is_alone=True).running
    host = gpu_host_memory(work, [8, 16])
    # 2 * 1000 * 24 + 2 * 5000 bytes in runs of 1000 * 8 and 1000 * 16 in turn
    assert host.running["capture"] == 3 * 8000 + 3 * 16_000 + 2 * GROWN_BYTES
    assert "weights" not in host.running
    assert gpu_host_memory(work, []).running["capture"] == 0
    assert gpu_host_memory(work, [], {"packed_layers": 7, "readers": 0}).loading["packed_layers"] == 7
    on_cpu = cpu_memory(held | {"process": 7, "staging": 9}, work, [8, 16])
    assert on_cpu.loading == {"weights": 400, "process": 7, "staging": 9}
    assert "staging" not in on_cpu.running
    assert {"weights": 400, "transient": 200_000, "heap": 240_000, "capture": 2 * 1000 * 24 + 5000}.items() <= on_cpu.running.items()
    assert cpu_memory(held, replace(work, transient_bytes=10**9), [8]).running["heap"] == HEAP_BYTES


def test_what_a_cpu_loads_through_is_counted_by_the_tensors_that_are_not_read_into_their_place():
    assert weights.THREADS == LOADING_THREADS
    large = 100 << 20
    ready = TensorRow("a", "layer", 0, (large // 2,), None, large, ("a",), lies_as="bfloat16")
    assert staging_bytes([ready], "bfloat16") == 0
    assert staging_bytes([ready], "float32") == 8 * pieces.PIECE_BYTES
    assert staging_bytes([replace(ready, method="AWQ", lies_as="")], "bfloat16") == STAGING_BYTES["host"] == 64 * pieces.PIECE_BYTES
    assert staging_bytes([replace(ready, method="AWQ", lies_as="", sources=("a",) * 1000)], "bfloat16") == 64 * (large // 1000)
    assert staging_bytes([replace(ready, disk_bytes=1000)], "float32") == 2 * 1000, "there is no more of it"


def test_a_process_takes_less_where_torch_has_no_cuda():
    versions = ({}, {"torch": "2.13"}, {"torch": "2.13", "cuda": "13.0"})
    unknown, without, with_cuda = (process_bytes(Node("a", versions=each), 4096) for each in versions)
    assert without < with_cuda == unknown


def test_a_process_holds_its_tokenizer():
    """One of 128,000 entries took 90 to 144 MB."""
    node = Node("a", versions={"torch": "2.13"})
    assert process_bytes(node, 4096) == 576 * 2**20 + 4_096_000
    assert process_bytes(node, 128_000) - process_bytes(node, 4096) > 110e6


def test_host_memory_holds_what_nine_sites_took_on_an_h200():
    """Of 6 layers of MiniMax-M2, where a micro-batch that was two thirds full held as much pinned memory as a full one (benchmarks sites_on_gpu).

    Runs of 96 MiB took 128 then, since torch rounded them: 32 for each of three micro-batches, which are not taken any more.
    """
    hidden, logits, experts = 2 * 3072, 4 * 256, (2 * 8, 4 * 8)
    columns = 6 * [*5 * [hidden], logits, *experts] + 2 * [hidden]
    work = Workload(
        16_384, 16_384, longest_tokens=2048, token_bytes=hidden, itemsize_bytes=2, transient_bytes=0, writer_queue_bytes=WRITER_QUEUE_BYTES
    )
    taken_bytes = 14_938_574_848 - 3 * 32 * (2**27 - 16_384 * hidden)
    assert taken_bytes <= gpu_host_memory(work, columns).peak_bytes <= 1.2 * taken_bytes


# -- transient memory -----------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors alive at once, those `known` before left out. Tensors may be fake."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in known}
        self.now_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self._gone(key, num_bytes))
            self.now_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _gone(self, key: int, num_bytes: int) -> None:
        del self.known[key]
        self.now_bytes -= num_bytes


class FlashAttention(TorchFunctionMode):
    """Scaled dot-product attention as the GPU's kernels do it: no matrix of scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
        return func(*args, **(kwargs or {}))


def no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for transformers' other two ways to such kernels: into flash-attn's functions, and into torch's compiled flex_attention."""

    def flash(query_BTAD: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty_like(query_BTAD)

    def flex(query_BATD: torch.Tensor, _: torch.Tensor, value_BATD: torch.Tensor, **__: Any) -> torch.Tensor:
        torch.empty(query_BATD.shape[:-1], dtype=torch.float32)
        return torch.empty(*query_BATD.shape[:-1], value_BATD.shape[-1], dtype=query_BATD.dtype)

    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", flash)
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", flex)


class LayersDone(Exception):  # noqa: N818 - no error
    pass


def leave(*_: Any) -> None:
    raise LayersDone


def put_in_float8(model: torch.nn.Module) -> None:
    """Make all projections and experts ones of FP8."""
    for module in list(model.modules()):
        for name in (
            ("weight",) if type(module) is torch.nn.Linear else ("gate_up_proj", "down_proj") if hasattr(module, "has_gate") else ()
        ):
            shape = getattr(module, name).shape
            setattr(module, name, torch.nn.Parameter(torch.empty(shape, dtype=FP8), requires_grad=False))
            module.register_buffer(name + SCALES, torch.empty(scale_shape(tuple(shape), (128, 128))))
    use_float8(model)


def alive_bytes(
    config: Any, num_sequences: int, num_tokens: int, dtype: torch.dtype, attn: str | None = None, *, in_float8: bool = False
) -> int:
    """The most bytes that transformers' own layers of `config` hold at once beside their weights, input included."""
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.config._attn_implementation = attn or model.config._attn_implementation
    layers = next(module for name, module in model.named_modules() if name.rpartition(".")[2] in ("layers", "h"))
    layers[-1].register_forward_hook(leave)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if in_float8:
            put_in_float8(model)
        # A mask of four axes is taken as it is. Without one, none is made on a GPU, but a full one for fake tensors.
        mask = torch.zeros(1, 1, 1, 1, dtype=dtype).expand(num_sequences, 1, num_tokens, num_tokens)
        position_ids = torch.arange(num_tokens)[None]
        alive = Alive([*model.parameters(), *model.buffers(), mask, position_ids])
        with torch.no_grad(), alive, FlashAttention():
            hidden_BTH = torch.empty(num_sequences, num_tokens, config.hidden_size, dtype=dtype)
            with pytest.raises(LayersDone):
                model(inputs_embeds=hidden_BTH, position_ids=position_ids, attention_mask=mask, use_cache=False)
    return alive.peak_bytes


def config_of(family: str) -> Any:
    """The family's own default dimensions, as many layers as it takes to meet its experts."""
    config = AutoConfig.from_pretrained("tests/data/minimax_m2") if family == "minimax_m2" else CONFIG_MAPPING[family]()
    config.num_hidden_layers = 1 + getattr(config, "first_k_dense_replace", 0)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def shape_of(config: Any, attn: str) -> ModelShape:
    def first(*fields: str) -> int:
        return next((value for field in fields if (value := getattr(config, field, None))), 0)

    heads, num_experts = config.num_attention_heads, first("num_local_experts", "num_experts", "n_routed_experts")
    expert_size = first("moe_intermediate_size", "intermediate_size") if num_experts else 0
    return ModelShape(
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=first("num_key_value_heads") or heads,
        head_dim=first("qk_head_dim", "head_dim") or config.hidden_size // heads,
        intermediate_size=first("intermediate_size", "ffn_dim", "n_inner") or 4 * config.hidden_size,
        num_experts=num_experts,
        experts_per_token=first("num_experts_per_tok") if num_experts else 0,
        expert_size=expert_size,
        shared_size=expert_size * first("n_shared_experts"),
        attn_implementation=attn,
        window=first("sliding_window"),
        activation_steps=2 if config.model_type == "gpt2" else 1,
    )


@pytest.mark.parametrize(("family", "dtype"), [*((f, torch.bfloat16) for f in FAMILIES), *((f, torch.float32) for f in DENSE)], ids=str)
def test_the_transient_bound_holds_for_transformers_own_code(family, dtype):
    config = config_of(family)
    alive = alive_bytes(config, 8, 2048, dtype)
    bound = shape_of(config, config._attn_implementation).transient_bytes(8 * 2048, 2048, dtype.itemsize)
    assert alive <= bound <= 2.3 * alive


def test_the_bound_is_close_for_wide_dense_layers():
    """Llama-70B's: gate, activated gate and up, and their product beside three streams; a compiled layer's is held to that count too."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 1}
    config = CONFIG_MAPPING["llama"](**sizes)
    alive, shape = alive_bytes(config, 8, 2048, torch.bfloat16), ModelShape.of(config, "sdpa")
    assert alive <= shape.transient_bytes(8 * 2048, 2048, 2) <= 1.35 * alive
    assert alive <= shape.compiled_transient_bytes(8 * 2048, 2048, 2) <= 1.08 * alive


ONE_LAYER: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"layer_types": ["compressed_sparse_attention"], "mlp_layer_types": ["moe"]},
    "deepseek_v32": {"first_k_dense_replace": 0},
    "glm_moe_dsa": {"mlp_layer_types": ["sparse"]},
    "hy_v4": {"mlp_layer_types": ["sparse"]},
    "gemma4_text": {"num_hidden_layers": 6, "hidden_size": 1536, "intermediate_size": 6144, "hidden_size_per_layer_input": 0},
}


@pytest.mark.parametrize(("num_sequences", "num_tokens"), [(8, 2048), (32, 512)])
@pytest.mark.parametrize("family", ONE_LAYER)
def test_the_bound_holds_for_indexers_streams_and_heads_of_two_sizes(family, num_sequences, num_tokens):
    config = CONFIG_MAPPING[family].from_dict({"model_type": family, "num_hidden_layers": 1, **ONE_LAYER[family]})
    alive = alive_bytes(config, num_sequences, num_tokens, torch.bfloat16)
    bound = ModelShape.of(config, config._attn_implementation).transient_bytes(num_sequences * num_tokens, num_tokens, 2)
    assert alive <= bound <= 2.3 * alive


@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "minimax_m2", "mixtral", "qwen3_moe"])
def test_the_bound_holds_for_products_in_fp8(family):
    """Not compiled, rounding makes float32 of its own."""
    config = config_of(family)
    alive = alive_bytes(config, 8, 2048, torch.bfloat16, in_float8=True)
    assert alive <= ModelShape.of(config, config._attn_implementation).transient_bytes(8 * 2048, 2048, 2) <= 2.5 * alive


@pytest.mark.parametrize(("num_sequences", "num_tokens"), [(8, 2048), (32, 512), (1, 16384), (1, 1000)])
def test_the_bound_is_close_for_minimax_m2(num_sequences, num_tokens):
    alive = alive_bytes(config_of("minimax_m2"), num_sequences, num_tokens, torch.bfloat16)
    bound = M2.transient_bytes(num_sequences * num_tokens, num_tokens, 2)
    assert alive <= bound <= 1.04 * alive


@pytest.mark.parametrize("family", ["cohere2", "llama", "olmo2", "qwen3"])
def test_the_bound_holds_where_attention_is_the_peak(family):
    config = config_of(family)
    config.intermediate_size = 256
    alive = alive_bytes(config, 8, 2048, torch.bfloat16)
    assert alive <= shape_of(config, "sdpa").transient_bytes(8 * 2048, 2048, 2) <= 2.3 * alive


@pytest.mark.parametrize("attn", ["sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("family", ["minimax_m2", "llama", "deepseek_v3", "gemma2", "gemma3_text", "gpt_oss"])
def test_no_kernel_without_scores_takes_more_for_a_long_prompt(monkeypatch, family, attn):
    """32k tokens as one prompt, in the layers as each of these attentions has them called."""
    if (family, attn) == ("gemma2", "sdpa") or family == "gpt_oss":
        pytest.skip("refused, or not to be had on a CPU")
    no_scores(monkeypatch)
    config = config_of(family)
    alive = alive_bytes(config, 1, 32_768, torch.bfloat16, attn)
    shape = replace(shape_of(config, attn), window=0)
    assert alive <= shape.transient_bytes(32_768, 32_768, 2) <= 2.3 * alive
    assert shape.transient_bytes(32_768, 32_768, 2) == shape.transient_bytes(32_768, 512, 2)


def test_a_window_under_sdpa_costs_a_mask_of_all_pairs():
    """transformers' own mask for a window shorter than the prompt, and what ATen's kernels make of a mask."""
    config = config_of("mistral")
    config.sliding_window, config.intermediate_size, config._attn_implementation = 1024, 256, "sdpa"
    shape = shape_of(config, "sdpa")
    with FakeTensorMode():
        hidden_BTH = torch.empty(2, 4096, config.hidden_size, dtype=torch.bfloat16)
        alive = Alive([hidden_BTH])
        with alive:
            mask = create_sliding_window_causal_mask(config, hidden_BTH, None, None, torch.arange(4096)[None])
            added = torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill_(mask.logical_not(), -torch.inf)
            torch.nn.functional.pad(added, (0, 8))
    without = replace(shape, window=0)
    counted = shape.transient_bytes(8192, 4096, 2) - without.transient_bytes(8192, 4096, 2)
    assert 0.5 * counted < alive.peak_bytes < 1.02 * counted
    assert shape.transient_bytes(8192, 1024, 2) == without.transient_bytes(8192, 1024, 2), "a window that holds the prompt needs no mask"


def test_eager_attention_grows_with_the_longest_sequence():
    config = config_of("gemma2")
    for num_sequences, num_tokens in ((16, 512), (2, 4096)):
        alive = alive_bytes(config, num_sequences, num_tokens, torch.bfloat16)
        bound = shape_of(config, "eager").transient_bytes(8192, num_tokens, 2)
        assert alive <= bound <= 1.6 * alive


@pytest.mark.parametrize("kinds", [{"moments"}, {"norms"}, {"moments", "norms"}, {"moments", "covariance"}, {"experts"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_taking_statistics_allocates_what_is_planned(kinds: set[str], dtype: torch.dtype):
    with FakeTensorMode():
        rows_NW = torch.empty((16_384, 3072), dtype=dtype)
        ids_NK = torch.empty((16_384, 8), dtype=torch.int16)
        alive = Alive([rows_NW, ids_NK])
        with alive, torch.inference_mode():
            _ = experts_statistics(ids_NK, 256) if "experts" in kinds else rows_statistics(kinds, rows_NW)
    planned = device_bytes(frozenset(kinds), 256 if "experts" in kinds else 3072, 16_384)
    assert alive.peak_bytes <= planned
    if kinds != {"norms"}:  # on a CPU a norm in float64 makes no copy of the rows
        assert planned <= 1.6 * alive.peak_bytes
