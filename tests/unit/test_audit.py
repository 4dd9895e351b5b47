"""The audit: what it draws, what it says, where it keeps it, and what it refuses. What it catches is in test_audit_mutants.py."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from m2ray.activations.audits import read_audits
from m2ray.activations.job import read_job
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.audit import restaged
from m2ray.audit.sample import draw, least_share_found
from m2ray.audit.tolerance import bound
from m2ray.batches import LayerSpan, PartSpec
from m2ray.chain import checking
from m2ray.cli import main
from m2ray.model import site_hooks
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.storage import LocalStore
from tests.data.run_format_1.make_runs import HERE as FORMAT_1
from tests.data.run_format_1.make_runs import RUNS
from tests.data.run_format_1.make_runs import make_model as make_model_of_format_1
from tests.reference import make_family, other_weights
from tests.unit.audited_runs import TOKENIZER, audited, extracted, make_model, rows_of_stage, verify, write_prompts

FLOAT32 = {"compute-dtype": "float32", "store-dtype": "float32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name) for name in ("llama", "minimax_m2")}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path) -> Path:
    return extracted(monkeypatch, models["llama"], prompts, tmp_path / "run")


def stage_of(model: Path, sites: dict[str, tuple[int, ...]]) -> Stage:
    stage = load_stage(StageSpec(str(model), LayerSpan(0, 5), "bfloat16", "auto", "cpu", 1, with_final_norm=True), lambda *_: None)
    stage.begin(CaptureSpec(sites, "bfloat16"))
    return stage


# -- what is equal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "compute_dtype", "store_dtype"),
    [
        ("llama", "float32", "bfloat16"),
        ("llama", "bfloat16", "bfloat16"),
        ("minimax_m2", "float32", "float32"),
        ("minimax_m2", "bfloat16", "float32"),
    ],
)
def test_rows_as_they_were_extracted_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, name: str, compute_dtype: str, store_dtype: str
) -> None:
    dtypes = {"compute-dtype": compute_dtype, "store-dtype": store_dtype}
    audit = audited(extracted(monkeypatch, models[name], prompts, tmp_path / "run", layers="0,2-3", **dtypes))
    assert (audit["passed"], audit["exact"], audit["num_wrong"], audit["remarks"]) == (True, True, 0, []), audit
    assert {(each["by"], each["batch"], each["layer"]) for each in audit["compared"]} == {
        (*pair, layer) for pair in (("m2ray", "recorded"), ("transformers", "recorded"), ("transformers", "alone")) for layer in (0, 2, 3)
    }
    for each in audit["compared"]:
        assert each["rows"] == audit["tokens"]
        assert sum(each["exponents"].values()) == each["rows"] - each["same_bits"]
        if each["batch"] == "recorded":
            assert (each["tolerance"], each["same_bits"], each["greatest"]) == (0.0, each["rows"], 0.0)
        else:
            assert each["tolerance"] == bound(
                read_job(LocalStore(tmp_path / "run")), PartSpec.of("residual", each["layer"], store_dtype, 1)
            )
    assert audit["least_share_found"] == 1 / 16


ALL_SITES = "residual:1-2, residual_mid:1-2, attention:1-2, mlp:1-2, mlp_in:1-2, embedding, final_norm"
BRANCHES = {"residual", "residual_mid", "attention", "mlp", "mlp_in", "embedding", "final_norm"}


@pytest.mark.parametrize(
    ("name", "compute_dtype", "store_dtype"),
    [("llama", "float32", "float32"), ("llama", "bfloat16", "bfloat16"), ("llama", "float32", "int8"), ("minimax_m2", "float32", "float8")],
)
def test_every_site_is_audited(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, name: str, compute_dtype: str, store_dtype: str
) -> None:
    """The branches as transformers' own layers add them, and what its own routers return."""
    sites = ALL_SITES + (", router_topk:all, router_logits:0" if name == "minimax_m2" else "")
    dtypes = {"compute-dtype": compute_dtype, "store-dtype": store_dtype}
    run = extracted(monkeypatch, models[name], prompts, tmp_path / "run", sites=sites, **dtypes)
    audit = audited(run)
    assert (audit["passed"], audit["exact"], audit["num_wrong"]) == (True, True, 0), audit
    found = {by: {(each["site"], each["layer"]) for each in audit["compared"] if each["by"] == by} for by in ("m2ray", "transformers")}
    assert found["transformers"] == found["m2ray"]
    assert {site for site, _ in found["m2ray"]} == BRANCHES | ({"router_topk", "router_logits"} if name == "minimax_m2" else set())
    assert audit["remarks"] == []
    assert {each["layer"] for each in audit["compared"] if each["site"] == "final_norm"} == {None}
    assert all(each["same_bits"] == each["rows"] for each in audit["compared"] if each["batch"] == "recorded")


@pytest.mark.parametrize("swapped", [("attention", "mlp"), ("mlp_in", "final_norm")])
def test_rows_of_another_site_are_found(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, swapped: tuple[str, str]
) -> None:
    stage = stage_of(models["llama"], {site: () if site == "final_norm" else (4,) for site in swapped})
    sites = ", ".join(site if site == "final_norm" else f"{site}:4" for site in swapped)
    run = extracted(monkeypatch, models["llama"], prompts, tmp_path / "run", lambda batch: rows_of_stage(stage, batch)[::-1], sites=sites)
    assert not audited(run)["passed"]


@pytest.mark.parametrize("site", ["router_logits", "router_topk"])
def test_a_router_that_m2ray_reads_wrongly_is_found_by_transformers(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, site: str
) -> None:
    """In stages of another cut m2ray reads it as wrongly again."""
    values_of = site_hooks.values_of

    def half(layer, point, kept, of, shape):
        *others, last = values_of(layer, point, kept, of, shape)
        return (*others, last / 2 if of == site else last)

    monkeypatch.setattr(site_hooks, "values_of", half)
    monkeypatch.setattr(checking, "prove_sites", lambda *_: None)
    audit = audited(extracted(monkeypatch, models["minimax_m2"], prompts, tmp_path / "run", sites=f"{site}:1", **FLOAT32))
    assert not audit["passed"]
    assert {each["by"] for each in audit["compared"] if each["same_bits"] < each["rows"]} == {"transformers"}


@pytest.mark.parametrize("name", ["llama", "minimax_m2"])
def test_rows_of_another_machine_are_held_to_rounding(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, name: str
) -> None:
    audit = audited(extracted(monkeypatch, models[name], prompts, tmp_path / "run", computed_on="NVIDIA H200", **FLOAT32))
    assert (audit["passed"], audit["exact"]) == (True, False)
    assert "the rows were computed on NVIDIA H200" in audit["remarks"][0]
    assert {(each["by"], each["batch"]) for each in audit["compared"]} == {("m2ray", "alone"), ("transformers", "alone")}
    assert audit["least_share_found"] == (1 / 16 if name == "llama" else None)


# -- what is drawn -----------------------------------------------------------------------------------------------------------


def test_a_seed_decides_which_sequences_are_drawn(run: Path) -> None:
    catalogue = Catalogue(LocalStore(run))
    drawn = [draw(catalogue, 0.3, seed) for seed in (0, 0, 1)]
    ids = [sample.sequence_ids.tolist() for sample in drawn]
    assert ids[0] == ids[1] != ids[2]
    assert [len(each) for each in ids] == [5, 5, 5]
    everything = draw(catalogue, 1.0, 5)
    assert (everything.sequence_ids.tolist(), everything.of_sequences) == (list(range(16)), 16)
    all_batches = [batch.sequence_ids.tolist() for batch in everything.micro_batches]
    commits = [json.loads(path.read_text())["micro_batches"] for path in sorted((run / "_commits").iterdir())]
    assert [len(ids) for ids in all_batches] == [size for commit in commits for size, _ in commit]
    assert any(len(ids) > 1 for ids in all_batches)
    one = draw(catalogue, 1e-9, 0)
    assert len(one.sequence_ids) == 1
    assert [batch.sequence_ids.tolist() for batch in one.micro_batches] == [ids for ids in all_batches if one.sequence_ids[0] in ids]


@pytest.mark.parametrize(("num_drawn", "num_all"), [(1, 1), (1, 20), (7, 50), (30, 50), (49, 50), (50, 50)])
def test_the_least_share_found_is_that_of_drawing_without_putting_back(num_drawn: int, num_all: int) -> None:
    share = least_share_found(num_drawn, num_all)
    num_wrong = round(share * num_all)
    rng = np.random.default_rng(0)
    found = [np.mean([(rng.permutation(num_all)[:num_drawn] < wrong).any() for _ in range(4000)]) for wrong in (num_wrong, num_wrong - 1)]
    assert found[0] > 0.94
    assert found[1] < 0.96


def test_a_thousandth_of_a_million_finds_three_in_a_thousand() -> None:
    assert least_share_found(1000, 10**6) == pytest.approx(0.003, rel=0.01)


# -- where it is kept --------------------------------------------------------------------------------------------------------


def test_audits_are_kept_in_the_run_and_shown(run: Path) -> None:
    first = audited(run)
    shown = verify(run, "--sample", "0.2", "--seed", "7")
    assert shown.exit_code == 0, shown.output
    assert "transformers' own model, the recorded micro-batches" in shown.stdout
    assert re.search(
        r"3 of 16 sequences \(seed 7\), bit by bit: passed; had 0\.\d+ of all been wrong, it would have found one with 95 %", shown.stdout
    )
    kept = dict(read_audits(LocalStore(run), read_job(LocalStore(run))))
    assert list(kept) == ["audit/audit-000001.json", "audit/audit-000002.json"]
    assert json.loads((run / "audit/audit-000001.json").read_text()) == first
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(run), "--json"]).stdout)["audits"]
    assert [(each["sequences"], each["passed"]) for each in inspected.values()] == [(16, True), (3, True)]
    assert "audited    20" in CliRunner().invoke(main, ["inspect", str(run)]).stdout
    facts = json.loads(verify(run, "--json").stdout)
    assert (facts["damaged"], facts["unnamed"]) == ([], [])


def test_a_damaged_audit_is_named_and_a_repair_deletes_it_alone(run: Path) -> None:
    audited(run)
    path = run / "audit/audit-000001.json"
    path.write_text(path.read_text().replace('"passed": true', '"passed": false'))
    (run / "audit/notes.txt").write_text("a user's own")
    facts = json.loads(verify(run, "--json").stdout)
    assert [damage["key"] for damage in facts["damaged"]] == ["audit/audit-000001.json"]
    assert [file["key"] for file in facts["unnamed"]] == ["audit/notes.txt"]
    before = sorted(path for path in run.rglob("*") if path.is_file())
    verify(run, "--repair")
    assert set(before) - {path for path in run.rglob("*") if path.is_file()} == {path}
    assert verify(run).exit_code == 0


# -- what it needs -----------------------------------------------------------------------------------------------------------


def test_damage_comes_before_an_audit(run: Path) -> None:
    next((run / "data").rglob("*.parquet")).unlink()
    result = verify(run, "--sample", "1")
    assert result.exit_code == 1
    assert "Not audited: what is damaged comes first." in result.stdout
    assert not (run / "audit").exists()


def test_without_the_prompts_tokens_are_those_of_the_run(run: Path, prompts: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / prompts.name
    moved.parent.mkdir()
    prompts.rename(moved)
    audit = audited(run)
    assert (audit["passed"], audit["tokens_from"]) == (True, "run")
    assert "another tokenizer would not show" in audit["remarks"][0]
    write_prompts(prompts).open("a").write('{"text": "one more"}\n')
    assert audited(run)["tokens_from"] == "run", "these are other prompts"
    assert audited(run, "--prompts", str(moved))["tokens_from"] == "prompts"
    refused = verify(run, "--sample", "1", "--prompts", str(prompts))
    assert refused.exit_code == 1
    assert "are not those of the run" in refused.stderr


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_of_format_1_is_audited_by_its_own_tokens(tmp_path: Path, name: str) -> None:
    model, run = make_model_of_format_1(tmp_path / "model"), Path(shutil.copytree(FORMAT_1 / name, tmp_path / "run"))
    refused = verify(run, "--sample", "1")
    assert refused.exit_code == 1
    assert "--model" in refused.stderr
    audit = audited(run, "--model", str(model))
    assert (audit["passed"], audit["exact"], audit["tokens_from"]) == (True, False, "run")
    assert "runs of format 1 do not say" in audit["remarks"][0]


def test_another_model_is_refused(run: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for other, why in ((models["minimax_m2"], "The checkpoint at"), (tmp_path / "none", "none"), ("s3://bucket/model", "local folders")):
        refused = verify(run, "--sample", "1", "--model", str(other))
        assert refused.exit_code == 1
        assert why in refused.stderr
    moved = Path(shutil.copytree(models["llama"], tmp_path / "moved"))
    assert audited(run, "--model", str(moved))["passed"]
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-3]
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = verify(run, "--sample", "1", "--model", str(moved))
    assert refused.exit_code == 1
    assert "has not the tokenizer of the run" in refused.stderr


@pytest.mark.parametrize("name", ["llama", "minimax_m2"])
def test_a_model_without_room_in_memory_lies_on_disk_and_is_held_to_rounding(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, name: str
) -> None:
    run = extracted(monkeypatch, models[name], prompts, tmp_path / "run")
    monkeypatch.setattr("m2ray.audit.reference.get_max_memory", lambda: {"cpu": 1_500_000 if name == "minimax_m2" else 200_000})
    audit = audited(run)
    assert (audit["passed"], audit["exact"]) == (True, False)
    assert audit["remarks"] == ["not held to the same bits: transformers' model does not fit into memory as a whole"]
    assert {(each["by"], each["batch"]) for each in audit["compared"]} == {("m2ray", "recorded"), ("transformers", "alone")}


def test_a_run_whose_hidden_states_are_float32_is_audited_and_held_as_such(
    monkeypatch: pytest.MonkeyPatch, prompts: Path, tmp_path: Path
) -> None:
    model = make_family(tmp_path / "model", "mamba", vocab_size=320)
    shutil.copytree(TOKENIZER, model, dirs_exist_ok=True)
    run = extracted(monkeypatch, model, prompts, tmp_path / "run")
    held, groups = [], restaged._groups
    monkeypatch.setattr(restaged, "_groups", lambda batches, handed_bytes: held.append(handed_bytes) or groups(batches, handed_bytes))
    audit = audited(run)
    assert (audit["passed"], audit["exact"]) == (True, True)
    assert held == [48 * 4], "in bfloat16"


def test_weights_that_were_replaced_are_refused_by_layer(run: Path, models: dict[str, Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(models["llama"], tmp_path / "moved"))
    with other_weights(moved):
        refused = verify(run, "--sample", "1", "--model", str(moved))
    assert refused.exit_code == 1
    assert "the embedding and layers 0-4 of 5 layers differ" in refused.stderr


def test_an_unfinished_run_is_audited_by_what_is_committed(run: Path) -> None:
    for name in ("_SUCCESS", "manifest.parquet", "_commits/shard-000000.json"):
        (run / name).unlink()
    audit = json.loads(verify(run, "--sample", "1", "--json").stdout)["audit"]
    assert audit["passed"]
    assert audit["sequences"] == audit["of_sequences"] < 16
    for commit in (run / "_commits").iterdir():
        commit.unlink()
    refused = verify(run, "--sample", "1")
    assert refused.exit_code == 1
    assert "is committed yet" in refused.stderr
