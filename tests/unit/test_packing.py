"""Prompts joined and cut into contexts of one length: the same as one list of tokens cut by hand, whatever comes in how many batches."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import m2ray
from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptSource, PromptTokenizer, load_shards, packing, respool, survey, surveying
from m2ray.prompts.masks import Marked
from m2ray.prompts.packing import Packer
from m2ray.sequences import read_sequences
from m2ray.storage import LocalStore
from tests.unit.audited_runs import audited, extracted, make_model

TINY = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"
BOS = 0
SIZE = 16


def documents(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Token ids of 1 to 70 tokens, some beginning with BOS, some with a mask; the fourth cannot be used."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        token_ids = [*([BOS] if number % 3 == 0 else []), *rng.integers(3, 300, rng.integers(1, 70)).tolist()]
        mask = rng.integers(0, 2, len(token_ids)).tolist() if number % 2 else None
        rows.append({"id": f"d{number}", "input_ids": token_ids if number != 3 else [999], "loss_mask": mask if number != 3 else None})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def joined(rows: list[dict[str, Any]]) -> tuple[list[int], list[tuple[str, int]]]:
    """All tokens in one list, and of each its document and its place there."""
    tokens: list[int] = []
    places: list[tuple[str, int]] = []
    for row in rows:
        if row["id"] != "d3":
            ids = row["input_ids"] if row["input_ids"][0] == BOS else [BOS, *row["input_ids"]]
            tokens += ids
            places += [(row["id"], place) for place in range(len(ids))]
    return tokens, places


def surveyed(path: Path, store: LocalStore, **options: Any) -> tuple[Any, pa.Table, PromptSource, PromptTokenizer]:
    chosen = PromptOptions(str(path), SIZE, id_column="id", pack=SIZE, **options)
    source, tokenizer = PromptSource.open(chosen), PromptTokenizer.load(str(TINY), chosen, 320)
    found = survey(source, tokenizer, store, "a", 100)
    return found, pa.concat_tables(read_sequences(store, file) for file in found.sequence_files), source, tokenizer


@pytest.mark.parametrize("batch_rows", [1, 7, 8192])
def test_contexts_are_the_documents_cut_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int) -> None:
    monkeypatch.setattr(surveying, "_BATCH_ROWS", batch_rows)
    for module in (surveying, packing):
        monkeypatch.setattr(module, "WINDOW_ROWS", 8)
    rows = documents(20)
    tokens, places = joined(rows)
    found, table, _, _ = surveyed(write(tmp_path / "p.jsonl", rows), LocalStore(tmp_path / "run"))
    ready = [row for row in table.to_pylist() if row["status"] == "ready"]
    assert table["sequence_id"].to_pylist() == list(range(len(table)))
    assert [found.tokens.read(row["sequence_id"]).tolist() for row in ready] == [
        tokens[start : start + SIZE] for start in range(0, len(tokens) - SIZE + 1, SIZE)
    ]
    for context, row in enumerate(ready):
        spans = [*row["documents"], {"start": SIZE}]
        told = [(one["row_id"], one["offset"] + place) for one, after in pairwise(spans) for place in range(after["start"] - one["start"])]
        assert told == places[context * SIZE : (context + 1) * SIZE]
        assert (row["token_count"], row["row_count"], row["roles"]) == (SIZE, SIZE, None)
    others = [(row["row_id"], row["reason"]) for row in table.to_pylist() if row["status"] != "ready"]
    rest = len(tokens) % SIZE
    assert others == [
        ("d3", "token id 999 is beyond the model's vocabulary of 320 tokens"),
        (
            "remainder",
            f"the last {rest} tokens, from token {places[-rest][1]} of row {places[-rest][0]} on, fill no context of 16: left out",
        ),
    ]
    assert (found.num_sequences, found.num_ready, found.num_tokens) == (len(ready) + 2, len(ready), SIZE * len(ready))
    found.tokens.close()


def test_a_resume_finds_the_same_contexts(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    found, _, source, tokenizer = surveyed(write(tmp_path / "p.jsonl", documents(30)), store, tokens="mask")
    shards = load_shards(store, found.sequence_files)
    assert [shard.row_counts.tolist() for shard in shards] == [shard.row_counts.tolist() for shard in found.shards]
    missing = shards[1::2]
    with respool(source, tokenizer, missing, store, found.sequence_files) as again:
        assert len(again) == sum(len(shard.sequence_ids) for shard in missing)
        for shard in missing:
            for sequence_id, rows in zip(shard.sequence_ids.tolist(), shard.row_counts.tolist(), strict=True):
                assert again.read(sequence_id).tolist() == found.tokens.read(sequence_id).tolist()
                assert again.mask(sequence_id).tolist() == found.tokens.mask(sequence_id).tolist()
                assert again.mask(sequence_id).sum() == rows
    found.tokens.close()


def test_masks_are_joined_and_bos_between_has_none() -> None:
    packer = Packer(6, BOS)
    rows = [PromptRow(0, "a"), PromptRow(1, "b")]
    marked = [Marked(np.array([5, 6], np.int32), b"\1\1"), Marked(np.array([7, 8, 9], np.int32))]
    (((context,), (found,)), (_, (rest,))) = packer.packed([(rows, marked)])
    assert (context.sequence_id, context.row_id, found.token_ids.tolist()) == (0, "0", [0, 5, 6, 0, 7, 8])
    assert found.loss_mask == b"\0\1\1\0\0\0"
    assert [tuple(one) for one in found.documents] == [("a", 0, 0), ("b", 3, 0)]
    assert rest == "the last 1 tokens, from token 3 of row b on, fill no context of 6: left out"


def test_what_is_too_short_for_a_context_or_too_bad_is_refused(tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", [{"id": "d0", "input_ids": [5, 6]}])
    with pytest.raises(PromptsError, match="None of the 1 rows"):
        surveyed(short, LocalStore(tmp_path / "run"))
    bad = write(tmp_path / "bad.jsonl", [*documents(3), *({"id": f"b{number}", "input_ids": [999]} for number in range(2))])
    with pytest.raises(PromptsError, match=r"2 of the 5 rows .* cannot be used, more than quarantine_limit = 0\.3"):
        surveyed(bad, LocalStore(tmp_path / "other"), quarantine_limit=0.3)


def test_a_packed_run_is_audited_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "llama", "llama")
    prompts = write(tmp_path / "p.jsonl", documents(12))
    options = {"pack": SIZE, "id-column": "id", "layers": "0,4", "compute-dtype": "float32", "store-dtype": "float32", "tokens": "every:5"}
    run = extracted(monkeypatch, model, prompts, tmp_path / "run", **options)
    reader = m2ray.open_run(run)
    assert set(reader.tokens()["position"].tolist()) == {0, 5, 10, 15}
    assert reader.job.counts.rows == 4 * reader.job.counts.ready
    assert (reader.job.options["pack"], reader.job.options["max_length"]) == (SIZE, SIZE)
    audit = audited(run)
    assert (audit["passed"], audit["exact"], audit["tokens_from"]) == (True, True, "prompts"), audit
