"""The layouts of DeepSpec, NeMo Automodel's DSpark and ModelOpt, read as their readers do: what they hold is the run, bit by bit."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from m2ray.batches import PartSpec
from m2ray.cli import main
from m2ray.errors import CheckpointError, ConfigError, NotInRunError, RunConflictError
from m2ray.export import modelopt, nemo_dspark, safetensors_file, specforge
from m2ray.export.consumer import Export, Unit
from m2ray.export.exporting import ids_of, plan_export, write_export
from m2ray.export.samples import Sample
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.target_weights import target_weights
from m2ray.model.tensor_table import up_to_layer
from m2ray.model.weights import hash_weights
from m2ray.storage import LocalStore
from tests.reference import edited, load_reference, make_family, make_minimax, make_wrapper, other_weights, same_bits
from tests.unit import activation_runs as runs
from tests.unit import export_runs

LAYERS = (1, 3, 5, 7, 9, 11)
VOCAB = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    export_runs.finished_run(LocalStore(folder), export_runs.parts(LAYERS))
    return folder


def turned(_job, _folder):
    """A norm whose result is known to the bit."""
    return lambda rows: rows.flip(-1)


MATRICES = {
    name: torch.randn(VOCAB, runs.WIDTH, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate(("embedding", "head"))
}


def target(_job, _folder):
    shapes = dict.fromkeys(MATRICES, (VOCAB, runs.WIDTH))
    return SimpleNamespace(
        model_type="qwen3", vocab_size=VOCAB - 2, shapes=shapes, pieces=lambda name, dtype: iter(MATRICES[name].to(dtype).split(7))
    )


def export(run: Path, to: str, output: Path) -> dict[str, object]:
    plan = plan_export(run, to, layers=",".join(map(str, LAYERS)), model_folder="there", norm_of=turned, target_of=target)
    return write_export(plan, to, output)


def states(number: int, dtype: str = "bfloat16") -> tuple[torch.Tensor, torch.Tensor]:
    """The features side by side, and the last state behind the norm."""
    states_TLW = torch.from_numpy(export_runs.states(number, LAYERS, dtype)).view(getattr(torch, dtype))
    return states_TLW[:, :-1].flatten(1), states_TLW[:, -1].flip(-1)


def test_deepspec_finds_each_tensor_by_its_offset(run: Path, tmp_path: Path) -> None:
    plan = plan_export(run, "deepspec", model_folder="there", norm_of=turned)
    assert list(ids_of(plan, "deepspec").values()) == ["1", "3", "5", "7", "9", "target_last_hidden_states"]
    export(run, "deepspec", tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    index = (tmp_path / "samples.idx").read_bytes()
    records = list(struct.iter_unpack("<QIIQQQQQ", index))
    assert (manifest["version"], manifest["index_record_size"], manifest["target_layer_ids"]) == (2, 56, [1, 3, 5, 7, 9])
    assert (manifest["num_samples"], manifest["num_shards"], manifest["hidden_size"]) == (len(records), 3, runs.WIDTH) == (10, 3, 24)
    assert [shard["shard_id"] for shard in manifest["shards"]] == [0, 1, 2]
    assert manifest["target_model_name_or_path"] == "/models/m"
    ends = dict.fromkeys(range(3), 0)
    for number, (sample, shard, count, *offsets) in zip(export_runs.ORDER, records, strict=True):
        assert (sample, count) == (export_runs.ORDER.index(number), runs.token_count(number))
        data = (tmp_path / manifest["shards"][shard]["file_name"]).read_bytes()
        ids, attention, mask = (np.frombuffer(data, kind, count, at) for kind, at in zip(("<i4", "u1", "u1"), offsets, strict=False))
        assert ids.tolist() == runs.token_ids(number).tolist()
        assert (attention.all(), mask.tolist()) == (True, export_runs.mask(number).tolist())
        features, last = states(number)
        for expected, at in zip((features, last), offsets[3:], strict=True):
            found = torch.frombuffer(bytearray(data), dtype=torch.bfloat16, count=expected.numel(), offset=at).view(expected.shape)
            assert same_bits(found, expected)
        assert offsets[0] == ends[shard]
        ends[shard] = offsets[4] + 2 * last.numel()
    assert list(ends.values()) == [(tmp_path / shard["file_name"]).stat().st_size for shard in manifest["shards"]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nemo_finds_sample_i_in_a_shard_of_equally_many(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_dspark, "_MOST_SAMPLES", 4)
    export_runs.finished_run(LocalStore(tmp_path / "run"), export_runs.parts(LAYERS, dtype))
    export(tmp_path / "run", "nemo-dspark", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    longest = max(runs.token_count(number) for number in export_runs.ORDER)
    assert manifest == {
        "format_version": 1,
        "complete": True,
        "target_model": "/models/m",
        "target_model_type": "qwen3",
        "target_vocab_size": VOCAB - 2,
        "hidden_size": 24,
        "num_hidden_layers": 12,
        "seq_length": longest,
        "dtype": {"bfloat16": "bf16", "float32": "fp32"}[dtype],
        "num_samples": 10,
        "shard_size": 4,
        "target_hidden_dim": 120,
        "target_last_hidden_dim": 24,
        "target_layer_ids": [1, 3, 5, 7, 9],
    }
    assert sorted(path.name for path in (tmp_path / "out").glob("shard-*")) == [f"shard-{number:06d}.safetensors" for number in range(3)]
    for index, number in enumerate(export_runs.ORDER):
        with safe_open(tmp_path / "out" / f"shard-{index // 4:06d}.safetensors", "pt") as file:
            keys = file.keys()
            sample = {key: file.get_slice(key)[index % 4] for key in keys}
        count = runs.token_count(number)
        assert sample["input_ids"].dtype == sample["loss_mask"].dtype == torch.int64
        assert sample["input_ids"].tolist() == [*runs.token_ids(number).tolist(), *[0] * (longest - count)]
        assert sample["loss_mask"].tolist() == [*export_runs.mask(number).tolist(), *[0] * (longest - count)]
        for key, expected in zip(("target_hidden_states", "target_last_hidden_states"), states(number, dtype), strict=True):
            assert same_bits(sample[key][:count].contiguous(), expected.contiguous())
            assert not sample[key][count:].any()
    with safe_open(tmp_path / "out" / "target_weights.safetensors", "pt") as file:
        for name, of in (("embed_tokens.weight", "embedding"), ("lm_head.weight", "head")):
            assert same_bits(file.get_tensor(name), MATRICES[of].to(getattr(torch, dtype)))


@pytest.mark.parametrize("to", ["deepspec", "specforge"])
def test_the_runs_own_normed_rows_are_taken_where_it_has_them(tmp_path: Path, to: str) -> None:
    """So that neither the model nor the last layer's rows are asked for."""
    normed = PartSpec.of("final_norm", None, "bfloat16", runs.WIDTH)
    export_runs.finished_run(LocalStore(tmp_path / "run"), [*export_runs.parts((1, 3, 5)), normed])
    plan = plan_export(tmp_path / "run", to, layers="1,3,5,11")
    write_export(plan, to, tmp_path / "out")
    written = b"".join(path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.suffix in (".bin", ".ckpt"))
    for number in export_runs.ORDER:
        assert runs.bits(normed, number).tobytes() in written
        assert export_runs.states(number, (1, 3, 5)).tobytes() in written
    with pytest.raises(NotInRunError, match="no residual of layer 11"):
        plan_export(tmp_path / "run", "modelopt", layers="1,3,5,11")


def test_a_sample_of_one_token_is_saved_without_the_memory_around_it() -> None:
    around, written = np.zeros((100_000, 4, 2 * runs.WIDTH), np.uint8), []
    sample = Sample(0, 0, "row-0", np.array([1], np.int32), np.array([1], np.uint8), around[:1], "bfloat16")
    plan = Export(SimpleNamespace(is_normed=True), 12, "0" * 32)
    output = SimpleNamespace(write=lambda _, pieces: written.append(sum(len(piece) for piece in pieces)))
    for consumer in (modelopt.CONSUMER, specforge.CONSUMER):
        consumer.write(plan, output, Unit(0, 1, 0, 1), iter([sample]))
    assert max(written) < 8192


def test_modelopt_loads_tensors_alone(run: Path, tmp_path: Path) -> None:
    export(run, "modelopt", tmp_path)
    files = sorted(tmp_path.rglob("*.pt"))
    assert len(files) == 10
    for path, number in zip(files, export_runs.ORDER, strict=True):
        sample = torch.load(path, weights_only=True)
        assert (sample["conversation_id"], sample["hidden_states_prenorm"]) == (f"row-{number}", True)
        assert sample["input_ids"].tolist() == runs.token_ids(number).tolist()
        assert sample["loss_mask"].tolist() == export_runs.mask(number).tolist()
        features, last = states(number)
        assert same_bits(sample["aux_hidden_states"], features)
        assert same_bits(sample["hidden_states"], last.flip(-1))  # as recorded
        assert path.stat().st_size < features.nbytes + last.nbytes + 4096  # and nothing of the window's memory beside it


def test_modelopt_needs_no_mask(tmp_path: Path) -> None:
    runs.finished_run(LocalStore(tmp_path / "run"), export_runs.parts(LAYERS))
    export(tmp_path / "run", "modelopt", tmp_path / "out")
    assert "loss_mask" not in torch.load(tmp_path / "out" / "00000000.pt", weights_only=True)


def test_what_the_run_lacks_for_them_is_said_by_name(run: Path, tmp_path: Path) -> None:
    for to in ("deepspec", "nemo-dspark"):
        with pytest.raises(ConfigError, match="--model"):
            plan_export(run, to)
        with pytest.raises(ConfigError, match="model's last layer, 11"):
            plan_export(run, to, layers="1,3", model_folder="there")
        with pytest.raises(ConfigError, match="other layers before those of the last one; the only layer is 11"):
            plan_export(run, to, layers="11", model_folder="there")
    runs.finished_run(LocalStore(tmp_path / "bare"), export_runs.parts(LAYERS))
    with pytest.raises(NotInRunError, match="have no loss mask"):
        plan_export(tmp_path / "bare", "nemo-dspark", model_folder="there")
    export_runs.finished_run(LocalStore(tmp_path / "wide"), export_runs.parts(LAYERS, "float32"))
    with pytest.raises(NotInRunError, match="bfloat16"):
        plan_export(tmp_path / "wide", "deepspec", model_folder="there")


def test_the_command_reads_norm_embedding_and_head_of_the_runs_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_family(
        tmp_path / "m",
        "llama",
        torch.bfloat16,
        hidden_size=runs.WIDTH,
        num_hidden_layers=runs.NUM_LAYERS,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=8,
    )
    digest, job_of = up_to_layer(open_checkpoint(str(folder)), runs.NUM_LAYERS - 1)[0].digest, runs.job

    def job(store, parts, **_options):
        record = job_of(store, parts, compute_dtype="bfloat16", store_dtype="bfloat16")
        return replace(record, fingerprints={**record.fingerprints, "model": digest})

    monkeypatch.setattr(runs, "job", job)
    monkeypatch.setattr(runs, "LOADED", {**runs.LOADED, **hash_weights(open_checkpoint(str(folder)), runs.NUM_LAYERS)})
    export_runs.finished_run(LocalStore(tmp_path / "run"), export_runs.parts(LAYERS))
    words = ["export", str(tmp_path / "run"), "--to", "nemo-dspark", "--model", str(folder), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    longest = max(map(runs.token_count, export_runs.ORDER))
    assert f"target_layer_ids: [1, 3, 5, 7, 9] and seq_length: {longest}" in result.output
    model = load_reference(folder, torch.bfloat16)
    with safe_open(tmp_path / "out" / "shard-000000.safetensors", "pt") as file:
        last = file.get_tensor("target_last_hidden_states")
    for row, number in enumerate(export_runs.ORDER):
        recorded = torch.from_numpy(export_runs.states(number, LAYERS)).view(torch.bfloat16)[:, -1]
        assert same_bits(last[row, : len(recorded)].contiguous(), model.model.norm(recorded.contiguous()).detach())
    with safe_open(tmp_path / "out" / "target_weights.safetensors", "pt") as file:
        assert same_bits(file.get_tensor("embed_tokens.weight"), model.model.embed_tokens.weight.data)
        assert same_bits(file.get_tensor("lm_head.weight"), model.lm_head.weight.data)
    words[-1] = str(tmp_path / "other")
    with other_weights(folder):
        refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert "are not those of the run: its embedding or its last layer" in refused.output
    assert not (tmp_path / "other").exists()


# -- embedding and head -----------------------------------------------------------------------------------------------


def weights_of(folder: Path, fingerprint: str | None = None):
    checkpoint = open_checkpoint(str(folder))
    num_layers = checkpoint.config.num_hidden_layers
    return target_weights(str(folder), fingerprint or up_to_layer(checkpoint, num_layers - 1)[0].digest, num_layers)


@pytest.mark.parametrize("made", ["llama", "qwen3", "gpt2", "gemma3 wrapper", "minimax fp8"])
def test_embedding_and_head_are_those_of_transformers(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart and tied, in several files, below a multimodal model, beside FP8; whatever a piece's size is."""
    monkeypatch.setattr("m2ray.model.target_weights._PIECE_BYTES", 1000)
    if made == "gemma3 wrapper":
        make_wrapper(tmp_path / "m", "gemma3")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=torch.float32)
    else:
        make_minimax(tmp_path / "m", "fp8") if made == "minimax fp8" else make_family(tmp_path / "m", made)
        model = load_reference(tmp_path / "m", torch.float32)
    found = weights_of(tmp_path / "m")
    assert (found.model_type, found.vocab_size) == (model.config.model_type, model.config.get_text_config().vocab_size)
    for name, module in (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        pieces = list(found.pieces(name, torch.float32))
        assert len(pieces) > 1
        assert same_bits(torch.cat(pieces), module.weight.data)
        assert found.shapes[name] == tuple(module.weight.shape)


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    make_family(tmp_path / "m", "llama")
    with pytest.raises(RunConflictError, match="not that of the run"):
        weights_of(tmp_path / "m", "0" * 32)


def test_a_checkpoint_without_its_head_is_refused_by_the_name(tmp_path: Path) -> None:
    make_family(tmp_path / "m", "llama")
    folder = edited(tmp_path / "m", tmp_path / "e", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        weights_of(folder)


def test_a_header_alone_is_that_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": ("int64", (2, 3), np.arange(6)), "b": ("bfloat16", (3,), np.zeros(3, np.uint16))}
    whole = b"".join(safetensors_file.pieces_of(tensors))
    assert whole.startswith(bytes(safetensors_file.header_of({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()})))
