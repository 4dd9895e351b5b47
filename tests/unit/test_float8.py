"""compute_dtype = "float8": rounding, products and whole chains against float64, what stays packed, and what is refused by name."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from m2ray.audit.tolerance import require_reference
from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError, ConfigError, NotInRunError, StageError
from m2ray.model import stage as stage_module
from m2ray.model.boundary import Boundary
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.families import parse_config
from m2ray.model.float8 import modules, proof, twin
from m2ray.model.float8.launching import ROWS, tiles_of
from m2ray.model.float8.modules import Float8Linear
from m2ray.model.float8.products import multiply, multiply_gated
from m2ray.model.float8.rounding import round_rows
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.model.tensor_table import table_without_weights, tensor_table
from m2ray.storage import open_store
from tests.float8 import FILE, config_of, in_fp8, make_float8, make_plain, reference_of, rounding_inputs
from tests.packed import make_packed
from tests.reference import chain_rows, load_capturing, micro_batch_of, reference_rows, same_bits
from tests.unit import activation_runs as runs

FAMILIES = ("minimax_m2", "qwen3_moe", "llama")
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("float8")
    return {family: make_float8(folder / family, family) for family in FAMILIES}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets stages multiply FP8 on this machine, by torch."""
    monkeypatch.setattr(stage_module, "require_gpu", lambda _: None)


def load(folder: Path, *bounds: int, dtype: str = "float8", **how: Any) -> list[Stage]:
    spans = [LayerSpan(*ends) for ends in pairwise(bounds)]
    return [load_capturing(StageSpec(str(folder), span, dtype, "auto", "cpu", 1, **how), store_dtype="bfloat16") for span in spans]


def far(rows: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over rows of |rows - expected| / |expected|."""
    return float(((rows.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)).median())


# -- rounding and products ------------------------------------------------------------------------------------------------


def test_rows_are_rounded_by_blocks() -> None:
    hidden = torch.randn(5, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden[1, 128:256] *= 1e4
    hidden[2, :128] = 0
    rows, scales = round_rows(hidden)
    assert (rows.dtype, rows.shape, scales.dtype, scales.shape) == (torch.float8_e4m3fn, (5, 384), torch.float32, (5, 3))
    assert torch.equal(rows.double() * scales.double().repeat_interleave(128, 1), in_fp8(hidden))
    assert (rows.float().abs().reshape(-1, 128).max(1).values.sort().values == torch.tensor([0.0] + [448.0] * 14)).all()
    hidden[3, 5] = torch.inf
    assert round_rows(hidden)[0][3, 5].float().isnan()


def test_products_are_those_of_float64() -> None:
    """Groups of none, one and more rows, rows in another order, a weight that is no whole number of blocks high; on a GPU the kernel is held so."""
    assert proof.wrong(torch.device("cpu"), twin.multiply) == ""


@pytest.mark.parametrize("spoilt", ["scales", "order", "block"])
def test_wrong_products_are_seen(spoilt: str) -> None:
    def wrong(
        rows: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, *places: Any
    ) -> torch.Tensor:
        match spoilt:
            case "scales":
                return twin.multiply(rows, row_scales, weight, weight_scales.roll(1, -1), *places)
            case "order":
                return twin.multiply(rows, row_scales, weight, weight_scales, *places).roll(1, 0)
            case _:
                return twin.multiply(rows[:, :-128].contiguous(), row_scales, weight, weight_scales, *places)

    assert "are not those of torch" in proof.wrong(torch.device("cpu"), wrong)


def test_gated_rows_that_are_not_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(rows: torch.Tensor, scales: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values, of_values = twin.multiply_gated(rows, scales, *given)
        return values, of_values * (1 + (torch.arange(len(of_values))[:, None] == 5000))

    monkeypatch.setattr(proof, "on_hopper", lambda *given: twin.multiply(*given).bfloat16())
    for kernel, problem in ((twin.multiply_gated, ""), (spoilt, "what is gated is not as torch's")):
        monkeypatch.setattr(proof, "gated_on_hopper", kernel)
        assert proof.gated_problem(torch.device("cpu")) == problem


def test_tiles_cover_each_group_once() -> None:
    ends = torch.tensor([0, 1, 128, 300, 300, 685], dtype=torch.int32)
    tiles, count = tiles_of(ends, 685, ends.device)
    found = [(group, row) for group, first, stop in tiles[: int(count)].tolist() for row in range(first, min(first + ROWS, stop))]
    begins = [0, *ends.tolist()]
    assert sorted(found) == [(group, row) for group in range(6) for row in range(begins[group], begins[group + 1])]
    assert len(tiles) >= int(count)
    tiles, count = tiles_of(None, 300, ends.device)
    assert tiles[: int(count)].tolist() == [[0, 0, 300], [0, 128, 300], [0, 256, 300]]


def test_compiled_products_are_those_of_the_same_operation() -> None:
    rows, scales = round_rows(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)))
    weight, weight_scales = torch.ones(1, 130, 128).to(rows.dtype), torch.ones(1, 2, 1)
    torch.library.opcheck(multiply, (rows, scales, weight, weight_scales, None, None, None), test_utils=("test_faketensor",))
    weight, ends = torch.ones(1, 256, 128).to(rows.dtype), torch.tensor([3], dtype=torch.int32)
    torch.library.opcheck(round_rows, (torch.ones(128, 3).T,), test_utils=("test_faketensor",))
    torch.library.opcheck(multiply_gated, (rows, scales, weight, weight_scales, ends), test_utils=("test_faketensor",))


def test_a_graph_serves_any_number_of_rows() -> None:
    """As micro-batches come: one of the first shape, and one of all others. Each graph of a layer takes seconds, and 64 are the most."""
    graphs = CompileCounter()
    compiled = torch.compile(lambda rows, scales, *weight: multiply(rows, scales, *weight, None, None, None), backend=graphs)
    weight = torch.ones(1, 130, 128).to(torch.float8_e4m3fn), torch.ones(1, 2, 1)
    for num_rows in (3, 5, 7, 9):
        assert compiled(*round_rows(torch.ones(num_rows, 128)), *weight).shape == (num_rows, 130)
    assert graphs.frame_count == 2


def test_another_kernel_than_the_one_for_the_gpu_is_told_and_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(proof, "_problem", lambda _, kernel: "spoilt" if kernel is proof.on_hopper else "")
    with pytest.warns(RuntimeWarning, match=r"by by_triton on cuda:0, which takes longer: on_hopper: spoilt\."):
        assert proof.kernel_for.__wrapped__(device) is proof.by_triton
    monkeypatch.setattr(proof, "_problem", lambda *_: "spoilt")
    with pytest.raises(StageError, match="on_hopper: spoilt; by_triton: spoilt"):
        proof.kernel_for.__wrapped__(device)


def test_activations_that_a_layer_rounds_itself_are_an_error() -> None:
    """`projection(hidden.to(projection.weight.dtype))`, as DeepSeek's indexer has it: what is above 448 would be lost."""
    projection = Float8Linear(128, 4, bias=False)
    projection.weight = torch.nn.Parameter(torch.ones(4, 128).to(torch.float8_e4m3fn), requires_grad=False)
    projection.register_buffer("weight_scale_inv", torch.ones(1, 1))
    hidden = torch.full((1, 128), 1000.0, dtype=torch.bfloat16)
    assert (projection(hidden) == 128_000).all()
    with pytest.raises(StageError, match="loses their scale"):
        projection(hidden.to(projection.weight.dtype))


# -- whole chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("on_cpu")
def test_rows_are_those_of_transformers_with_such_products(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Each layer, from the input that transformers' has, is near to that one with products in float64 of inputs rounded to FP8, and further from
    what it gives in bfloat16.
    """
    micro_batch = micro_batch_of((20, 20, 20), 96)
    token_ids_BT = torch.from_numpy(micro_batch.token_ids_BT).long()
    model = reference_of(make_plain(tmp_path / "plain", folders[family], family))
    with rounding_inputs(model):
        expected = [rows.view(*token_ids_BT.shape, -1) for rows in reference_rows(model, micro_batch)]
    (float8,), (bfloat16,) = (load(folders[family], 0, NUM_LAYERS, dtype=dtype) for dtype in ("float8", "bfloat16"))
    incoming = None
    for layer, rows in enumerate(expected):
        with torch.inference_mode():
            near, away = (
                far(stage._decoder.run(token_ids_BT, incoming, lambda *_: None, LayerSpan(layer, layer + 1)).hidden_BTH, rows)
                for stage in (float8, bfloat16)
            )
        assert near < 0.4 * away, (layer, near, away)
        incoming = Boundary(rows)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("is_gated", [False, True])
def test_experts_in_their_order_are_those_in_the_tokens(
    *, is_gated: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compiled layers have them on a GPU: what is rounded once there lies nearer to the same experts uncompiled than rounding to FP8 moves them."""
    (stage,) = load(folders["minimax_m2"], 0, 1)
    experts: Any = stage._decoder.skeleton.layers[0].mlp.experts
    hidden_NH = torch.randn((50, experts.hidden_dim), generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen_NK = (
        torch.rand((50, experts.num_experts - 1), generator=torch.Generator().manual_seed(1)).topk(2).indices
    )  # the last one is nobody's
    weights_NK = torch.rand((50, 2), generator=torch.Generator().manual_seed(2))
    expected_NH = experts(hidden_NH, chosen_NK, weights_NK)
    monkeypatch.setattr(modules, "has_kernels", lambda _: True)
    monkeypatch.setattr(modules, "has_gated", lambda _: is_gated)
    assert experts.use_kernels(torch.device("cpu"))
    assert experts.m2ray_gated == is_gated
    found_NH = experts(hidden_NH, chosen_NK, weights_NK)
    assert (found_NH.dtype, same_bits(found_NH, expected_NH)) == (expected_NH.dtype, not is_gated)
    assert far(found_NH, expected_NH) < 0.02


@pytest.mark.usefixtures("on_cpu")
def test_every_cut_and_place_gives_the_same_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, micro_batch = folders["minimax_m2"], micro_batch_of((9, 5, 1), 96)
    (whole,) = load(folder, 0, NUM_LAYERS)
    expected = chain_rows([whole], micro_batch)
    for how in ({}, {"residency": {0: "host", 1: "checkpoint", 2: "checkpoint"}, "offload_folder": str(tmp_path)}):
        stages = load(folder, 0, 1, NUM_LAYERS, **how)
        assert all(same_bits(*pair) for pair in zip(chain_rows(stages, micro_batch), expected, strict=True))
        assert {layer: digest for stage in stages for layer, digest in stage.digests.items()} == whole.digests
    (in_bfloat16,) = load(folder, 0, NUM_LAYERS, dtype="bfloat16")
    assert in_bfloat16.digests == whole.digests
    assert not any(same_bits(*pair) for pair in zip(chain_rows([in_bfloat16], micro_batch), expected, strict=True))


@pytest.mark.usefixtures("on_cpu")
def test_weights_stay_as_the_files_have_them(folders: dict[str, Path]) -> None:
    (stage,) = load(folders["minimax_m2"], 0, NUM_LAYERS)
    found, files = stage._decoder.skeleton.model.state_dict(), load_file(folders["minimax_m2"] / FILE)
    experts = found["model.layers.1.mlp.experts.gate_up_proj"], found["model.layers.1.mlp.experts.gate_up_proj_scale_inv"]
    for number, name in enumerate(("w1", "w3")):
        key = f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"
        assert same_bits(experts[0][2].chunk(2)[number], files[key])
        assert same_bits(experts[1][2].chunk(2)[number], files[f"{key}_scale_inv"])
    assert same_bits(found["model.layers.2.self_attn.o_proj.weight"], files["model.layers.2.self_attn.o_proj.weight"])
    assert found["model.layers.2.mlp.gate.weight"].dtype == torch.float32
    table = tensor_table(open_checkpoint(str(folders["minimax_m2"])), in_float8=True)
    embedding, layers = table.role_bytes("embedding", 2), table.layer_bytes(2)
    assert stage.parameter_bytes == embedding + sum(layers)
    assert table.unpacked_bytes("float8") == (0, 0, 0)


@pytest.mark.usefixtures("on_cpu")
def test_scales_in_bfloat16_are_taken(folders: dict[str, Path], tmp_path: Path) -> None:
    """As Qwen publishes them; packed layers too."""
    folder, micro_batch = tmp_path / "model", micro_batch_of((9, 5), 96)
    folder.mkdir()
    tensors = load_file(folders["qwen3_moe"] / FILE)
    save_file(
        {name: values.bfloat16() if name.endswith("_scale_inv") else values for name, values in tensors.items()},
        folder / FILE,
        metadata={"format": "pt"},
    )
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_bytes((folders["qwen3_moe"] / name).read_bytes())
    expected = chain_rows(load(folders["qwen3_moe"], 0, NUM_LAYERS), micro_batch)
    for how in ({}, {"residency": {1: "host"}}):
        assert all(same_bits(*pair) for pair in zip(chain_rows(load(folder, 0, NUM_LAYERS, **how), micro_batch), expected, strict=True))


# -- refusals -------------------------------------------------------------------------------------------------------------


def test_a_cpu_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match='"float8" on a CPU'):
        load_stage(StageSpec(str(folders["llama"]), LayerSpan(0, 1), "float8", "auto", "cpu", 1), lambda *_: None)


def spoilt(folder: Path, out: Path, change: Any) -> Path:
    out.mkdir()
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, out / FILE, metadata={"format": "pt"})
    config = (folder / "config.json").read_text()
    (out / "config.json").write_text(config)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, FILE)}))
    return out


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("family", "fmt", "why"),
    [
        ("qwen3_moe", "bf16", "none of its weights that are run are FP8"),
        ("qwen3_moe", "fp8-static", "is FP8, a scale a tensor, not FP8 in blocks"),
        ("qwen3_moe", "mxfp8", "is MXFP8 in blocks of 1 x 32, not of 128 x 128"),
        ("qwen3_moe", "nvfp4", "not FP8 in blocks of 128 x 128"),
        ("gpt_oss", "mxfp4", "not FP8 in blocks of 128 x 128"),
        ("qwen3_moe", "float-quantized-block", "not of 128 x 128 that are whole"),
    ],
)
def test_other_weights_are_refused(family: str, fmt: str, why: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = make_plain(tmp_path / "model", folders[family], family) if fmt == "bf16" else make_packed(tmp_path / "model", family, fmt)
    with pytest.raises(ConfigError, match=f"compute_dtype = 'float8' for this checkpoint: .*{why}"):
        tensor_table(open_checkpoint(str(folder)), in_float8=True)
    with pytest.raises(ConfigError, match="compute_dtype = 'float8' for this checkpoint"):
        load(folder, 0, 1)


def test_experts_of_which_some_are_not_fp8_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".w2.weight" in name]:
            values = tensors[name]
            tensors[name] = values.float().bfloat16() if values.dtype == torch.float8_e4m3fn else values
        for name in [name for name in tensors if name.endswith("w2.weight_scale_inv")]:
            del tensors[name]

    folder = spoilt(folders["minimax_m2"], tmp_path / "model", change)
    with pytest.raises(ConfigError, match=r"mlp.experts is a MiniMaxM2Experts with gate_up_proj in FP8"):
        tensor_table(open_checkpoint(str(folder)), in_float8=True)


def test_a_scale_that_is_missing_is_still_told(folders: dict[str, Path], tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    with pytest.raises(CheckpointError, match="scales .* are missing"):
        tensor_table(open_checkpoint(str(spoilt(folders["llama"], tmp_path / "model", lambda tensors: tensors.pop(key)))), in_float8=True)


def test_a_plan_without_files_refuses_by_the_configuration() -> None:
    fields = config_of("minimax_m2")
    with pytest.raises(ConfigError, match="none of its weights"):
        table_without_weights(parse_config(json.dumps(fields).encode()), in_float8=True)
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    with pytest.raises(ConfigError, match="FP8, a scale a tensor"):
        table_without_weights(parse_config(json.dumps(fields).encode()), in_float8=True)


def test_the_table_by_the_configuration_is_that_of_the_files(folders: dict[str, Path]) -> None:
    for family in FAMILIES:
        checkpoint = open_checkpoint(str(folders[family]))
        by_config = table_without_weights(checkpoint.whole_config, in_float8=True)
        assert by_config.layer_bytes(2) == tensor_table(checkpoint, in_float8=True).layer_bytes(2)


def test_rows_of_such_a_run_are_not_audited_and_its_files_say_so(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    job = runs.job(store, compute_dtype="float8")
    with pytest.raises(NotInRunError, match="computed in float8"):
        require_reference(job)
    assert job.run_metadata()["compute_dtype"] == "float8"
    assert "compute_dtype" not in runs.job(store, compute_dtype="bfloat16").run_metadata()
