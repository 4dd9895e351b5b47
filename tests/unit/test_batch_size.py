"""`batch_tokens = "auto"`: what the GPUs have room for and what suits the prompts, kept in job.json."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2ray.batches import PromptStats
from m2ray.chain import beginning
from m2ray.chain.checking import look
from m2ray.chain.probing import Hardware
from m2ray.chain.progress import Progress
from m2ray.chain.stopping import Stop
from m2ray.cli import plan
from m2ray.config import ExtractConfig
from m2ray.errors import ClusterError
from m2ray.planning.batch_size import best_batch_tokens
from m2ray.planning.hardware import Cluster, Gpu, Node
from m2ray.planning.plan import plan_run
from m2ray.prompts.shards import ShardTable, batching, cut_shards
from tests.reference import make_minimax

Stats = Callable[[int], PromptStats]


def stats_of(lengths: list[int]) -> Stats:
    """Prompts of these lengths, in shards of the default size, as a run would cut them."""
    counts = np.array(lengths, np.int32)
    shards = ShardTable.join([(places, counts[places], counts[places]) for places in cut_shards(counts, 32_768)])

    def stats_at(batch_tokens: int) -> PromptStats:
        return batching(shards, batch_tokens)

    return stats_at


def test_many_prompts_get_the_most_there_is_room_for():
    many = stats_of(np.random.default_rng(0).integers(200, 600, 4000).tolist())
    for most_tokens in (16_384, 9_984, 2_048, 512):
        assert best_batch_tokens(most_tokens, many, 8) == most_tokens


def test_a_few_prompts_over_many_stages_get_smaller_ones():
    """48 prompts of 512 tokens make 2 micro-batches of 16,384: 8 stages would stand idle most of the time."""
    few = stats_of([512] * 48)
    assert best_batch_tokens(16_384, few, 1) == 16_384
    chosen = best_batch_tokens(16_384, few, 8)
    assert 2_048 <= chosen < 16_384


def test_padding_counts():
    """Long prompts beside short ones in one shard: large micro-batches would pad the short ones to the long."""
    stats_by_size = {
        16_384: PromptStats(0, 0, 160_000, 0, 0, 10),
        8_192: PromptStats(0, 0, 100_000, 0, 0, 13),
        4_096: PromptStats(0, 0, 99_000, 0, 0, 25),
        2_048: PromptStats(0, 0, 98_500, 0, 0, 50),
    }
    assert best_batch_tokens(16_384, stats_by_size.__getitem__, 1) == 8_192


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("model") / "model", "fp8")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join("0123456789" * 200 for _ in range(100)))
    return path


def two_gpus(free_bytes: int) -> Cluster:
    return Cluster((Node("here", tuple(Gpu(index, "NVIDIA H200", 150 * 10**9, free_bytes) for index in range(2))),))


def begin(monkeypatch: pytest.MonkeyPatch, cluster: Cluster | int, run: Path, **options: Any) -> dict[str, Any]:
    """The options that job.json holds after a run has begun there, or on two GPUs that have so much left."""
    cluster = two_gpus(cluster) if isinstance(cluster, int) else cluster
    hardware = Hardware(cluster, {"here": "0"}, {"here": 8.0})
    monkeypatch.setattr(beginning, "_hardware", lambda *_: hardware)
    with ExitStack() as stack, Progress() as progress:
        beginning.begin(look(ExtractConfig(output=str(run), **options)), stack, Stop(), progress)
    found: dict[str, Any] = json.loads((run / "job.json").read_text())["options"]
    return found


def needed_bytes(run: Path, batch_tokens: int, **options: Any) -> int:
    """What a GPU of two must have free for micro-batches of this size: the plan's own peak."""
    inputs = look(ExtractConfig(output=str(run), batch_tokens=batch_tokens, compile=True, **options))
    planned = plan_run(inputs.demand(2000), two_gpus(150 * 10**9))
    return max(gpu.memory.peak_bytes for gpu in planned.gpus)


def test_a_small_gpu_gets_smaller_micro_batches_and_job_json_says_so(
    monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Eager attention, so that a micro-batch takes more than loading such a small model does."""
    options = {"model": str(model), "prompts": str(prompts), "attn_implementation": "eager"}
    assert begin(monkeypatch, 100 * 10**9, tmp_path / "ample", **options)["batch_tokens"] == 16_384
    free_bytes = needed_bytes(tmp_path / "none", 10_240, **options)
    assert begin(monkeypatch, free_bytes, tmp_path / "small", **options)["batch_tokens"] == 10_240
    assert begin(monkeypatch, free_bytes - 1, tmp_path / "smaller", **options)["batch_tokens"] == 9_984
    with pytest.raises(ClusterError, match="It fits with batch_tokens = 10240 or less"):
        begin(monkeypatch, free_bytes, tmp_path / "told", **options, batch_tokens=16_384)


def test_a_gpu_without_room_for_the_longest_prompt_is_refused_before_the_run_is_claimed(
    monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match="The plan does not fit"):
        begin(monkeypatch, 1 << 30, tmp_path / "run", model=str(model), prompts=str(prompts))
    assert not (tmp_path / "run" / "job.json").exists()


def test_a_plan_decides_what_the_run_will_record(monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Path, tmp_path: Path) -> None:
    """Every option that decides the rows, most of them "auto", where memory is ample, where it is short, and without GPUs."""
    options = {"model": str(model), "prompts": str(prompts), "attn_implementation": "eager"}
    small = two_gpus(needed_bytes(tmp_path / "none", 10_240, **options))
    automatic = {**options, "attn_implementation": "auto"}
    cases = {"ample": (two_gpus(100 * 10**9), automatic), "small": (small, options), "none": (Cluster((Node("here"),)), automatic)}
    found = {}
    for name, (cluster, asked) in cases.items():
        monkeypatch.setattr(plan, "_found_cluster", lambda _, cluster=cluster: cluster)
        planned, _ = plan.make_plan(plan.PlanConfig(output=str(tmp_path / name), **asked))
        found[name] = json.loads(json.dumps(planned.demand.options.row_options()))
        assert found[name] == begin(monkeypatch, cluster, tmp_path / name, **asked)
    assert [each["batch_tokens"] for each in found.values()] == [16_384, 10_240, 1_024]
    assert [each["compile"] for each in found.values()] == [True, True, False]
    assert not any("auto" in each.values() for each in found.values())
