"""Survey, shards, micro-batches and resume: every ready sequence once, like lengths together, the same again next time."""

import itertools
import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from m2ray import sequences
from m2ray.batches import Shard
from m2ray.errors import PromptsError, RunConflictError, RunDamagedError, StoreError
from m2ray.options import PromptOptions
from m2ray.prompts import (
    PromptRow,
    PromptSource,
    PromptTokenizer,
    ShardTable,
    TokenSpool,
    batching,
    load_shards,
    micro_batches,
    respool,
    survey,
    surveying,
)
from m2ray.prompts.masks import Marked
from m2ray.prompts.shards import WINDOW_ROWS, cut_micro_batches, cut_shards
from m2ray.selection import Selection
from m2ray.storage import LocalStore

TINY = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"
WORDS = ["river", "stone", "bridge", "water", "河水", "nobody", "mountains", "x"]


def realistic_lengths(count, seed=0):
    """Log-normal token counts (median 200) between 20 and 2,000."""
    draws = np.exp(np.random.default_rng(seed).normal(5.3, 0.9, 3 * count))
    return draws[(draws >= 20) & (draws <= 2000)][:count].astype(np.int32)


def as_table(token_counts, shard_tokens):
    """The shards of these token counts, window by window."""
    pieces = []
    for start in range(0, len(token_counts), WINDOW_ROWS):
        window = token_counts[start : start + WINDOW_ROWS]
        pieces += [(places + np.int64(start), window[places], window[places]) for places in cut_shards(window, shard_tokens)]
    return ShardTable.join(pieces)


def write_prompts(path, count, seed=0):
    """Texts of 1 to 60 words with bad rows among them. Returns the records."""
    draw = np.random.default_rng(seed)
    records = [{"id": f"p{place}", "text": " ".join(draw.choice(WORDS, draw.integers(1, 60)))} for place in range(count)]
    for place, text in ((3, ""), (17, None), (40, 5)):
        if place < count:
            records[place]["text"] = text
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def prepare(path, max_length=1000, folder=TINY):
    options = PromptOptions(str(path), max_length, id_column="id")
    return PromptSource.open(options), PromptTokenizer.load(str(folder), options, 320)


@pytest.fixture
def surveyed(tmp_path):
    records = write_prompts(tmp_path / "p.jsonl", 300)
    source, tokenizer = prepare(tmp_path / "p.jsonl", max_length=90)
    store = LocalStore(tmp_path / "run")
    result = survey(source, tokenizer, store, "attempt", 400)
    yield records, source, tokenizer, store, result
    result.tokens.close()


def test_survey_accounts_for_every_row_and_keeps_its_tokens(surveyed):
    _, source, tokenizer, _, result = surveyed
    encoded = tokenizer.encode(list(source.rows()))
    ready = {place: ids for place, ids in enumerate(encoded) if not isinstance(ids, str)}
    assert 100 < len(ready) < 297
    assert (result.num_sequences, result.num_ready, result.num_quarantined) == (300, len(ready), 300 - len(ready))
    assert result.num_tokens == sum(map(len, ready.values()))
    assert sorted(itertools.chain.from_iterable(shard.sequence_ids.tolist() for shard in result.shards)) == sorted(ready)
    for number, shard in enumerate(result.shards):
        assert shard.index == number
        assert np.all(np.diff(shard.sequence_ids) > 0)
        assert shard.num_tokens <= 400 or len(shard.sequence_ids) == 1
        for sequence_id, count in zip(shard.sequence_ids.tolist(), shard.token_counts.tolist(), strict=True):
            assert result.tokens.read(sequence_id).tolist() == ready[sequence_id].tolist()
            assert count == len(ready[sequence_id])
    first_bad = [place for place, ids in enumerate(encoded) if isinstance(ids, str)][:5]
    assert list(result.first_quarantined) == [f"row p{place} (place {place}): {encoded[place]}" for place in first_bad]


def test_the_sequences_table_says_what_became_of_every_row(surveyed):
    records, source, tokenizer, store, result = surveyed
    encoded = tokenizer.encode(list(source.rows()))
    (file,) = result.sequence_files
    assert file.key == "sequences/sequences-00000-attempt.parquet"
    assert (file.num_bytes, file.xxh3) == (store.size(file.key), xxhash.xxh3_64_hexdigest(store.read(file.key)))
    shard_of = {sequence_id: shard.index for shard in result.shards for sequence_id in shard.sequence_ids.tolist()}
    rows = pq.read_table(store.path(file.key)).to_pylist()
    assert len(rows) == file.rows == len(records)
    for place, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
        is_bad = isinstance(ids, str)
        assert row == {
            "sequence_id": place,
            "row_id": records[place]["id"],
            "prompt_digest": None if is_bad else xxhash.xxh3_128_hexdigest(ids.tobytes()),
            "token_count": 0 if is_bad else len(ids),
            "shard": shard_of.get(place),
            "status": "quarantined" if is_bad else "ready",
            "reason": ids if is_bad else None,
            "loss_mask": None,
            "roles": None,
            "row_count": 0 if is_bad else len(ids),
            "documents": None,
        }
    bad = [(place, f"p{place}", ids) for place, ids in enumerate(encoded) if isinstance(ids, str)]
    assert {(3, "p3", "empty"), (17, "p17", "null"), (40, "p40", "not a string but int")} <= set(bad)
    counted = duckdb.sql(f"select status, count(*) from '{store.path(file.key)}' group by 1").fetchall()
    assert dict(counted) == {"ready": result.num_ready, "quarantined": result.num_quarantined}


def test_the_same_prompts_give_the_same_shards_and_progress_reaches_the_end(surveyed, tmp_path):
    _, source, tokenizer, _, result = surveyed
    done = []
    store = LocalStore(tmp_path / "again")
    again = survey(source, tokenizer, store, "other", 400, on_progress=done.append)
    again.tokens.close()
    assert_same_shards(again.shards, result.shards)
    assert_same_shards(load_shards(store, again.sequence_files), result.shards)
    assert done[-1] == 300


def assert_same_shards(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.index == other.index
        assert np.array_equal(one.sequence_ids, other.sequence_ids)
        assert np.array_equal(one.token_counts, other.token_counts)
        assert (one.sequence_ids.dtype, one.token_counts.dtype) == (np.int64, np.int32)


def test_windows_and_files_continue_the_numbering(tmp_path, monkeypatch):
    monkeypatch.setattr(surveying, "WINDOW_ROWS", 64)
    monkeypatch.setattr(sequences, "ROWS_PER_FILE", 128)
    write_prompts(tmp_path / "p.jsonl", 300)
    source, tokenizer = prepare(tmp_path / "p.jsonl")
    store = LocalStore(tmp_path / "run")
    result = survey(source, tokenizer, store, "a", 600)
    with result.tokens as tokens:
        assert [file.rows for file in result.sequence_files] == [128, 128, 44]
        assert_same_shards(load_shards(store, result.sequence_files), result.shards)
        for shard in result.shards:
            assert len(set((shard.sequence_ids // 64).tolist())) == 1
        assert len(tokens) == 297
    rows_done = []
    first_window = [shard for shard in result.shards if shard.sequence_ids[0] < 64]
    respool(source, tokenizer, first_window, store, result.sequence_files, on_progress=rows_done.append).close()
    assert rows_done == [64]  # nothing is read beyond the last missing sequence
    with pytest.raises(RunDamagedError, match="do not follow"):
        load_shards(store, result.sequence_files[1:])


def test_a_resume_tokenises_only_the_missing_shards(surveyed):
    _, source, tokenizer, store, result = surveyed
    shards = load_shards(store, result.sequence_files)
    assert_same_shards(shards, result.shards)
    missing = [shards[number] for number in (7, 2, len(shards) - 1)]
    encoded = []
    marked = tokenizer.marked
    tokenizer.marked = lambda rows: encoded.extend(row.sequence_id for row in rows) or marked(rows)
    with respool(source, tokenizer, missing, store, result.sequence_files) as tokens:
        wanted = sorted(itertools.chain.from_iterable(shard.sequence_ids.tolist() for shard in missing))
        assert encoded == wanted
        assert len(tokens) == len(wanted)
        for sequence_id in wanted:
            assert tokens.read(sequence_id).tolist() == result.tokens.read(sequence_id).tolist()
        others = set(shards[0].sequence_ids.tolist()) - set(wanted)
        with pytest.raises(KeyError):
            tokens.read(others.pop())


def test_a_resume_refuses_prompts_that_changed(surveyed, tmp_path):
    records, _, tokenizer, store, result = surveyed
    victim = int(result.shards[1].sequence_ids[0])
    untouched = [shard for shard in result.shards if victim not in shard.sequence_ids.tolist()]

    def changed(text):
        rows = [dict(record) for record in records]
        rows[victim]["text"] = text
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare(tmp_path / "p.jsonl")[0]

    with pytest.raises(RunConflictError, match=rf"sequence {victim} \(row p{victim}\) gives other tokens"):
        respool(changed(records[victim]["text"].replace(" ", "  ", 1)), tokenizer, result.shards, store, result.sequence_files)
    with pytest.raises(RunConflictError, match=rf"sequence {victim} \(row p{victim}\) is bad now: empty"):
        respool(changed(""), tokenizer, result.shards, store, result.sequence_files)
    respool(changed(""), tokenizer, untouched, store, result.sequence_files).close()
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:100]))
    with pytest.raises(RunConflictError, match="and later ones are no longer in"):
        respool(prepare(tmp_path / "p.jsonl")[0], tokenizer, result.shards, store, result.sequence_files)


def test_damaged_sequence_files_are_refused_by_name(surveyed):
    *_, store, result = surveyed
    path = store.path(result.sequence_files[0].key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    for content, message in ((bytes(data), "the xxh3 of its bytes is"), (bytes(data[:-1]), "bytes;"), (None, "is absent")):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(RunDamagedError, match=message) as caught:
            load_shards(store, result.sequence_files)
        assert result.sequence_files[0].key in str(caught.value)


def test_prompts_of_which_none_is_left_stop_the_run_with_reasons(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "a", "text": ""}\n{"id": "b", "text": null}\n')
    with pytest.raises(PromptsError, match=r"(?s)None of the 2 rows.*row a \(place 0\): empty.*row b \(place 1\): null"):
        survey(*prepare(tmp_path / "p.jsonl"), LocalStore(tmp_path / "run"), "a", 400)
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(PromptsError, match="hold no rows"):
        survey(*prepare(tmp_path / "p.jsonl"), LocalStore(tmp_path / "run"), "a", 400)
    assert list(LocalStore(tmp_path / "run").list("")) == []


def test_more_bad_rows_than_the_limit_allows_stop_the_survey_with_the_reasons_counted(tmp_path):
    records = [*[{"text": "fine"}] * 6, *[{"text": None}] * 2, *[{"text": "river " * length} for length in (300, 301)]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def surveyed(limit):
        options = PromptOptions(str(tmp_path / "p.jsonl"), 100, quarantine_limit=limit)
        found = survey(PromptSource.open(options), PromptTokenizer.load(str(TINY), options, 320), LocalStore(tmp_path / "run"), "a", 400)
        found.tokens.close()
        return found.num_quarantined

    with pytest.raises(
        PromptsError, match=r"(?s)4 of the 10 rows .* more than quarantine_limit = 0.3 allows.*2 rows: null\n.*row 6 "
    ) as caught:
        surveyed(0.3)
    assert "2 rows: ... tokens, more than max_length ...\n" in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.parquet"))
    assert surveyed(0.4) == 4


def test_messages_without_a_template_stop_the_survey_before_it_writes(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "p.jsonl").write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}]}\n')
    rows_done = []
    with pytest.raises(PromptsError, match="no chat template"):
        survey(*prepare(tmp_path / "p.jsonl", folder=folder), LocalStore(tmp_path / "run"), "a", 400, on_progress=rows_done.append)
    assert rows_done == []
    assert not (tmp_path / "run").exists()


def test_a_survey_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(surveying, "WINDOW_ROWS", 64)
    monkeypatch.setattr(sequences, "ROWS_PER_FILE", 128)
    write_prompts(tmp_path / "p.jsonl", 300)
    source, tokenizer = prepare(tmp_path / "p.jsonl")
    open_files = os.listdir("/proc/self/fd")
    rows_done = []

    def stop_at(rows):
        rows_done.append(rows)
        if rows >= 192:
            raise KeyboardInterrupt

    store = LocalStore(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt) as caught:
        survey(source, tokenizer, store, "a", 400, on_progress=stop_at)
    assert rows_done[-1] >= 192
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
    assert os.listdir("/proc/self/fd") == open_files
    del caught  # until here its traceback kept the spool alive


def test_two_surveys_of_one_attempt_cannot_mix(surveyed):
    _, source, tokenizer, store, _ = surveyed
    with pytest.raises(StoreError, match="exists already"):
        survey(source, tokenizer, store, "attempt", 400)


# --- shards ----------------------------------------------------------------------------------------------------------

counts_lists = st.lists(st.integers(1, 120), min_size=1, max_size=60).map(lambda counts: np.array(counts, np.int32))


@given(counts_lists, st.integers(1, 400))
def test_shards_partition_a_window_within_their_limit(token_counts, shard_tokens):
    shards = cut_shards(token_counts, shard_tokens)
    assert sorted(itertools.chain.from_iterable(places.tolist() for places in shards)) == list(range(len(token_counts)))
    for places in shards:
        assert len(places) == 1 or int(token_counts[places].max()) * len(places) <= shard_tokens
        assert np.all(np.diff(places) > 0)
    for before, after in itertools.pairwise(shards):
        assert token_counts[before].min() >= token_counts[after].max()


def test_a_shard_has_no_more_sequences_than_a_part_may_have_row_groups():
    shards = cut_shards(np.full(WINDOW_ROWS, 3, np.int32), shard_tokens=1 << 30)
    assert sum(map(len, shards)) == WINDOW_ROWS
    assert max(map(len, shards)) == 2**15 - 2, "at most 32,767, and an even number"


def test_sequences_of_one_length_stay_in_their_order():
    token_counts = np.random.default_rng(0).integers(20, 24, 5000).astype(np.int32)
    places = np.concatenate(cut_shards(token_counts, 700))
    for length in range(20, 24):
        assert np.all(np.diff(places[token_counts[places] == length]) > 0)


def test_a_shard_table_is_a_sequence():
    table = as_table(realistic_lengths(500), 4096)
    assert [shard.index for shard in table] == list(range(len(table)))
    assert table[-1].index == len(table) - 1
    assert [shard.index for shard in table[2:6:2]] == [2, 4]
    assert (table.num_sequences, table.num_tokens) == (500, int(realistic_lengths(500).sum()))
    with pytest.raises(IndexError):
        table[len(table)]
    assert len(ShardTable.join([])) == 0


def plan_cost(token_counts, bounds, batch_tokens):
    runs = [token_counts[start:stop] for start, stop in itertools.pairwise(bounds)]
    return sum(int(run.max()) * len(run) + batch_tokens / 10 for run in runs)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9).map(lambda counts: np.array(counts, np.int32)), st.integers(1, 200))
def test_micro_batches_are_cut_as_well_as_any_cut_could_be(token_counts, batch_tokens):
    bounds = cut_micro_batches(token_counts, batch_tokens)
    assert (bounds[0], bounds[-1]) == (0, len(token_counts))

    def is_allowed(candidate):
        runs = [token_counts[start:stop] for start, stop in itertools.pairwise(candidate)]
        return all(len(run) == 1 or int(run.max()) * len(run) <= batch_tokens for run in runs)

    inner = range(1, len(token_counts))
    every_cut = ([0, *cut, len(token_counts)] for size in range(len(token_counts)) for cut in itertools.combinations(inner, size))
    best = min(plan_cost(token_counts, cut, batch_tokens) for cut in every_cut if is_allowed(cut))
    assert is_allowed(bounds)
    assert plan_cost(token_counts, bounds, batch_tokens) == pytest.approx(best)


def test_micro_batches_hold_the_shards_tokens_in_its_order():
    draw = np.random.default_rng(1)
    sequence_ids = np.sort(draw.choice(1000, 40, replace=False)).astype(np.int64)
    prompts = {int(sequence_id): draw.integers(1, 320, draw.integers(1, 50)).astype(np.int32) for sequence_id in sequence_ids}
    prompts[int(sequence_ids[20])] = draw.integers(1, 320, 300).astype(np.int32)
    shard = Shard(5, sequence_ids, np.array([len(prompts[int(sequence_id)]) for sequence_id in sequence_ids], np.int32))
    with TokenSpool() as tokens:
        for sequence_id, token_ids in prompts.items():
            tokens.append(sequence_id, token_ids)
        batches = list(micro_batches(shard, tokens, 200))
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert {batch.shard for batch in batches} == {5}
    assert np.concatenate([batch.sequence_ids for batch in batches]).tolist() == sequence_ids.tolist()
    for batch in batches:
        assert batch.padded_tokens <= 200 or batch.token_ids_BT.shape == (1, 300)
        assert batch.token_ids_BT.dtype == np.int32
        for sequence_id, count, row in zip(batch.sequence_ids.tolist(), batch.token_counts.tolist(), batch.token_ids_BT, strict=True):
            assert row[:count].tolist() == prompts[sequence_id].tolist()
            assert not row[count:].any()
    real, padded = shard.num_tokens, sum(batch.padded_tokens for batch in batches)
    assert batching([shard], 200).padding_waste == pytest.approx(1 - real / padded)


def test_padding_is_under_5_percent_at_the_defaults():
    table = as_table(realistic_lengths(100_000), 32_768)
    assert table.num_sequences == 100_000
    assert batching(table, 16_384).padding_waste < 0.01  # the promise is 0.05; anything above this is a regression
    assert batching(table, 2048).padding_waste < 0.01
    sizes = [int(run.max()) * len(run) for shard in table for run in runs_of(shard, 16_384)]
    assert sum(size < 16_384 / 4 for size in sizes) < 0.01 * len(sizes)
    assert len(sizes) < 2.02 * len(table)


def runs_of(shard, batch_tokens):
    return [shard.token_counts[start:stop] for start, stop in itertools.pairwise(cut_micro_batches(shard.token_counts, batch_tokens))]


@pytest.mark.parametrize(("shard_tokens", "batch_tokens", "limit"), [(32_768, 16_384, 0.2), (6000, 2048, 0.07), (32_768, 2048, 0.1)])
def test_padding_stays_decent_for_a_few_hundred_prompts(shard_tokens, batch_tokens, limit):
    for seed in range(5):
        assert batching(as_table(realistic_lengths(300, seed), shard_tokens), batch_tokens).padding_waste < limit


def test_batches_for_the_tokenizer_are_bounded_in_rows_and_bytes():
    def sizes(rows):
        return [len(batch) for batch in surveying.row_batches(rows)]

    chat = [{"role": "user", "content": "x" * (3 << 18)}]
    assert sizes(PromptRow(place, "", text="x") for place in range(17_000)) == [8192, 8192, 616]
    assert sizes(PromptRow(place, "", text="x" * (3 << 18), num_bytes=3 << 18) for place in range(5)) == [2, 2, 1]
    assert sizes(PromptRow(place, "", messages=chat, num_bytes=3 << 18) for place in range(5)) == [2, 2, 1]


# --- bounds ----------------------------------------------------------------------------------------------------------


class InstantTokenizer:
    """Stands where the tokenizer's own time and memory must not count: token ids without looking at the text."""

    selection = Selection()

    def __init__(self, lengths):
        self._lengths = lengths
        self._ids = np.arange(2000, dtype=np.int32)

    def packer(self):
        return None

    def require(self, columns):
        pass

    def marked(self, rows):
        return [row.reason or Marked(self._ids[: self._lengths[row.sequence_id]]) for row in rows]

    def close(self):
        pass


def test_60k_prompts_are_surveyed_quickly_in_bounded_memory(tmp_path):
    lengths = realistic_lengths(60_000)
    with (tmp_path / "p.jsonl").open("w") as file:
        for place, length in enumerate(lengths.tolist()):
            file.write(json.dumps({"text": "wxyz" * length, "id": place}) + "\n")
    source = PromptSource.open(PromptOptions(str(tmp_path / "p.jsonl"), 2000))
    started_s = time.process_time()
    with survey(source, InstantTokenizer(lengths), LocalStore(tmp_path / "run"), "a", 32_768).tokens as tokens:
        assert time.process_time() - started_s < 12
        assert len(tokens) == 60_000
    tracemalloc.start()
    with survey(source, InstantTokenizer(lengths), LocalStore(tmp_path / "traced"), "a", 32_768).tokens as tokens:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        assert tokens.num_tokens * 4 > 66_000_000
    tracemalloc.stop()
    assert peak_bytes < 45_000_000  # texts and token ids are 69 MB each; a window's row ids and digests about 12


def test_the_spool_leaves_no_file_and_says_when_its_disk_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with TokenSpool() as tokens:
        tokens.append(4, np.arange(3, dtype=np.int32))
        assert list(tmp_path.iterdir()) == []
        assert tokens.read(4).tolist() == [0, 1, 2]
        tokens.append(9, np.arange(5, dtype=np.int32))
        assert tokens.read(9).tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="ids must ascend"):
            tokens.append(9, np.arange(5, dtype=np.int32))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(StoreError, match=r"absent: No such file or directory\. Check the path\. TMPDIR may name another"):
        TokenSpool()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_spool_is_named(monkeypatch):
    with open("/dev/full", "w+b", buffering=0) as full_disk:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full_disk)
        with TokenSpool() as tokens, pytest.raises(StoreError, match="No space left on device"):
            tokens.append(0, np.zeros(1 << 20, np.int32))
