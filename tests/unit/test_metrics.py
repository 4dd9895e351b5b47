"""The metrics: what they say of a run, and that docs, board and rules name those that are there."""

import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from m2ray.batches import LayerSpan
from m2ray.chain import metrics as module
from m2ray.chain.metrics import METRICS, Metrics
from m2ray.chain.status import GpuStatus, RunStatus, StageStatus

REPOSITORY = Path(__file__).parents[2]
MONITORING = REPOSITORY / "cluster/monitoring"
NAMES = {metric.name for metric in METRICS}
STAGE = StageStatus(LayerSpan(0, 2), "here", "cuda:0", pid=7, micro_batches=1, tokens=90, compute_s=3.0, wait_s=1.0, written_bytes=500)
GPU = GpuStatus(0, "H200", 100, 10, 20, 30, 40, 50)
RUN = RunStatus(
    3, 10, 900, 100, 2000, 5.0, 9.0, 500, (), shards_here=2, quarantined=4, site_bytes={"residual": 500}, site_rows={"residual": 60}
)
UNITS = ("bytes", "failures", "micro_batches", "parts", "ratio", "rows", "seconds", "sequences", "shards", "tokens")


class Meter:
    """Stands in for Ray's: a counter that only grows, as Prometheus wants it, and by more than nothing, as Ray does."""

    values: ClassVar[defaultdict[tuple[Any, ...], float]] = defaultdict(float)

    def __init__(self, name: str, meaning: str, labels: tuple[str, ...]) -> None:
        self._name, self._labels = name, labels

    def _key(self, labels: dict[str, str]) -> tuple[Any, ...]:
        assert tuple(labels) == self._labels
        return (self._name, *labels.values())

    def inc(self, value: float, labels: dict[str, str]) -> None:
        assert value > 0
        self.values[self._key(labels)] += value

    def set(self, value: float, labels: dict[str, str]) -> None:
        self.values[self._key(labels)] = value


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], float]:
    monkeypatch.setattr(module, "Counter", Meter)
    monkeypatch.setattr(module, "Gauge", Meter)
    monkeypatch.setattr(Meter, "values", defaultdict(float))
    return Meter.values


def run_of(stage: StageStatus, **changes: Any) -> RunStatus:
    planned: Any = type("Planned", (), {"replica": 1, "stage": 2})
    return replace(RUN, stages=((planned, stage),), **changes)


def tell(*runs: RunStatus) -> None:
    looks = iter(runs)
    metrics = Metrics("r", lambda: next(looks))
    for _ in runs:
        metrics.tell()


def test_what_a_run_tells(told: dict[tuple[Any, ...], float]) -> None:
    tell(run_of(replace(STAGE, gpus=(GPU, GPU))))
    assert told["m2ray_left_shards", "r"] == 7
    assert told["m2ray_committed_shards_total", "r"] == 2
    assert told["m2ray_left_tokens", "r"] == 1000
    assert told["m2ray_left_seconds", "r"] == pytest.approx(10.0)
    assert told["m2ray_output_bytes_total", "r", "residual"] == 500
    assert told["m2ray_busy_ratio", "r", "1.2"] == 0.75
    assert told["m2ray_gpu_used_bytes", "r", "1.2"] == 100


def test_what_is_not_known_is_not_told(told: dict[tuple[Any, ...], float]) -> None:
    tell(run_of(STAGE, tokens=0))
    assert not {name for name, *_ in told if "_gpu_" in name or name == "m2ray_left_seconds"}


def test_a_restarted_stage_adds_to_its_counters(told: dict[tuple[Any, ...], float]) -> None:
    again = replace(STAGE, pid=8, written_bytes=40)
    tell(run_of(STAGE), run_of(STAGE), run_of(again), run_of(replace(again, written_bytes=70)))
    assert told["m2ray_written_bytes_total", "r", "1.2"] == 570


def test_tokens_that_are_computed_again_count_once(told: dict[tuple[Any, ...], float]) -> None:
    tell(run_of(STAGE, tokens=900), run_of(STAGE, tokens=600), run_of(STAGE, tokens=1000))
    assert told["m2ray_tokens_total", "r"] == 1000


def test_the_last_look_is_told_at_the_end(told: dict[tuple[Any, ...], float]) -> None:
    with Metrics("r", lambda: run_of(STAGE)):
        pass
    assert told["m2ray_left_shards", "r"] == 7


def test_names_end_with_their_unit() -> None:
    assert len(METRICS) == len(NAMES) >= 20
    for metric in METRICS:
        assert re.fullmatch(rf"m2ray(_[a-z]+)+_({'|'.join(UNITS)})(_total)?|m2ray_({'|'.join(UNITS)})_total", metric.name)
        assert metric.label in ("", "stage", "site")


def test_docs_name_each_with_type_and_labels() -> None:
    table = (REPOSITORY / "docs/operations.md").read_text(encoding="utf-8")
    for metric in METRICS:
        kind, unit = "counter" if metric.is_counter else "gauge", metric.name.removesuffix("_total").rpartition("_")[2]
        unit = "micro-batches" if metric.name.endswith("micro_batches_total") else unit
        line = f"| `{metric.name}` | {kind} | {unit} | {', '.join(metric.labels)} | {metric.meaning} |"
        assert line in table, f"docs/operations.md should have: {line}"
    assert set(re.findall(r"^\| `(m2ray_\w+)`", table, re.MULTILINE)) == NAMES


def used(text: str) -> set[str]:
    return set(re.findall(r"ray_(m2ray_\w+)", text))


def test_the_board_asks_for_metrics_that_are_there_and_for_all() -> None:
    board = json.loads((MONITORING / "board.json").read_text(encoding="utf-8"))
    asked = used(" ".join(target["expr"] for panel in board["panels"] for target in panel["targets"]))
    assert asked == NAMES
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_rules_ask_for_metrics_that_are_there() -> None:
    (group,) = yaml.safe_load((MONITORING / "rules.yml").read_text(encoding="utf-8"))["groups"]
    assert {rule["alert"] for rule in group["rules"]} == {"M2rayRunStalled", "M2rayStoreFailing"}
    for rule in group["rules"]:
        asked = used(rule["expr"])
        assert asked
        assert asked <= NAMES
        # A driver's Ray reports every 10 s: a shorter window may see no two values.
        assert {int(window) for window in re.findall(r"\[(\d+)s\]", rule["expr"])} <= {25}


def test_prometheus_reads_the_rules_and_keeps_the_metrics() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    assert [(MONITORING / name).is_file() for name in config["rule_files"]] == [True]
    (scraped,) = config["scrape_configs"]
    keep = next(rule["regex"] for rule in scraped["metric_relabel_configs"] if rule["action"] == "keep")
    assert all(re.fullmatch(keep, f"ray_{name}") for name in NAMES)
