"""Statistics as a stage takes them of its own rows: the same whatever is kept and however layers are cut, and experts counted as they are chosen."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2ray.batches import LayerSpan, PartSpec
from m2ray.errors import ConfigError, StageError
from m2ray.model.capture import Capture, CaptureSpec
from m2ray.model.eight_bits import Encoder
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.model.statistics import Statistics
from m2ray.selection import Selection
from m2ray.statistics import Asked
from tests.reference import LENGTHS, make_minimax, micro_batch_of, vocab_size
from tests.summed import close_covariance, close_moments, expected_norms

SITES = {"residual": (0, 1, 4), "router_topk": (1, 3)}
ASKED: Asked = {
    "moments": {"residual": (0, 1, 4)},
    "norms": {"residual": (0, 4)},
    "covariance": {"residual": (1,)},
    "experts": {"router_topk": (1, 2, 3)},
}


@pytest.fixture(scope="module")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("minimax") / "model", "bf16")


def stages(folder: Path, *bounds: int) -> list[Stage]:
    specs = [StageSpec(str(folder), LayerSpan(*span), "bfloat16", "auto", "cpu", 1) for span in pairwise(bounds)]
    return [load_stage(spec, lambda *_: None) for spec in specs]


def captured(chain: list[Stage], capture: CaptureSpec, folder: Path) -> dict[tuple[str, int | None], Any]:
    micro_batch, boundary, found = micro_batch_of(LENGTHS, vocab_size(folder)), None, {}
    for stage in chain:
        stage.begin(capture)
        output = stage.forward(micro_batch, boundary)
        boundary = output.boundary
        found |= {(layer.site, layer.layer): layer for layer in output.captured}
        assert {(layer.site, layer.layer): layer.statistics.keys() for layer in output.captured if layer.statistics} == {
            place: set(kinds) for place, kinds in stage.statistics.items()
        }
    return found


def statistics(found: Mapping[Any, Any]) -> dict[Any, bytes]:
    return {(*place, kind): values.tobytes() for place, layer in found.items() for kind, values in layer.statistics.items()}


def rows_of(layer: Any, column: int, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(layer.columns[column]).view(dtype).double().numpy()


@pytest.mark.parametrize("tokens", ["all", "last:3"])
def test_they_are_of_the_rows_that_are_stored(minimax: Path, tokens: str) -> None:
    """Of the chosen tokens, as they are rounded; experts of a layer too whose choices are not kept."""
    chain = stages(minimax, 0, 5)
    found = captured(chain, CaptureSpec(SITES, "bfloat16", Selection(tokens), ASKED), minimax)
    num_rows = sum(LENGTHS) if tokens == "all" else sum(min(3, length) for length in LENGTHS)
    for layer in (0, 1, 4):
        rows, taken = rows_of(found["residual", layer], 0, torch.bfloat16), found["residual", layer].statistics
        assert len(rows) == num_rows
        mean, squares, smallest, largest = taken["moments"]
        close_moments(mean, squares / num_rows, smallest, largest, rows)
    rows = rows_of(found["residual", 1], 0, torch.bfloat16)
    close_covariance(found["residual", 1].statistics["covariance"] / num_rows, rows)
    assert np.array_equal(found["residual", 4].statistics["norms"], expected_norms(rows_of(found["residual", 4], 0, torch.bfloat16)))
    for layer in (1, 3):
        ids, pairs = rows_of(found["router_topk", layer], 0, torch.int16).astype(int), found["router_topk", layer].statistics["experts"]
        assert np.array_equal(np.diagonal(pairs), np.bincount(ids.ravel(), minlength=len(pairs)))
    assert found["router_topk", 2].columns == ()
    assert np.diagonal(found["router_topk", 2].statistics["experts"]).sum() == num_rows * ids.shape[1]


def test_neither_what_is_kept_nor_how_layers_are_cut_changes_a_bit(minimax: Path) -> None:
    whole = captured(stages(minimax, 0, 5), CaptureSpec(SITES, "float32", statistics=ASKED), minimax)
    alone = captured(stages(minimax, 0, 2, 3, 5), CaptureSpec({}, "float32", statistics=ASKED), minimax)
    assert statistics(alone) == statistics(whole)
    assert {layer.columns for layer in alone.values()} == {()}
    assert len(statistics(whole)) == 3 + 2 + 1 + 3


def test_taking_them_leaves_the_rows_alone(minimax: Path) -> None:
    chain = stages(minimax, 0, 5)
    for store_dtype in ("bfloat16", "float32"):
        beside = captured(chain, CaptureSpec(SITES, store_dtype, statistics=ASKED), minimax)
        without = captured(chain, CaptureSpec(SITES, store_dtype), minimax)
        for place, layer in without.items():
            assert [column.tobytes() for column in beside[place].columns] == [column.tobytes() for column in layer.columns]


def test_rows_that_are_no_numbers_stop_a_run_that_keeps_none() -> None:
    part, micro_batch = PartSpec.of("residual", 0, "float16", 4), micro_batch_of((2, 1), 96)
    capture = Capture(micro_batch, (), Selection(), Encoder(), None, Statistics({part: frozenset({"moments"})}))
    capture.keep("residual", 0, torch.full((2, 2, 4), 1e30))
    with pytest.raises(StageError, match="Residual of layer 0, sequences 100, 101: values from 1e[+]30"):
        capture.finish()


def test_what_a_layer_lacks_is_refused(minimax: Path) -> None:
    (stage,) = stages(minimax, 0, 2)
    with pytest.raises(ConfigError, match="has layers 0 to"):
        stage.begin(CaptureSpec({}, "bfloat16", statistics={"moments": {"residual": (99,)}}))
