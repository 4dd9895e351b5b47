"""Statistics of a run: committed with each shard, merged once, read, verified, and right after every kill."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from m2ray.activations.reading.reader import open_run
from m2ray.activations.reading.verify import verify
from m2ray.activations.records import SUCCESS_KEY, committed_shards, read_commit
from m2ray.activations.statistics import CONTRIBUTIONS, FOLDER, STATISTICS_KEY, is_merged
from m2ray.activations.writing import merging
from m2ray.activations.writing.commits import Run, claim_run, reopen
from m2ray.activations.writing.statistics_writer import StatisticsWriter
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.batches import CapturedLayer, Column, MicroBatch, PartReceipt, PartSpec, Shard
from m2ray.cli import main
from m2ray.errors import ConfigError, NotInRunError, RunDamagedError, StageError, StoreError
from m2ray.model.statistics import Statistics
from m2ray.selection import Selection
from m2ray.statistics import Place, places
from m2ray.storage import LocalStore
from tests.summed import close_covariance, close_moments, expected_norms
from tests.unit import activation_runs as runs

NUM_EXPERTS = 5
PARTS = (
    *(PartSpec.of("residual", layer, "bfloat16", runs.WIDTH) for layer in (0, 7, 11)),
    PartSpec("router_topk", 7, (Column("expert_ids", "int16", 2), Column("expert_weights", "float32", 2))),
)
ASKED = {
    "moments": {"residual": [0, 7, 11]},
    "norms": {"residual": [0, 11]},
    "covariance": {"residual": [7, 11]},
    "experts": {"router_topk": [7]},
}
ONE_STAGE, THREE_STAGES = ((0, 12),), ((0, 4), (4, 8), (8, 12))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The statistics of a run that nothing happened to, of one stage."""
    store = LocalStore(tmp_path_factory.mktemp("undisturbed") / "run")
    finished(store, "statistics")
    return files(store)


@cache
def values(part: PartSpec, sequence_id: int) -> list[torch.Tensor]:
    """A sequence's rows at a site and layer, a tensor [T, W] a column."""
    generator = torch.Generator().manual_seed(100 * sequence_id + (part.layer or 0))
    num_tokens = runs.token_count(sequence_id)
    if part.site == "router_topk":
        chosen = part.columns[0].width
        ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:chosen] for _ in range(num_tokens)]).short()
        return [ids, torch.rand((num_tokens, chosen), generator=generator)]
    return [(torch.randn((num_tokens, runs.WIDTH), generator=generator) * 3 + torch.arange(runs.WIDTH) * 50).bfloat16()]


def captured(parts: Sequence[PartSpec], micro_batch: MicroBatch, *, kept: bool) -> list[CapturedLayer]:
    kinds = places(ASKED)
    taken = Statistics({part: kinds[part.site, part.layer] for part in parts}, NUM_EXPERTS)
    layers = []
    for part in parts:
        columns = [torch.cat(each) for each in zip(*(values(part, number) for number in micro_batch.sequence_ids.tolist()), strict=True)]
        bits = tuple(column.contiguous().view(torch.uint8).numpy() for column in columns) if kept else ()
        layers.append(CapturedLayer(part.site, part.layer, bits, {kind: each.numpy() for kind, each in taken.of(part, columns).items()}))
    return layers


def begin(store: LocalStore, keep: str = "both") -> Run:
    run = claim_run(store, runs.job(store, PARTS if keep == "both" else (), statistics=ASKED, keep=keep))
    hold_weights(store, run.job, runs.LOADED)
    return run


def extract(run: Run, shard: Shard, attempt: str, spans: Iterable[tuple[int, int]]) -> list[PartReceipt]:
    """A shard through stages that hold these layers, each with a writer of rows and one of statistics."""
    receipts: list[PartReceipt] = []
    for start, stop in spans:
        here = [part for part in PARTS if start <= part.layer < stop]
        kept = [part for part in run.job.parts if part in here]
        kinds = {place: each for place, each in places(run.job.statistics).items() if start <= place[1] < stop}
        rows = commits_writer(run, kept)
        consumers = (rows, StatisticsWriter(run.store, kinds, Selection()))
        for micro_batch in runs.micro_batches(shard):
            for consumer in consumers:
                consumer.submit(attempt, micro_batch, captured(here, micro_batch, kept=bool(kept)), 10)
        for consumer in consumers:
            receipts += consumer.collect(shard.index, attempt, 10)
        rows.close()
    return receipts


def commits_writer(run: Run, parts: Sequence[PartSpec]) -> Any:
    from m2ray.activations.writing.writer import ActivationWriter

    return ActivationWriter(run.store, run.job.run_metadata(), parts, queue_bytes=1 << 20, threads=1)


_attempts = (f"{number:012x}" for number in count(0xB0))


def commit(run: Run, index: int, spans: Iterable[tuple[int, int]] = ONE_STAGE) -> None:
    shard, attempt = runs.shard(index), next(_attempts)
    shapes = [(len(each.sequence_ids), each.token_ids_BT.shape[1]) for each in runs.micro_batches(shard)]
    run.commit(shard, attempt, extract(run, shard, attempt, spans), shapes, 1.0)


def finished(store: LocalStore, keep: str = "both", spans: Iterable[tuple[int, int]] = ONE_STAGE) -> Run:
    run = begin(store, keep)
    for index in range(3):
        commit(run, index, spans)
    run.finish()
    return run


def files(store: LocalStore) -> Mapping[str, bytes]:
    return {key: store.read(key) for key, _ in store.list(FOLDER)}


def left(store: LocalStore) -> list[str]:
    return [key for key, _ in store.list(CONTRIBUTIONS)]


def stored_rows(store: LocalStore, place: Place) -> np.ndarray:
    site, layer = place
    found = open_run(store.url).site(site).layer(layer).tensor()
    return found.double().numpy()


# -- what they are ----------------------------------------------------------------------------------------------------


def test_they_are_one_pass_over_the_stored_rows(store: LocalStore, undisturbed: Mapping[str, bytes]) -> None:
    finished(store)
    run = open_run(store.url)
    for layer in (0, 7, 11):
        rows, found = stored_rows(store, ("residual", layer)), run.statistics("residual", layer)
        assert found.count == len(rows) == run.num_rows
        close_moments(found.mean.numpy(), found.variance.numpy(), found.min.numpy(), found.max.numpy(), rows)
    rows = stored_rows(store, ("residual", 7))
    close_covariance(run.statistics("residual", 7).covariance.double().numpy(), rows)
    rows, found = stored_rows(store, ("residual", 11)), run.statistics("residual", 11)
    counts = expected_norms(rows)
    assert found.norms["rows"].to_pylist() == counts[counts > 0].tolist()
    norms = np.sort(np.linalg.norm(rows, axis=1))
    for share in (0.01, 0.5, 1.0):
        exact = norms[max(0, int(np.ceil(share * len(norms))) - 1)]
        assert exact <= found.norm_quantile(share) <= exact * (1 + 1 / 32) * (1 + 1e-6)
    assert store.size(f"{FOLDER}/moments.parquet") is not None
    assert is_merged(store, run.job)
    assert not left(store)
    assert verify(store, checksums=True).is_sound
    assert files(store) == undisturbed, "whether rows are kept or not"


def test_expert_load_is_what_counting_the_stored_choices_gives(store: LocalStore) -> None:
    finished(store)
    run = open_run(store.url)
    chosen = np.concatenate([values(PARTS[-1], number)[0].numpy() for ids in runs.SHARD_SEQUENCES for number in ids])
    found = run.statistics("router_topk", 7)
    assert found.expert_load.tolist() == np.bincount(chosen.ravel(), minlength=NUM_EXPERTS).tolist()
    together = found.coactivation
    assert torch.equal(together, together.T)
    assert int(torch.triu(together, 1).sum()) == len(chosen)


def test_a_router_that_chooses_one_expert_has_no_two_together(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one = PartSpec("router_topk", 7, (Column("expert_ids", "int16", 1), Column("expert_weights", "float32", 1)))
    monkeypatch.setitem(globals(), "PARTS", (*PARTS[:-1], one))
    finished(store)
    found = open_run(store.url).statistics("router_topk", 7)
    assert torch.equal(found.coactivation, torch.diag(found.expert_load))
    assert int(found.expert_load.sum()) == open_run(store.url).num_rows


def test_values_whose_squares_are_none_are_refused_by_place(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 has them; float32, in which squares are summed, has not."""
    usual = values
    monkeypatch.setitem(globals(), "values", lambda part, number: [usual(part, number)[0] * (1e20 if part.layer == 11 else 1)])
    monkeypatch.setitem(globals(), "PARTS", PARTS[:-1])
    monkeypatch.setitem(globals(), "ASKED", {kind: ASKED[kind] for kind in ("moments", "norms", "covariance")})
    with pytest.raises(StageError, match="^Residual of layer 11: of values from -?[0-9.e+]* to .* float32 holds no squares"):
        extract(begin(store), runs.shard(0), "a", ONE_STAGE)
    assert not left(store)


def test_a_quantile_is_of_a_share(store: LocalStore) -> None:
    finished(store, "statistics")
    found = open_run(store.url).statistics("residual", 0)
    assert found.norm_quantile(0) == found.norms["below"][0].as_py()
    for share in (-0.5, 1.01, 99, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            found.norm_quantile(share)


def test_a_run_may_keep_them_alone(store: LocalStore) -> None:
    """No rows are there, and whoever asks for them is told so."""
    finished(store, "statistics")
    run = open_run(store.url)
    assert run.is_complete
    assert run.num_shards == 3
    assert not list(store.list("data"))
    assert run.num_tokens == run.statistics("residual", 0).count
    with pytest.raises(NotInRunError, match="keeps no rows"):
        run.tensor()
    for ask in (run.tokens, lambda: run.rows([0]), lambda: run.site("residual"), lambda: run.layer(0), lambda: run.layers([0, 7])):
        with pytest.raises(NotInRunError, match="keeps no rows"):
            ask()
    assert verify(store, checksums=True).is_sound


def test_what_was_not_asked_for_is_said(store: LocalStore) -> None:
    run = begin(store)
    with pytest.raises(NotInRunError, match="not finished"):
        open_run(store.url).statistics("residual", 0)
    for index in range(3):
        commit(run, index)
    run.finish()
    reader = open_run(store.url)
    with pytest.raises(NotInRunError, match="no statistics of mlp of layer 0.*: residual 0,7,11; router_topk 7"):
        reader.statistics("mlp", 0)
    with pytest.raises(NotInRunError, match="there are no covariance"):
        _ = reader.statistics("residual", 0).covariance


# -- once and no more -------------------------------------------------------------------------------------------------


def test_stages_and_resumes_leave_their_bits_alone(store: LocalStore, undisturbed: Mapping[str, bytes]) -> None:
    """An attempt that was given up, one that came second, another driver with other stages: each shard is in them once."""
    run = begin(store)
    extract(run, runs.shard(0), "dead", THREE_STAGES)
    commit(run, 2, THREE_STAGES)
    resumed = claim_run(store, run.job)
    commit(resumed, 0, THREE_STAGES)
    commit(resumed, 0, ONE_STAGE)
    commit(resumed, 1, ONE_STAGE)
    assert len(left(store)) == 3 + 3 + 3 + 1 + 1
    resumed.finish()
    assert files(store) == undisturbed
    assert not left(store)


@pytest.mark.parametrize("keep", ["both", "statistics"])
@pytest.mark.parametrize("cut", ["before the record", "before the manifest", "before the contributions go", "before _SUCCESS"])
def test_an_end_that_was_killed_goes_on(
    store: LocalStore, undisturbed: Mapping[str, bytes], cut: str, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(store, keep)
    for index in range(3):
        commit(run, index, THREE_STAGES)
    with monkeypatch.context() as patch:
        kill = _Killed(cut, store)
        patch.setattr(store, "create", kill.create)
        patch.setattr(store, "delete", kill.delete)
        with pytest.raises(KeyboardInterrupt):
            run.finish()
    assert store.size(SUCCESS_KEY) is None
    resumed = claim_run(store, run.job)
    assert resumed.reopen_damaged() == []
    resumed.finish()
    assert files(store) == undisturbed
    assert not left(store)
    assert resumed.finished() is not None
    assert verify(store, checksums=True).is_sound


class _Killed:
    """A store whose process dies before one step of the end."""

    def __init__(self, cut: str, store: LocalStore) -> None:
        self._cut, self._create, self._delete = cut, store.create, store.delete

    def create(self, key: str, data: Any) -> None:
        before = {"before the record": STATISTICS_KEY, "before the manifest": "manifest.parquet", "before _SUCCESS": SUCCESS_KEY}
        if before.get(self._cut) == key:
            raise KeyboardInterrupt
        self._create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        if self._cut == "before the contributions go" and any(key.startswith(CONTRIBUTIONS) for key in keys):
            raise KeyboardInterrupt
        self._delete(keys)


def test_a_shard_that_is_extracted_again_after_the_end_is_not_counted_again(store: LocalStore, undisturbed: Mapping[str, bytes]) -> None:
    run = finished(store)
    store.delete([read_commit(store, run.job, 1).parts[0].key])
    resumed = claim_run(store, run.job)
    assert resumed.reopen_damaged() == [1]
    commit(resumed, 1, THREE_STAGES)
    assert len(left(store)) == 3
    resumed.finish()
    assert files(store) == undisturbed
    assert not left(store)
    assert open_run(store.url).statistics("residual", 0).count == open_run(store.url).num_rows
    assert verify(store, checksums=True).is_sound


def test_what_a_late_writer_leaves_in_a_finished_run_is_named_and_goes(store: LocalStore, undisturbed: Mapping[str, bytes]) -> None:
    run = finished(store, "statistics")
    extract(run, runs.shard(0), "late", ONE_STAGE)
    assert [key for key, _ in verify(store, checksums=True).unnamed] == left(store)
    run.finish()
    assert not left(store)
    assert files(store) == undisturbed


@pytest.mark.parametrize("keep", ["both", "statistics"])
def test_what_a_shard_left_and_is_gone_before_the_end_is_extracted_again(
    store: LocalStore, undisturbed: Mapping[str, bytes], keep: str
) -> None:
    run = begin(store, keep)
    for index in range(3):
        commit(run, index)
    (gone,) = read_commit(store, run.job, 1).statistics
    store.delete([gone.key])
    assert [damage.shard for damage in verify(store, checksums=False).damages] == [1]
    with pytest.raises(RunDamagedError, match="gone"):
        run.finish()
    resumed = claim_run(store, run.job)
    assert resumed.reopen_damaged() == [1]
    commit(resumed, 1)
    resumed.finish()
    assert files(store) == undisturbed


def test_bits_that_flipped_in_what_a_shard_left_are_found(store: LocalStore) -> None:
    run = begin(store)
    for index in range(3):
        commit(run, index)
    (kept,) = read_commit(store, run.job, 2).statistics
    data = bytearray(store.read(kept.key))
    data[-1] ^= 1
    store.put(kept.key, bytes(data))
    assert [damage.shard for damage in verify(store, checksums=True).damages] == [2]
    with pytest.raises(RunDamagedError, match="shard 2 is damaged"):
        run.finish()
    reopen(store, run.job, [2])
    resumed = claim_run(store, run.job)
    commit(resumed, 2)
    resumed.finish()
    assert verify(store, checksums=True).is_sound


def test_merged_statistics_that_are_gone_are_an_error_until_it_is_said_that_all_shards_may_be_extracted_again(
    store: LocalStore, undisturbed: Mapping[str, bytes]
) -> None:
    """What they were made of is deleted, and days of work are not begun for a file that a copy may have."""
    run = finished(store, "statistics")
    store.delete([f"{FOLDER}/norms.parquet"])
    found = verify(store, checksums=True)
    assert [damage.key for damage in found.damages] == [f"{FOLDER}/norms.parquet"]
    with pytest.raises(StoreError):
        _ = open_run(store.url).statistics("residual", 0).norms
    resumed = claim_run(store, run.job)
    with pytest.raises(RunDamagedError, match="Or delete statistics.json"):
        resumed.reopen_damaged()
    store.delete([STATISTICS_KEY])
    assert resumed.reopen_damaged() == [0, 1, 2]
    for index in range(3):
        commit(resumed, index, THREE_STAGES)
    resumed.finish()
    assert files(store) == undisturbed


def test_bits_that_flipped_in_merged_statistics_are_found(store: LocalStore) -> None:
    finished(store, "statistics")
    for key in (f"{FOLDER}/moments.parquet", f"{FOLDER}/covariance/site=residual/layer=007.safetensors"):
        data = bytearray(store.read(key))
        data[len(data) // 2] ^= 1
        store.put(key, bytes(data))
    assert len(verify(store, checksums=True).damages) == 2
    assert verify(store, checksums=False).is_sound
    for name in ("mean", "covariance"):
        with pytest.raises(RunDamagedError, match=r"is not what statistics[.]json says"):
            getattr(open_run(store.url).statistics("residual", 7), name)


def test_commands_take_a_run_of_statistics_alone(store: LocalStore) -> None:
    finished(store, "statistics")
    for words in (["inspect", store.url], ["inspect", store.url, "--json"], ["verify", store.url, "--checksums"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        assert words[0] == "verify" or "covariance" in done.output
    told = CliRunner().invoke(main, ["inspect", store.url]).output
    assert "moments    residual 0,7,11\n" in told
    assert "none are kept; statistics are of" in told
    refused = CliRunner().invoke(main, ["verify", store.url, "--sample", "1"])
    assert "keeps no rows that could be computed again" in refused.output
    refused = CliRunner().invoke(main, ["export", store.url, "--to", "saelens", "--output", f"{store.url}-out", "--context-size", "4"])
    assert "keeps no rows of the residual" in refused.output
    listed = CliRunner().invoke(main, ["inspect", str(store.folder.parent), "--json"]).output
    assert '"router_topk": [' in listed
    store.delete(["weights.json"])
    assert [damage.key for damage in verify(store, checksums=False).damages] == ["weights.json"]


def test_what_the_store_refuses_leaves_nothing(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run, shard = begin(store, "statistics"), runs.shard(0)
    writer = StatisticsWriter(store, {place: kinds for place, kinds in places(ASKED).items() if place[0] == "residual"}, Selection())
    for micro_batch in runs.micro_batches(shard):
        writer.submit("a", micro_batch, captured(PARTS[:3], micro_batch, kept=False), 10)
    opened = store.open_part

    def failing(key: str) -> Any:
        sink = opened(key)
        monkeypatch.setattr(sink, "write", _refuse)
        return sink

    monkeypatch.setattr(store, "open_part", failing)
    with pytest.raises(StoreError, match="no room"):
        writer.collect(0, "a", 10)
    assert not left(store)
    assert run.store.delete_unfinished() == 0


def _refuse(data: object) -> None:
    raise StoreError("There is no room.")


def test_covariances_that_do_not_fit_together_are_merged_one_after_the_other(
    store: LocalStore, undisturbed: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_COVARIANCE_BYTES", 1)
    finished(store, "statistics")
    assert files(store) == undisturbed


def test_a_shard_without_its_statistics_is_not_committed(store: LocalStore) -> None:
    run, shard = begin(store), runs.shard(0)
    shapes = [(len(each.sequence_ids), each.token_ids_BT.shape[1]) for each in runs.micro_batches(shard)]
    receipts = extract(run, shard, "a0", ONE_STAGE)
    with pytest.raises(StageError, match="Statistics are missing"):
        run.commit(shard, "a0", receipts[:-1], shapes, 1.0)
    assert not committed_shards(store)


def test_statistics_of_half_a_shard_are_not_collected(store: LocalStore) -> None:
    writer = StatisticsWriter(store, {place: kinds for place, kinds in places(ASKED).items() if place[0] == "residual"}, Selection())
    first, second = runs.micro_batches(runs.shard(0))
    writer.submit("a", first, captured(PARTS[:3], first, kept=False), 10)
    with pytest.raises(StageError, match="before its last"):
        writer.collect(0, "a", 10)
    writer.submit("b", first, captured(PARTS[:3], first, kept=False), 10)
    with pytest.raises(StageError, match="micro-batch 0 came, expected was 1"):
        writer.submit("b", first, captured(PARTS[:3], first, kept=False), 10)
    writer.abandon([(0, "b")])
    with pytest.raises(StageError, match="micro-batch 1 came, expected was 0"):
        writer.submit("b", second, captured(PARTS[:3], second, kept=False), 10)
    assert not left(store)
