"""The progress line."""

import io
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from m2ray.batches import LayerSpan, PartReceipt
from m2ray.chain.failure import Failure, FailureKind
from m2ray.chain.monitor import Monitor
from m2ray.chain.progress import Progress
from m2ray.chain.status import StageStatus
from m2ray.statistics import STATISTICS


def test_the_rate_counts_from_when_the_stages_were_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look at a run may come when much of it is done."""
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    tokens = 230_000
    stages: Any = SimpleNamespace(statuses=[], is_loaded=True, reads=True, loaded_at=time.monotonic() - 10)
    chain: Any = SimpleNamespace(tokens_done=tokens, failures=())
    plan: Any = SimpleNamespace(stages=(), demand=SimpleNamespace(options=SimpleNamespace(compile=False)))
    shard: Any = SimpleNamespace(num_tokens=4 * tokens)
    said = io.StringIO()
    Monitor(plan, [(chain, stages)], [shard], [shard], Progress(said)).tick()
    ((left_s, rate),) = re.findall(r"(\d+) s left, ([\d,]+) tokens/s", said.getvalue())
    assert int(rate.replace(",", "")) == pytest.approx(tokens / 10, rel=0.1)
    assert int(left_s) == pytest.approx(30, rel=0.1)


def test_a_job_on_a_chain_that_stands_is_told_of_no_loading_but_of_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    there, warming = (StageStatus(LayerSpan(0, 2), "here", "cpu", needed_bytes=4, read_bytes=4, warm_up_left=left) for left in (0, 3))
    planned = SimpleNamespace(replica=0, stage=0)
    plan: Any = SimpleNamespace(stages=(planned,), gpus=(), demand=SimpleNamespace(options=SimpleNamespace(compile=True)))
    said = io.StringIO()
    for statuses, is_loaded in (([], False), ([warming], False), ([there], True)):
        found = SimpleNamespace(statuses=statuses, is_loaded=is_loaded, reads=False, loaded_at=time.monotonic())
        stages: Any = SimpleNamespace(**vars(found), status=lambda _: there)
        Monitor(plan, [(SimpleNamespace(tokens_done=0, failures=()), stages)], [], [], Progress(said)).tick()  # type: ignore[list-item]
    assert [line.partition(":")[::2] for line in said.getvalue().splitlines() if line.startswith("load")] == [
        ("load", " compiling and warming up, micro-batches left by stage: 3")
    ]
    assert " read in " not in said.getvalue()


def test_what_failed_and_what_was_committed_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    failures = (Failure(FailureKind.STORE, 0.0, (), (3, 4)), Failure(FailureKind.DEATH, 1.0, (1,), (4,)))
    chain: Any = SimpleNamespace(tokens_done=5, failures=failures)
    stages: Any = SimpleNamespace(statuses=[], is_loaded=True, loaded_at=time.monotonic())
    plan: Any = SimpleNamespace(stages=())
    shards: Any = [SimpleNamespace(num_tokens=5, num_rows=4)] * 3
    monitor = Monitor(plan, [(chain, stages)], shards, shards[1:], Progress(io.StringIO()), quarantined=7)
    receipts = [PartReceipt(1, "a", site, 0, "key", 4, 100, "", "") for site in ("residual", "residual", "mlp", STATISTICS)]
    monitor.committed(shards[1], receipts)
    run = monitor.status()
    assert (run.failures, run.store_failures, run.retried_shards, run.quarantined) == (2, 1, 3, 7)
    assert (run.shards, run.shards_here) == (2, 1)
    assert run.site_rows == {"residual": 8, "mlp": 4}
    assert run.site_bytes == {"residual": 200, "mlp": 100}
    assert run.output_bytes == 300
