"""The stream: every row once an epoch whatever the ranks, workers and buffers; the same again by seed; resumed anywhere."""

import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.reader import RunReader, open_run
from m2ray.activations.reading.stream import ActivationStream
from m2ray.errors import ConfigError, NotInRunError, RunDamagedError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

NUM_ROWS = 67
ROW_BYTES = 2 * runs.WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    runs.finished_run(LocalStore(folder), compressions=("none", "planes"))
    return folder


@pytest.fixture(scope="module")
def view(folder: Path) -> RunReader:
    return open_run(folder).layer(7)


def identities(batches) -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch["sequence_id"].tolist(), batch["position"].tolist(), strict=True)]


ALL_ROWS = sorted((i, position) for ids in runs.SHARD_SEQUENCES for i in ids for position in range(runs.token_count(i)))


def assert_equal(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


def test_rows_come_with_their_own_tokens(view: RunReader) -> None:
    for batch in view.stream(batch_rows=10, shuffle_buffer_bytes=20 * ROW_BYTES):
        assert (batch["activations"].dtype, batch["position"].dtype) == (torch.bfloat16, torch.int32)
        for number, (sequence_id, position) in enumerate(identities([batch])):
            bits = batch["activations"][number].view(torch.uint8).numpy()
            assert np.array_equal(bits, runs.bits(runs.PARTS[1], sequence_id)[position])
            assert batch["token_id"][number] == runs.token_ids(sequence_id)[position]


def test_loss_masks_come_with_their_rows(tmp_path: Path) -> None:
    runs.finished_run(LocalStore(tmp_path), masked=True)
    found = 0
    for batch in open_run(tmp_path).layer(7).stream(batch_rows=10, shuffle_buffer_bytes=20 * ROW_BYTES):
        assert batch["loss_mask"].dtype == torch.uint8
        for (sequence_id, position), counts in zip(identities([batch]), batch["loss_mask"].tolist(), strict=True):
            mask = runs.loss_mask(sequence_id)
            assert counts == (1 if mask is None else mask[position])
            found += 1
    assert found == NUM_ROWS


def test_a_run_without_masks_has_no_such_column(view: RunReader) -> None:
    assert "loss_mask" not in next(iter(view.stream()))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.integers(1, 7),
    batch_rows=st.integers(1, 80),
    buffer_rows=st.integers(1, 200),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_every_row_once_over_all_ranks(view: RunReader, world_size: int, batch_rows: int, buffer_rows: int, seed: int, epoch: int) -> None:
    found = []
    for rank in range(world_size):
        stream = view.stream(
            batch_rows=batch_rows, shuffle_buffer_bytes=buffer_rows * ROW_BYTES, seed=seed, rank=rank, world_size=world_size
        )
        stream.set_epoch(epoch)
        batches = list(stream)
        assert all(len(batch["activations"]) == batch_rows for batch in batches[:-1])
        found += identities(batches)
    assert sorted(found) == ALL_ROWS


@pytest.mark.parametrize(("workers", "world_size"), [(1, 1), (2, 1), (3, 2)])
def test_every_row_once_over_all_workers(view: RunReader, workers: int, world_size: int) -> None:
    found = []
    for rank in range(world_size):
        stream = view.stream(batch_rows=5, shuffle_buffer_bytes=16 * ROW_BYTES, rank=rank, world_size=world_size)
        found += identities(DataLoader(stream, batch_size=None, num_workers=workers, timeout=60))
    assert sorted(found) == ALL_ROWS


def test_a_spawned_workers_copy_gives_the_same(view: RunReader) -> None:
    stream = view.stream(batch_rows=8, shuffle_buffer_bytes=40 * ROW_BYTES)
    assert_equal(list(pickle.loads(pickle.dumps(stream))), list(stream))


def test_seed_and_epoch_decide_the_order(view: RunReader) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        stream = view.stream(batch_rows=8, shuffle_buffer_bytes=1 << 20, seed=seed)
        stream.set_epoch(epoch)
        return identities(stream)

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert all(order(*key) == found for key, found in orders.items())
    assert len({tuple(found) for found in [*orders.values(), ALL_ROWS]}) == 5


def test_a_buffer_mixes_rows_of_all_blocks(view: RunReader) -> None:
    found = identities(view.stream(batch_rows=8, shuffle_buffer_bytes=1 << 20))
    neighbours = sum(b == (a[0], a[1] + 1) for a, b in itertools.pairwise(found))
    assert neighbours < 8, "by chance about one"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch_rows=st.integers(1, 30), buffer_rows=st.integers(1, 120), after=st.integers(0, 70), world_size=st.integers(1, 3))
def test_a_resumed_stream_gives_what_the_uninterrupted_one_would(
    view: RunReader, batch_rows: int, buffer_rows: int, after: int, world_size: int
) -> None:
    def make() -> ActivationStream:
        return view.stream(
            batch_rows=batch_rows, shuffle_buffer_bytes=buffer_rows * ROW_BYTES, seed=3, rank=world_size - 1, world_size=world_size
        )

    whole = make()
    whole.set_epoch(2)
    expected = list(whole)
    cut = make()
    cut.set_epoch(2)
    head = list(itertools.islice(cut, after))
    resumed = make()
    resumed.load_state_dict(pickle.loads(pickle.dumps(cut.state_dict())))
    assert resumed.state_dict() == cut.state_dict()
    assert_equal(head + list(resumed), expected)
    assert_equal(list(resumed), expected)


def test_batches_that_are_kept_stay_as_they_are(view: RunReader) -> None:
    """They lie in the windows' memory, which is used again only for windows of which nothing is kept."""
    stream = view.stream(batch_rows=3, shuffle_buffer_bytes=16 * ROW_BYTES)
    copies, kept = [], []
    for batch in stream:
        copies.append({name: column.clone() for name, column in batch.items()})
        kept.append(batch["activations"][1:] if len(kept) % 5 == 0 else None)
    assert len(copies) > 20
    for rows, copy in zip(kept, copies, strict=True):
        assert rows is None or torch.equal(rows.view(torch.uint8), copy["activations"][1:].view(torch.uint8))
    assert_equal(list(stream), copies)


def test_two_windows_of_memory_do_for_any_number_of_epochs(view: RunReader) -> None:
    stream = view.stream(batch_rows=4, shuffle_buffer_bytes=16 * ROW_BYTES)
    for epoch in range(5):
        stream.set_epoch(epoch)
        for batch in stream:
            del batch
        assert len(stream._held[2]._lent) == 2
    assert all(array() is None for _, array in stream._held[2]._lent), "nothing is held once the batches are gone"


def test_two_iterations_at_once_do_not_disturb_each_other(view: RunReader) -> None:
    stream = view.stream(batch_rows=4, shuffle_buffer_bytes=16 * ROW_BYTES)
    alone = list(stream)
    assert_equal([batch for pair in zip(stream, stream, strict=True) for batch in pair], [batch for batch in alone for _ in range(2)])


def test_parts_come_in_groups_when_not_all_can_be_held(view: RunReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2ray.activations.reading.open_parts._TOKENS_KEPT_BYTES", 1)
    opened = []
    monkeypatch.setattr(
        Catalogue, "open_part", lambda self, spec, receipt, was=Catalogue.open_part: opened.append(1) or was(self, spec, receipt)
    )
    assert sorted(identities(view.stream(batch_rows=5, shuffle_buffer_bytes=16 * ROW_BYTES))) == ALL_ROWS
    assert len(opened) == 3


def test_an_iteration_that_is_left_begins_again(view: RunReader) -> None:
    stream = view.stream(batch_rows=4)
    next(iter(stream))
    assert sorted(identities(stream)) == ALL_ROWS


def test_a_state_of_another_stream_is_refused(view: RunReader, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = view.stream(batch_rows=4, seed=1).state_dict()
    for other, message in (
        (view.stream(batch_rows=5, seed=1), "batch_rows was 4, is 5"),
        (view.stream(batch_rows=4, seed=2), "seed was 1, is 2"),
        (view.stream(batch_rows=4, seed=1, world_size=2), "world_size was 1, is 2"),
        (open_run(folder).layer(0).stream(batch_rows=4, seed=1), "parts was"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.load_state_dict(state)
    resumed = view.stream(batch_rows=4, seed=1)
    resumed.load_state_dict(state)
    # As in a worker. After an error a real loader's workers are joined for 5 s each, by whatever thread collects the garbage.
    monkeypatch.setattr("m2ray.activations.reading.shares.get_worker_info", lambda: SimpleNamespace(num_workers=2, id=0))
    with pytest.raises(ConfigError, match="consumers was 1, is 2"):
        list(resumed)


@pytest.mark.parametrize(
    "options", [{"rank": 1}, {"rank": -1}, {"batch_rows": 0}, {"shuffle_buffer_bytes": 0}, {"seed": -1}, {"idle_s": 0.0}]
)
def test_options_that_make_no_sense(view: RunReader, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        view.stream(**options)


def test_one_layer_only(folder: Path) -> None:
    with pytest.raises(NotInRunError, match="layers 0, 7, 11"):
        open_run(folder).stream()


def test_a_damaged_part_stops_it(tmp_path: Path) -> None:
    runs.finished_run(LocalStore(tmp_path))
    path = next((tmp_path / "data" / "site=residual" / "layer=007").glob("shard-000001*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunDamagedError, match=str(path)):
        list(open_run(tmp_path).layer(7).stream())
