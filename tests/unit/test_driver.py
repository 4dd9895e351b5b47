"""The driver of one chain."""

from types import SimpleNamespace
from typing import Any

import pytest

from m2ray.chain import driver
from m2ray.chain.completion import Completed
from m2ray.chain.driver import Chain, ChainLimits
from m2ray.errors import StageError

NEWS, WATCH = "news", "watch"


def wait(refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
    """As Ray's where all are ready: it gives any of them, here the last."""
    return refs[-num_returns:], refs[:-num_returns]


def test_a_failure_is_heard_though_news_is_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ray", SimpleNamespace(wait=wait, get=lambda *_, **__: Completed(0, ())))

    def heed(watch: str, _: int) -> None:
        assert watch == WATCH
        raise StageError("not finite")

    completed: Any = SimpleNamespace(remote=lambda *_: NEWS)
    stages: Any = SimpleNamespace(watches=[WATCH], heed=heed, actors=[SimpleNamespace(completed=completed)])
    chain = Chain(stages, ChainLimits(1, 1, 1, 1.0), lambda *_: iter(()), 1, print)
    with pytest.raises(StageError, match="not finite"):
        chain._advance(lambda _: None)
