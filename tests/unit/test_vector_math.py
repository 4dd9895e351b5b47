"""torch's vector functions are called by one thread before several may: a race in their first call gave rows other bits.

The race itself is findings/torch_first_cosine_of_two_threads.sh; here is that nothing is computed before it is out of the way.
"""

from pathlib import Path

import pytest
import torch

from m2ray.batches import LayerSpan
from m2ray.model import vector_math
from m2ray.model.families import parse_config
from m2ray.model.rehearsal import rehearse
from m2ray.model.stage import StageSpec, load_stage
from tests.reference import make_family


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a process does that has computed nothing yet."""
    calls: list[str] = []
    usual = torch.cos
    monkeypatch.setattr(vector_math, "_settled", [])
    monkeypatch.setattr(torch, "cos", lambda values: (calls.append(f"cos of {values.numel()}"), usual(values))[1])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: calls.append(f"{count} threads"))
    return calls


def test_they_are_settled_before_a_stage_has_its_threads(tmp_path: Path, calls: list[str]) -> None:
    model = make_family(tmp_path / "model", "llama")
    spec = StageSpec(str(model), LayerSpan(0, 1), "float32", "sdpa", "cpu", 2)
    load_stage(spec, lambda *_: None)
    assert calls[:3] == ["cos of 1", "cos of 1", "2 threads"]
    calls.clear()
    load_stage(spec, lambda *_: None)
    assert calls[0] == "2 threads", "once a process"


def test_they_are_settled_before_a_proof(tmp_path: Path, calls: list[str]) -> None:
    config = make_family(tmp_path / "model", "llama") / "config.json"
    copy = tmp_path / "copy"
    copy.mkdir()
    rehearse(parse_config(config.read_bytes()), 0, copy)
    assert calls[:2] == ["cos of 1", "cos of 1"]
