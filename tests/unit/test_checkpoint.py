"""Opening a checkpoint: what is read, what is refused and how clearly, and the table that planning counts on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import MemoryStore
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2ray.errors import CheckpointError, ConfigError
from m2ray.model import checkpoint, families
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.families import parse_config
from m2ray.model.skeleton import build_skeleton
from m2ray.model.tensor_table import table_without_weights, tensor_table
from m2ray.model.tiny import tiny_copies
from m2ray.storage import ObjectStore
from tests.reference import DATA, FAMILIES, load_reference, make_family, make_minimax

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {
        "minimax": make_minimax(root / "minimax", "fp8"),
        "llama": make_family(root / "llama", "llama"),
        "qwen3": make_family(root / "qwen3", "qwen3"),
    }


@pytest.fixture
def minimax(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["minimax"], tmp_path / "minimax"))


@pytest.fixture
def llama(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["llama"], tmp_path / "llama"))


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a checkpoint as one file with other tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tensor_is_read_to_the_bit_and_counted(minimax: Path) -> None:
    checkpoint = open_checkpoint(str(minimax))
    checkpoint.check()
    total = 0
    for file in sorted(minimax.glob("*.safetensors")):
        for key, expected in load_file(file).items():
            found = checkpoint.read(key)
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
            total += expected.numel() * expected.itemsize
    assert checkpoint.bytes_read == total


def test_rows_of_a_tensor_are_read_without_the_rest(minimax: Path) -> None:
    checkpoint = open_checkpoint(str(minimax))
    key = "model.embed_tokens.weight"
    rows = checkpoint.read(key, slice(3, 7))
    assert checkpoint.bytes_read == 4 * 128 * 2
    assert torch.equal(rows, checkpoint.read(key)[3:7])


def test_a_checkpoint_of_one_file_needs_no_index(llama: Path) -> None:
    before = {row.name: row.shape for row in tensor_table(open_checkpoint(str(llama))).rows}
    edit_tensors(llama, lambda _: None)
    assert {row.name: row.shape for row in tensor_table(open_checkpoint(str(llama))).rows} == before


def test_the_digest_changes_with_config_header_and_size_only(minimax: Path, tmp_path: Path) -> None:
    digest = open_checkpoint(str(minimax)).digest
    assert len(digest) == 32
    assert open_checkpoint(str(shutil.copytree(minimax, tmp_path / "copy"))).digest == digest
    file = min(minimax.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    assert open_checkpoint(str(minimax)).digest != digest
    file.write_bytes(data)
    assert open_checkpoint(str(minimax)).digest == digest
    edit_config(minimax, rope_theta=10000)
    assert open_checkpoint(str(minimax)).digest != digest


def test_opening_reads_headers_only(minimax: Path) -> None:
    assert open_checkpoint(str(minimax)).bytes_read == 0


def test_every_damage_is_listed_at_once(minimax: Path) -> None:
    absent, truncated, *_ = sorted(minimax.glob("*.safetensors"))
    absent.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(minimax)).check()
    assert f"no file {absent.name}" in str(caught.value)
    assert f"{truncated.name} has" in str(caught.value)
    assert "it is truncated" in str(caught.value)


def test_a_stale_entry_of_the_index_is_no_damage_unless_the_model_needs_it(minimax: Path) -> None:
    index = json.loads((minimax / INDEX).read_text())
    file = index["weight_map"]["model.layers.3.self_attn.q_norm.weight"]
    index["weight_map"] |= {"mtp.fc.weight": file, "model.layers.0.extra.weight": file}
    (minimax / INDEX).write_text(json.dumps(index))
    tensor_table(open_checkpoint(str(minimax)))
    tensors = load_file(minimax / file)
    del tensors["model.layers.3.self_attn.q_norm.weight"]
    save_file(tensors, minimax / file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"(?s){file} that it does not hold: .*no tensor for model\.layers\.3\.self_attn\.q_norm"):
        tensor_table(open_checkpoint(str(minimax)))


@pytest.mark.parametrize("key", ["score.weight", "v_head.summary.weight", "medusa_head.0.0.linear.weight", "mtp.fc.weight"])
def test_a_head_that_is_never_loaded_need_not_be_there_and_others_are_not_read(llama: Path, key: str) -> None:
    rows = {row.name: row for row in tensor_table(open_checkpoint(str(llama))).rows}
    edit_tensors(llama, lambda tensors: tensors.update({key: tensors.pop("lm_head.weight")}))
    table = tensor_table(open_checkpoint(str(llama)))
    found = {row.name: row for row in table.rows}
    assert found.pop(key).role == "unused"
    assert found.keys() == rows.keys() - {"lm_head.weight"}
    edit_tensors(llama, lambda tensors: tensors.update({"model.score.weight": tensors.pop(key)}))
    with pytest.raises(CheckpointError, match=r"model\.score\.weight: a llama model has no such tensor"):
        tensor_table(open_checkpoint(str(llama)))


@pytest.mark.parametrize("name", ["q_proj.activation_scale", "q_proj.input_scale", "k_scale", "v_scale", "k_proj.k_scale"])
def test_scales_of_activations_are_not_read_of_an_fp8_checkpoint(minimax: Path, llama: Path, name: str) -> None:
    for folder in (minimax, llama):
        edit_tensors(folder, lambda tensors: tensors.update({f"model.layers.3.self_attn.{name}": torch.ones(())}))
    rows = {row.name: row.role for row in tensor_table(open_checkpoint(str(minimax))).rows}
    assert rows[f"model.layers.3.self_attn.{name}"] == "unused"
    with pytest.raises(CheckpointError, match="a llama model has no such tensor"):
        tensor_table(open_checkpoint(str(llama)))


def test_scales_of_a_weight_that_is_not_quantised_are_refused_once_and_never_read_without(minimax: Path) -> None:
    key = "model.layers.3.self_attn.q_proj.weight"

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{key}_scale"] = tensors.pop(f"{key}_scale_inv")
        tensors[key] = tensors[key].to(torch.bfloat16)

    edit_tensors(minimax, rename)
    with pytest.raises(CheckpointError, match=rf"^{key} is of dtype torch.bfloat16 and yet has scales, {key}_scale"):
        tensor_table(open_checkpoint(str(minimax)))


def single_file_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_a_single_file_beside_an_index_and_its_shards_is_refused_naming_both(llama: Path) -> None:
    other = {key: tensor + 1 for key, tensor in single_file_of(llama).items()}
    save_file(other, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"both model\.safetensors and {INDEX} with \d+ of its files \(model-00001-of-"):
        open_checkpoint(str(llama)).check()
    min(llama.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=rf"both model\.safetensors and {INDEX}"):
        open_checkpoint(str(llama)).check()


def test_a_stale_index_beside_the_single_file_of_save_pretrained_is_not_read(llama: Path, tmp_path: Path) -> None:
    model = load_reference(llama, torch.float32)
    model.save_pretrained(llama)  # removes the shards, and leaves their index
    assert (llama / INDEX).exists()
    assert not list(llama.glob("model-*.safetensors"))
    checkpoint = open_checkpoint(str(llama))
    checkpoint.check()
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.read(key), model.state_dict()[key])
    (llama / INDEX).unlink()
    assert open_checkpoint(str(llama)).digest == checkpoint.digest


def test_an_index_that_names_the_single_file_is_read(llama: Path) -> None:
    edit_tensors(llama, lambda _: None)
    keys = load_file(llama / "model.safetensors")
    (llama / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, "model.safetensors")}))
    open_checkpoint(str(llama)).check()


def test_a_tensor_in_two_files_is_refused_naming_both(llama: Path) -> None:
    first, *_, last = sorted(llama.glob("*.safetensors"))
    tensors, key = load_file(last), min(load_file(first))
    save_file({**tensors, key: load_file(first)[key] + 1}, last, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{first.name} and {last.name} both hold {key}: transformers takes the file"):
        open_checkpoint(str(llama)).check()


OLD, NEW = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 5e6}


def test_rope_scaling_that_contradicts_rope_parameters_is_refused_naming_both(llama: Path) -> None:
    edit_config(llama, rope_parameters=NEW, rope_scaling=OLD)
    with pytest.raises(CheckpointError, match=r"rope_scaling = .*'factor': 2.0} and rope_parameters = .*5000000\.0.* would take"):
        open_checkpoint(str(llama))


@pytest.mark.parametrize("fields", [{"rope_parameters": NEW, "rope_scaling": None}, {"rope_parameters": NEW, "rope_scaling": NEW}])
def test_rope_scaling_that_says_nothing_else_is_read(llama: Path, fields: dict[str, Any]) -> None:
    edit_config(llama, **fields)
    assert open_checkpoint(str(llama)).config.rope_parameters["rope_theta"] == 5e6


@pytest.mark.parametrize("model_type", ["gptj", "codegen", "llama", "minimax_m3_vl_text"])
def test_rotary_dim_is_minimax_m2s_alone(model_type: str) -> None:
    fields = {"model_type": model_type, "rotary_dim": 32, "partial_rotary_factor": 0.25}
    config = parse_config(json.dumps(fields).encode())
    expected = CONFIG_MAPPING[model_type].from_dict(fields)
    assert config.to_dict() == expected.to_dict()
    if model_type == "minimax_m3_vl_text":
        assert families.expected_rotary_dim(config) == config.head_dim // 4


def change_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def change_entry(**fields: Any) -> Callable[[bytes], bytes]:
    def change(header: dict[str, Any]) -> None:
        first = min((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
        header[first] |= fields

    return lambda data: change_header(data, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5], "has 5 bytes only"),
        (lambda data: data[:200], "its header alone needs"),
        (lambda data: data[:-1], "it is truncated"),
        (lambda data: data + b"\0", "something was appended"),
        (lambda data: b"\xff" * 8 + data[8:], "claims a header of"),
        (lambda data: data[:8] + b"#" + data[9:], "is not JSON"),
        (change_entry(dtype="F4"), "of dtype 'F4'"),
        (change_entry(shape=[3, 5]), "has .* bytes in the file"),
        (change_entry(shape=[-3, 5]), "no count"),
        (change_entry(data_offsets=[8, 4]), "bytes in the file"),
        (change_entry(data_offsets=None), "malformed"),
        (change_entry(data_offsets=[4, 4], shape=[0]), "the tensor before it ends at"),
    ],
)
def test_a_damaged_header_is_refused_by_file_name(llama: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = min(llama.glob("*.safetensors"))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(llama)).check()
    assert file.name in str(caught.value)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "pytorch_model.bin"])
def test_an_index_must_not_lead_outside_or_to_pickles(llama: Path, name: str) -> None:
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no safetensors file inside the folder"):
        open_checkpoint(str(llama)).check()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json in .*nowhere"):
        open_checkpoint(str(tmp_path / "nowhere"))
    for file in [*llama.glob("*.safetensors"), llama / INDEX]:
        file.unlink()
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="safetensors only"):
        open_checkpoint(str(llama))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"metadata": {}}'])
def test_a_malformed_index_is_refused(llama: Path, text: str) -> None:
    (llama / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="weight_map|is not JSON"):
        open_checkpoint(str(llama))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "no_such_model"}, "knows no model_type 'no_such_model'"),
        ({"model_type": "bart"}, "a bart has an encoder beside its decoder"),
        ({"model_type": "albert"}, "transformers has no language model of model_type 'albert'"),
        ({"model_type": None}, "no model_type"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2"),
        ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input = 8"),
        ({"quantization_config": {"quant_method": "none_such"}}, "quant_method 'none_such', which m2ray does not read"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "weight_block_size"),
        ({"quantization_config": "fp8"}, "quantization_config = 'fp8' is no JSON object. Write what says how"),
        (
            {"dtype": "bf16"},
            "transformers refuses config.json as a llama .* Instead of dtype = 'bf16' write torch's own name: \"bfloat16\"",
        ),
        ({"num_attention_heads": "many"}, "transformers refuses config.json"),
    ],
)
def test_what_m2ray_does_not_run_is_refused_with_the_reason(llama: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(llama, **fields)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(llama))


def test_a_padding_token_beyond_the_vocabulary_is_refused_with_both_numbers(llama: Path) -> None:
    edit_config(llama, pad_token_id=96)
    with pytest.raises(CheckpointError, match=r"cannot build a llama .*Padding_idx.* pad_token_id = 96, and vocab_size = 96\. Set"):
        tensor_table(open_checkpoint(str(llama)))


def test_numbers_that_json_cannot_say_are_read_as_transformers_writes_them(llama: Path) -> None:
    edit_config(llama, limits=[{"__float__": "Infinity"}, {"__float__": "-Infinity"}], other={"__float__": "x"}, odd={"__float__": [{}]})
    config = open_checkpoint(str(llama)).config
    assert (config.limits, config.other) == ([float("inf"), float("-inf")], {"__float__": "x"})
    assert config.odd == {"__float__": [{}]}


@pytest.mark.parametrize("model_type", [["llama"], {"name": "llama"}, 7])
def test_a_model_type_that_is_no_name_is_refused(llama: Path, model_type: object) -> None:
    edit_config(llama, model_type=model_type)
    with pytest.raises(CheckpointError, match="knows no model_type"):
        open_checkpoint(str(llama))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_that_look_positions_up_are_known(model_type: str) -> None:
    config = parse_config((DATA / "families" / f"{model_type}.json").read_bytes())
    skeleton = build_skeleton(config, torch.bfloat16)
    modules = {name: skeleton.model.get_submodule(name) for name in skeleton.inputs}
    tables = [name for name, each in modules.items() if isinstance(each, torch.nn.Embedding) and each.num_embeddings != config.vocab_size]
    assert bool(tables) == (model_type in families.LEARNED_POSITIONS), tables


@pytest.mark.parametrize("model_type", ["biogpt", "falcon_h1", "gpt-sw3", "gpt_bigcode", "gpt_neo", "openai-gpt", "starcoder2", "trocr"])
def test_types_without_a_file_that_look_positions_up_are_known_too(model_type: str) -> None:
    skeleton = build_skeleton(next(tiny_copies(CONFIG_MAPPING[model_type]())), torch.bfloat16)
    tables = [name for name in skeleton.inputs if isinstance(skeleton.model.get_submodule(name), torch.nn.Embedding)]
    assert (len(tables) > 1) == (model_type in families.LEARNED_POSITIONS), tables


def test_a_table_of_biases_ends_too() -> None:
    config = parse_config(b'{"model_type": "mpt", "max_seq_len": 256}')
    assert families.default_max_length(config) == 256
    families.require_positions(config, 256)
    with pytest.raises(ConfigError, match=r"a mpt of config\.json has 256 positions"):
        families.require_positions(config, 257)


def test_a_window_beyond_the_models_positions_adds_none() -> None:
    config = parse_config(b'{"model_type": "doge", "max_position_embeddings": 64, "keep_window_size": 256}')
    assert (families.default_max_length(config), families.steady_positions(config)) == (64, 256)


def test_code_and_settings_of_the_folder_are_ignored(llama: Path) -> None:
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(
        llama, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, _attn_implementation="flash_attention_2"
    )
    config = open_checkpoint(str(llama)).config
    assert type(config).__name__ == "LlamaConfig"
    assert config._attn_implementation != "flash_attention_2"


def test_the_table_counts_every_tensor_of_the_checkpoint(minimax: Path) -> None:
    checkpoint = open_checkpoint(str(minimax))
    table = tensor_table(checkpoint)
    assert checkpoint.bytes_read == 0
    assert table.disk_bytes == sum(header.num_bytes for header in checkpoint.headers.values())
    assert (table.num_layers, table.hidden_size) == (7, 128)
    scales = {key for key in checkpoint.headers if key.endswith("_scale_inv")}
    assert scales
    assert {key for row in table.rows for key in row.sources} | scales == set(checkpoint.headers)
    by_name = {row.name: row for row in table.rows}
    fused = by_name["model.layers.3.mlp.experts.gate_up_proj"]
    assert (fused.role, fused.layer, fused.shape, fused.itemsize_bytes) == ("layer", 3, (12, 256, 128), None)
    assert len(fused.sources) == 24
    assert by_name["model.layers.3.mlp.gate.weight"].itemsize_bytes == 4
    assert by_name["model.layers.3.mlp.e_score_correction_bias"].itemsize_bytes == 4
    assert [by_name[name].role for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")] == [
        "embedding",
        "final_norm",
        "head",
    ]


def test_the_table_without_weights_is_that_of_the_checkpoint(minimax: Path, llama: Path) -> None:
    for folder in (minimax, llama):
        checkpoint = open_checkpoint(str(folder))
        assert set(table_without_weights(checkpoint.config).rows) == set(tensor_table(checkpoint).rows)


def test_the_table_of_the_real_minimax_m2() -> None:
    table = table_without_weights(parse_config((DATA / "minimax_m2" / "config.json").read_bytes()))
    num_elements = sum(row.num_elements for row in table.rows)
    router_elements = sum(row.num_elements for row in table.rows if row.itemsize_bytes == 4)
    assert table.disk_bytes == 230_121_630_720
    assert num_elements * 2 == 457_379_529_728
    assert sum(row.compute_bytes(2) for row in table.rows) == 457_379_529_728 + 2 * router_elements
    assert router_elements == 62 * (256 * 3072 + 256)
    assert set(table.layer_bytes(2)) == {7_337_437_696 + 2 * (256 * 3072 + 256)}
    assert table.role_bytes("head", 2) == table.role_bytes("embedding", 2) == 1_229_193_216


def test_the_table_of_twice_as_many_layers_visits_twice_as_many_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = []
    usual = torch.nn.Module.named_modules

    def counted(*args: Any, **options: Any) -> Any:
        visits[-1] += 1  # of one module: the walk calls itself for each
        return usual(*args, **options)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    fields = json.loads((DATA / "families" / "mixtral.json").read_text())
    for layers in (8, 16):
        visits.append(0)
        table_without_weights(parse_config(json.dumps({**fields, "num_hidden_layers": layers}).encode()))
    assert visits[1] < 2.2 * visits[0]


def add_extra_layers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.5.eh_proj.weight"] = torch.ones(2, 2)
    tensors["mtp.fc.weight"] = torch.ones(2, 2)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def test_extra_layers_are_reported_and_never_read(llama: Path) -> None:
    edit_tensors(llama, add_extra_layers)
    rows = tensor_table(open_checkpoint(str(llama))).rows
    assert {row.name for row in rows if row.role == "unused"} == {
        "model.layers.5.eh_proj.weight",
        "mtp.fc.weight",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
    }


def test_buffers_that_older_versions_of_transformers_saved_are_never_read(tmp_path: Path) -> None:
    """GPT-Neo's masks are in its release's files, and what they were filled with in many of GPT-2's kind; the model makes its own."""
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64, "max_position_embeddings": 8}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt_neo"](**sizes, attention_types=[[["global", "local"], 1]]))
    model.save_pretrained(tmp_path)
    old = {f"transformer.h.{layer}.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for layer in range(2)}
    old |= {f"transformer.h.{layer}.attn.attention.masked_bias": torch.tensor(-1e9) for layer in range(2)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(old))
    assert {row.name for row in tensor_table(open_checkpoint(str(tmp_path))).rows if row.role == "unused"} == old.keys()


def test_a_tied_head_on_disk_is_reported_as_head(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals["qwen3"], tmp_path / "qwen3"))
    before = tensor_table(open_checkpoint(str(folder)))
    assert before.role_bytes("head", 2) == 0
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    rows = {row.name: row for row in tensor_table(open_checkpoint(str(folder))).rows}
    assert rows["lm_head.weight"].role == "head"
    assert rows["model.embed_tokens.weight"].sources == ("model.embed_tokens.weight",)
    edit_tensors(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    rows = {row.name: row for row in tensor_table(open_checkpoint(str(folder))).rows}
    assert rows["model.embed_tokens.weight"].sources == ("lm_head.weight",)


def test_a_bucket_is_asked_once_for_the_sizes_of_all_weight_files(monkeypatch: pytest.MonkeyPatch, minimax: Path) -> None:
    memory, looked_at = MemoryStore(), list[str]()
    for path in minimax.iterdir():
        obstore.put(memory, path.name, path.read_bytes())
    head = obstore.head
    monkeypatch.setattr(obstore, "head", lambda store, key: looked_at.append(key) or head(store, key))
    monkeypatch.setattr(checkpoint, "open_store", lambda url: ObjectStore(url, memory))
    found = open_checkpoint("memory://model")
    assert len(found.weight_files) > 1
    assert not [key for key in looked_at if key in found.weight_files]
    monkeypatch.undo()
    assert found.digest == open_checkpoint(str(minimax)).digest
    obstore.delete(memory, min(found.weight_files))
    monkeypatch.setattr(checkpoint, "open_store", lambda url: ObjectStore(url, memory))
    assert open_checkpoint("memory://model").damaged.keys() == {min(found.weight_files)}
