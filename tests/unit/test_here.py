"""One stage on a machine without GPUs: it runs in the driver's process, and everything is as with Ray."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

import m2ray
from m2ray.batches import LayerSpan, MicroBatch
from m2ray.chain import beginning, extract
from m2ray.chain.calls import CallError
from m2ray.chain.checking import look
from m2ray.chain.failure import FailureKind, classify
from m2ray.chain.here import ActorHere, ActorsHere, hardware_here
from m2ray.chain.progress import Progress
from m2ray.chain.specs import stage_specs
from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, RunConflictError, StageError, StoreError
from m2ray.model.interpreter import quick_imports
from m2ray.model.stage import Stage, StageSpec
from m2ray.planning.hardware import Cluster, Gpu, Node
from m2ray.planning.plan import plan_run
from m2ray.prompts.surveying import _old_objects_passed_over
from m2ray.storage import LocalStore
from m2ray.tensor_rows import TensorRow
from tests.ray.test_extract import micro_batches
from tests.reference import load_reference, make_family, make_minimax, other_weights, reference_rows, same_bits

START_S = 120.0
TOKENIZER = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("model") / "model", "bf16")


@pytest.fixture
def options(model: Path, tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join("one two three " * (1 + number % 5) + "\n" for number in range(60)))
    options = {"model": str(model), "prompts": str(prompts), "output": str(tmp_path / "run")}
    return {**options, "shard_tokens": 64, "compute_dtype": "float32", "store_dtype": "float32", "threads_per_stage": 1}


def assert_transformers_rows(run: Path, model: Path) -> None:
    reader, reference = m2ray.open_run(run), load_reference(model, torch.float32)
    for micro_batch in micro_batches(run):
        expected = reference_rows(reference, micro_batch)
        starts = [0, *micro_batch.token_counts.cumsum().tolist()]
        for place, sequence_id in enumerate(micro_batch.sequence_ids.tolist()):
            for layer in reader.layer_numbers:
                found = reader.layer(layer).sequence(sequence_id)
                assert same_bits(found, expected[layer][starts[place] : starts[place + 1]]), (sequence_id, layer)


def test_of_dynamic_embeddings_prompts_are_run_up_to_the_length_beyond_which_they_change(tmp_path: Path) -> None:
    fields = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 24}
    model = make_family(tmp_path / "llama", "llama", **fields)
    shutil.copytree(TOKENIZER, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    prompts = tmp_path / "ids.jsonl"
    prompts.write_text(
        "".join(json.dumps({"input_ids": [5 + number % 90 for number in range(length)]}) + "\n" for length in (24, 9, 25, 24))
    )
    options = {"max_length": 100, "compute_dtype": "float32", "store_dtype": "float32", "threads_per_stage": 1}
    m2ray.extract(model=str(model), prompts=str(prompts), output=str(tmp_path / "run"), **options)
    reasons = m2ray.open_run(tmp_path / "run").sequences["reason"].to_pylist()
    assert reasons[2].startswith("25 tokens, more than 24: beyond them the model computes a whole batch otherwise")
    assert [place for place, reason in enumerate(reasons) if reason is None] == [0, 1, 3]
    assert_transformers_rows(tmp_path / "run", model)


def test_a_run_survives_a_full_store_and_a_lack_of_memory(
    options: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Ray, through the door that people use."""
    failures = [StoreError("The disk is busy.", "Wait.")]
    open_part, through = LocalStore.open_part, Stage._pass
    held: list[weakref.ref[Any]] = []

    def refuse_once(self: LocalStore, key: str) -> Any:
        if failures and key.startswith("data/"):
            raise failures.pop()
        return open_part(self, key)

    def of_two_at_most(self: Stage, micro_batch: MicroBatch, *more: Any) -> Any:
        assert not [each for each in held if each() is not None], "what had no room goes before a smaller one is tried"
        if len(micro_batch.sequence_ids) > 2:
            hidden = torch.zeros(1)
            held.append(weakref.ref(hidden))
            raise torch.OutOfMemoryError("no room")
        return through(self, micro_batch, *more)

    monkeypatch.setattr(LocalStore, "open_part", refuse_once)
    monkeypatch.setattr(Stage, "_pass", of_two_at_most)
    m2ray.extract(**options)
    said = capsys.readouterr().out
    assert not ray.is_initialized()
    assert "The disk is busy" in said
    assert "padded tokens from here on" in said
    assert "stages 1, threads_per_stage 1, batch_tokens" in said
    assert "Complete: 60 sequences" in said
    assert_transformers_rows(tmp_path / "run", model)


def in_waves(*given: Any) -> Iterator[list[StageSpec]]:
    for specs in stage_specs(*given):
        yield [replace(spec, residency={1: "host", 2: "host", 5: "host"}, wave_tokens=600) for spec in specs]


def test_waves_over_several_shards_are_halved_where_they_find_no_room_and_give_the_same_rows(
    options: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward_wave = Stage.forward_wave
    waves: list[list[int]] = []

    def of_200_tokens_at_most(self: Stage, batches: Any) -> Any:
        waves.append([micro_batch.shard for micro_batch, _ in batches])
        if sum(micro_batch.padded_tokens for micro_batch, _ in batches) > 200:
            raise torch.OutOfMemoryError("no room")
        return forward_wave(self, batches)

    monkeypatch.setattr(extract, "stage_specs", in_waves)
    monkeypatch.setattr(Stage, "forward_wave", of_200_tokens_at_most)
    m2ray.extract(**options)
    said = capsys.readouterr().out
    assert said.count("Waves of half the size from here on") == 2
    assert "Micro-batches of at most" not in said
    assert max(len(set(shards)) for shards in waves[2:]) > 1, "waves go over the ends of shards"
    assert_transformers_rows(tmp_path / "run", model)


@pytest.mark.timeout(240)
def test_ctrl_c_and_sigkill_leave_whole_shards_and_the_same_command_does_the_rest(
    options: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In waves, where the first two took a micro-batch at a time."""
    assert stopped(options, signal.SIGINT, 1) == 130
    assert stopped(options, signal.SIGKILL, 2) == -signal.SIGKILL
    run = tmp_path / "run"
    kept = {path.name: path.read_bytes() for path in (run / "_commits").iterdir()}
    monkeypatch.setattr(extract, "stage_specs", in_waves)
    assert not (run / "_SUCCESS").exists()
    m2ray.extract(**options)
    assert (run / "_SUCCESS").exists()
    assert {name: (run / "_commits" / name).read_bytes() for name in kept} == kept
    assert_transformers_rows(run, model)
    m2ray.extract(**options, sites="residual")  # nothing is missing, and nothing is loaded
    with other_weights(model, "model.layers.3."), pytest.raises(RunConflictError, match="model's weights .*: layer 3 of 7 layers"):
        m2ray.extract(**options)
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    m2ray.extract(**options | {"model": str(elsewhere)})
    with other_weights(elsewhere), pytest.raises(RunConflictError, match="the embedding and layers 0-6 of 7 layers differ"):
        m2ray.extract(**options | {"model": str(elsewhere)})


SLOWLY = """
import sys, time
from m2ray.model.stage import Stage
through = Stage._pass
Stage._pass = lambda *given: (time.sleep(0.3), through(*given))[1]
from m2ray.cli import main
main()
"""


def stopped(options: dict[str, Any], by: signal.Signals, shards: int) -> int:
    """The exit code of a run that gets a signal once so many shards are committed."""
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, "extract", *flags], env=env, stdout=subprocess.DEVNULL)
    commits, deadline = Path(options["output"]) / "_commits", time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if commits.is_dir() and len(list(commits.iterdir())) >= shards:
            process.send_signal(by)
            break
        time.sleep(0.05)  # looks now and then
    return process.wait(START_S)


def test_what_a_stage_raises_comes_as_of_an_actor(tmp_path: Path) -> None:
    spec = StageSpec(str(tmp_path), LayerSpan(0, 1), "float32", "auto", "cpu", None)
    actor = ActorHere([spec], 1.0, epoch=0)
    with pytest.raises(CallError) as raised:
        actor.load.remote().result(10.0)
    actor.end()
    assert isinstance(raised.value.cause, CheckpointError)
    assert classify(raised.value) is FailureKind.USER


def test_a_stage_that_hangs_ends_the_run_since_it_shares_the_process() -> None:
    with pytest.raises(StageError, match="ray = true"):
        ActorsHere([], 1800.0).restart({0: None}, 1)


@pytest.mark.timeout(180)
def test_a_stage_that_hangs_does_not_keep_the_program_from_its_end(tmp_path: Path) -> None:
    """Python itself waits for the threads of pools before it is at its end."""
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=START_S, check=False)
    assert (done.returncode, done.stdout) == (1, "the program goes on\n"), done.stderr


HANGS = """
import sys, time
from m2ray.batches import LayerSpan
from m2ray.chain import here
from m2ray.model.stage import StageSpec
here._LEAVE_S = here._END_S = 0.2
actors = here.ActorsHere([[StageSpec(sys.argv[1], LayerSpan(0, 1), "float32", "auto", "cpu", None)]], 1.0)
actors.start(0)
actors.handles[0]._actor._passage.compute.thread.submit(time.sleep, 600)
actors.end()
print("the program goes on")
"""


@pytest.mark.parametrize(
    "asked", [{"ray": True}, {"stages": 2}, {"replicas": 2}, {"node_labels": "zone=a"}, {"RAY_ADDRESS": "1.2.3.4:6379"}, {"gpus": 1}]
)
def test_ray_is_started_where_one_process_is_not_enough(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    if address := asked.pop("RAY_ADDRESS", None):
        monkeypatch.setenv("RAY_ADDRESS", address)
    gpus = tuple(Gpu(0, "NVIDIA H200", 1, 1) for _ in range(asked.pop("gpus", 0)))
    monkeypatch.setattr("m2ray.chain.here.probe_node", lambda *_: Node("here", gpus, cpus=2))
    with ExitStack() as stack:
        assert hardware_here(ExtractConfig(**options | asked), "", stack) is None


def test_alone_it_is_this_machine(options: dict[str, Any]) -> None:
    config, folder = ExtractConfig(**options), options["output"]
    with ExitStack() as stack:
        found = hardware_here(config, folder, stack)
        assert found is not None
        assert found.is_here
        assert list(found.cpus) == ["127.0.0.1"]
        assert hardware_here(config, folder, stack) is None, "torch's threads are another run's"
    with ExitStack() as stack:
        assert hardware_here(config, folder, stack) is not None


WITHOUT_TORCH = """
import sys
from m2ray.cli import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "ray", "pyarrow"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--modle", "x"], ["--modle", "--model"]),
        (["--stages", "none"], ["stages", "'none'"]),
        (["--sites", "nothing"], ["sites", "nothing"]),
        (["--model", "no/where", "--prompts", "none.jsonl"], ["no/where"]),
        (
            ["--model", "nowhere", "--prompts", "none.jsonl"],
            ["2 problems", "There is no folder nowhere", "The prompts none.jsonl are absent"],
        ),
        (["--model", "empty", "--prompts", "*.jsonl"], ["2 problems", "no config.json in empty", "No file matches *.jsonl"]),
        (["--prompts", "/absent/*/x"], ["No file matches /absent/*/x"]),
        (["--chat-template", "x.jinja", "--output", "file/run"], ["2 problems", "chat template x.jinja: No such file", "file/run"]),
    ],
)
def test_wrong_options_and_paths_are_told_before_anything_is_imported_that_takes_seconds(
    options: dict[str, Any], tmp_path: Path, more: list[str], said: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    asked = ["--model", options["model"], "--prompts", options["prompts"], "--output", options["output"], *more]
    command = [sys.executable, "-c", WITHOUT_TORCH, "extract", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False, cwd=tmp_path)
    assert done.returncode in (1, 2), done.stderr
    assert done.stdout == "[]\n"
    for words in said:
        assert words in done.stderr
    assert not Path(options["output"]).exists()


@pytest.mark.parametrize(
    ("stages", "read", "is_begun"), [(2, "as lines", [True]), (1, "as lines", []), (2, "within a limit", []), (2, "as chats", [])]
)
def test_ray_is_begun_beside_the_survey_unless_that_limits_the_process_or_forks(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stages: int, read: str, is_begun: list[bool]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(beginning, "cluster_ahead", lambda *_: nullcontext(True))
    source = SimpleNamespace(may_be_read_ahead=read != "within a limit", columns=SimpleNamespace(is_messages=read == "as chats"))
    inputs: Any = SimpleNamespace(
        config=ExtractConfig(**options, stages=stages), source=source, options=SimpleNamespace(placement_timeout_s=1.0)
    )
    with ExitStack() as stack:
        assert [beginning._ahead(inputs, stack, Progress())] == (is_begun or [None])


def test_the_collector_goes_on_passing_over_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    gc.unfreeze()
    try:
        with quick_imports():
            pass
        assert not gc.get_freeze_count(), "nothing was imported"
        with quick_imports():
            import_module("colorsys")
        frozen = gc.get_freeze_count()
        with _old_objects_passed_over():
            pass
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen / 2 > 0, "but for what has no owner any more, some objects of a thread that ends just then"
    finally:
        gc.freeze()  # as it was


@pytest.mark.parametrize(("said", "stages", "threads"), [("3", 1, 3), ("", 1, 4), ("", 2, 2), ("no number", 3, 1)])
def test_threads_are_what_the_user_allows_or_the_cores_for_each_stage(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, said: str, stages: int, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    del options["threads_per_stage"]
    inputs = look(ExtractConfig(**options, stages=stages))
    assert inputs.on(Cluster((Node("here", cpus=4),)), 20).options.threads_per_stage == threads
    asked = look(ExtractConfig(**options, stages=stages, threads_per_stage=7))
    assert asked.on(Cluster((Node("here", cpus=4),)), 20).options.threads_per_stage == 7


def test_stages_on_cores_get_layers_of_equal_time(options: dict[str, Any]) -> None:
    """However large the embedding is, which takes none."""
    inputs = look(ExtractConfig(**options, stages=2))
    table = replace(inputs.table, rows=tuple(_large(row) if row.role == "embedding" else row for row in inputs.table.rows))
    demand = replace(inputs.demand(20), table=table)
    spans = [stage.span for stage in plan_run(demand, Cluster((Node("here", cpus=2),))).stages]
    assert [len(range(span.start, span.stop)) for span in spans] in ([4, 3], [3, 4])


def _large(row: TensorRow) -> TensorRow:
    return replace(row, shape=(10_000 * row.shape[0], *row.shape[1:]))
