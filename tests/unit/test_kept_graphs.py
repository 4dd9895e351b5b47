"""Compiled graphs are kept between processes, in the user's own folder; and what a warm-up has left is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2ray.model.compilation import compile_layers

SCRIPT = """
import sys, torch
from m2ray.model.compilation import compile_layers
from torch._dynamo.utils import counters
layer = torch.nn.Linear(4, 4)
compile_layers([layer], torch.device("cpu"))
with torch.inference_mode():
    layer(torch.ones(2, 4))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def run(**environment: str) -> list[int]:
    """(hits, misses) of torch's cache in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=kept | environment, capture_output=True, text=True, timeout=300, check=True)
    return [int(word) for word in done.stdout.split()]


def test_a_second_process_finds_the_graphs_of_the_first(tmp_path: Path) -> None:
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    assert run(**home) == [0, 1]
    folder = tmp_path / "cache" / "m2ray" / "compiled"
    assert any(folder.iterdir())
    assert folder.stat().st_mode & 0o077 == 0, "what is run from there is the user's alone to write"
    assert run(**home) == [1, 0]


def test_a_folder_of_ones_own_is_left_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_layers([], torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
