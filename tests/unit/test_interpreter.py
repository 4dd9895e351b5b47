"""The interpreter's switches between threads: quick while anybody wants them so, and then as they were."""

import sys

import pytest

from m2ray.model import interpreter
from m2ray.model.interpreter import quick_switches


def test_the_last_to_leave_brings_back_the_usual_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_usual_s", [])  # stages that earlier tests left behind
    sys.setswitchinterval(usual_s := 0.005)
    one, other = quick_switches(), quick_switches()
    one.__enter__()
    other.__enter__()
    quick_s = sys.getswitchinterval()
    assert quick_s < usual_s
    one.__exit__(None, None, None)
    assert sys.getswitchinterval() == quick_s
    other.__exit__(None, None, None)
    assert sys.getswitchinterval() == usual_s
