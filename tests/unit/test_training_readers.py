"""Bare rows for dictionary trainers and whole sequences for draft trainers: the run's own bits, each once an epoch, resumed anywhere."""

import concurrent.futures.thread
import itertools
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from m2ray.activations.reading.draft_samples import DraftSamples
from m2ray.activations.reading.reader import open_run
from m2ray.batches import PartSpec
from m2ray.errors import ConfigError, NotInRunError, RunDamagedError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

IDS = sorted(i for ids in runs.SHARD_SEQUENCES for i in ids)
NUM_ROWS = 67


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    runs.finished_run(LocalStore(folder), compressions=("none", "planes"), masked=True)
    return folder


def samples_of(folder: Path, **options: object) -> DraftSamples:
    return open_run(folder).draft_samples([7, 0], **{"all_tokens": True} | options)


def ids(samples) -> list[int]:
    return [sample["sequence_id"].item() for sample in samples]


def sorted_rows(rows: torch.Tensor) -> list[bytes]:
    return sorted(row.tobytes() for row in rows.contiguous().view(torch.uint8).numpy())


# -- rows -------------------------------------------------------------------------------------------------------------


def test_an_iterator_gives_every_row_of_each_epoch_once(folder: Path) -> None:
    view = open_run(folder).layer(7)
    expected = sorted_rows(view.tensor())
    batches = list(view.iterator(rows=10, epochs=2))
    assert [len(batch) for batch in batches] == [10, 10, 10, 10, 10, 10, 7] * 2
    first, second = torch.cat(batches[:7]), torch.cat(batches[7:])
    assert sorted_rows(first) == sorted_rows(second) == expected
    assert sorted_rows(first[:10]) != sorted_rows(second[:10]), "another order"


def test_a_data_provider_goes_on_without_end_in_full_batches_of_float32(folder: Path) -> None:
    view = open_run(folder).layer(7)
    provider = view.as_data_provider(rows=10)
    assert iter(provider) is provider
    batches = [next(provider) for _ in range(20)]
    assert {(batch.dtype, tuple(batch.shape)) for batch in batches} == {(torch.float32, (10, runs.WIDTH))}
    stored = set(sorted_rows(view.tensor().float()))
    for epoch in range(3):
        rows = sorted_rows(torch.cat(batches[6 * epoch : 6 * epoch + 6]))
        assert len(set(rows)) == 60
        assert stored.issuperset(rows)


@pytest.mark.filterwarnings("error")
def test_a_provider_that_is_open_when_python_ends_says_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    batches = iter(open_run(folder).layer(7).stream(batch_rows=10))
    next(batches)
    monkeypatch.setattr(concurrent.futures.thread, "queue", None)  # as modules are by then
    batches.close()


@pytest.mark.parametrize("after", [0, 3, 6, 7, 13])
def test_rows_go_on_where_a_state_was_taken(folder: Path, after: int) -> None:
    def make():
        return open_run(folder).layer(7).iterator(rows=10, epochs=2, seed=3)

    whole, cut, resumed = list(make()), make(), make()
    head = list(itertools.islice(cut, after))
    resumed.load_state_dict(pickle.loads(pickle.dumps(cut.state_dict())))
    found = [*head, *resumed]
    assert len(found) == len(whole)
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(found, whole, strict=True))


def test_a_batch_that_an_epoch_does_not_fill_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="fewer rows than one batch of 68"):
        next(open_run(folder).layer(7).as_data_provider(rows=NUM_ROWS + 1))
    with pytest.raises(ConfigError, match="epochs = 0"):
        open_run(folder).layer(7).iterator(epochs=0)
    with pytest.raises(NotInRunError, match="layers 0, 7, 11"):
        open_run(folder).iterator()
    with pytest.raises(ConfigError, match=r"check = 'page' is not known. Give one of 'pages', 'none'"):
        open_run(folder, check="page")


# -- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_the_run_bit_by_bit(folder: Path) -> None:
    run = open_run(folder)
    samples = list(samples_of(folder))
    assert sorted(ids(samples)) == IDS
    assert ids(samples) != IDS
    for sample in samples:
        number = sample["sequence_id"].item()
        states = [run.layer(layer).sequence(number) for layer in (7, 0, 11)]
        mask = runs.loss_mask(number)
        assert sample["input_ids"].tolist() == runs.token_ids(number).tolist()
        assert sample["loss_mask"].tolist() == (mask or [1] * runs.token_count(number))
        assert torch.equal(sample["aux_hidden_states"].view(torch.uint8), torch.cat(states[:2], dim=1).view(torch.uint8))
        assert torch.equal(sample["last_hidden_states"].view(torch.uint8), states[2].view(torch.uint8))
        assert sample["last_hidden_states"].dtype == torch.bfloat16


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 3), (2, 2)])
def test_every_sample_once_over_all_ranks_and_workers(folder: Path, workers: int, world_size: int) -> None:
    found = []
    for rank in range(world_size):
        samples = samples_of(folder, rank=rank, world_size=world_size)
        found += ids(DataLoader(samples, batch_size=None, num_workers=workers, timeout=60 if workers else 0))
    assert sorted(found) == IDS


def test_seed_and_epoch_decide_the_samples_order(folder: Path) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        samples = samples_of(folder, seed=seed)
        samples.set_epoch(epoch)
        return tuple(ids(samples))

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert orders == [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]


def test_parts_come_in_groups_when_not_all_can_be_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2ray.activations.reading.open_parts._TOKENS_KEPT_BYTES", 1)
    found = ids(samples_of(folder))
    shard_of = {i: number for number, members in enumerate(runs.SHARD_SEQUENCES) for i in members}
    assert sorted(found) == IDS
    assert len(list(itertools.groupby(found, shard_of.__getitem__))) == 3


@pytest.mark.parametrize("after", [0, 4, 10])
def test_samples_go_on_where_a_state_was_taken(folder: Path, after: int) -> None:
    whole, cut, resumed = ids(samples_of(folder)), samples_of(folder), samples_of(folder)
    head = ids(itertools.islice(cut, after))
    resumed.load_state_dict(pickle.loads(pickle.dumps(cut.state_dict())))
    assert head + ids(resumed) == whole
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        samples_of(folder, seed=1).load_state_dict(cut.state_dict())


def test_a_sequence_without_a_mask_is_refused_unless_all_its_tokens_count(folder: Path) -> None:
    with pytest.raises(NotInRunError, match="has no loss mask.*all_tokens"):
        list(samples_of(folder, all_tokens=False))


def test_what_a_run_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotInRunError, match="residual of layer 3, 5 is not"):
        open_run(folder).draft_samples([3, 7, 5])
    with pytest.raises(ConfigError, match="layers"):
        open_run(folder).draft_samples([])
    runs.finished_run(LocalStore(tmp_path), parts=(PartSpec.of("residual", 7, "bfloat16", runs.WIDTH),))
    with pytest.raises(NotInRunError, match="residual of layer 11 is not.*model's last one, 11"):
        open_run(tmp_path).draft_samples([7])


def test_a_damaged_part_stops_the_samples(tmp_path: Path) -> None:
    runs.finished_run(LocalStore(tmp_path), masked=True)
    path = next((tmp_path / "data" / "site=residual" / "layer=000").glob("shard-000001*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunDamagedError, match="layer=000"):
        list(samples_of(tmp_path))
