"""The real job through the user's own commands, compared with transformers layer by layer."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import m2ray
from m2ray.activations.job import read_job
from m2ray.activations.reading.verify import verify
from m2ray.activations.writing.commits import reopen
from m2ray.activations.writing.lease import read_holder
from m2ray.batches import MicroBatch
from m2ray.storage import LocalStore, open_store
from scripts.make_checkpoint import make_checkpoint
from tests.ray.conftest import RayCluster, free_ports
from tests.reference import DATA, MINIMAX_TINY, edited, load_reference, make_family, make_minimax, reference_rows, same_bits
from tests.summed import close_covariance, close_moments

NUM_PROMPTS = 36
OPTIONS = (
    *("--compute-dtype", "float32", "--store-dtype", "float32", "--threads-per-stage", "1"),
    *("--batch-tokens", "256", "--shard-tokens", "400"),
)
"""One thread, like the reference: on some processors another number gives other bits, and as many stages as there are have each its share of the cores."""

SUMMED = ("--statistics", "moments, norms, experts, covariance:1")


@pytest.fixture(scope="module")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("minimax") / "model", "fp8")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "model"
    config = json.loads((DATA / "qwen3" / "config.json").read_text())
    sizes = {"layers": 5, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 384}
    make_checkpoint(folder, config, overrides=sizes, fmt="bf16", seed=3)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of mixed length, one in the middle empty."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["sea", "wind", "stone", "水", "light"], int(count))) for count in rng.integers(1, 40, NUM_PROMPTS)]
    texts[7] = ""
    path.write_text(
        "".join(json.dumps({"id": f"row-{number}", "text": text}) + "\n" for number, text in enumerate(texts)), encoding="utf-8"
    )
    return path


def words(model: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--prompts", str(prompts), "--output", str(output), "--id-column", "id", *OPTIONS, *more]


def micro_batches(run: Path) -> list[MicroBatch]:
    """The micro-batches as the commits say they went through the model, rebuilt from the rows' tokens."""
    rebuilt = []
    tokens = {shard.index: shard.tokens for shard in m2ray.open_run(run).site("residual").layer(0).shards()}
    for path in sorted((run / "_commits").iterdir()):
        commit = json.loads(path.read_text())
        of_shard = tokens[commit["shard"]]
        ids, starts = np.unique(of_shard["sequence_id"], return_index=True)
        sequences = np.split(of_shard["token_id"], starts[1:])
        first = 0
        for index, (count, length) in enumerate(commit["micro_batches"]):
            token_ids_BT = np.zeros((count, length), np.int32)
            for row, token_ids in enumerate(sequences[first : first + count]):
                token_ids_BT[row, : len(token_ids)] = token_ids
            counts = np.array([len(token_ids) for token_ids in sequences[first : first + count]], np.int32)
            rebuilt.append(MicroBatch(commit["shard"], index, False, ids[first : first + count], counts, token_ids_BT))
            first += count
    return rebuilt


def assert_equals_transformers(run: Path, model: Path, layers: Sequence[int]) -> None:
    """Every row of every layer of the run, bit by bit."""
    reference = load_reference(model, torch.float32)
    reader = m2ray.open_run(run)
    compared = 0
    for micro_batch in micro_batches(run):
        expected = reference_rows(reference, micro_batch)
        stop = 0
        for sequence_id, count in zip(micro_batch.sequence_ids.tolist(), micro_batch.token_counts.tolist(), strict=True):
            start, stop = stop, stop + count
            for layer in layers:
                assert same_bits(reader.layer(layer).sequence(sequence_id), expected[layer][start:stop]), (sequence_id, layer)
                compared += count
    assert compared == reader.num_tokens * len(layers) > 0


def summed(run: Path) -> dict[str, bytes]:
    """The files of `statistics/`."""
    return {str(path.relative_to(run)): path.read_bytes() for path in (run / "statistics").rglob("*") if path.is_file()}


def rows_of(run: Path) -> tuple[np.ndarray, torch.Tensor]:
    reader = m2ray.open_run(run)
    return reader.tokens(), reader.tensor()


@pytest.fixture(scope="module")
def finished(cluster: RayCluster, minimax: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MiniMax-M2 with 3 stages, submitted as a job, with statistics beside its rows."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    submitted = cluster.run(
        *("ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--"),
        *("python", "jobs/extract.py", *words(minimax, prompts, run, "--stages", "3", *SUMMED)),
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    for line in ("36 prompts: 35 ready", "1 quarantined", "load: ", "extract: ", "tokens/s", "Complete: 35 sequences"):
        assert line in submitted.stdout, line
    return run


def test_a_submitted_job_equals_transformers(finished: Path, minimax: Path) -> None:
    assert_equals_transformers(finished, minimax, range(MINIMAX_TINY["layers"]))


def test_statistics_are_those_of_the_stored_rows(finished: Path) -> None:
    """One pass over the rows of each layer in float64; a token chooses its number of experts in each layer."""
    reader = m2ray.open_run(finished)
    for layer in reader.layer_numbers:
        found, rows = reader.statistics("residual", layer), reader.layer(layer).tensor().double().numpy()
        close_moments(found.mean.numpy(), found.variance.numpy(), found.min.numpy(), found.max.numpy(), rows)
        assert found.count == len(rows) == found.norms["rows"].to_numpy().sum()
        load = reader.statistics("router_topk", layer).expert_load
        assert int(load.sum()) % len(rows) == 0 < int(load.sum())
    close_covariance(reader.statistics("residual", 1).covariance.double().numpy(), reader.layer(1).tensor().double().numpy())


def test_an_audit_of_a_submitted_job_finds_the_same_bits(finished: Path, cluster: RayCluster) -> None:
    audited = cluster.run("m2ray", "verify", str(finished), "--checksums", "--sample", "1", "--json")
    assert audited.returncode == 0, audited.stdout + audited.stderr
    audit = json.loads(audited.stdout)["audit"]
    assert (audit["sequences"], audit["tokens_from"], audit["exact"]) == (NUM_PROMPTS - 1, "prompts", True), audit["remarks"]
    exact = [each for each in audit["compared"] if each["batch"] == "recorded"]
    assert len(exact) == 2 * MINIMAX_TINY["layers"]
    assert {each["same_bits"] for each in exact} == {m2ray.open_run(finished).num_tokens}


def test_the_account_closes(finished: Path, cluster: RayCluster) -> None:
    shown = cluster.run("m2ray", "inspect", str(finished), "--json")
    facts = json.loads(shown.stdout)
    assert facts["complete"]
    assert facts["sequences"] == {"all": NUM_PROMPTS, "ready": NUM_PROMPTS - 1, "quarantined": 1}
    assert [(row["row_id"], row["sequence_id"]) for row in facts["quarantined"]] == [("row-7", 7)]
    assert facts["shards"]["committed"] == facts["shards"]["all"] > 3
    assert [layer["layer"] for layer in facts["layers"]] == list(range(MINIMAX_TINY["layers"]))
    norms = m2ray.open_run(finished).layer(3).tensor().double().norm(dim=1)
    assert facts["layers"][3]["mean_norm"] == pytest.approx(norms.mean().item())
    on_disk = {path.relative_to(finished).as_posix() for path in finished.rglob("*.parquet") if "site=" in path.as_posix()}
    named = {part["key"] for path in (finished / "_commits").iterdir() for part in json.loads(path.read_text())["parts"]}
    assert on_disk == named


def test_prometheus_is_told_where_its_metrics_are(finished: Path, cluster: RayCluster) -> None:
    """Counters stay at the port when the driver is gone, and Ray hands on the last values at its end."""
    (told,) = json.loads((cluster.folder / "session_latest/prom_metrics_service_discovery.json").read_text())
    lines = [line for target in told["targets"] for line in metrics_at(target) if f'run="{finished.name}-' in line]

    def total(name: str, label: str = "") -> float:
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"ray_{name}{{") and label in line)

    reader = m2ray.open_run(finished)
    assert total("m2ray_tokens_total") == reader.num_tokens
    assert total("m2ray_committed_shards_total") == len(commits(finished))
    assert total("m2ray_output_rows_total", 'site="residual"') == reader.num_tokens * MINIMAX_TINY["layers"]
    for stage in ("0.0", "0.1", "0.2"):
        assert total("m2ray_stage_tokens_total", f'stage="{stage}"') == reader.num_tokens
    assert total("m2ray_stored_parts_total") == sum(1 for _ in (finished / "data").rglob("*.parquet"))


def metrics_at(target: str) -> list[str]:
    """None at a port that another cluster of this machine had before: two of Ray's are the same for all."""
    with suppress(OSError), urlopen(f"http://{target}/metrics", timeout=10) as answer:
        return answer.read().decode().splitlines()
    return []


def test_an_autoencoder_trains_on_a_layer(finished: Path, cluster: RayCluster) -> None:
    """examples/train_sae.py as a user runs it, on a run too small to teach it much."""
    options = ("--layer", "3", "--features", "256", "--active", "8", "--steps", "300", "--batch-rows", "128")
    trained = cluster.run("python", "examples/train_sae.py", str(finished), *options)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    measured = {
        name: float(re.search(rf"{name}: ([\d.]+)", trained.stdout)[1]) for name in ("explained variance", "principal components", "L0")
    }
    assert measured["principal components"] < measured["explained variance"] < 1
    assert 1 < measured["L0"] <= 8


def test_a_probe_finds_the_token_in_its_activations(finished: Path, cluster: RayCluster) -> None:
    """examples/linear_probe.py as a user runs it. Weights are random, but a token's embedding is in its residual stream."""
    fitted = cluster.run("python", "examples/linear_probe.py", str(finished), "--layers", "0", "6")
    assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    found = re.findall(r"layer (\d): held-out accuracy ([\d.]+) of \d+ rows; always the commonest class: ([\d.]+)", fitted.stdout)
    assert [layer for layer, *_ in found] == ["0", "6"]
    assert all(float(accuracy) > float(guessed) + 0.2 for _, accuracy, guessed in found), fitted.stdout


def test_m2ray_submit_runs_a_dense_family_up_to_the_last_layer_asked_for(
    cluster: RayCluster, qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    """From a folder that is no checkout, with a file that lies there."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "job.toml").write_text(f'model = "{qwen3}"\nprompts = "{prompts}"\nstages = 3\nlayers = "0,2-3"\nwait = false\n')
    flags = ("--output", str(run), "--id-column", "id", "--stages", "2", *OPTIONS)
    submitted = cluster.run("m2ray", "submit", "job.toml", "--address", cluster.dashboard, *flags, cwd=elsewhere)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert submitted.stdout.startswith("Job "), submitted.stdout
    assert not re.search("(?i)package|upload|WebSocket", submitted.stdout + submitted.stderr), "what Ray does to bring it there is no news"
    assert re.search(r"stage 1 on \S+: layers 2-3", submitted.stdout), "layer 4 is not asked for, so no stage runs it"
    assert m2ray.open_run(run).layer_numbers == (0, 2, 3)
    assert_equals_transformers(run, qwen3, (0, 2, 3))


def test_a_run_of_the_first_layers_needs_their_files_alone(cluster: RayCluster, qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    """Over keys without the base prefix, the rest of the model still on its way."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("model.")]:
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    whole, part, run = edited(qwen3, tmp_path / "whole", strip), tmp_path / "part", tmp_path / "run"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(whole / "model.safetensors")
    weight_map = {
        key: "early.safetensors" if key.startswith(("embed", "layers.0.", "layers.1.")) else "later.safetensors" for key in tensors
    }
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({key: tensors[key] for key, file in weight_map.items() if file.startswith("early")}, part / "early.safetensors")
    extracted = cluster.run("m2ray", "extract", *words(part, prompts, run, "--layers", "0-1", "--stages", "2"))
    assert extracted.returncode == 0, extracted.stdout + extracted.stderr
    assert_equals_transformers(run, whole, range(2))


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma4_text"])
def test_families_that_hand_on_more_than_one_hidden_state(
    cluster: RayCluster, qwen3: Path, prompts: Path, tmp_path: Path, model_type: str
) -> None:
    """Token ids in later stages and four streams; keys, values and inputs of layers."""
    tokens = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 384)
    model = make_family(tmp_path / "model", model_type, **tokens)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(qwen3 / name, model)
    run = tmp_path / "run"
    done = cluster.run("m2ray", "extract", *words(model, prompts, run, "--stages", "3"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 2 on" in done.stdout
    assert_equals_transformers(run, model, range(5))


def test_chats_with_tools_from_parquet_are_the_rows_of_the_same_chats_as_json_lines(
    cluster: RayCluster, qwen3: Path, tmp_path: Path
) -> None:
    """Parquet gives each call the other calls' keys; the run was begun on another day than today; what the assistant says is under the mask."""
    model = Path(shutil.copytree(qwen3, tmp_path / "model"))
    template = (
        "{{ strftime_now('%d %b %Y') }}{% for message in messages %}{{ message.role }}: {{ message.content or message.tool_calls | tojson }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    arguments: list[dict[str, object]] = [{"city": "Oslo"}, {"a": 1, "b": 2}]
    asked: dict[str, object] = {"role": "user", "content": "Now?\n"}
    chats = [[asked, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": one}}]}] for one in arguments]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "chats.parquet")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    digests = []
    for name in ("chats.parquet", "chats.jsonl"):
        run = tmp_path / f"run-{name}"
        options = ("--model", str(model), "--prompts", str(tmp_path / name), "--output", str(run), *OPTIONS)
        done = cluster.run("m2ray", "extract", *options, "--mask", "assistant", "--template-date", "2025-02-03")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "chat messages of the column 'messages'" in done.stdout
        assert "its date is 2025-02-03" in done.stdout
        assert_equals_transformers(run, model, range(5))
        digests.append(m2ray.open_run(run).sequences.column("prompt_digest").to_pylist())
    assert digests[0] == digests[1]
    first = next(m2ray.open_run(run).layer(0).shards()).tokens
    token_ids = first["token_id"][first["sequence_id"] == 0]
    decode = AutoTokenizer.from_pretrained(str(model)).decode
    answer = '[{"function": {"name": "f", "arguments": {"city": "Oslo"}}}]'
    assert decode(token_ids.tolist()) == f"03 Feb 2025user: Now?\nassistant: {answer}"
    sequence = m2ray.open_run(run).sequences.slice(0, 1).to_pylist()[0]
    assert decode(token_ids[np.array(sequence["loss_mask"], bool)].tolist()) == answer
    told = [(one["role"], decode(token_ids[one["start"] : one["stop"]].tolist())) for one in sequence["roles"]]
    assert told == [("user", "Now?\n"), ("assistant", f"assistant: {answer}")]
    store = open_store(str(run))
    reopen(store, read_job(store), [0])
    refused = cluster.run("m2ray", "extract", *options)
    assert 'mask: "assistant" in the run, null now' in refused.stdout + refused.stderr
    again = cluster.run("m2ray", "extract", *options, "--mask", "assistant")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of 1 shards are missing" in again.stdout
    assert_equals_transformers(run, model, range(5))


def test_m2ray_submit_returns_the_jobs_exit_code(cluster: RayCluster, minimax: Path, tmp_path: Path) -> None:
    submitted = cluster.run("m2ray", "submit", "--address", cluster.dashboard, *words(minimax, tmp_path / "no.jsonl", tmp_path / "run"))
    assert submitted.returncode == 1
    assert "no.jsonl are absent" in submitted.stdout


def test_a_dashboard_that_refuses_or_is_not_there_is_told_in_a_paragraph(cluster: RayCluster, minimax: Path, tmp_path: Path) -> None:
    flags = words(minimax, tmp_path / "p.jsonl", tmp_path / "run")
    wrong = cluster.run("m2ray", "submit", "--address", cluster.dashboard, *flags, cwd=tmp_path, RAY_AUTH_TOKEN="0" * 64)
    none = cluster.run("m2ray", "submit", "--address", cluster.dashboard, *flags, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    gone = cluster.run("m2ray", "submit", "--address", f"http://127.0.0.1:{free_ports(1)[0]}", *flags)
    for told, what in (
        (wrong, "does not take the token that it was given"),
        (none, "asks for a token"),
        (gone, "Failed to connect to Ray"),
    ):
        assert told.returncode == 1, told.stdout + told.stderr
        assert told.stdout == ""
        assert what in " ".join(told.stderr.split())
        assert len(told.stderr.splitlines()) == 1, told.stderr


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts for a run that is still at work when a signal comes."""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    path.write_text("".join(json.dumps({"id": f"row-{number}", "text": "sea wind"}) + "\n" for number in range(3000)), encoding="utf-8")
    return path


def test_ctrl_c_asks_before_it_stops_the_job(cluster: RayCluster, minimax: Path, many: Path, tmp_path: Path) -> None:
    follower = subprocess.Popen(
        ["m2ray", "submit", "--address", cluster.dashboard, *words(minimax, many, tmp_path / "run", "--shard-tokens", "64")],
        env=dict(cluster.env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        said_until("Running entrypoint", follower)
        follower.send_signal(signal.SIGINT)
        rest, _ = follower.communicate("y\n", timeout=120)
    finally:
        follower.kill()
    assert "Stop job" in rest
    assert "stopped" in rest
    assert follower.returncode == 1


def test_submit_and_inspect_tell_of_a_driver_that_was_killed(cluster: RayCluster, minimax: Path, many: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = words(minimax, many, run, "--shard-tokens", "64", "--in-flight", "1KB")
    follower = cluster.start("m2ray", "submit", "--address", cluster.dashboard, *flags)
    wait_for_commits(run, 1, follower)
    drivers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"--output={run}" in (cmdline := process.info["cmdline"] or []) and "m2ray.cli" in cmdline
    ]
    assert len(drivers) == 1, drivers
    drivers[0].kill()
    printed, _ = follower.communicate(timeout=120)
    assert follower.returncode == 128 + signal.SIGKILL, printed
    assert "Its driver was ended by SIGKILL: most often a node ran out of memory. Committed shards are kept" in printed
    assert "Traceback" not in printed
    told = cluster.run("m2ray", "inspect", str(run))
    assert told.returncode == 0, told.stderr
    assert "ended without a word: it was killed, most often for lack of memory" in " ".join(told.stdout.split())


def commits(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "_commits").glob("shard-*.json")}


def said_until(words: str, started: subprocess.Popen[str]) -> str:
    """What it has printed up to the line with these words; it fails with all of that if it ends before."""
    assert started.stdout is not None
    said = ""
    while words not in said:
        line = started.stdout.readline()
        assert line, said
        said += line
    return said


def wait_for_commits(run: Path, count: int, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while len(commits(run)) < count:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "no commit came"
        time.sleep(0.01)  # polls a folder; the order of events does not rest on it


def test_of_two_drivers_one_waits_and_the_run_is_made_once(
    cluster: RayCluster, minimax: Path, prompts: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("m2ray", "extract", *words(minimax, prompts, run, "--stages", "1", "--wait", *SUMMED))
    first = cluster.start(*command)
    deadline = time.monotonic() + 120
    while (holder := read_holder(LocalStore(run))) is None:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, "nobody took the lease"
        time.sleep(0.01)  # polls a folder; the order of events does not rest on it
    os.kill(holder.pid, signal.SIGSTOP)  # or the run may end while the other one imports
    try:
        second = cluster.start(*command)
        said = said_until("A driver may be at this run", second)
    finally:
        os.kill(holder.pid, signal.SIGCONT)
    printed = [first.communicate(timeout=200)[0], said + (second.stdout.read() if second.stdout else "")]
    assert [driver.wait(60) for driver in (first, second)] == [0, 0], printed
    assert all("Complete: 35 sequences" in text for text in printed), printed
    assert " 0 of " in printed[1], printed
    found = verify(LocalStore(run), checksums=True)
    assert (found.damages, found.unnamed, found.is_complete) == ((), (), True)
    ours, theirs = rows_of(run), rows_of(finished)
    assert np.array_equal(ours[0], theirs[0])
    assert same_bits(ours[1], theirs[1])
    assert summed(run) == summed(finished), "whatever the stages"
    assert len(summed(run)) == 5


def test_a_finished_run_without_a_commit_and_with_parts_of_a_dead_driver_is_made_whole(
    cluster: RayCluster, minimax: Path, prompts: Path, finished: Path, tmp_path: Path
) -> None:
    """By the same command: one shard is done anew, and no row is there twice, by the manifest and by a glob."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "_commits" / "shard-000001.json").unlink()
    part = next((run / "data").rglob("shard-000000-*.parquet"))
    shutil.copy(part, part.with_name("shard-000000-dead.parquet"))
    again = cluster.run("m2ray", "extract", *words(minimax, prompts, run, *SUMMED))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of" in again.stdout
    assert summed(run) == summed(finished), "a shard counts once, also if it is extracted again"
    found = verify(LocalStore(run), checksums=True)
    assert (found.damages, found.unnamed, found.is_complete) == ((), (), True)
    keys = pq.read_table(run / "manifest.parquet")["key"].to_pylist()
    assert sorted(keys) == sorted(path.relative_to(run).as_posix() for path in (run / "data").rglob("*.parquet"))
    ours, theirs = rows_of(run), rows_of(finished)
    assert np.array_equal(ours[0], theirs[0])
    assert same_bits(ours[1], theirs[1])


def test_a_finished_run_is_left_as_it_is(cluster: RayCluster, minimax: Path, prompts: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    again = cluster.run("m2ray", "extract", *words(minimax, prompts, finished, *SUMMED))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 of" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.fixture
def full_cluster(cluster: RayCluster) -> Iterator[RayCluster]:
    """The cluster, with another user on all its CPUs."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=dict(cluster.env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert "held" in iter(holder.stdout.readline, "").__next__()
        yield cluster
    finally:
        holder.communicate("\n", timeout=60)


def test_a_cluster_without_room_is_refused_in_time(full_cluster: RayCluster, minimax: Path, prompts: Path, tmp_path: Path) -> None:
    refused = full_cluster.run(
        "m2ray", "extract", *words(minimax, prompts, tmp_path / "run", "--stages", "2", "--placement-timeout-s", "2")
    )
    assert refused.returncode == 1
    assert "No room for 2 x (1 CPU) on " in refused.stderr
    assert "0 of 2 CPU free" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_that_waits_for_room_can_be_stopped(full_cluster: RayCluster, minimax: Path, prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = full_cluster.start("m2ray", "extract", *words(minimax, prompts, run, "--placement-timeout-s", "240"))
    assert driver.stdout is not None
    seen = ""
    while "35 ready" not in seen:  # it is claimed next, and then room is waited for
        line = driver.stdout.readline()
        assert line, seen
        seen += line
    driver.send_signal(signal.SIGTERM)
    printed, _ = driver.communicate(timeout=60)
    assert driver.returncode == 1, printed
    assert "Error: The run was stopped on request." in printed
    assert not list((run / "_lease").glob("*")), "the next driver starts at once"
    assert "Traceback" not in printed


HOLDER = """
import sys, ray
ray.init(logging_level="ERROR")
group = ray.util.placement_group([{"CPU": 2}])
assert group.wait(60)
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_wrong_address_is_a_clear_error(minimax: Path, prompts: Path, tmp_path: Path, cluster: RayCluster) -> None:
    refused = cluster.run(
        "m2ray", "extract", *words(minimax, prompts, tmp_path / "run", "--placement-timeout-s", "3"), RAY_ADDRESS="127.0.0.1:9"
    )
    assert refused.returncode == 1
    assert "127.0.0.1:9" in refused.stderr
    assert "Traceback" not in refused.stderr
