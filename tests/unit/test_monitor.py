"""The progress line."""

import io
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from m2ray.chain.monitor import Monitor
from m2ray.chain.progress import Progress


def test_the_rate_counts_from_when_the_stages_were_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look at a run may come when much of it is done."""
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    tokens = 230_000
    stages: Any = SimpleNamespace(statuses=[], is_loaded=True, loaded_at=time.monotonic() - 10)
    chain: Any = SimpleNamespace(tokens_done=tokens, failures=())
    plan: Any = SimpleNamespace(stages=())
    shard: Any = SimpleNamespace(num_tokens=4 * tokens)
    said = io.StringIO()
    Monitor(plan, [(chain, stages)], [shard], [shard], Progress(said)).tick()
    ((left_s, rate),) = re.findall(r"(\d+) s left, ([\d,]+) tokens/s", said.getvalue())
    assert int(rate.replace(",", "")) == pytest.approx(tokens / 10, rel=0.1)
    assert int(left_s) == pytest.approx(30, rel=0.1)
