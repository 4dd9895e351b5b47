"""Which files are read: those that the layers need, and of a folder without transformers' names what alone can be meant."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from m2ray.batches import LayerSpan
from m2ray.cli import main
from m2ray.cli.plan_inputs import read_model
from m2ray.errors import CheckpointError
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.stage import StageSpec
from m2ray.model.tensor_table import tensor_table, up_to_layer
from tests.reference import (
    LENGTHS,
    chain_rows,
    edited,
    load_capturing,
    load_chain,
    load_reference,
    make_family,
    micro_batch_of,
    reference_rows,
    same_bits,
    vocab_size,
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    sharded = make_family(root / "sharded", "llama")
    return {"sharded": sharded, "single": edited(sharded, root / "single", lambda _: None), "tied": make_family(root / "tied", "qwen3")}


@pytest.fixture
def sharded(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["sharded"], tmp_path / "model"))


@pytest.fixture
def single(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["single"], tmp_path / "model"))


def rows_of(folder: Path, bounds: tuple[int, ...] = (0, 2, 5)) -> list[torch.Tensor]:
    return chain_rows(load_chain(folder, bounds, "float32"), micro_batch_of(LENGTHS, vocab_size(folder)))


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(same_bits(one, other) for one, other in zip(ours, theirs, strict=True))


# -- the files that the layers need -----------------------------------------------------------------------------------------


def files_of(folder: Path, wanted: Callable[[str], bool]) -> set[str]:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return {file for key, file in weight_map.items() if wanted(key)}


def is_early(key: str) -> bool:
    return key.startswith(("model.layers.0.", "model.layers.1.", "model.embed_tokens."))


def keep_only(folder: Path, needed: set[str]) -> None:
    others = [file for file in folder.glob("*.safetensors") if file.name not in needed]
    assert others
    for number, file in enumerate(others):
        if number % 2:
            file.unlink()
        else:  # still on its way
            file.write_bytes(file.read_bytes()[:-100])


def test_files_of_later_layers_need_not_be_there(originals: dict[str, Path], sharded: Path) -> None:
    whole, _ = up_to_layer(open_checkpoint(str(sharded)), 1)
    keep_only(sharded, files_of(sharded, is_early))
    checkpoint, table = up_to_layer(open_checkpoint(str(sharded)), 1)
    assert checkpoint.digest == whole.digest, "the same files, whatever lies beside them"
    assert table.num_layers == 5
    rows = tensor_table(open_checkpoint(str(originals["sharded"]))).rows
    assert {(row.name, row.shape, row.disk_bytes) for row in table.rows} == {
        (row.name, row.shape, row.disk_bytes if is_early(row.name) else 0) for row in rows
    }
    spec = StageSpec(str(sharded), LayerSpan(0, 2), "float32", "auto", "cpu", 1, model_files=checkpoint.digests)
    micro_batch = micro_batch_of(LENGTHS, vocab_size(sharded))
    output = load_capturing(spec).forward(micro_batch, None)
    expected = reference_rows(load_reference(originals["sharded"], torch.float32), micro_batch)[:2]
    assert_same([torch.from_numpy(layer.columns[0].copy()).view(torch.float32) for layer in output.captured], expected)


def test_the_table_of_unchanged_files_is_kept_and_of_changed_ones_made_anew(sharded: Path) -> None:
    checkpoint, table = up_to_layer(open_checkpoint(str(sharded)), 1)
    again, kept = up_to_layer(open_checkpoint(str(sharded)), 1)
    assert kept is table
    assert again.digests == checkpoint.digests
    assert up_to_layer(open_checkpoint(str(sharded)), 2)[1] != table
    file = sharded / min(files_of(sharded, is_early))
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.unheard_of": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="unheard_of"):
        up_to_layer(open_checkpoint(str(sharded)), 1)


def test_a_needed_file_that_is_absent_or_cut_is_named_and_no_other(sharded: Path) -> None:
    needed = sorted(files_of(sharded, is_early))
    keep_only(sharded, set(needed))
    (sharded / needed[0]).unlink()
    (sharded / needed[1]).write_bytes((sharded / needed[1]).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        up_to_layer(open_checkpoint(str(sharded)), 1)
    assert all(file in str(caught.value) for file in needed[:2])
    with pytest.raises(CheckpointError, match="no file"):
        tensor_table(open_checkpoint(str(sharded)))


def test_the_file_of_head_and_final_norm_need_not_be_there(originals: dict[str, Path], single: Path) -> None:
    first, absent = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    tensors = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    weight_map = {key: absent if key in ("model.norm.weight", "lm_head.weight") else first for key in tensors}
    save_file({key: tensors[key] for key, file in weight_map.items() if file == first}, single / first, metadata={"format": "pt"})
    (single / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint, table = up_to_layer(open_checkpoint(str(single)), 4)
    assert table.role_bytes("final_norm", 4) > 0, "of the model, if not on disk"
    assert set(checkpoint.digests) == {"config.json", INDEX, first}
    with pytest.raises(CheckpointError, match=absent):  # of a run that asks for the final norm it is one of the model's files
        up_to_layer(open_checkpoint(str(single)), 4, with_final_norm=True)
    up_to_layer(open_checkpoint(str(single)), 3, with_final_norm=True)
    stages = [
        load_capturing(StageSpec(str(single), LayerSpan(*ends), "float32", "auto", "cpu", 1, model_files=checkpoint.digests))
        for ends in ((0, 2), (2, 5))
    ]
    assert_same(chain_rows(stages, micro_batch_of(LENGTHS, vocab_size(single))), rows_of(originals["sharded"]))


def test_a_tied_embedding_under_its_heads_name_is_needed(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals["tied"], tmp_path / "tied"))
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].pop("model.embed_tokens.weight")
    tensors = load_file(folder / file)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({"lm_head.weight": embedding}, folder / "head.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / file, metadata={"format": "pt"}) if tensors else (folder / file).unlink()
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    checkpoint, _ = up_to_layer(open_checkpoint(str(folder)), 0)
    assert "head.safetensors" in checkpoint.digests
    (folder / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no file head\.safetensors"):
        up_to_layer(open_checkpoint(str(folder)), 0)


def test_a_plan_takes_an_index_whose_keys_lack_the_base_prefix(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded / INDEX).write_text(json.dumps({"weight_map": {key.removeprefix("model."): file for key, file in weight_map.items()}}))
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    assert read_model(str(sharded), "auto", "bfloat16").source == "config"
    del weight_map["model.layers.3.mlp.up_proj.weight"]
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that config\.json asks for: model\.layers\.3\.mlp\.up_proj\.weight"):
        read_model(str(sharded), "auto", "bfloat16")


def test_a_run_of_few_layers_needs_their_files_alone(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # as far as Ray, and no further
    shutil.copytree(
        Path(__file__).parents[1] / "data" / "prompts" / "tokenizer", sharded, dirs_exist_ok=True, ignore=lambda *_: ["config.json"]
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input_ids": [3, 4, 5]}\n')

    def extract(layers: str) -> Result:
        words = ["extract", "--model", str(sharded), "--prompts", str(prompts), "--output", str(tmp_path / "run"), "--layers", layers]
        return CliRunner().invoke(main, words)

    keep_only(sharded, files_of(sharded, is_early))
    assert "RAY_ADDRESS" in extract("0-1").stderr
    assert "it is truncated" in extract("0-2").stderr


# -- files of other names ----------------------------------------------------------------------------------------------------


def rename(single: Path, *names: str) -> None:
    """Put the one file under another name, or cut it into as many files as there are names."""
    tensors = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    keys = sorted(tensors)
    for number, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[number :: len(names)]}, single / name, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "names",
    [
        ("consolidated.safetensors",),
        ("model.fp16.safetensors",),
        ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"),
        ("model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"),
    ],
)
def test_the_only_weights_of_a_folder_are_read_whatever_their_name(
    originals: dict[str, Path], single: Path, names: tuple[str, ...]
) -> None:
    rename(single, *names)
    (single / "adapter_model.safetensors").write_bytes(b"of no use")
    expected = reference_rows(load_reference(originals["single"], torch.float32), micro_batch_of(LENGTHS, vocab_size(single)))
    assert_same(rows_of(single), expected)


def test_an_adapter_beside_whole_weights_is_refused(single: Path) -> None:
    """transformers puts it on the model where peft is installed, and leaves it out without a word where it is not."""
    (single / "adapter_model.safetensors").write_bytes(b"of no use")
    (single / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json beside .*weights.*peft.*merge_and_unload"):
        rows_of(single)


def test_an_index_of_another_name_is_read(originals: dict[str, Path], sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "model.safetensors.index.fp16.json")
    assert_same(rows_of(sharded), rows_of(originals["sharded"]))


def test_the_file_that_config_json_names_is_read_as_transformers_does(single: Path) -> None:
    tensors = load_file(single / SINGLE)
    save_file({key: tensor / 2 for key, tensor in tensors.items()}, single / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert_same(rows_of(single), reference_rows(load_reference(single, torch.float32), micro_batch_of(LENGTHS, vocab_size(single))))
    for named, message in (("../other.safetensors", "no safetensors file inside the folder"), (["a"], r"= \['a'\] is no name of a file")):
        (single / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(single))


def test_of_several_sets_none_is_chosen_and_all_are_named(single: Path) -> None:
    rename(single, "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors")
    shutil.copy(single / "a-00001-of-00002.safetensors", single / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"several others: a-00001-of-00002\.safetensors \.\.\., b\.safetensors\. Which is the model"):
        open_checkpoint(str(single))


def test_shards_without_an_index_have_to_be_all_there(single: Path) -> None:
    rename(single, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json, and 2 of 3 shards: model-00001-of-00003"):
        open_checkpoint(str(single))


def test_the_layout_of_mistrals_own_code_is_refused_by_name(single: Path) -> None:
    tensors = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    save_file({"tok_embeddings.weight": tensors["model.embed_tokens.weight"]}, single / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors has tensors of other names .*Take the files of the same release"):
        open_checkpoint(str(single))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("pytorch_model.bin",), r"there is pytorch_model\.bin\. Pickled weights may run code.*save_pretrained"),
        (("model.Q4_K_M.gguf",), r"there is model\.Q4_K_M\.gguf\. m2ray reads safetensors only.*gguf_file='model\.Q4_K_M\.gguf'\)"),
        (("adapter_model.safetensors",), r"there is adapter_model\.safetensors\. An adapter is not a model: merge it"),
        ((), r"of a model\. Download the model's safetensors"),
    ],
)
def test_a_folder_without_safetensors_is_told_what_helps_there(single: Path, names: tuple[str, ...], message: str) -> None:
    (single / SINGLE).unlink()
    for name in names:
        (single / name).write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(single))
    assert ("ickled" in str(caught.value)) == (names == ("pytorch_model.bin",))


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(single: Path) -> None:
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"holds no tensors, but the .* `git lfs pull`") as caught:
        open_checkpoint(str(single)).check()
    assert "Copy" not in str(caught.value)


def test_no_one_is_told_to_copy_again_what_is_whole(single: Path) -> None:
    tensors = load_file(single / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, single / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        tensor_table(open_checkpoint(str(single)))
    assert "opy" not in str(caught.value)
