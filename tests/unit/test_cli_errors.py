"""Everything that is wrong before Ray is needed is said before Ray is started: one clear paragraph, exit code 1, no trace."""

import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import m2ray
from m2ray import __version__, provenance
from m2ray.activations.json_record import digest
from m2ray.chain.loading import require_run_folder
from m2ray.chain.probing import Hardware
from m2ray.cli import main
from m2ray.errors import ClusterError, RunConflictError, StageError
from m2ray.planning.hardware import Cluster, Node
from tests.reference import make_family, make_minimax
from tests.unit.hub_cache import COMMIT, cached


@pytest.fixture(scope="module")
def sound_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("cli") / "model", "fp8")


@pytest.fixture
def model(sound_model: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound_model, tmp_path / "model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "one two three"}\n{"text": "four"}\n', encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def unreachable_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets as far as Ray fails with another error than the one that is looked for."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")


def extract(model: Path, prompts: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["extract", "--model", str(model), "--prompts", str(prompts), "--output", str(output), *more])


def begin(monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Path, output: Path, *more: str) -> None:
    """A run that is claimed on a machine without GPUs, and cut off before its first stage."""

    def hardware(*_: object) -> Hardware:
        return Hardware(Cluster((Node("here"),)), {"here": "id"}, {"here": 2.0})

    def cut_off(*_: object) -> None:
        raise StageError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr("m2ray.chain.beginning._hardware", hardware)
        patch.setattr("m2ray.chain.extract._run", cut_off)
        begun = extract(model, prompts, output, *more)
    assert "cut off" in begun.stderr, begun.output
    assert (output / "job.json").exists()


def assert_refused(result: Result, *messages: str) -> None:
    assert result.exit_code == 1, result.output
    assert "RAY_ADDRESS" not in result.stderr, "this should have been found before Ray"
    assert "Traceback" not in result.output
    for message in messages:
        assert message in result.stderr


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def some_file(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[1]


def test_absent_model_folder_and_absent_prompts_are_both_named(tmp_path: Path) -> None:
    result = extract(tmp_path / "nowhere", tmp_path / "nothing.jsonl", tmp_path / "run")
    assert_refused(result, "2 problems", str(tmp_path / "nowhere"), "nothing.jsonl")
    assert not (tmp_path / "run" / "job.json").exists()


def test_index_naming_an_absent_file(model: Path, prompts: Path, tmp_path: Path) -> None:
    absent = some_file(model)
    absent.unlink()
    assert_refused(extract(model, prompts, tmp_path / "run"), absent.name)


def test_truncated_safetensors(model: Path, prompts: Path, tmp_path: Path) -> None:
    cut = some_file(model)
    os.truncate(cut, cut.stat().st_size - 10)
    assert_refused(extract(model, prompts, tmp_path / "run"), cut.name)


def test_a_tensor_of_the_wrong_shape(model: Path, prompts: Path, tmp_path: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.3.input_layernorm.weight"
    tensors = load_file(model / index[name])
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, model / index[name], {"format": "pt"})
    assert_refused(extract(model, prompts, tmp_path / "run"), name, "127", "128")


def test_an_unknown_model_type(model: Path, prompts: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(model_type="transmogrifier"))
    assert_refused(extract(model, prompts, tmp_path / "run"), "transmogrifier", "Install a transformers that knows it")


def test_layers_out_of_range(sound_model: Path, prompts: Path, tmp_path: Path) -> None:
    assert_refused(extract(sound_model, prompts, tmp_path / "run", "--layers", "0-7"), "layer 7", "0 to 6")


def test_sites_of_no_layer_and_unknown_ones(sound_model: Path, prompts: Path, tmp_path: Path) -> None:
    refused = extract(sound_model, prompts, tmp_path / "run", "--sites", "mlp:7, embedding:0")
    assert_refused(refused, "layer 7 is out of range", "embedding is one for the whole model")
    assert_refused(extract(sound_model, prompts, tmp_path / "run", "--sites", "mlp, nowhere"), "There is no site 'nowhere'")


def test_a_resume_may_name_the_same_sites_in_other_words(
    sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, sound_model, prompts, tmp_path / "run", "--sites", "mlp:0-2, router_topk", "--layers", "1,3")
    recorded = json.loads((tmp_path / "run" / "job.json").read_text())["options"]
    assert (recorded["sites"], recorded["layers"]) == ({"mlp": [0, 1, 2], "router_topk": [1, 3]}, [0, 1, 2, 3])
    same = extract(sound_model, prompts, tmp_path / "run", "--sites", "router_topk:1,3, mlp", "--layers", "0-2")
    assert "RAY_ADDRESS" in same.stderr, same.output
    other = extract(sound_model, prompts, tmp_path / "run", "--sites", "mlp:0-2, router_topk", "--layers", "1-3")
    assert_refused(other, 'sites: {"mlp": [0, 1, 2], "router_topk": [1, 3]} in the run')


def test_more_stages_than_layers(sound_model: Path, prompts: Path, tmp_path: Path) -> None:
    assert_refused(extract(sound_model, prompts, tmp_path / "run", "--layers", "0-1", "--stages", "3"), "stages = 3", "2 layers")


def test_no_prompts_left_after_quarantine(sound_model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": ""}\n{"text": 5}\nnot json\n', encoding="utf-8")
    assert_refused(extract(sound_model, bad, tmp_path / "run"), "None of the 3 rows", "empty")
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_output_folder_of_something_else(sound_model: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("dear")
    assert_refused(extract(sound_model, prompts, tmp_path / "thesis"), "chapter1.tex", "another output")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "dear"


def test_output_folder_of_another_job_names_what_differs(
    sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, sound_model, prompts, tmp_path / "run", "--batch-tokens", "512")
    prompts.write_text('{"text": "others"}\n', encoding="utf-8")
    result = extract(sound_model, prompts, tmp_path / "run", "--batch-tokens", "256", "--layers", "0-2")
    assert_refused(result, "batch_tokens: 512 in the run, 256 now", "layers", "prompts", "another output")


@pytest.mark.parametrize(
    "url",
    [
        "s3://me:hunter2@bucket/x.jsonl",
        "s3://bucket/x.jsonl?aws_secret_access_key=hunter2",
        "s3://bucket/x.jsonl?X-Amz-Signature=hunter2",
        "s3://bucket/x.jsonl?endpoint=http://host?token=hunter2",
        "file://me:hunter2@host/x.jsonl",
        "https://me:hunter2@host/x.jsonl",
    ],
)
@pytest.mark.parametrize("option", ["model", "prompts", "chat-template"])
def test_a_name_with_credentials_is_refused_and_not_repeated(
    sound_model: Path, prompts: Path, tmp_path: Path, option: str, url: str
) -> None:
    """job.json holds all of them."""
    refused = CliRunner().invoke(
        main, ["extract", "--model", str(sound_model), "--prompts", str(prompts), "--output", str(tmp_path / "run"), f"--{option}", url]
    )
    assert_refused(refused)
    assert "hunter2" not in refused.output


VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "tokenizers": "0.23.3"}


def installed(monkeypatch: pytest.MonkeyPatch, **others: str) -> None:
    versions = {**VERSIONS, **others}
    monkeypatch.setattr(provenance, "version", lambda package: versions[package])


def test_a_run_goes_on_under_the_versions_that_it_began_with_alone(
    sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    installed(monkeypatch)
    begin(monkeypatch, sound_model, prompts, run)
    job = json.loads((run / "job.json").read_text())
    assert (job["versions"], job["m2ray_version"]) == ({**VERSIONS, "python": platform.python_version()}, __version__)
    assert job["names"] == {"model": str(sound_model), "prompts": str(prompts)}
    installed(monkeypatch, torch="2.13.0+cu130")
    assert "RAY_ADDRESS" in extract(sound_model, prompts, run).stderr, "another build of the same version"
    installed(monkeypatch, transformers="5.24.1", tokenizers="0.24.0")
    refused = extract(sound_model, prompts, run)
    assert_refused(refused, "transformers: 5.24.0 in the run, 5.24.1 now", "tokenizers: 0.23.3 in the run, 0.24.0 now", "another output")
    assert "Go on with it under transformers 5.24.0, tokenizers 0.23.3" in refused.stderr
    assert "torch" not in refused.stderr
    shown = CliRunner().invoke(main, ["inspect", str(run)]).stdout
    assert f"model      {sound_model}" in shown
    assert (
        f"begun by   m2ray {__version__}, torch 2.13.0+cpu, transformers 5.24.0, tokenizers 0.23.3, python {platform.python_version()}"
        in shown
    )
    facts = json.loads(CliRunner().invoke(main, ["inspect", str(run), "--json"]).stdout)
    assert (facts["versions"], facts["names"]) == (job["versions"], job["names"])


def test_a_run_by_names_on_the_hub_names_their_commits(
    sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a job too, where other relative paths are refused."""
    cache, run = tmp_path / "hub", tmp_path / "run"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    cached(cache / "models--MiniMaxAI--MiniMax-M2", {path.name: path.read_bytes() for path in sound_model.iterdir()}, COMMIT)
    cached(cache / "datasets--my--prompts", {"data/train-00000-of-00001.jsonl": prompts.read_bytes()}, COMMIT)
    begin(monkeypatch, Path("MiniMaxAI/MiniMax-M2"), Path("my/prompts"), run, "--in-job")
    job = json.loads((run / "job.json").read_text())
    assert job["names"] == {"model": f"MiniMaxAI/MiniMax-M2@{COMMIT}", "prompts": f"my/prompts@{COMMIT}"}
    assert_refused(extract(Path("MiniMaxAI/M1"), Path("my/prompts"), run, "--in-job"), "hf download MiniMaxAI/M1 brings it there")
    assert "RAY_ADDRESS" in extract(*(Path(name) for name in job["names"].values()), run).stderr, "the same run goes on by these names"


def test_a_limit_is_of_the_run(sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    begin(monkeypatch, sound_model, prompts, run, "--limit", "1")
    job = json.loads((run / "job.json").read_text())
    assert (job["options"]["limit"], job["counts"]["sequences"], job["counts"]["tokens"] > 0) == (1, 1, True)
    assert_refused(extract(sound_model, prompts, run), "limit: 1 in the run, null now")
    with prompts.open("a") as file:
        file.write('{"text": "five"}\n')
    assert_refused(extract(sound_model, prompts, run, "--limit", "1"), "fingerprints.prompts")
    planned = CliRunner().invoke(
        main, ["plan", "--model", str(sound_model), "--prompts", str(prompts), "--limit", "2", "--gpus", "1xH100", "--json"]
    )
    assert json.loads(planned.stdout)["output"]["sequences"] == 2, planned.output


def test_kept_columns_are_of_the_run(sound_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, prompts = tmp_path / "run", tmp_path / "labelled.jsonl"
    prompts.write_text('{"text": "one two", "label": 7}\n{"text": "", "label": 8}\n', encoding="utf-8")
    begin(monkeypatch, sound_model, prompts, run, "--keep-columns", "label")
    assert m2ray.open_run(run).sequences["label"].to_pylist() == [7, 8]
    assert_refused(extract(sound_model, prompts, run), 'keep_columns: ["label"] in the run, null now')
    assert "RAY_ADDRESS" in extract(sound_model, prompts, run, "--keep-columns", "label").stderr, "it goes on"


def test_relative_folders_are_those_of_the_driver(
    sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages are started elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(sound_model)
    begin(monkeypatch, Path("model"), prompts, Path("run"))
    assert m2ray.open_run(tmp_path / "run").job.names["model"] == str(tmp_path / "model")


def test_an_option_that_a_run_did_not_know_yet_is_one_that_asks_for_nothing(
    sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    begin(monkeypatch, sound_model, prompts, run)

    def forget(job: dict) -> None:
        del job["options"]["keep_columns"], job["digest"]
        job["digest"] = digest(job)

    edit_json(run / "job.json", forget)
    assert "RAY_ADDRESS" in extract(sound_model, prompts, run).stderr, "it goes on"


def test_a_stage_on_a_node_with_other_versions_refuses_before_it_loads(
    sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have come back on a node that joined after the driver had looked at all."""
    installed(monkeypatch)
    begin(monkeypatch, sound_model, prompts, tmp_path / "run")
    require_run_folder(str(tmp_path / "run"), "here", __version__)
    with pytest.raises(ClusterError, match=rf"Node late has m2ray {__version__}, the driver 0\.2\.99"):
        require_run_folder(str(tmp_path / "run"), "late", "0.2.99")
    installed(monkeypatch, torch="2.14.0")
    with pytest.raises(RunConflictError, match=r"torch: 2\.13\.0\+cpu in the run, 2\.14\.0 on node late"):
        require_run_folder(str(tmp_path / "run"), "late", __version__)


def test_nodes_with_other_versions_than_the_driver_are_all_named(
    sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    same = {"m2ray": __version__, **VERSIONS}
    nodes = [
        Node("a", versions={**same, "torch": "2.13.0+cu130"}),
        Node("b", versions={**same, "m2ray": "0.0.9", "torch": "2.12.1+cu130"}),
        Node("c", versions={name: same[name] for name in same if name != "tokenizers"}),
    ]
    monkeypatch.setattr("m2ray.chain.beginning.cluster", lambda *_: nullcontext())
    monkeypatch.setattr("m2ray.chain.beginning.cluster_ahead", lambda *_: nullcontext())
    monkeypatch.setattr("m2ray.chain.beginning.probe_hardware", lambda *_: Hardware(Cluster(tuple(nodes)), {}, {}))
    refused = extract(sound_model, prompts, tmp_path / "run")
    assert_refused(
        refused, "Install the same everywhere", f"node b: m2ray 0.0.9, {__version__} here", "node b: torch 2.12.1+cu130, 2.13.0+cpu here"
    )
    assert "node c: tokenizers absent, 0.23.3 here" in refused.stderr
    assert "node a" not in refused.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_automatic_values_stay_those_of_the_run(sound_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(monkeypatch, sound_model, prompts, tmp_path / "run", "--shard-tokens", "100", "--batch-tokens", "512", "--compile", "true")
    again = extract(sound_model, prompts, tmp_path / "run")
    assert "RAY_ADDRESS" in again.stderr, "a run resumed without naming its options keeps them"


@pytest.fixture
def dated(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model whose template reads the date, and a chat."""
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}")
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n', encoding="utf-8")
    return model, chats


def test_a_run_keeps_the_day_on_which_it_began(dated: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    begin(monkeypatch, *dated, run, "--template-date", "2025-02-03")
    assert "RAY_ADDRESS" in extract(*dated, run).stderr, "on another day it goes on, with the tokens that it had"
    refused = extract(*dated, run, "--template-date", "2025-02-04")
    assert_refused(refused, 'template_date: "2025-02-03" in the run, "2025-02-04" now')
    assert_refused(extract(*dated, run, "--template-date", "3 Feb"), "template_date = '3 Feb' is not")
    refused = extract(*dated, run, "--template-options", '{"thinking": false}')
    assert_refused(refused, 'template_options: {} in the run, {"thinking": false} now')
    assert_refused(extract(*dated, run, "--template-options", "thinking"), "template_options = 'thinking' is not")


def test_a_driver_that_loses_the_claim_goes_on_with_the_winners_day(
    dated: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def another_begins(*_: object) -> Hardware:
        begin(monkeypatch, *dated, run, "--template-date", "2025-02-03")
        return Hardware(Cluster((Node("here"),)), {"here": "id"}, {"here": 2.0})

    def cut_off(*_: object) -> None:
        raise StageError("the loser goes on")

    # As if both had found the run free: its lease would keep the second one from beginning.
    monkeypatch.setattr("m2ray.chain.checking.held", lambda *_, **__: nullcontext(False))
    monkeypatch.setattr("m2ray.chain.beginning._hardware", another_begins)
    monkeypatch.setattr("m2ray.chain.extract._run", cut_off)
    lost = extract(*dated, run)
    assert "the loser goes on" in lost.stderr, lost.output
    assert "Going on with the run of" in lost.output
    job = json.loads((run / "job.json").read_text())
    assert job["options"]["template_date"] == "2025-02-03"
    assert [path.name for path in (run / "sequences").iterdir()] == [Path(file["key"]).name for file in job["sequence_files"]]


def test_job_json_says_what_the_prompts_settled(
    dated: tuple[Path, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chats = dated
    of_prompts = ("text_column", "messages_column", "input_ids_column", "tools_column", "special_tokens")
    begin(monkeypatch, model, chats, tmp_path / "chat")
    begin(monkeypatch, model, prompts, tmp_path / "text")
    chat, text = (json.loads((tmp_path / name / "job.json").read_text())["options"] for name in ("chat", "text"))
    assert [chat[name] for name in of_prompts] == [None, "messages", None, None, "none"], "a column of tools need not be there"
    assert [text[name] for name in of_prompts] == ["text", None, None, None, "none"], "this tokenizer adds none"
    assert text["template_date"] is None, "a text sees no date, so the run has none to keep"
    job = json.loads((tmp_path / "text" / "job.json").read_text())
    del job["options"]["special_tokens"]
    job["digest"] = digest(job)
    (tmp_path / "text" / "job.json").write_text(json.dumps(job))
    assert_refused(extract(model, prompts, tmp_path / "text"), 'special_tokens: absent in the run, "none" now')


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}


@pytest.mark.parametrize(
    ("max_length", "reason"), [("100", "25 tokens, more than 24: .*longrope"), (None, "25 tokens, more than max_length 24")]
)
def test_a_prompt_beyond_the_length_at_which_longrope_changes_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_length: str | None, reason: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, prompts, run = tmp_path / "phi3", tmp_path / "ids.jsonl", tmp_path / "run"
    make_family(model, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=24)
    tokenizer = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"
    shutil.copytree(tokenizer, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    prompts.write_text("".join(json.dumps({"input_ids": [5] * length}) + "\n" for length in (24, 25)))
    begin(monkeypatch, model, prompts, run, *(["--max-length", max_length] if max_length else []))
    (table,) = (run / "sequences").glob("*.parquet")
    reasons = pq.read_table(table).column("reason").to_pylist()
    assert reasons[0] is None
    assert re.fullmatch(rf"{reason}.*", reasons[1])


def test_more_quarantined_rows_than_the_limit(sound_model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n' + '{"txt": "y"}\n' * 2, encoding="utf-8")
    refused = extract(sound_model, bad, tmp_path / "run")
    assert_refused(refused, "2 of the 3 rows", "quarantine_limit = 0.5", "2 rows: no column")
    assert "RAY_ADDRESS" in extract(sound_model, bad, tmp_path / "run", "--quarantine-limit", "0.7").stderr


def test_nothing_is_left_of_a_run_whose_cluster_is_not_there(sound_model: Path, prompts: Path, tmp_path: Path) -> None:
    refused = extract(sound_model, prompts, tmp_path / "run")
    assert "RAY_ADDRESS" in refused.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_no_permission_to_write(sound_model: Path, prompts: Path) -> None:
    assert_refused(extract(sound_model, prompts, Path("/sys/m2ray-run")), "/sys/m2ray-run", "ermi" if os.geteuid() else "/sys")


def test_an_unknown_option() -> None:
    result = CliRunner().invoke(main, ["extract", "--modle", "x"])
    assert result.exit_code == 2
    assert "--modle" in result.stderr


def test_an_unknown_key_in_the_file(tmp_path: Path) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text('model = "m"\nprompts = "p"\noutput = "o"\nstagse = 4\n', encoding="utf-8")
    assert_refused(CliRunner().invoke(main, ["extract", str(toml)]), "'stagse'", "stages")


def test_a_job_refuses_relative_folders(sound_model: Path, prompts: Path) -> None:
    assert_refused(CliRunner().invoke(main, ["extract", "--in-job", "--model", "m", "--prompts", "p", "--output", "run"]), "relative")


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["extract", str(tmp_path / "absent.toml"), "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_inspecting_what_is_no_run(tmp_path: Path) -> None:
    assert_refused(CliRunner().invoke(main, ["inspect", str(tmp_path)]), "There is no run", str(tmp_path))
