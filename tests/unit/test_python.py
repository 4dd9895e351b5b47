"""What `import m2ray` offers: typed options, a plan and a run that show themselves, and progress in a notebook."""

import gc
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

import m2ray
from m2ray import cli
from m2ray.api.options import Options, PlanOptions, as_written
from m2ray.batches import Column, PartSpec
from m2ray.chain.notebook import NotebookProgress, progress_here
from m2ray.cli import plan_inputs
from m2ray.cli.plan import PlanConfig
from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, ConfigError, NotInRunError
from m2ray.planning.plan import Plan
from m2ray.storage import LocalStore
from tests.reference import DATA
from tests.unit import activation_runs as runs

OF_ITS_OWN = {"model", "prompts", "output"}


def test_keywords_are_the_options() -> None:
    assert get_type_hints(Options).keys() | OF_ITS_OWN == ExtractConfig.model_fields.keys()
    assert get_type_hints(PlanOptions).keys() | OF_ITS_OWN == PlanConfig.model_fields.keys()
    shown = inspect.signature(m2ray.extract).parameters
    assert shown.keys() == ExtractConfig.model_fields.keys()
    assert shown["compile"].default == "auto"
    assert shown["output"].default is inspect.Parameter.empty
    assert f"keep_columns: {ExtractConfig.model_fields['keep_columns'].description}" in (m2ray.extract.__doc__ or "")


def test_pythons_values_become_what_a_file_says() -> None:
    given = as_written({"model": Path("m"), "layers": [0, 7], "sites": {"residual": "all", "mlp": range(2, 4)}, "split": None, "pack": 64})
    assert given == {"model": "m", "layers": "0,7", "sites": "residual:all, mlp:2,3", "pack": 64}
    assert as_written({"layers": np.arange(2), "sites": {"mlp": np.array([4])}}) == {"layers": "0,1", "sites": "mlp:4"}
    assert as_written({"layers": 3, "sites": ["mlp", "residual"]}) == {"layers": 3, "sites": "mlp, residual"}
    with pytest.raises(ConfigError, match="no option 'layer'. Did you mean 'layers'"):
        m2ray.plan(model="m", layer=3)  # type: ignore[call-arg]


def test_a_plan_shows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "plan_inputs", plan_inputs)
    monkeypatch.delitem(sys.modules, plan_inputs.__name__)  # imported again, as in a process that has not yet
    gc.unfreeze()
    shutil.copytree(DATA / "prompts" / "tokenizer", tmp_path / "model")
    shutil.copy(DATA / "llama" / "config.json", tmp_path / "model")
    plan = m2ray.plan(
        model=tmp_path / "model", prompts=["one text", "two texts & <more>"], gpus="2xH100-80GB", sites=["residual"], layers=range(3)
    )
    is_kept = gc.get_freeze_count()
    gc.freeze()  # as it was
    assert not is_kept, "what the user's process has is his, and may go"
    assert isinstance(plan, Plan)
    assert plan.prompts is not None
    assert plan.prompts.sequences == 2
    assert repr(plan).startswith("It fits")
    assert f"{plan.prompts.tokens:,} tokens" in repr(plan)
    assert "\x1b" not in repr(plan)
    assert plan._repr_html_().startswith("<pre>It fits")
    assert max(map(len, repr(plan).splitlines())) <= 100


def test_ray_is_not_to_ask_for_widgets_while_it_is_imported() -> None:
    """In a subprocess, where nobody has imported Ray."""
    look = "import m2ray.chain, logging, ray; print(*(logging.getLogger(f'ray.{name}').isEnabledFor(logging.INFO) for name in ('widgets.util', 'data')))"
    told = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "False True\n", "what else Ray says is its own affair"


# -- runs -----------------------------------------------------------------------------------------------------------------


PARTS = (
    *runs.PARTS,
    PartSpec.of("mlp", 7, "bfloat16", runs.WIDTH),
    PartSpec.of("embedding", None, "bfloat16", runs.WIDTH),
    PartSpec("router_topk", 7, (Column("expert_ids", "int16", 3), Column("expert_weights", "float32", 3))),
)


def bits(part: PartSpec, sequence_id: int) -> Any:
    """Rows of every kind of number that the columns hold, without NaN."""
    rng = np.random.default_rng(sequence_id)
    pieces = []
    for column in part.columns:
        values = torch.from_numpy(rng.standard_normal((runs.token_count(sequence_id), column.width)))
        if "int" in column.dtype:
            values = (values * 40).round().clamp(-127, 127)
        pieces.append(values.to(getattr(torch, column.dtype)).contiguous().view(torch.uint8).numpy().reshape(len(values), -1))
    return np.concatenate(pieces, axis=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "bits", bits)
        runs.finished_run(LocalStore(folder), PARTS)
    return folder


def test_a_run_shows_model_sites_tokens_bytes_and_how_far_it_is(finished: Path) -> None:
    run = m2ray.open_run(finished)
    assert re.fullmatch(
        rf"<run {finished}: .* with \d+ layers of width \d+; residual at layers 0,7,11, mlp at layers 7, embedding, router_topk at layers 7; "
        r"\d+ sequences \(\d quarantined\), 67 tokens; [\d.]+ kB in 18 files; complete>",
        repr(run),
    )
    assert "residual at layers 7;" in repr(run.site("residual").layer(7))
    assert run._repr_html_().count("<tr>") == 6
    assert ">complete</td>" in run._repr_html_()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"])
def test_rows_come_as_floats_to_numpy_arrow_pandas_and_polars(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = (Column("scale", "float32", 1),) if dtype in ("int8", "float8_e4m3fn") else ()
    part = PartSpec("residual", 3, (Column("activation", dtype, runs.WIDTH), *scale))
    monkeypatch.setattr(runs, "bits", bits)
    runs.finished_run(LocalStore(tmp_path), (part,))
    view = m2ray.open_run(tmp_path).layer(3)
    expected, tokens = view.tensor().float().numpy(), view.tokens()
    found = view.to_numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    table = view.to_arrow()
    assert table.column_names == ["sequence_id", "position", "token_id", "activation"]
    assert table["activation"].type == pa.list_(pa.float32(), expected.shape[1])
    assert np.array_equal(table["token_id"].to_numpy(), tokens["token_id"])
    frame, polar = view.to_pandas(), view.to_polars()
    assert isinstance(frame, pd.DataFrame)
    assert np.array_equal(np.stack(list(frame["activation"])), expected)
    assert np.array_equal(frame["sequence_id"], tokens["sequence_id"])
    assert polar.schema["activation"] == pl.Array(pl.Float32, expected.shape[1])
    assert np.array_equal(polar["activation"].to_numpy(), expected)


def test_several_layers_and_experts_come_too(finished: Path) -> None:
    run = m2ray.open_run(finished)
    residual = run.site("residual")
    assert np.array_equal(residual.to_numpy(), residual.tensor().float().numpy())
    assert np.array_equal(residual.to_arrow()["layer"].to_numpy(), np.repeat([0, 7, 11], 67))
    routed = run.site("router_topk").layer(7)
    assert {name: values.dtype for name, values in routed.to_numpy().items()} == {"expert_ids": np.int16, "expert_weights": np.float32}
    assert np.array_equal(routed.to_numpy()["expert_ids"], routed.tensor()["expert_ids"].numpy())
    assert routed.to_arrow().column_names[-2:] == ["expert_ids", "expert_weights"]
    with pytest.raises(NotInRunError, match="sites"):
        run.to_numpy()


def test_words_need_the_runs_own_tokenizer(finished: Path) -> None:
    run = m2ray.open_run(finished)
    with pytest.raises((NotInRunError, CheckpointError)):
        run.text(0)


# -- a notebook -----------------------------------------------------------------------------------------------------------


class Display:
    """IPython's display, as far as it is called: what was shown, and how often anew."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.handles = 0

    def __call__(self, what: Any, *, display_id: bool) -> "Display":
        assert display_id
        self.handles += 1
        self.shown.append(what)
        return self

    def update(self, what: Any) -> None:
        self.shown.append(what)


def test_a_notebook_draws_its_own_bars_in_one_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=display)))
    with progress_here() as progress:
        assert isinstance(progress, NotebookProgress)
        progress.surveying(5)
        progress.say("a line\x1b[31m")
        for number in range(100):
            progress.following([f"{number} <b>"], number / 100)
    assert display.handles == 1
    assert len(display.shown) < 20, "not a hundred times in a moment"
    last = display.shown[-1]._repr_html_()
    assert last.count("<progress") == 2
    assert 'value="1.0000"' in last, "what came before is over"
    assert 'value="0.9900"' in last
    assert "99 &lt;b&gt;" in last
    assert capsys.readouterr().out == "a line\\x1b[31m\n"
    monkeypatch.setattr(shell, "kernel", None)
    assert not isinstance(progress_here(), NotebookProgress), "IPython on a terminal"
