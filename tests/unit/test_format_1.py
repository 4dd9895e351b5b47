"""Runs of format 1, made by m2ray 0.1.0 before there was a format 2, are read for good: rows, tokens, facts and the account."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import m2ray
from m2ray.activations.job import read_job
from m2ray.activations.reading.verify import verify
from m2ray.activations.writing.commits import reopen
from m2ray.batches import MicroBatch
from m2ray.cli import main
from m2ray.errors import RunConflictError, RunDamagedError
from m2ray.storage import LocalStore
from tests.data.run_format_1.make_runs import HERE, RUNS, TEXTS, command, make_model
from tests.reference import load_reference, reference_rows, same_bits

LAYERS = (0, 1, 2)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-5 + 2**-7}
"""Of a row's norm, between two kinds of processors (docs/numerics.md), and what storing it in bfloat16 adds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("format_1") / "model")


@pytest.fixture(params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def unfinished(name: str, tmp_path: Path) -> Path:
    """A copy of the run as it was before its last commit."""
    folder = shutil.copytree(HERE / name, tmp_path / name)
    for key in ("_SUCCESS", "manifest.parquet", "_commits/shard-000002.json"):
        (folder / key).unlink()
    return folder


def expected_rows(model: Path, run: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """transformers' own rows of each layer, [N, H], in the order of the run's tokens."""
    reference, found = load_reference(model, torch.float32), []
    tokens = m2ray.open_run(run).tokens()
    for path in sorted((run / "_commits").iterdir()):
        for count, length in json.loads(path.read_text())["micro_batches"]:
            ids = list(dict.fromkeys(tokens["sequence_id"].tolist()))[:count]
            token_ids_BT, counts = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
            for row, sequence_id in enumerate(ids):
                of_sequence = tokens["token_id"][tokens["sequence_id"] == sequence_id]
                counts[row] = len(of_sequence)
                token_ids_BT[row, : len(of_sequence)] = of_sequence
            tokens = tokens[counts.sum() :]
            found.append(reference_rows(reference, MicroBatch(0, 0, False, np.array(ids), counts, token_ids_BT)))
    return [torch.cat([rows[layer] for rows in found]).to(dtype) for layer in LAYERS]


def test_rows_are_transformers_own_by_every_way_to_them(name: str, model: Path) -> None:
    run = m2ray.open_run(HERE / name)
    assert run.is_complete
    assert (run.num_shards, run.num_tokens, run.job.format_version) == (3, 68, 1)
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    tokens = run.tokens()
    for layer, expected in zip(LAYERS, expected_rows(model, HERE / name, dtype), strict=True):
        view = run.layer(layer)
        rows = view.tensor()
        # Bits are promised on the kind of processor that computed them, which need not be this one.
        assert ((rows.float() - expected.float()).norm(dim=1) <= ROUNDING[dtype] * expected.float().norm(dim=1)).all()
        assert same_bits(view.rows(np.arange(68)[::-1].copy()), rows.flip(0))
        assert same_bits(torch.cat([shard.activations for shard in view.shards()]), rows)
        for sequence_id in np.unique(tokens["sequence_id"]).tolist():
            assert same_bits(view.sequence(sequence_id), rows[torch.from_numpy(tokens["sequence_id"] == sequence_id)])
        streamed = {
            (int(sequence_id), int(position)): row
            for batch in view.stream(batch_rows=16)
            for sequence_id, position, row in zip(batch["sequence_id"], batch["position"], batch["activations"].clone(), strict=True)
        }
        assert same_bits(torch.stack([streamed[int(row["sequence_id"]), int(row["position"])] for row in tokens]), rows)


def test_the_account_and_every_checksum_hold(name: str) -> None:
    found = verify(LocalStore(HERE / name), checksums=True)
    assert (found.damages, found.is_complete, found.files) == ((), True, 9)
    shown = CliRunner().invoke(main, ["inspect", str(HERE / name), "--json"])
    facts = json.loads(shown.stdout)
    assert facts["complete"]
    assert facts["sequences"] == {"all": len(TEXTS), "ready": 5, "quarantined": 1}
    assert facts["quarantined"] == [{"sequence_id": 2, "row_id": "row-2", "reason": "empty"}]


def test_nothing_is_deleted_that_this_m2ray_cannot_make_again(name: str, tmp_path: Path) -> None:
    run = shutil.copytree(HERE / name, tmp_path / name)
    damaged = next((run / "data").rglob("shard-000001-*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = sorted(run.rglob("*"))
    shown = CliRunner().invoke(main, ["verify", str(run)])
    assert str(damaged) in shown.stdout
    assert "--repair" not in shown.stdout
    assert "restore them from a copy" in shown.stdout
    with pytest.raises(RunDamagedError) as raised:
        m2ray.open_run(run).layer(int(damaged.parent.name[-1])).tensor()
    assert "--repair" not in raised.value.remedy
    assert "Restore it from a copy" in raised.value.remedy
    manifest = (run / "manifest.parquet").read_bytes()
    (run / "manifest.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunDamagedError, match=r"manifest\.parquet.*from a copy"):
        m2ray.open_run(run)
    (run / "manifest.parquet").write_bytes(manifest)
    refused = CliRunner().invoke(main, ["verify", str(run), "--repair"])
    assert refused.exit_code == 1
    assert "with format 1; this m2ray goes on with format 2 only" in refused.stderr
    store = LocalStore(run)
    job = read_job(store)
    assert job is not None
    with pytest.raises(RunConflictError, match="with format 1"):
        reopen(store, job, [1])
    assert sorted(run.rglob("*")) == before


def test_what_is_committed_of_an_unfinished_run_is_read(unfinished: Path) -> None:
    run, whole = m2ray.open_run(unfinished), m2ray.open_run(HERE / unfinished.name)
    assert (run.is_complete, run.num_shards) == (False, 2)
    assert same_bits(run.tensor(), whole.tensor()[:, : run.num_tokens])
    assert verify(LocalStore(unfinished), checksums=True).damages == ()


def test_the_command_that_began_it_is_told_what_goes_on_with_it(unfinished: Path, model: Path) -> None:
    before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
    told = CliRunner().invoke(main, command(model, unfinished.name, unfinished)[1:])
    assert told.exit_code == 1
    said = " ".join(told.output.split())
    assert "was begun by m2ray 0.1.0 with format 1; this m2ray goes on with format 2 only." in said
    assert "Finish it with m2ray 0.1.0, or give another output." in said
    assert m2ray.__version__ != "0.1.0", "it would name itself"
    assert {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()} == before
