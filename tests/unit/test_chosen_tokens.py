"""Runs whose tokens were chosen, by the real command but for Ray: each is a full run filtered, bit for bit, and every reader knows it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import m2ray
from m2ray.activations.job import read_job
from m2ray.activations.reading.reader import RunReader
from m2ray.activations.reading.verify import verify
from m2ray.activations.records import read_summary
from m2ray.batches import LayerSpan
from m2ray.cli import main
from m2ray.errors import NotInRunError
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import StageSpec
from m2ray.selection import Selection
from m2ray.storage import LocalStore
from tests.reference import chain_rows, load_capturing, micro_batch_of, same_bits
from tests.unit.audited_runs import audited, extracted, make_model

SPECIAL = (0, 1, 2)
FLOAT32 = {"compute-dtype": "float32", "store-dtype": "float32"}
LENGTHS = (3, 9, 1, 6, 12, 2, 5, 7, 1, 8, 4, 10, 3, 2, 11, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids, each sequence beginning with <s> and ending with <|end|>, which are special; some masks are 0 throughout."""
    rng = np.random.default_rng(3)
    path, lines = tmp_path_factory.mktemp("prompts") / "prompts.jsonl", []
    for number, length in enumerate(LENGTHS):
        mask = [0] * length if number % 5 == 1 else rng.integers(0, 2, length).tolist()
        lines.append({"input_ids": [0, *rng.integers(3, 380, length - 1).tolist()][:length], "loss_mask": mask})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def full(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> RunReader:
    with pytest.MonkeyPatch.context() as patch:
        return m2ray.open_run(extracted(patch, model, prompts, tmp_path_factory.mktemp("full") / "run", layers="1,4", **FLOAT32))


def expected(full: RunReader, chosen: Selection) -> dict[int, tuple[list[int], torch.Tensor]]:
    """Positions and rows [L, N, W] of each sequence, filtered out of the full run."""
    found, masks = {}, full.sequences["loss_mask"].to_pylist()
    words = chosen.tokens.split(":")
    tokens = full.tokens()
    for sequence_id in range(len(LENGTHS)):
        token_ids = tokens["token_id"][tokens["sequence_id"] == sequence_id].tolist()
        places = [
            place
            for place, token_id in enumerate(token_ids)
            if token_id not in chosen.skip_ids and ("mask" not in words or masks[sequence_id][place])
        ]
        if "last" in words:
            places = places[-int(words[-1]) if words[-1] != "last" else -1 :]
        elif "first" in words:
            places = places[: int(words[-1])]
        elif "every" in words:
            places = [place for place in places if place % int(words[-1]) == 0]
        rows = full.sequence(sequence_id)[:, places]
        if "mean" in words and places:
            means = np.add.reduce(rows.numpy(), axis=1) / np.float32(len(places))
            places, rows = [-1], torch.from_numpy(means)[:, None]
        found[sequence_id] = (places, rows)
    return found


CHOICES = ["last:3", "mask:last:2", "mean:mask", "every:4", "mean, no special tokens"]
"""All others are held against their words in test_selection.py, and against a stage's rows below."""


@pytest.mark.parametrize("choice", CHOICES)
def test_a_run_of_chosen_tokens_is_the_full_run_filtered(
    full: RunReader, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    tokens, _, skips = choice.partition(", ")
    flags = {"tokens": tokens} | ({"skip-special-tokens": True} if skips else {})
    run = m2ray.open_run(extracted(monkeypatch, model, prompts, tmp_path / "run", layers="1,4", **FLOAT32, **flags))
    wanted = expected(full, Selection(tokens, SPECIAL if skips else ()))
    without = sum(not places for places, _ in wanted.values())
    num_rows = sum(len(places) for places, _ in wanted.values())
    identities = run.tokens()
    for sequence_id, (places, rows) in wanted.items():
        assert identities["position"][identities["sequence_id"] == sequence_id].tolist() == places
        assert same_bits(run.sequence(sequence_id), rows.contiguous()), sequence_id
    assert (run.num_rows, len(identities), run.num_tokens) == (num_rows, num_rows, sum(LENGTHS))
    assert run.sequences["row_count"].to_pylist() == [len(places) for places, _ in wanted.values()]
    account = read_summary(LocalStore(tmp_path / "run"))
    assert (account.tokens, account.rows, account.without_rows, account.committed) == (sum(LENGTHS), num_rows, without, len(LENGTHS))
    assert not verify(LocalStore(tmp_path / "run"), threads=1, checksums=True).damages
    for batch in run.layer(4).stream(batch_rows=7):
        assert len(batch["activations"]) == len(batch["token_id"])
        assert ("loss_mask" in batch) == (not tokens.startswith("mean"))
    if tokens in ("mask:last:2", "mean:mask") and not skips:
        audit = audited(tmp_path / "run")
        assert (audit["passed"], audit["exact"], audit["remarks"]) == (True, True, []), audit
        assert {each["same_bits"] for each in audit["compared"] if each["batch"] == "recorded"} == {num_rows}


def test_a_stage_keeps_what_a_filter_would_keep(model: Path) -> None:
    """Every choice, in a dtype that rounds: a mean is of the values before they are rounded."""
    stage = load_capturing(StageSpec(str(model), LayerSpan(0, 5), "float32", "auto", "cpu", 1))
    batch = micro_batch_of((3, 8, 1, 12), 300)
    batch = replace(batch, mask_BT=np.random.default_rng(5).random(batch.token_ids_BT.shape) < 0.4)
    whole = chain_rows([stage], batch)
    numbers_BT = np.cumsum(np.arange(12) < batch.token_counts[:, None]).reshape(batch.token_ids_BT.shape) - 1
    skipped = tuple(batch.token_ids_BT[1, ::2].tolist())
    for tokens in ("all", "last", "last:9", "first:2", "every:4", "mask", "mask:last:2", "mean", "mean:mask"):
        for chosen in (Selection(tokens), Selection(tokens, skipped)):
            stage.begin(CaptureSpec({"residual": tuple(range(5))}, "bfloat16", chosen))
            places = torch.from_numpy(numbers_BT.reshape(-1)[chosen.places(batch)])
            for all_NW, found_NW in zip(whole, chain_rows([stage], batch), strict=True):
                expected_NW = all_NW[places]
                if chosen.is_mean:
                    pieces = expected_NW.split(chosen.chosen_counts(batch).tolist())
                    expected_NW = torch.stack([torch.from_numpy(piece.numpy().sum(axis=0) / np.float32(len(piece))) for piece in pieces])
                assert same_bits(found_NW, expected_NW.bfloat16()), chosen


@pytest.fixture(scope="module")
def sparse(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every part but one has no rows: one token of all is chosen."""
    folder = tmp_path_factory.mktemp("sparse")
    lines = [
        {"input_ids": list(range(5, 5 + length)), "loss_mask": [int(length == 8 and place == 3) for place in range(length)]}
        for length in LENGTHS
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        return extracted(
            patch, model, folder / "prompts.jsonl", folder / "run", layers="0", tokens="mask", **{"shard-tokens": 30}, **FLOAT32
        )


def test_parts_without_rows_are_read_by_everyone(sparse: Path) -> None:
    run = m2ray.open_run(sparse)
    parts = pq.read_table(sparse / "manifest.parquet")
    assert sorted(parts["rows"].to_pylist(), reverse=True)[:2] == [1, 0]
    empty = next(str(sparse / row["key"]) for row in parts.to_pylist() if not row["rows"])
    assert pq.read_table(empty).num_rows == pq.ParquetFile(empty).metadata.num_row_groups == 0
    files = [str(sparse / key) for key in parts["key"].to_pylist()]
    assert duckdb.sql(f"select position, token_id from read_parquet({files})").fetchall() == [(3, 8)]
    assert duckdb.sql(f"select count(*) from read_parquet('{empty}')").fetchall() == [(0,)]
    assert not verify(LocalStore(sparse), threads=1, checksums=True).damages
    assert same_bits(run.layer(0).rows([0]), run.layer(0).tensor())
    assert [len(batch["activations"]) for batch in run.layer(0).stream()] == [1]
    assert sorted(len(shard.activations[0]) for shard in run.shards())[-2:] == [0, 1]
    assert [len(run.layer(0).sequence(number)) for number in range(len(LENGTHS))] == [int(length == 8) for length in LENGTHS]
    audit = audited(sparse)
    assert (audit["passed"], audit["exact"]) == (True, True), audit


def test_what_needs_every_token_refuses_by_name(sparse: Path) -> None:
    with pytest.raises(NotInRunError, match="kept the tokens 'mask': a sample is a whole sequence"):
        m2ray.open_run(sparse).draft_samples([0])
    exported = CliRunner().invoke(
        main, ["export", str(sparse), "--to", "saelens", "--output", str(sparse.parent / "out"), "--context-size", "4"]
    )
    assert exported.exit_code == 1
    assert "The run kept the tokens 'mask': trainers read whole sequences" in " ".join(exported.output.split())
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(sparse), "--json"]).stdout)
    assert facts["rows"] == {"committed": 1, "all": 1, "sequences_without": len(LENGTHS) - 1}
    assert facts["tokens"]["committed"] == sum(LENGTHS)


def test_the_choice_and_the_special_ids_are_recorded_and_compared(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {"layers": "0", "tokens": "last:2", "skip-special-tokens": True}
    extracted(monkeypatch, model, prompts, tmp_path / "run", **flags)
    record = read_job(LocalStore(tmp_path / "run"))
    assert (record.options["tokens"], record.options["skip_special_tokens"], record.options["skip_ids"]) == ("last:2", True, list(SPECIAL))
    assert record.selection == Selection("last:2", SPECIAL)
    assert not record.selection.is_all
    words = ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "run"), "--layers", "0"]
    other = CliRunner().invoke(main, [*words, "--shard-tokens", "150", "--batch-tokens", "60", "--tokens", "last:3"])
    assert other.exit_code == 1
    assert 'tokens: "last:2" in the run, "last:3" now' in " ".join(other.output.split())


def test_what_assistants_say_last_is_kept_and_comes_back_after_a_lost_shard(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template = Path(shutil.copytree(model, tmp_path / "model"))
    template = "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    ending = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    (with_template / "chat_template.jinja").write_text(template + ending)
    turns = [("user", "low?"), ("assistant", "the river is low"), ("user", "and the stone"), ("assistant", "gives water")]
    chats = [[{"role": role, "content": text} for role, text in turns[: 2 * (1 + number % 2)]] for number in range(10)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    options = {"layers": "2", "mask": "assistant", **FLOAT32}
    whole = m2ray.open_run(extracted(monkeypatch, with_template, tmp_path / "chats.jsonl", tmp_path / "whole", **options))
    chosen = {**options, "tokens": "mask:last:7", "skip-special-tokens": True}
    run = extracted(monkeypatch, with_template, tmp_path / "chats.jsonl", tmp_path / "run", **chosen)
    before = m2ray.open_run(run).tokens(), m2ray.open_run(run).tensor()
    tokens, masks = whole.tokens(), whole.sequences["loss_mask"].to_pylist()
    said = np.array([masks[row["sequence_id"]][row["position"]] == 1 and row["token_id"] not in SPECIAL for row in tokens])
    to_come = np.array([(said[place:] & (tokens["sequence_id"][place:] == row["sequence_id"])).sum() for place, row in enumerate(tokens)])
    expected = said & (to_come <= 7)
    assert said.sum() > expected.sum() > 0
    assert np.array_equal(before[0], tokens[expected])
    assert same_bits(before[1], whole.tensor()[:, expected])
    next(run.glob("data/site=residual/layer=002/shard-000000-*")).unlink()
    extracted(monkeypatch, with_template, tmp_path / "chats.jsonl", run, **chosen)
    after = m2ray.open_run(run).tokens(), m2ray.open_run(run).tensor()
    assert np.array_equal(before[0], after[0])
    assert same_bits(before[1], after[1])


def test_the_plan_counts_the_bytes_that_a_choice_saves(model: Path, prompts: Path) -> None:
    words = ["plan", "--model", str(model), "--prompts", str(prompts), "--gpus", "1xH200", "--layers", "1,4", "--json", "--tokens"]
    told = [json.loads(CliRunner().invoke(main, [*words, tokens]).stdout)["output"] for tokens in ("all", "last:2")]
    assert [(each["tokens"], each["rows"]) for each in told] == [(sum(LENGTHS), sum(LENGTHS)), (sum(LENGTHS), 2 * len(LENGTHS) - 2)]
    assert told[0]["saved_bytes"] == 0
    assert told[0]["num_bytes"] - told[1]["num_bytes"] == pytest.approx(told[1]["saved_bytes"], rel=0.05)  # the ids of few rows repeat less


def test_numbers_of_experts_have_no_mean(prompts: Path, tmp_path: Path) -> None:
    minimax = make_model(tmp_path / "minimax", "minimax_m2")
    words = ["extract", "--model", str(minimax), "--prompts", str(prompts), "--output", str(tmp_path / "run"), "--tokens", "mean"]
    refused = CliRunner().invoke(main, [*words, "--sites", "residual, router_topk"])
    assert refused.exit_code == 1
    assert "tokens = 'mean', and router_topk has numbers of experts, which have no mean" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([{"text": "a river"}], "tokens = 'mask' goes by a loss mask, and the prompts, text of the column 'text', bring none"),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            "goes by a loss mask, and the prompts, chat messages of the column 'messages', bring none",
        ),
        ([{"input_ids": [5, 6], "loss_mask": [0, 0]}], "are 0 at every token"),
        ([{"input_ids": [5, 6]}, {"input_ids": [7], "loss_mask": None}], "2 rows: no loss mask, by which its tokens are to be chosen"),
    ],
)
def test_masks_that_choose_nothing_are_refused_before_ray(tmp_path: Path, model: Path, lines: list[dict[str, Any]], what: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["extract", "--model", str(model), "--prompts", str(path), "--output", str(tmp_path / "run"), "--tokens", "mask"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert what in " ".join(refused.output.split()), refused.output
