"""weights.json: created by the first chain, and all others are held against it."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m2ray.activations.json_record import digest
from m2ray.activations.records import read_weights
from m2ray.activations.writing.commits import claim_run
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.errors import RunConflictError, RunDamagedError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def test_of_many_chains_one_records_and_all_are_held_against_it(store: LocalStore) -> None:
    job = claim_run(store, runs.job(store)).job
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: hold_weights(store, job, runs.LOADED), range(8)))
    record = read_weights(store, job)
    assert (record.embedding, record.layers) == ("e" * 32, tuple(f"{layer:032x}" for layer in range(12)))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({3: "f" * 32}, "layer 3 of 12 layers"),
        ({None: "f" * 32, 0: "f" * 32, 1: "f" * 32, 11: "f" * 32}, "the embedding and layers 0-1, 11 of 12 layers"),
    ],
)
def test_other_weights_are_refused_by_layer(store: LocalStore, other: dict[int | None, str], named: str) -> None:
    job = claim_run(store, runs.job(store)).job
    hold_weights(store, job, runs.LOADED)
    with pytest.raises(RunConflictError, match=named):
        hold_weights(store, job, {**runs.LOADED, **other})
    hold_weights(store, job, runs.LOADED)


def test_rows_without_a_record_are_refused(store: LocalStore) -> None:
    run = claim_run(store, runs.job(store))
    store.put("_commits/shard-000000.json", b"{}")
    with pytest.raises(RunConflictError, match=r"no weights\.json: which weights they come from is not known"):
        hold_weights(store, run.job, runs.LOADED)
    assert store.size("weights.json") is None


def test_a_record_of_another_number_of_layers_is_damage(store: LocalStore) -> None:
    job = claim_run(store, runs.job(store)).job
    hold_weights(store, job, {layer: digest for layer, digest in runs.LOADED.items() if layer != 11})
    with pytest.raises(RunDamagedError, match=r"weights\.json .* is of 11 layers; a run as job\.json has it loads 12"):
        read_weights(store, job)


def test_another_runs_record_is_damage(store: LocalStore) -> None:
    job = claim_run(store, runs.job(store)).job
    hold_weights(store, job, runs.LOADED)
    record = json.loads(store.read("weights.json")) | {"run_id": "0" * 32}
    store.put("weights.json", json.dumps(record | {"digest": digest(record)}).encode())
    with pytest.raises(RunDamagedError, match="of run 0000"):
        hold_weights(store, job, runs.LOADED)
