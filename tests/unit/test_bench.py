"""The bench's profile: from measured times to a plan's rates, what it refuses, and the real command on a small model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from m2ray.batches import PromptStats
from m2ray.bench.measuring import encode_bytes_per_s, store_bytes_per_s
from m2ray.cli import main
from m2ray.cli.bench import shapes_of
from m2ray.errors import ConfigError, StoreError
from m2ray.planning.hardware import parse_gpus
from m2ray.planning.passes import active_elements
from m2ray.planning.plan import Plan, plan_run
from m2ray.planning.profile import LayerTime, Profile
from m2ray.planning.rates import ENDS_S
from m2ray.storage import LocalStore, PartSink
from tests.reference import make_minimax
from tests.unit.test_plan import PROMPTS, SHAPE, demand, drawn, m2_rows, plan

ACTIVE = active_elements(m2_rows(0), SHAPE)
PROFILE = Profile(
    gpu="NVIDIA H200",
    gpus=8,
    cpus=64,
    versions={"torch": "2.11.0"},
    model_type="minimax_m2",
    compute_dtype="bfloat16",
    active_elements=ACTIVE,
    layer=(LayerTime(8, 2048, False, 24.0), LayerTime(32, 512, False, 20.0), LayerTime(8, 2048, True, 12.0)),
    copy_bytes_per_s=50e9,
    encode_bytes_per_s=2e9,
    store="/mnt/run",
    store_bytes_per_s=3e9,
)


def profiled(gpus: str = "8xH200", profile: Profile = PROFILE, **options) -> Plan:
    return plan(gpus, profile=profile, **options)


def test_the_slowest_shape_gives_the_computation() -> None:
    """8 layers on the fullest of 8 GPUs, 16,384 tokens a layer in 24 ms (not in 20)."""
    rates = profiled().rates
    assert rates.is_measured
    assert rates.limits["computation"] == pytest.approx(16_384 / (8 * 0.024))
    assert profiled(compile=True).rates.limits["computation"] == pytest.approx(16_384 / (8 * 0.012))
    assert profiled(replicas=2).rates.limits["computation"] == pytest.approx(2 * 16_384 / (16 * 0.024))


def test_copy_encoder_and_store_are_those_of_the_profile() -> None:
    limits = profiled().rates.limits
    assert limits["device_to_host_copy"] == pytest.approx(50e9 / (9 * 6144))
    assert PROFILE.writer_threads == 4
    assert limits["encoder"] == pytest.approx(4 * 2e9 / (8 * 6144))
    assert limits["store"] == pytest.approx(3e9 / (62 * (6144 + 4.5)))
    assert profiled().limiting_resource == "store"
    stated = profiled(store_bytes_per_s=100e9)
    assert stated.rates.limits["store"] == pytest.approx(100e9 / (62 * (6144 + 4.5))), "what is stated wins"
    assert stated.limiting_resource == "computation"


def test_the_encoder_is_the_one_that_the_run_has() -> None:
    """A GPU makes the CRCs of rows that are stored as they are, all of them, and a core those of other pages."""
    given = replace(PROFILE, encode_given_crcs_bytes_per_s=5e9)
    by_cores = profiled().rates.limits["encoder"]
    assert profiled(profile=given).rates.limits["encoder"] == pytest.approx(2.5 * by_cores)
    assert profiled(profile=given, compression="planes").rates.limits["encoder"] == pytest.approx(by_cores)
    of_few = replace(plan("8xH200").demand.options.prompts, tokens="last")
    assert plan_run(demand(profile=given, prompts=of_few), parse_gpus("8xH200")).rates.limits["encoder"] == pytest.approx(by_cores)


def test_rows_that_come_with_crcs_are_measured_without_a_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2ray.bench.measuring._ENCODE_S", 0.0)
    monkeypatch.setattr("m2ray.bench.measuring._MICRO_BATCH_BYTES", 1 << 16)
    monkeypatch.setattr("m2ray.parquet.column_chunks.crc32", lambda _: pytest.fail("a core makes them"))
    assert encode_bytes_per_s(64, "bfloat16", with_crcs=True) > 0


def test_all_threads_help_where_a_stage_has_few_layers() -> None:
    """They are at parts of several shards then."""
    one_layer = profiled(parts=plan("8xH200").demand.options.parts[:1], gpus_per_stage=1).rates.limits["encoder"]
    assert one_layer == pytest.approx(4 * 2e9 / 6144)


def test_few_micro_batches_pay_for_filling_the_chain() -> None:
    prompts = replace(PROMPTS, micro_batches=14)
    planned = profiled(prompts=prompts)
    assert len(planned.stages) == 8
    assert planned.rates.filled_share == pytest.approx(14 / 21)
    assert planned.rates.duration_s == pytest.approx(prompts.tokens / planned.rates.limits["store"] + ENDS_S), (
        "the store is not to be filled"
    )
    fast = profiled(prompts=prompts, store_bytes_per_s=100e9)
    assert fast.limiting_resource == "computation"
    assert fast.rates.duration_s == pytest.approx(prompts.tokens / fast.rates.limits["computation"] * 21 / 14 + ENDS_S)
    between = profiled(prompts=prompts, store_bytes_per_s=0.9 * fast.rates.limits["computation"] * 62 * (6144 + 4.5))
    assert between.limiting_resource == "computation", "the store takes more than chains give that are filled for two thirds of the time"
    assert between.rates.duration_s == pytest.approx(fast.rates.duration_s)
    assert "filling and draining the chains takes 33.3% of the time" in drawn(fast)
    assert "filling" not in drawn(planned), "it takes no time that the store does not take"
    assert profiled(prompts=prompts, replicas=2).rates.filled_share == pytest.approx(7 / 10)
    stated = profiled(prompts=prompts, tokens_per_s=1000.0)
    assert not stated.rates.is_measured
    assert stated.rates.duration_s == pytest.approx(prompts.tokens / 1000), "a stated rate is that of the whole run"


def test_small_micro_batches_pay_more_often_what_each_costs() -> None:
    full, half = (replace(PROMPTS, tokens=size * 90, padded_tokens=size * 100, micro_batches=100) for size in (16_384, 8_192))
    rates = [profiled(prompts=prompts).rates.limits["computation"] for prompts in (full, half)]
    assert rates[0] == pytest.approx(0.9 * profiled().rates.limits["computation"]), "those that were measured"
    assert rates[1] == pytest.approx(rates[0] * (16_384 + 1_700) / 16_384 * 8_192 / (8_192 + 1_700))
    assert profiled(prompts=replace(PROMPTS, micro_batches=0)).rates.limits["computation"] > 0
    stated = profiled(profile=replace(PROFILE, layer=PROFILE.layer[:2]), prompts=half, tokens_per_s=1000.0, compile=True)
    assert stated.rates.limits["computation"] == 1000, "who states a rate needs no measured layer"


H200S = Profile(
    gpu="NVIDIA H200",
    gpus=4,
    cpus=64,
    versions={},
    model_type="minimax_m2",
    compute_dtype="bfloat16",
    active_elements=158_086_400.0,
    layer=(LayerTime(8, 2048, True, 13.151), LayerTime(32, 512, True, 12.526)),
    copy_bytes_per_s=55.1e9,
    encode_bytes_per_s=3.053e9,
    store="/memory/bench",
    store_bytes_per_s=5.168e9,
)
"""The machine of benchmarks/results/full_depth_extract.json."""


@pytest.mark.parametrize(
    ("kept", "prompts", "measured_s"),
    [
        ((14, 30, 45, 61), PromptStats(3600, 1_039_600, 1_082_917, 1024, 36, 68), 14.5),
        (tuple(range(62)), PromptStats(1300, 375_036, 411_675, 1024, 13, 27), 27.5),
    ],
)
def test_runs_that_were_measured_take_as_long_as_planned(kept: tuple[int, ...], prompts: PromptStats, measured_s: float) -> None:
    """All 62 layers over four H200s, few kept and all kept; numbers of micro-batches are those of prompts of the same lengths."""
    parts = tuple(part for part in plan("4xH200").demand.options.parts if part.layer in kept)
    planned = profiled("4xH200", H200S, prompts=prompts, compile=True, parts=parts)
    assert planned.rates.duration_s == pytest.approx(measured_s, rel=0.05)
    assert planned.run_tokens_per_s == pytest.approx(prompts.tokens / measured_s, rel=0.05)


def test_a_profile_of_another_machine_dtype_or_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="NVIDIA H200; the plan has H100-80GB"):
        profiled("8xH100-80GB")
    with pytest.raises(ConfigError, match="the plan is for float8. Leave --profile out"):
        profiled(compute_dtype="float8")
    with pytest.raises(ConfigError, match="taken in bfloat16, the plan is for float32"):
        profiled("16xH200", compute_dtype="float32")
    with pytest.raises(ConfigError, match="no layer compiled"):
        profiled(profile=replace(PROFILE, layer=PROFILE.layer[:2]), compile=True)


def test_a_profile_survives_its_file_and_anything_else_is_refused() -> None:
    assert Profile.from_json(PROFILE.to_json()) == PROFILE
    for text in ("", "[]", "{}", '{"format_version": 1, "layer": []}', PROFILE.to_json().replace("layer_ms", "layer_s")):
        with pytest.raises(ConfigError, match="no profile"):
            Profile.from_json(text)
    with pytest.raises(ConfigError, match="format_version 2"):
        Profile.from_json(PROFILE.to_json().replace('"format_version": 1', '"format_version": 2'))


def test_shapes_hold_the_tokens_of_a_micro_batch() -> None:
    assert shapes_of(16_384, 196_608) == [(8, 2048), (32, 512)]
    assert shapes_of(512, 196_608) == [(1, 512), (4, 128)]
    assert shapes_of(1, 196_608) == [(1, 1)]


def test_the_command_measures_a_small_model_and_plan_reads_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2ray.bench.measuring._STORE_ROUNDS", ((2 << 20, 1, 1),))
    model, profile, output = make_minimax(tmp_path / "model", "fp8"), tmp_path / "profile.json", tmp_path / "run"
    words = ["bench", str(model), "--output", str(output), "--profile", str(profile), "--batch-tokens", "64", "--no-compile"]
    done = CliRunner(env={"CUDA_VISIBLE_DEVICES": ""}).invoke(main, words)
    assert done.exit_code == 0, done.output
    measured = Profile.from_json(profile.read_bytes())
    assert [(time.sequences, time.length) for time in measured.layer] == [(1, 64), (4, 16)]
    assert all(
        rate is not None and rate > 0 for rate in (measured.encode_bytes_per_s, measured.store_bytes_per_s, measured.read_bytes_per_s)
    )
    assert measured.elapsed_s < 120
    assert not [path for path in output.rglob("*") if path.is_file()], "nothing is left in the output"
    planned = CliRunner(env={"CUDA_VISIBLE_DEVICES": ""}).invoke(main, ["plan", "--model", str(model), "--profile", str(profile), "--json"])
    assert planned.exit_code == 0, planned.output
    rates = json.loads(planned.stdout)["rates"]
    assert rates["is_measured"]
    assert rates["limits"].keys() == {"computation", "encoder", "store"}
    slowest = min(time.tokens_per_s for time in measured.layer)
    assert rates["limits"]["computation"] == pytest.approx(slowest / 7), "7 equal layers in one stage"


def test_a_file_that_is_no_profile_ends_the_plan(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["plan", "--model", "x", "--gpus", "8xH200", "--profile", str(tmp_path / "none.json")])
    assert done.exit_code == 1
    assert "cannot be read" in done.output


def test_a_store_that_refuses_is_an_error_and_left_clean(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("in the way")
    with pytest.raises(StoreError):
        store_bytes_per_s(LocalStore(folder), 64, "bfloat16", 1)


class Watched(LocalStore):
    """Remembers what was written under which names, and fails with the part of number `failing`, if there is to be one."""

    def __init__(self, root: Path, failing: int | None = None) -> None:
        super().__init__(root)
        self.keys: list[str] = []
        self._failing = failing

    def open_part(self, key: str) -> PartSink:
        self.keys.append(key)
        if len(self.keys) == self._failing:
            raise StoreError(f"Cannot write {key}: No space left on device.")
        return super().open_part(key)


def test_the_store_is_measured_by_parts_that_no_reader_takes_for_a_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds grow, all layers of a round's shards are written, and everything is deleted, whether it went well or not."""
    monkeypatch.setattr("m2ray.bench.measuring._STORE_ROUNDS", ((1 << 16, 1, 1), (1 << 16, 2, 3)))
    store = Watched(tmp_path)
    assert store_bytes_per_s(store, 64, "bfloat16", 2) > 0
    assert len(store.keys) == 8 * (1 + 3)
    assert all("/" not in key and key.startswith("_bench-") for key in store.keys)
    full = Watched(tmp_path, failing=20)
    with pytest.raises(StoreError, match="No space left"):
        store_bytes_per_s(full, 64, "bfloat16", 2)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
