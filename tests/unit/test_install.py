"""What is installed where: the wheel's own needs read a run; what they do not bring is named with what installs it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from m2ray.activations.reading.floats import floats_of
from m2ray.activations.reading.values import tensors_of
from m2ray.batches import Column, PartSpec
from m2ray.errors import MissingPackageError
from m2ray.extras import EXTRAS, naming_extras
from m2ray.sites import BLOCK_CHANNELS
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

REPOSITORY = Path(__file__).parents[2]

READER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {EXTRAS["extract"]!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
run = sys.argv[1]

import m2ray
from m2ray.cli import main
from m2ray.errors import MissingPackageError

def command(*words):
    try:
        main(list(words))
    except SystemExit as end:
        return end.code or 0

opened = m2ray.open_run(run)
assert opened.num_tokens == len(opened.tokens()) and isinstance(opened.layer(7).mean_norm(), float)
assert opened.layer(7).to_numpy().shape == (opened.num_tokens, 24) and len(opened.layer(7).to_arrow()) == opened.num_tokens
assert repr(opened) and len(opened.sequences) and not (set({EXTRAS["extract"]!r}) & sys.modules.keys())
for words in (["--help"], ["--version"], ["inspect", run], ["inspect", run, "--json"], ["verify", run, "--checksums"], ["extract", "--help"]):
    assert command(*words) == 0, words
beside = run.removesuffix("run")
given = ["--model", beside + "model", "--prompts", beside + "prompts.jsonl", "--output", run + "-2"]
for words in (["extract", *given], ["submit", *given], ["plan", *given], ["bench", "/m"], ["verify", run, "--sample", "1"], ["doctor", "--model", "/m"]):
    assert command(*words) == 1, words
for lacking in (opened.layer(7).tensor, lambda: opened.layer(7).sequence(0), lambda: opened.layer(7).rows([0]), opened.layer(7).stream,
                lambda: next(opened.layer(7).shards()), opened.layer(7).as_data_provider):
    try:
        lacking()
    except MissingPackageError as error:
        assert error.remedy == "pip install 'm2ray[extract]'", error
    else:
        raise AssertionError("this needs torch")
print("read")
"""


def test_a_run_is_read_without_torch_ray_and_transformers_and_what_needs_them_says_so(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    runs.finished_run(store)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"text": "one"}\n')
    told = subprocess.run([sys.executable, "-c", READER, store.url], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.endswith("read\n")
    errors = [line for line in told.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 6
    assert all(re.fullmatch(r"Error: This needs \w+, which is not installed\. pip install 'm2ray\[extract\]'", line) for line in errors)


def test_every_package_of_an_extra_is_known_by_name() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        asked_for = {Requirement(line).name.replace("-", "_") for line in project["optional-dependencies"][extra]}
        of_extract = {"m2ray", *EXTRAS["extract"]} if "m2ray" in asked_for else set()
        assert asked_for <= {*packages, *of_extract}, extra
    always = {Requirement(line).name.replace("-", "_") for line in project["dependencies"]}
    assert not always & {package for packages in EXTRAS.values() for package in packages}


def test_what_is_of_no_extra_stays_the_error_that_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), naming_extras():
        import no_such_package  # noqa: F401
    with pytest.raises(MissingPackageError, match=re.escape("pip install 'm2ray[report]'")), naming_extras():
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_floats_without_torch_are_those_of_torch(dtype: str) -> None:
    columns = PartSpec.of("residual", 0, dtype, 40).columns
    bits = np.random.default_rng(0).integers(0, 256, (50, columns[0].row_bytes), dtype=np.uint8)
    bits[0, : 2 * len(runs.PATTERNS)] = runs.PATTERNS.view(np.uint8)
    np.testing.assert_array_equal(floats_of(columns, bits), tensors_of(columns, torch.from_numpy(bits)).float().numpy())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_rows_in_8_bits_without_torch_are_those_of_torch(dtype: str) -> None:
    width = BLOCK_CHANNELS + 56
    columns = (Column("activation", dtype, width), Column("scale", "float32", 2))
    values = np.arange(3 * width, dtype=np.uint32).astype(np.uint8).reshape(3, width)  # every byte there is
    scales = np.array([[0.5, 3e-3], [1, 7e20], [1e-30, 2]], np.float32)
    rows = np.concatenate([values, scales.view(np.uint8)], axis=1)
    np.testing.assert_array_equal(floats_of(columns, rows), tensors_of(columns, torch.from_numpy(rows)).numpy())
