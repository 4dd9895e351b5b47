"""What a run tells Prometheus through Ray's metrics agents: all that the driver knows of it, every two seconds.

The driver alone tells it, of all stages. It does so from a thread of its own: its main one may wait for minutes for a store that does not
answer, which is when somebody looks. Ray puts `ray_` before each name. docs/operations.md has the table of them, for readers.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ray.util.metrics import Counter, Gauge

from m2ray.chain.status import RunStatus, StageStatus

_EVERY_S = 2.0
_END_S = 10.0

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Metric:
    """One metric, `m2ray_<noun>_<unit>`: a counter where `_total` follows, else a gauge.

    Attributes:
        of: its values by its last label, stage or site, at a look at the run; by "" where the run is its only one. What is not known yet is
            left out.
    """

    name: str
    label: str
    meaning: str
    of: Callable[[RunStatus], Mapping[str, float]]

    @property
    def is_counter(self) -> bool:
        return self.name.endswith("_total")

    @property
    def labels(self) -> tuple[str, ...]:
        return ("run", self.label) if self.label else ("run",)


def _of_run(name: str, meaning: str, value: Callable[[RunStatus], float | None]) -> Metric:
    def values(run: RunStatus) -> dict[str, float]:
        known = value(run)
        return {} if known is None else {"": known}

    return Metric(name, "", meaning, values)


def _of_stages(name: str, meaning: str, value: Callable[[StageStatus], float | None]) -> Metric:
    def values(run: RunStatus) -> dict[str, float]:
        each = {f"{planned.replica}.{planned.stage}": value(stage) for planned, stage in run.stages}
        return {place: known for place, known in each.items() if known is not None}

    return Metric(name, "stage", meaning, values)


def _of_gpus(name: str, meaning: str, value: Callable[[StageStatus], float]) -> Metric:
    return _of_stages(name, meaning, lambda stage: value(stage) if stage.gpus else None)


METRICS = (
    _of_run("m2ray_tokens_total", "real tokens that left the last stage", lambda run: run.tokens),
    _of_run("m2ray_left_tokens", "tokens that have not left it yet", lambda run: run.all_tokens - run.tokens_before - run.tokens),
    _of_run("m2ray_left_seconds", "time left at the rate since the stages were loaded", lambda run: run.left_s),
    _of_run("m2ray_committed_shards_total", "shards committed by this driver", lambda run: run.shards_here),
    _of_run("m2ray_left_shards", "shards that are not committed", lambda run: run.all_shards - run.shards),
    _of_run("m2ray_quarantined_sequences", "rows of the prompts that were quarantined by the survey", lambda run: run.quarantined),
    _of_run("m2ray_padding_ratio", "share of the computed tokens that were padding", lambda run: run.padding_waste),
    _of_run("m2ray_failures_total", "failures after which a chain went on or ended", lambda run: run.failures),
    _of_run("m2ray_store_failures_total", "those of them in which the store refused a write or was late", lambda run: run.store_failures),
    _of_run("m2ray_retried_shards_total", "shards in flight at those failures, which are tried again", lambda run: run.retried_shards),
    Metric("m2ray_output_bytes_total", "site", "bytes of the parts of committed shards", lambda run: run.site_bytes),
    Metric("m2ray_output_rows_total", "site", "rows of the parts of committed shards, of all layers", lambda run: run.site_rows),
    _of_stages("m2ray_silent_seconds", "since the stage answered the driver", lambda stage: stage.silent_s),
    _of_stages("m2ray_read_bytes_total", "bytes of the checkpoint read", lambda stage: stage.read_bytes),
    _of_stages("m2ray_parameter_bytes", "parameters in memory", lambda stage: stage.parameter_bytes),
    _of_stages("m2ray_stage_tokens_total", "real tokens computed", lambda stage: stage.tokens),
    _of_stages("m2ray_padded_tokens_total", "tokens computed, padding counted", lambda stage: stage.padded_tokens),
    _of_stages("m2ray_micro_batches_total", "micro-batches computed", lambda stage: stage.micro_batches),
    _of_stages("m2ray_compute_seconds_total", "time of the layers, by the device's clock", lambda stage: stage.compute_s),
    _of_stages(
        "m2ray_busy_ratio", "share of the time since its first micro-batch in which its devices computed", lambda stage: stage.busy_share
    ),
    _of_stages("m2ray_wait_seconds_total", "time between, mostly waiting for the stage before", lambda stage: stage.wait_s),
    _of_stages("m2ray_copy_seconds_total", "time of copying rows to the host after the layers", lambda stage: stage.copy_s),
    _of_stages(
        "m2ray_queue_wait_seconds_total", "time that the computation waited for room in the queue", lambda stage: stage.write_wait_s
    ),
    _of_stages("m2ray_queue_bytes", "captured bytes that wait for the store, or are on their way there", lambda stage: stage.queued_bytes),
    _of_stages("m2ray_write_seconds_total", "time of the writer's threads, encoding and storing", lambda stage: stage.write_s),
    _of_stages("m2ray_store_seconds_total", "the store's share of it", lambda stage: stage.store_s),
    _of_stages("m2ray_written_bytes_total", "bytes handed to the store, those of failed attempts too", lambda stage: stage.written_bytes),
    _of_stages("m2ray_stored_parts_total", "parts that the store has made durable", lambda stage: stage.stored_parts),
    _of_stages(
        "m2ray_peak_rss_bytes",
        "the process's memory at its peak, and that of the one that writes beside it",
        lambda stage: stage.peak_rss_bytes,
    ),
    _of_gpus("m2ray_gpu_used_bytes", "taken on its GPUs now, by all processes", lambda stage: sum(gpu.used_bytes for gpu in stage.gpus)),
    _of_gpus("m2ray_gpu_peak_bytes", "reserved at the peak", lambda stage: sum(gpu.peak_reserved_bytes for gpu in stage.gpus)),
    _of_gpus("m2ray_gpu_total_bytes", "memory of its GPUs", lambda stage: sum(gpu.total_bytes for gpu in stage.gpus)),
)


class Metrics:
    """Tells Ray of a run for as long as the context lasts.

    Args:
        run: what the label `run` says.
        look: gives the run by now, from any thread.
    """

    def __init__(self, run: str, look: Callable[[], RunStatus]) -> None:
        self._run = run
        self._look = look
        self._meters: dict[str, Any] = {
            metric.name: (Counter if metric.is_counter else Gauge)(metric.name, metric.meaning, metric.labels) for metric in METRICS
        }
        self._counted: dict[tuple[Labels, str, int], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on_telling, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(_END_S)

    def tell(self) -> None:
        """Look at the run once, and tell what is new."""
        run = self._look()
        pids = {f"{planned.replica}.{planned.stage}": stage.pid for planned, stage in run.stages}
        for metric in METRICS:
            for place, value in metric.of(run).items():
                labels = tuple(zip(metric.labels, (self._run, place), strict=False))
                if not metric.is_counter:
                    self._meters[metric.name].set(value, dict(labels))
                elif (more := self._more(labels, metric.name, pids.get(place, 0), value)) > 0:
                    self._meters[metric.name].inc(more, dict(labels))

    def _more(self, labels: Labels, name: str, pid: int, value: float) -> float:
        """What a counter grew by. A restarted stage begins at 0 again; tokens whose shard failed are counted once."""
        key = (labels, name, pid)
        before = self._counted.get(key, 0.0)
        self._counted[key] = max(before, value)
        return value - before

    def _go_on_telling(self) -> None:
        """Every few seconds, and once more at the end."""
        while not self._ended.wait(_EVERY_S):
            self.tell()
        self.tell()
