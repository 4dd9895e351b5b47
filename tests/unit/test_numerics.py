"""What a chain captures equals transformers' own model bit by bit: every layer, every real position, however the layers are cut.

The reference runs the same right-padded micro-batch; hooks on its decoder layers give every layer's output. Rows are stored in the
compute dtype, so nothing is rounded between the computation and the comparison.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.families import NOT_IN_FLOAT16, default_max_length, steady_positions
from m2ray.model.proof import prove
from tests.reference import (
    FAMILIES,
    LENGTHS,
    alone,
    assert_close,
    chain_rows,
    edited,
    load_chain,
    load_reference,
    make_family,
    make_minimax,
    make_type,
    micro_batch_of,
    reference_rows,
    same_bits,
    vocab_size,
)

FOLDERS = ("minimax_m2-fp8-hub", "minimax_m2-bf16-hub", "minimax_m2-bf16-fused", "llama", "qwen3")
NUM_LAYERS = {"llama": 5, "qwen3": 5}
SPANS = {
    7: ((0, 7), (0, 5, 7), (0, 1, 4, 7), (0, 1, 3, 4, 6, 7)),
    5: ((0, 5), (0, 4, 5), (0, 1, 3, 5), (0, 1, 2, 3, 4, 5)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: make_minimax(root / name, *name.split("-")[1:]) for name in FOLDERS if "-" in name}
    return {**made, **{name: make_family(root / name, name, torch.bfloat16) for name in FOLDERS if "-" not in name}}


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FOLDERS)
def test_chains_of_1_2_3_and_5_uneven_spans_equal_the_whole_model(folders: dict[str, Path], name: str, dtype: str) -> None:
    folder = folders[name]
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    expected = reference_rows(load_reference(folder, getattr(torch, dtype)), micro_batch)
    for bounds in SPANS[len(expected)]:
        rows = chain_rows(load_chain(folder, bounds, dtype), micro_batch)
        assert [same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True)] == [True] * len(expected), bounds


def test_minimax_in_float16_equals_the_whole_model(folders: dict[str, Path]) -> None:
    folder = folders["minimax_m2-fp8-hub"]
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    expected = reference_rows(load_reference(folder, torch.float16), micro_batch)
    rows = chain_rows(load_chain(folder, (0, 1, 4, 7), "float16"), micro_batch)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True))


def test_fp8_and_bf16_checkpoints_of_the_same_values_give_the_same_rows(folders: dict[str, Path]) -> None:
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folders["minimax_m2-fp8-hub"]))
    fp8, bf16 = (chain_rows(load_chain(folders[f"minimax_m2-{fmt}-hub"], (0, 3, 7), "bfloat16"), micro_batch) for fmt in ("fp8", "bf16"))
    assert all(same_bits(one, other) for one, other in zip(fp8, bf16, strict=True))


def test_every_verified_family_equals_the_whole_model(family_folder: Path) -> None:
    micro_batch = micro_batch_of(LENGTHS, vocab_size(family_folder))
    model_type = json.loads((family_folder / "config.json").read_text())["model_type"]
    for dtype in ("float32", "bfloat16") if model_type in NOT_IN_FLOAT16 else ("float32", "bfloat16", "float16"):
        expected = reference_rows(load_reference(family_folder, getattr(torch, dtype)), micro_batch)
        handed_on = str(expected[0].dtype).removeprefix("torch.")  # float32 in mamba, whatever it computes with
        rows = chain_rows(load_chain(family_folder, (0, 2, 3, 5), dtype, handed_on), micro_batch)
        assert [same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True)] == [True] * 5, dtype


@pytest.mark.parametrize("model_type", ["bloom", "falcon_h1", "kimi_linear", "sarvam_moe"])
def test_types_that_no_list_names_equal_the_whole_model(tmp_path: Path, model_type: str) -> None:
    """Layers that return tuples, buffers that another module fills, tensors that are laid side by side or split as they are read."""
    folder = make_type(tmp_path / model_type, model_type)
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    for dtype in ("float32", "bfloat16"):
        expected = reference_rows(load_reference(folder, getattr(torch, dtype)), micro_batch)
        rows = chain_rows(load_chain(folder, sorted({0, 1, 2, len(expected)}), dtype), micro_batch)
        assert [same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True)] == [True] * len(expected), dtype


@pytest.mark.parametrize(("model_type", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("qwen3", "model.")])
def test_keys_without_the_base_prefix_are_read_by_any_number_of_stages(tmp_path: Path, model_type: str, prefix: str) -> None:
    original = make_family(tmp_path / "original", model_type)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(prefix)]:
            tensors[key.removeprefix(prefix)] = tensors.pop(key)

    folder = edited(original, tmp_path / "stripped", strip)
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    expected = chain_rows(load_chain(original, (0, 2, 5), "float32"), micro_batch)
    for bounds in ((0, 5), (0, 2, 5), (0, 1, 3, 5)):
        rows = chain_rows(load_chain(folder, bounds, "float32"), micro_batch)
        assert all(same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True)), bounds


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 24,
}


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "fields", "positions"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}, 256),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}, 24),
    ],
    ids=["longrope", "dynamic"],
)
def test_embeddings_that_change_at_a_length_equal_the_whole_models_up_to_there(
    family: str, fields: dict[str, Any], positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_family(tmp_path / family, family, **fields)
    config = open_checkpoint(str(folder)).config
    assert (steady_positions(config), default_max_length(config), config.max_position_embeddings) == (24, 24, positions)
    prove(config)
    micro_batch = micro_batch_of((*LENGTHS, 24), vocab_size(folder))
    for dtype in ("float32", "bfloat16"):
        expected = reference_rows(load_reference(folder, getattr(torch, dtype)), micro_batch)
        for bounds in ((0, 5), (0, 2, 3, 5)):
            stages = load_chain(folder, bounds, dtype)
            for stage in stages:
                stage.warm_up(4096)
            rows = chain_rows(stages, micro_batch)
            assert [same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True)] == [True] * 5, (dtype, bounds)
    # A prompt that is longer by one token changes all others of its batch: why it is quarantined.
    longer = reference_rows(load_reference(folder, torch.float32), micro_batch_of((*LENGTHS, 25), vocab_size(folder)))
    alone = reference_rows(load_reference(folder, torch.float32), micro_batch_of(LENGTHS, vocab_size(folder)))
    assert ((longer[0][: sum(LENGTHS)] - alone[0]).norm(dim=1) / alone[0].norm(dim=1)).max() > 1e-3


def test_rows_of_doge_change_with_the_batch_beyond_its_window(tmp_path: Path) -> None:
    """transformers' own rows of three tokens that come again and again, alone and beside a longer prompt: why longer ones are quarantined."""
    folder = make_type(tmp_path / "model", "doge")
    config = open_checkpoint(str(folder)).config
    assert steady_positions(config) == default_max_length(config) == config.keep_window_size == 6
    assert [moved_beside_a_longer_one(folder, length, vocabulary=6) < 1e-5 for length in (6, 30)] == [True, False]


def test_rows_change_with_the_batch_where_an_index_of_few_heads_chooses_keys(tmp_path: Path) -> None:
    """As Doge's: a key's score is a sum of rectified products, of few heads often 0, and which of equal keys are chosen changes with the length."""
    few, many = (make_type(tmp_path / str(heads), "deepseek_v32", index_n_heads=heads) for heads in (4, 16))
    config = open_checkpoint(str(few)).config
    assert steady_positions(config) == default_max_length(config) == config.index_topk == 3
    assert [moved_beside_a_longer_one(few, length) < 1e-5 for length in (3, 30)] == [True, False]
    assert steady_positions(open_checkpoint(str(many)).config) is None
    assert moved_beside_a_longer_one(many, 30) < 1e-5


def moved_beside_a_longer_one(folder: Path, length: int, vocabulary: int | None = None) -> float:
    """How far, of their norm, transformers' own rows of a prompt move that is right-padded beside one of 60 tokens."""
    model = load_reference(folder, torch.float32)
    beside = micro_batch_of((length, 60), vocabulary or vocab_size(folder))
    theirs = zip(reference_rows(model, beside), reference_rows(model, alone(beside, 0)), strict=True)
    return max(float(((one[:length] - other).norm(dim=1) / other.norm(dim=1)).max()) for one, other in theirs)


def test_a_prompt_alone_differs_by_rounding_only(family_folder: Path) -> None:
    assert_alone_is_close(family_folder)


@pytest.mark.parametrize("name", [name for name in FOLDERS if "-" in name])
def test_a_minimax_prompt_alone_differs_by_rounding_only(folders: dict[str, Path], name: str) -> None:
    assert_alone_is_close(folders[name])


def assert_alone_is_close(folder: Path) -> None:
    """Each prompt by itself, through transformers' own model, against the chain's rows of the whole micro-batch (float32)."""
    model = load_reference(folder, torch.float32)
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    rows = chain_rows(load_chain(folder, (0, 2, model.config.num_hidden_layers), "float32"), micro_batch)
    stop = 0
    for index, length in enumerate(LENGTHS):
        start, stop = stop, stop + length
        assert_close([ours[start:stop] for ours in rows], reference_rows(model, alone(micro_batch, index)))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_either_attention_equals_the_whole_model_with_the_same(folders: dict[str, Path], attn: str) -> None:
    folder = folders["minimax_m2-fp8-hub"]
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    expected = reference_rows(load_reference(folder, torch.bfloat16, attn), micro_batch)
    rows = chain_rows(load_chain(folder, (0, 3, 7), "bfloat16", attn=attn), micro_batch)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True))


def test_extra_padding_moves_rows_by_rounding_only(folders: dict[str, Path]) -> None:
    folder = folders["minimax_m2-fp8-hub"]
    stages = load_chain(folder, (0, 3, 7), "float32")
    tight, wide = (micro_batch_of(LENGTHS, vocab_size(folder), pad_to=length) for length in (max(LENGTHS), 40))
    wide.token_ids_BT[:, : max(LENGTHS)] = tight.token_ids_BT
    assert_close(chain_rows(stages, wide), chain_rows(stages, tight))


def test_what_stands_in_the_padding_changes_nothing(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    stages = load_chain(folder, (0, 3, 5), "float32")
    zeros, others = micro_batch_of(LENGTHS, vocab_size(folder)), micro_batch_of(LENGTHS, vocab_size(folder))
    for row, length in enumerate(LENGTHS):
        others.token_ids_BT[row, length:] = 77
    assert all(same_bits(one, other) for one, other in zip(chain_rows(stages, zeros), chain_rows(stages, others), strict=True))


def test_rows_are_rounded_once_to_nearest_even(folders: dict[str, Path]) -> None:
    folder = folders["qwen3"]
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    exact = chain_rows(load_chain(folder, (0, 2, 5), "float32"), micro_batch)
    stored = chain_rows(load_chain(folder, (0, 2, 5), "float32", store_dtype="bfloat16"), micro_batch)
    for precise, rounded in zip(exact, stored, strict=True):
        bits = precise.view(torch.int32).long() & 0xFFFFFFFF
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        assert torch.equal(rounded.view(torch.int16).long() & 0xFFFF, nearest_even)


def test_the_last_layer_is_captured_before_the_final_norm(folders: dict[str, Path]) -> None:
    folder = folders["qwen3"]
    micro_batch = micro_batch_of(LENGTHS, vocab_size(folder))
    model = load_reference(folder, torch.float32)
    last = chain_rows(load_chain(folder, (0, 2, 5), "float32"), micro_batch)[-1]
    with torch.inference_mode():
        normed = model.model(input_ids=torch.from_numpy(micro_batch.token_ids_BT).long(), use_cache=False).last_hidden_state
        is_real_BT = torch.arange(max(LENGTHS)) < torch.from_numpy(micro_batch.token_counts)[:, None]
        assert not torch.allclose(last, normed[is_real_BT])
        assert torch.allclose(model.model.norm(last), normed[is_real_BT], rtol=1e-5, atol=1e-5)
