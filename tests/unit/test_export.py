"""m2ray export: what each consumer's files hold is the run, bit by bit; what the run lacks is said; what is there is kept."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from m2ray.activations.writing.commits import claim_run
from m2ray.cli import main
from m2ray.errors import ConfigError, M2rayError, NotInRunError, RunConflictError, StoreError
from m2ray.export import saelens, samples
from m2ray.export.exporting import CONSUMERS, consumer_of, ids_of, plan_export, write_export
from m2ray.storage import LocalStore
from m2ray.storage.hashing import HashingFile
from tests.unit import activation_runs as runs
from tests.unit import export_runs


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    export_runs.finished_run(LocalStore(folder), export_runs.parts())
    return folder


@pytest.fixture(params=[32 << 20, 1], ids=["a window a shard", "a window a sequence"])
def window(request, monkeypatch) -> None:
    monkeypatch.setattr(samples, "_WINDOW_BYTES", request.param)
    monkeypatch.setattr(saelens, "_BATCH_BYTES", request.param)


def same_bits(tensor: torch.Tensor, expected: np.ndarray) -> bool:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() == expected.tobytes()


def turned(_job, _folder):
    """A norm whose result is known to the bit."""
    return lambda rows: rows.flip(-1)


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("window")
def test_speculators_reads_tokens_masks_and_states(run: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    export = plan_export(run, "speculators")
    assert ids_of(export, "speculators") == {1: "2", 5: "6", 8: "9", 11: "12"}
    write_export(export, "speculators", tmp_path)
    rows = load_from_disk(str(tmp_path))
    assert rows["sequence_id"][:].tolist() == export_runs.ORDER
    for index, number in enumerate(export_runs.ORDER):
        row, count = rows[index], runs.token_count(number)
        with safe_open(tmp_path / "hidden_states" / f"hs_{index}.safetensors", "pt") as file:
            token_ids, states = file.get_tensor("token_ids"), file.get_tensor("hidden_states")
        assert torch.equal(token_ids, row["input_ids"])  # as its trainer asks
        assert token_ids.tolist() == runs.token_ids(number).tolist()
        assert row["loss_mask"].tolist() == export_runs.mask(number).tolist()
        assert row["seq_len"] == count
        assert (states.dtype, tuple(states.shape)) == (torch.bfloat16, (count, 4, runs.WIDTH))
        assert same_bits(states, export_runs.states(number))


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_saelens_reads_contexts_of_a_hook(tmp_path: Path, dtype: str) -> None:
    from datasets import load_from_disk

    export_runs.finished_run(LocalStore(tmp_path / "run"), export_runs.parts((5, 8), dtype))
    write_export(plan_export(tmp_path / "run", "saelens", layers="5,8", context_size=4), "saelens", tmp_path / "out")
    rows, width = load_from_disk(str(tmp_path / "out")), runs.WIDTH
    hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in (5, 8)}
    token_ids = rows["token_ids"][:]
    rows.set_format(type="torch", columns=list(hooks.values()), dtype=torch.float16 if dtype == "float16" else torch.float32)
    wanted = [(number, start) for number in export_runs.ORDER for start in range(0, runs.token_count(number) - 3, 4)]
    assert len(rows) == len(wanted) > 0
    assert rows.features[hooks[5]].shape == (4, width)
    for row, ids, (number, start) in zip(rows, token_ids, wanted, strict=True):
        assert ids == runs.token_ids(number)[start : start + 4].tolist()
        for place, hook in enumerate(hooks.values()):
            found, expected = row[hook], export_runs.states(number, (5, 8), dtype)[start : start + 4, place]
            stored = torch.from_numpy(expected.copy()).view(getattr(torch, dtype))
            if dtype == "bfloat16":  # the same numbers in more bits
                assert found.dtype == torch.float32
                expected = stored.float().view(torch.uint8).numpy()
            assert same_bits(found, expected)


def test_a_long_sequence_is_several_record_batches_of_saelens(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Of 2**31 numbers of a layer Arrow would lose count without a word."""
    monkeypatch.setattr(saelens, "_BATCH_BYTES", 1)
    write_export(plan_export(run, "saelens", layers="5", context_size=2), "saelens", tmp_path)
    contexts = sum(runs.token_count(number) // 2 for number in runs.SHARD_SEQUENCES[0])
    with pa.ipc.open_stream(str(tmp_path / "data-00000-of-00003.arrow")) as stream:
        assert [len(batch) for batch in stream] == [1] * contexts


@pytest.mark.usefixtures("window")
def test_specforge_reads_four_tensors_a_sample(run: Path, tmp_path: Path) -> None:
    export = plan_export(run, "specforge", model_folder="there", norm_of=turned)
    write_export(export, "specforge", tmp_path)
    for index, number in enumerate(export_runs.ORDER):
        tensors = torch.load(tmp_path / "rows_0-5000" / f"data_{index}.ckpt", weights_only=True)
        states = torch.from_numpy(export_runs.states(number)).view(torch.bfloat16)
        assert set(tensors) == {"input_ids", "loss_mask", "hidden_state", "aux_hidden_state"}
        assert tensors["input_ids"].tolist() == runs.token_ids(number).tolist()
        assert tensors["loss_mask"].tolist() == export_runs.mask(number).tolist()
        assert same_bits(tensors["aux_hidden_state"], states[None, :, :3].flatten(2).view(torch.uint8).numpy())
        assert same_bits(tensors["hidden_state"], states[None, :, 3].flip(-1).view(torch.uint8).numpy())
        # No more than its own tensors: a view would take the memory of the whole window along.
        assert (tmp_path / "rows_0-5000" / f"data_{index}.ckpt").stat().st_size < 4096 + states.nbytes + 16 * len(states)


# -- kept, or written again -------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_export_is_kept_as_it_is(run: Path, tmp_path: Path) -> None:
    export, reports = plan_export(run, "speculators"), []
    first = write_export(export, "speculators", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "hidden_states").iterdir()}
    again = write_export(export, "speculators", tmp_path, lambda *report: reports.append(report))
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert reports[-1][:2] == (len(export_runs.ORDER), 0)


@pytest.mark.parametrize("damage", ["gone", "shorter", "a bit", "record"])
def test_what_is_not_what_was_written_is_written_again(run: Path, tmp_path: Path, damage: str) -> None:
    export = plan_export(run, "speculators")
    write_export(export, "speculators", tmp_path)
    whole, path = contents(tmp_path), tmp_path / "hidden_states" / "hs_5.safetensors"
    if damage == "gone":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "a bit":
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    else:
        (tmp_path / ".m2ray" / "unit-000001.json").unlink()
    write_export(export, "speculators", tmp_path)
    assert contents(tmp_path) == whole


def test_cut_off_anywhere_it_goes_on(run: Path, tmp_path: Path, monkeypatch) -> None:
    """The nth write fails; the next try gets further; in the end the files are those of an export that nothing cut off."""
    whole = tmp_path / "whole"
    write_export(plan_export(run, "speculators"), "speculators", whole)
    write, left = HashingFile.write, 0

    def write_some(file, data):
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionAbortedError
        return write(file, data)

    monkeypatch.setattr(HashingFile, "write", write_some)
    for tries in range(1, 20):
        left = 6 * tries
        try:
            write_export(plan_export(run, "speculators"), "speculators", tmp_path / "cut")
            break
        except ConnectionAbortedError:
            assert not (tmp_path / "cut" / "m2ray_export.json").exists()
            assert list((tmp_path / "cut" / "_unfinished").iterdir()) == []
    assert tries > 2
    assert contents(tmp_path / "cut") == contents(whole)


def test_files_become_durable_while_the_next_unit_is_written(run: Path, tmp_path: Path, monkeypatch) -> None:
    publish, next_is_written = HashingFile.publish, threading.Event()

    def late(file) -> None:
        assert next_is_written.wait(20), "the next unit waits for the disk"
        publish(file)

    monkeypatch.setattr(HashingFile, "publish", late)
    told = []

    def report(samples_done: int, _written: int, _kept: int) -> None:
        told.append((tmp_path / ".m2ray" / "unit-000000.json").exists())
        if samples_done > len(runs.SHARD_SEQUENCES[0]):
            next_is_written.set()

    write_export(plan_export(run, "speculators"), "speculators", tmp_path, report)
    assert told[0] is False, "a unit is recorded once it is durable"
    assert len(list((tmp_path / ".m2ray").glob("unit-*"))) == len(runs.SHARD_SEQUENCES) + 1


def test_a_file_that_does_not_become_durable_ends_it_and_its_unit_is_not_recorded(run: Path, tmp_path: Path, monkeypatch) -> None:
    publish = HashingFile.publish
    whole = tmp_path / "whole"
    write_export(plan_export(run, "speculators"), "speculators", whole)

    def failing(file) -> None:
        if str(file._sink._path).endswith(f"hs_{len(runs.SHARD_SEQUENCES[0]) + 1}.safetensors"):
            file.abort()
            raise StoreError("Cannot write it: the disk is broken.")
        publish(file)

    with monkeypatch.context() as patched:
        patched.setattr(HashingFile, "publish", failing)
        with pytest.raises(StoreError, match="the disk is broken"):
            write_export(plan_export(run, "speculators"), "speculators", tmp_path / "out")
    records = {path.name for path in (tmp_path / "out" / ".m2ray").iterdir()}
    assert "unit-000001.json" not in records
    assert not (tmp_path / "out" / "m2ray_export.json").exists()
    write_export(plan_export(run, "speculators"), "speculators", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_a_file_of_another_hand_is_not_replaced(run: Path, tmp_path: Path) -> None:
    export = plan_export(run, "speculators")
    write_export(export, "speculators", tmp_path)
    (tmp_path / ".m2ray" / "unit-000000.json").unlink()
    (tmp_path / "hidden_states" / "hs_0.safetensors").write_bytes(b"mine")
    with pytest.raises(RunConflictError, match="hs_0"):
        write_export(export, "speculators", tmp_path)
    assert (tmp_path / "hidden_states" / "hs_0.safetensors").read_bytes() == b"mine"


def test_a_folder_of_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes" / "x").mkdir(parents=True)
    (tmp_path / "notes" / "x" / "mine.txt").write_text("mine")
    with pytest.raises(RunConflictError, match="mine.txt"):
        write_export(plan_export(run, "speculators"), "speculators", tmp_path)


def test_another_export_is_refused_by_what_differs(run: Path, tmp_path: Path) -> None:
    write_export(plan_export(run, "speculators"), "speculators", tmp_path)
    with pytest.raises(RunConflictError, match=r"layers: \[1, 5, 8, 11\] there, \[5, 11\] now"):
        write_export(plan_export(run, "speculators", layers="5,11"), "speculators", tmp_path)


def test_a_damaged_record_is_refused(run: Path, tmp_path: Path) -> None:
    export = plan_export(run, "speculators")
    write_export(export, "speculators", tmp_path)
    record = tmp_path / ".m2ray" / "unit-000000.json"
    record.write_text(record.read_text().replace("hs_1.", "hs_2."))
    with pytest.raises(M2rayError, match="unit-000000"):
        write_export(export, "speculators", tmp_path)


# -- what a run lacks -------------------------------------------------------------------------------------------------


def test_what_the_run_lacks_is_said_by_name(run: Path, tmp_path: Path) -> None:
    export_runs.finished_run(LocalStore(tmp_path / "some"), export_runs.parts(), without_mask=[4, 11])
    with pytest.raises(NotInRunError, match=r"2 of the 10 sequences .* have no loss mask: 4, 11\."):
        plan_export(tmp_path / "some", "speculators")
    runs.finished_run(LocalStore(tmp_path / "none"), export_runs.parts())
    with pytest.raises(NotInRunError, match="10 of the 10 sequences"):
        plan_export(tmp_path / "none", "speculators")
    with pytest.raises(NotInRunError, match=r"no residual of layer 2-3\."):
        plan_export(run, "speculators", layers="2,3,11")
    with pytest.raises(ConfigError, match=r"model's last layer, 11, .* the layers are 1, 5"):
        plan_export(run, "speculators", layers="1,5")
    with pytest.raises(ConfigError, match=r"normed last state.*--model"):
        plan_export(run, "specforge")
    for size in (None, 0, 2**31, 10**30):
        with pytest.raises(ConfigError, match="--context-size"):
            plan_export(run, "saelens", layers="5", context_size=size)
    with pytest.raises(ConfigError, match="context_size is not an option"):
        plan_export(run, "speculators", context_size=8)
    with pytest.raises(ConfigError, match=r"the run has several: 1, 5, 8, 11\. Say which \(--layers\)"):
        plan_export(run, "saelens", context_size=8)
    with pytest.raises(M2rayError, match=r"(?s)^3 problems.*of layer 2.*--model.*10 of the 10 sequences"):
        plan_export(tmp_path / "none", "nemo-dspark", layers="1,2,11")
    with pytest.raises(ConfigError, match="no consumer 'x'"):
        plan_export(run, "x")
    with pytest.raises(ConfigError, match="longest sequence has 12 tokens"):
        write_export(plan_export(run, "saelens", layers="5", context_size=14), "saelens", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    claimed = claim_run(LocalStore(tmp_path), runs.job(LocalStore(tmp_path), export_runs.parts()))
    assert runs.commit_shard(claimed, runs.shard(0), "a" * 12)
    with pytest.raises(NotInRunError, match="not finished"):
        plan_export(tmp_path, "speculators")


def test_a_damaged_run_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    part = sorted((folder / "data").rglob("*.parquet"))[1]
    data = bytearray(part.read_bytes())
    data[200] ^= 1
    part.write_bytes(data)
    with pytest.raises(M2rayError, match=part.name):
        write_export(plan_export(folder, "speculators"), "speculators", tmp_path / "out")


def test_every_consumer_says_what_it_is() -> None:
    words = CliRunner().invoke(main, ["export", "--help"]).output
    for name in CONSUMERS:
        assert consumer_of(name).name
        assert name in words


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), "--to", "speculators", "--output", str(tmp_path / "out"), "--layers", "5,11"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "what speculators 0.9 calls them: 5 = 6, 11 = 12" in result.output
    assert "10 of 10 sequences" in result.output
    summary = json.loads((tmp_path / "out" / "m2ray_export.json").read_text())
    assert (summary["samples"], summary["layers"], summary["layer_ids"]) == (10, [5, 11], ["6", "12"])
    looked = CliRunner().invoke(main, ["inspect", "--foreign", str(tmp_path / "out")])
    assert f"written by m2ray export, of run {summary['run_id']}, computed in float8" in looked.output
    refused = CliRunner().invoke(main, ["export", str(run), "--to", "speculators", "--output", str(tmp_path / "out")])
    assert refused.exit_code == 1
    assert "another export" in refused.output
