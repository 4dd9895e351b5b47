"""`m2ray plan` on MiniMax-M2's real config.json: exact bytes, verdicts, exit codes, and the table in docs/planning.md."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from m2ray.cli import main, plan_inputs
from tests.reference import make_family, make_minimax

ROOT = Path(__file__).parents[2]
M2 = ROOT / "tests/data/minimax_m2"
M3 = ROOT / "tests/data/minimax_m3"
LLAMA = ROOT / "tests/data/llama"
CLUSTERS = ("8xA100-80GB", "8xA100-40GB", "4xH100-80GB", "6xH100-80GB", "1xH200", "2xH200", "8xH200")
DEEPSEEK = ROOT / "tests/data/official/DeepSeek-V3.json"
RESIDENCIES = (
    ("MiniMax-M2", "8xH200", ""),
    ("MiniMax-M2", "4xH200", ""),
    ("MiniMax-M2", "2xH200", ""),
    ("MiniMax-M2", "2xH200", "--weights packed"),
    ("MiniMax-M2", "4xH100-80GB", ""),
    ("MiniMax-M2", "1xH200", "--offload cpu"),
    ("MiniMax-M2", "1xH100-80GB", "--offload cpu"),
    ("DeepSeek-V3", "8xH200", ""),
    ("DeepSeek-V3", "8xH200", "--in-flight 16GiB"),
    ("DeepSeek-V3", "1xH100-80GB", "--offload cpu"),
    ("DeepSeek-V3", "1xH100-80GB", "--offload disk"),
)
"""Of the table of where weights live: a model, GPUs and options."""
FITS, DOES_NOT_FIT = 0, 3
_read = plan_inputs.read_model
_seen: dict[tuple[str, str, str, int], plan_inputs.PlannedModel] = {}


def _read_once(url: str, attn_implementation: str, compute_dtype: str) -> plan_inputs.PlannedModel:
    """Keyed by the newest change below the folder too."""
    paths = [Path(url), *Path(url).glob("*")]
    key = (url, attn_implementation, compute_dtype, max(path.stat().st_mtime_ns for path in paths))
    if key not in _seen:
        _seen[key] = _read(url, attn_implementation, compute_dtype)
    return _seen[key]


@pytest.fixture(autouse=True)
def _models_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real reading, but once a folder: building the 62 layers each time takes most of each command's time."""
    monkeypatch.setattr(plan_inputs, "read_model", _read_once)


def plan(*words: str, model: Path = M2) -> Result:
    return CliRunner().invoke(main, ["plan", "--model", str(model), *words])


def plan_json(*words: str, model: Path = M2) -> dict[str, Any]:
    result = plan(*words, "--json", model=model)
    assert result.exit_code in (FITS, DOES_NOT_FIT), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (FITS if found["fits"] else DOES_NOT_FIT)
    return found


@pytest.fixture(scope="module")
def bf16_m2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a checkpoint of MiniMax-M2 in bfloat16."""
    folder = tmp_path_factory.mktemp("bf16")
    config = json.loads((M2 / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("small") / "model", "fp8")


def table_row(checkpoint: str, gpus: str, found: dict[str, Any]) -> str:
    total_bytes = sum(gpu["total_bytes"] for gpu in found["cluster"][0]["gpus"])
    on_disk, loaded = found["weights"]["disk_bytes"], found["weights"]["loaded_bytes"]
    if found["fits"]:
        layers = [gpu["layers"][1] - gpu["layers"][0] + 1 for gpu in found["gpus"]]
        peak = max(gpu["peak_bytes"] for gpu in found["gpus"])
        verdict = f"yes | {min(layers)} to {max(layers)} | {peak:,} | 0 | |"
    else:
        remedies = " ".join(remedy["text"] for remedy in found["remedies"])
        verdict = f"no | | | {found['short_by_bytes']:,} | {remedies} |"
    return f"| {gpus} | {checkpoint} | {total_bytes:,} | {on_disk:,} | {loaded:,} | {verdict}"


def residency_row(model: str, gpus: str, options: str) -> str:
    found = plan_json("--gpus", gpus, *options.split(), model=M2 if model == "MiniMax-M2" else DEEPSEEK)
    counts = Counter()
    for run in (run for gpu in found["gpus"] for run in gpu["residency"]):
        counts[run["place"]] += run["layers"][1] - run["layers"][0] + 1
    layers = ", ".join(f"{number} `{place}`" for place, number in counts.items())
    peak_bytes, host_bytes = (max(each[name] for each in found[kind]) for kind, name in (("gpus", "peak_bytes"), ("nodes", "host_bytes")))
    rate = min(found["rates"]["limits"].values())
    asked = f" `{options}` |" if options else " |"
    sizes = f"{found['wave']['tokens']:,} | {peak_bytes / 1e9:.1f} GB | {host_bytes / 1e9:.0f} GB"
    return f"| {model} | {gpus} |{asked} {layers} | {sizes} | {rate:,.0f} | {1e6 / rate:,.0f} s |"


def test_the_table_of_where_weights_live_is_what_the_command_says() -> None:
    table = "\n".join(residency_row(*asked) for asked in RESIDENCIES)
    assert table in (ROOT / "docs/planning.md").read_text(encoding="utf-8"), f"the table should be:\n{table}"


def test_the_table_in_the_docs_is_what_the_command_says(bf16_m2: Path) -> None:
    models = {"BF16": bf16_m2, "FP8": M2}
    rows = [table_row(name, gpus, plan_json("--gpus", gpus, model=model)) for gpus in CLUSTERS for name, model in models.items()]
    table = "\n".join(rows)
    assert table in (ROOT / "docs/planning.md").read_text(encoding="utf-8"), f"the table should be:\n{table}"
    six = plan_json("--gpus", "6xH100-80GB", "--batch-tokens", "16384", "--weights", "bf16")
    (batch_tokens,) = (remedy["value"] for remedy in six["remedies"] if remedy["option"] == "batch_tokens")
    said = f"{six['short_by_bytes']:,} bytes short; at {batch_tokens:,} they are"
    assert said in (ROOT / "docs/migrating.md").read_text(encoding="utf-8")


def test_the_size_of_micro_batches_is_told_where_the_plan_chose_it() -> None:
    chosen, asked = plan("--gpus", "6xH100-80GB"), plan("--gpus", "6xH100-80GB", "--batch-tokens", "13824")
    said = "micro-batches of at most 13,824 tokens, fewer where prompts suit fewer\n"
    assert f"\n{said}" in chosen.stdout
    assert chosen.stdout.replace(said, "") == asked.stdout
    assert "micro-batches of at most" not in plan("--gpus", "1xH200").stdout


def test_a_plan_without_files_says_that_it_takes_the_usual_dtype_of_scales(bf16_m2: Path) -> None:
    said = "It does not tell the dtype of scales: they are counted as such a layout usually has them."
    assert said in " ".join(plan("--gpus", "8xH200").stdout.split())
    assert "dtype of scales" not in plan("--gpus", "8xH200", model=bf16_m2).stdout


def test_a_max_length_that_a_run_would_refuse(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "gpt2")
    assert plan("--gpus", "H200", "--max-length", "128", model=model).exit_code == FITS
    refused = plan("--gpus", "H200", "--max-length", "129", model=model)
    assert (refused.exit_code, "has 128 positions" in refused.stderr) == (1, True)


def test_a_quantised_layout_is_named_with_its_bytes_on_disk_and_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """62 layers: attention and experts in FP8 with a scale for 128 x 128; norms, routers, embedding and head as they are."""
    monkeypatch.delenv("COLUMNS", raising=False)  # of whoever runs the tests
    weights = plan_json("--gpus", "8xA100-80GB")["weights"]
    layouts = {layout["name"]: (layout["disk_bytes"], layout["compute_bytes"]) for layout in weights["layouts"]}
    on_disk, computed = layouts["FP8 in blocks of 128 x 128"]
    elements = 62 * 3_667_918_848
    assert (on_disk, computed) == (elements + elements // (128 * 128) * 4, 2 * elements)
    assert sum(one for one, _ in layouts.values()) == weights["disk_bytes"]
    assert f"{on_disk:,}   FP8 in blocks of 128 x 128: {computed:,} in bfloat16" in re.sub(
        " {2,}", "   ", plan("--gpus", "8xA100-80GB").stdout
    )


def test_exact_bytes_of_the_real_model() -> None:
    weights = plan_json("--gpus", "8xA100-80GB")["weights"]
    assert weights["disk_bytes"] == 230_121_630_720
    assert weights["compute_bytes"] == 457_379_529_728


def test_the_command_needs_neither_ray_nor_a_gpu_and_takes_seconds() -> None:
    script = (
        "import sys; from click.testing import CliRunner; from m2ray.cli import main\n"
        f"result = CliRunner().invoke(main, ['plan', '--model', {str(M2)!r}, '--gpus', '8xH200'])\n"
        "assert 'ray' not in sys.modules, 'ray was imported'\n"
        "sys.exit(result.exit_code)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False).returncode == FITS


def test_a_config_json_alone_and_a_toml_file_of_an_extraction(tmp_path: Path) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text(f'model = "{M2}/config.json"\noutput = "s3://bucket/run"\nlayers = "0-3"\nstages = 2\n', encoding="utf-8")
    result = CliRunner().invoke(main, ["plan", str(toml), "--gpus", "8xH200", "--json"])
    found = json.loads(result.stdout)
    assert [gpu["layers"] for gpu in found["gpus"]] == [[0, 1], [2, 3]]
    assert found["checkpoint"] == {"source": "config", "index_bytes": None}


def test_a_misspelt_option_in_the_file_is_refused(tmp_path: Path) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text('model = "m"\nmax_memroy = "40GB"\n', encoding="utf-8")
    result = CliRunner().invoke(main, ["plan", str(toml)])
    assert result.exit_code == 1
    assert "max_memroy" in result.stderr


def test_the_index_of_another_model_is_refused_and_its_own_total_is_shown(small_model: Path, tmp_path: Path) -> None:
    shutil.copy(small_model / "config.json", tmp_path)
    index = json.loads((small_model / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with_files, without = (plan_json("--gpus", "H200", model=folder) for folder in (small_model, tmp_path))
    assert (with_files["checkpoint"]["source"], without["checkpoint"]["source"]) == ("headers", "config")
    assert without["checkpoint"]["index_bytes"] == with_files["weights"]["disk_bytes"]
    del index["weight_map"]["model.layers.0.input_layernorm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    result = plan("--gpus", "H200", model=tmp_path)
    assert result.exit_code == 1
    assert "model.layers.0.input_layernorm.weight" in result.stderr


def test_prompts_give_the_output_and_a_price(small_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "one two three"}\n{"text": ""}\n{"text": "four"}\n', encoding="utf-8")
    found = plan_json("--gpus", "H200", "--prompts", str(prompts), "--price", "20", "--rate", "1000", model=small_model)
    assert found["output"]["sequences"] == 2, "the empty prompt is quarantined"
    assert found["output"]["files"] == found["model"]["num_layers"]
    assert found["output"]["cost_a_month"] == pytest.approx(20 * found["output"]["disk_bytes"] / 1e9)
    assert found["rates"]["tokens_per_s"] == 1000


def test_prompts_are_counted_as_a_run_would_read_them(small_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "one", "messages": [{"role": "user", "content": "one two three"}]}) + "\n", encoding="utf-8")
    refused = plan("--gpus", "H200", "--prompts", str(prompts), model=small_model)
    assert refused.exit_code == 1
    assert "The prompts have several columns" in refused.stderr
    chat, text = (
        plan_json("--gpus", "H200", "--prompts", str(prompts), f"--{name}-column", name, model=small_model)["output"]["tokens"]
        for name in ("messages", "text")
    )
    assert chat > text > 0
    added = plan("--gpus", "H200", "--prompts", str(prompts), "--messages-column", "messages", "--special-tokens", "add", model=small_model)
    assert 'special_tokens = "add", but the prompts are chat messages of' in added.stderr


def test_limits_and_device_maps_change_the_layout() -> None:
    everywhere = plan_json("--gpus", "8xH200", "--max-memory", "60GB", "--weights", "bf16")
    assert not everywhere["fits"]
    assert {remedy["option"] for remedy in everywhere["remedies"]} >= {"max_memory"}
    filled = plan_json("--gpus", "8xH200", "--device-map", "sequential")["gpus"]
    assert filled[0]["layers"] == [0, 18], "(150.8 GB - 7.8 GB overhead - 1.2 GB embedding) / 7.3 GB a layer = 19 layers"
    assert filled[7]["layers"] is None


def test_without_gpus_named_this_machine_is_planned(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (node,) = plan_json("--batch-tokens", "128", model=small_model)["cluster"]
    assert node["cpus"] > 0
    assert node["versions"]["python"]


def test_sites_are_planned_with_their_layers_and_bytes(small_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "a river"}\n' * 20)
    asked = ("--sites", "residual:0,2, router_topk, mlp:1, final_norm", "--prompts", str(prompts), "--gpus", "1xH100-80GB")
    found = plan_json(*asked, "--store-dtype", "int8", model=small_model)
    num_layers = found["model"]["num_layers"]
    assert found["model"]["layers_run"] == num_layers, "the final norm comes after all of them"
    every = list(range(num_layers))
    sites = {"residual": [0, 2], "mlp": [1], "router_topk": every, "final_norm": []}
    assert found["options"]["sites"] == [{"site": site, "layers": layers} for site, layers in sites.items()]
    parts = {(part["site"], part["layer"]): part["num_bytes"] for part in found["output"]["by_part"]}
    assert len(parts) == 2 + num_layers + 1 + 1
    assert parts["residual", 0] == parts["mlp", 1] == parts["final_norm", None] != parts["router_topk", 0]
    by_site = {each["site"]: each["num_bytes"] for each in found["output"]["by_site"]}
    assert by_site["residual"] == 2 * parts["residual", 0]
    assert sum(by_site.values()) == found["output"]["num_bytes"]
    shown = plan(*asked, model=small_model).stdout
    assert "capture  residual of layers 0,2: " in shown
    assert re.search(r"\n         final_norm: \d+ bytes a token", shown)


def test_what_a_model_lacks_is_said_and_refused_by_name() -> None:
    mixed = plan("--sites", "router_topk, residual:5", "--gpus", "8xH200", model=M3)
    assert re.search(r"router_topk of layers 3-59: [\d,]+ bytes a token; layers 0-2 have none", mixed.stdout), mixed.output
    for sites, told in (
        ("router_topk:0-2", "none of the layers 0-2 has router_topk"),
        ("embedding:3", "embedding is one for the whole model"),
    ):
        refused = plan("--sites", sites, "--gpus", "8xH200", model=M3)
        assert refused.exit_code == 1
        assert told in refused.stderr
    dense = plan("--sites", "router_logits, residual_mid", "--gpus", "8xH200", model=LLAMA)
    assert dense.exit_code == 1
    assert "the model has no router_logits" in dense.stderr
    assert "residual_mid" not in dense.stderr.split("It has")[0]
