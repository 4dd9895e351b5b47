"""What statistics of rows come to, held against numpy in float64; what `statistics` asks for; and what it is planned to take."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from m2ray import statistics
from m2ray.activations.statistics import encode
from m2ray.activations.writing.summary import Summary
from m2ray.batches import Column, PartSpec
from m2ray.errors import ConfigError
from m2ray.model import fused_statistics
from m2ray.model.statistics import Statistics
from m2ray.statistics import NORM_BINS, norm_edges, statistics_of_run
from tests.summed import against_numpy, expected_norms

WIDTH = 40
ALL = frozenset({"moments", "norms", "covariance"})


def rows_of(num_rows: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Channels of very different means and scales, as a residual stream has them; one never changes."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-3, 2, WIDTH)
    mixed = torch.randn((num_rows, WIDTH), generator=generator) @ torch.randn((WIDTH, WIDTH), generator=torch.Generator().manual_seed(9))
    rows = mixed * scales + 30 * scales * torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    rows[:, 3] = 0.1
    return rows.to(dtype)


def part_of(dtype: str, width: int = WIDTH) -> PartSpec:
    return PartSpec.of("residual", 3, dtype, width)


def summed(pieces: Sequence[torch.Tensor], dtype: str) -> Summary:
    part, summary = part_of(dtype), Summary()
    taken = Statistics({part: ALL})
    for rows in pieces:
        summary.add(len(rows), {kind: values.numpy() for kind, values in taken.of(part, [rows]).items()})
    return summary


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("sizes", [[1], [5000], [1, 0, 2047, 3], [0, 700, 1200]])
def test_they_are_numpys_in_float64(dtype: str, sizes: list[int]) -> None:
    """Micro-batches of any size, in pieces and not, of means far from zero, and of a channel that never changes."""
    pieces = [rows_of(size, getattr(torch, dtype), seed) for seed, size in enumerate(sizes)]
    summary = summed(pieces, dtype)
    against_numpy(summary.rows, summary.arrays, torch.cat(pieces).double().numpy())
    assert summary.arrays["moments"][1][3] == 0, "the variance of a constant is none"


def test_their_order_alone_decides_their_bits() -> None:
    pieces = [rows_of(size, torch.bfloat16, size) for size in (300, 20, 999)]
    once, again, otherwise = (summed(each, "bfloat16") for each in (pieces, pieces, pieces[::-1]))
    assert all(np.array_equal(once.arrays[kind], again.arrays[kind]) for kind in ALL)
    assert not np.array_equal(once.arrays["moments"], otherwise.arrays["moments"])


def test_no_rows_come_to_nothing() -> None:
    summary = summed([rows_of(0, torch.bfloat16)], "bfloat16")
    mean, squares, smallest, largest = summary.arrays["moments"]
    assert summary.rows == 0
    assert not mean.any()
    assert not squares.any()
    assert not summary.arrays["norms"].any()
    assert not summary.arrays["covariance"].any()
    assert (smallest == np.inf).all()
    assert (largest == -np.inf).all()


def test_norms_fall_into_bins_that_go_by_their_bits() -> None:
    edges = norm_edges()
    assert len(edges) == NORM_BINS + 1
    assert (np.diff(edges[:8161]) > 0).all()
    assert edges[8160] == np.inf
    at_one = np.searchsorted(edges, 1.0)
    assert edges[at_one] == 1
    assert edges[at_one + 1] == 1 + 1 / 32
    assert edges[at_one + 32] == 2
    norms = torch.tensor([[0.0], [1.0], [1 + 1 / 32], [1.0312], [-3.0], [3.4e38], [1e-45]])
    counts = Statistics({part_of("float32", 1): frozenset({"norms"})}).of(part_of("float32", 1), [norms])["norms"].numpy()
    assert np.array_equal(counts, expected_norms(norms.double().numpy()))
    assert counts.sum() == 7
    assert counts[at_one] == 2


def test_experts_are_counted_alone_and_in_pairs() -> None:
    """Equal to counting the chosen ids one by one."""
    num_experts, rng = 7, np.random.default_rng(3)
    ids = np.stack([rng.permutation(num_experts)[:3] for _ in range(20_000)]).astype(np.int16)
    part = PartSpec("router_topk", 1, (Column("expert_ids", "int16", 3), Column("expert_weights", "float32", 3)))
    pairs = Statistics({part: frozenset({"experts"})}, num_experts).of(part, [torch.from_numpy(ids), torch.ones(len(ids), 3)])["experts"]
    assert np.array_equal(np.diagonal(pairs), np.bincount(ids.ravel(), minlength=num_experts))
    both = [((ids == one).any(axis=1) & (ids == other).any(axis=1)).sum() for one in range(num_experts) for other in range(num_experts)]
    assert np.array_equal(pairs.numpy().ravel(), both)


# -- what is asked for ------------------------------------------------------------------------------------------------

RESIDUALS = [PartSpec.of("residual", layer, "bfloat16", WIDTH) for layer in (0, 2, 5)]
TOPK = PartSpec("router_topk", 2, (Column("expert_ids", "int16", 3), Column("expert_weights", "float32", 3)))
FINAL = PartSpec.of("final_norm", None, "bfloat16", WIDTH)


def test_nothing_is_tried_on_rows_that_no_statistics_are_taken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are proved in the dtype of the rows: a router's choices are integers, and have no norms."""
    monkeypatch.setattr(fused_statistics, "has_kernels", lambda *_: pytest.fail("kernels are proved"))
    part = PartSpec("router_topk", 1, (Column("expert_ids", "int16", 2),))
    assert Statistics().of(part, [torch.tensor([[1, 2]], dtype=torch.int16)]) == {}


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (None, {}),
        ("moments", {"moments": {"residual": (0, 2, 5), "final_norm": ()}}),
        ("norms:all, covariance:2,5", {"norms": {"residual": (0, 2, 5), "final_norm": ()}, "covariance": {"residual": (2, 5)}}),
        (" covariance: 2 , moments:0 ", {"moments": {"residual": (0,)}, "covariance": {"residual": (2,)}}),
        ("experts:all", {"experts": {"router_topk": (1, 2)}}),
        ("experts:1-2", {"experts": {"router_topk": (1, 2)}}),
    ],
)
def test_a_kind_names_layers_and_is_of_all_sites_of_hidden_width(text: str | None, asked: dict[str, object]) -> None:
    assert statistics_of_run(text, [*RESIDUALS, TOPK, FINAL], (1, 2), 6) == asked


def test_a_covariance_brings_its_means() -> None:
    asked = statistics_of_run("covariance:2, experts:1", RESIDUALS, (1,), 6)
    assert statistics.places(asked) == {("residual", 2): {"covariance", "moments"}, ("router_topk", 1): {"experts"}}
    assert statistics.statistic_sites(asked) == {"residual": (2,), "router_topk": (1,)}


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        statistics_of_run("median:2, norms:0, norms:1, covariance:2,3, moments:9, experts:4-3", RESIDUALS, (1,), 6)
    said = str(caught.value)
    for expected in ("no 'median'", "norms comes twice", "covariance: nothing of layer 3", "layer 9 is out of range", "runs backwards"):
        assert expected in said
    for text, expected in ((",", "',' names none"), (" ", "' ' names none"), ("moments:", "moments: '' is neither a layer nor a range")):
        with pytest.raises(ConfigError, match=expected):
            statistics_of_run(text, RESIDUALS, (1,), 6)
    with pytest.raises(ConfigError, match="experts: nothing chooses experts"):
        statistics_of_run("experts:all", RESIDUALS, (), 6)


# -- what they take ---------------------------------------------------------------------------------------------------


def test_what_a_shard_leaves_is_what_is_planned() -> None:
    rows = rows_of(3000, torch.bfloat16)
    for kinds in (frozenset({"moments"}), ALL):
        summary = Summary()
        summary.add(
            len(rows),
            {kind: each.numpy() for kind, each in Statistics({part_of("bfloat16"): kinds}).of(part_of("bfloat16"), [rows]).items()},
        )
        found, planned = len(encode({("residual", 3): summary.arrays})), statistics.contribution_bytes(kinds, WIDTH)
        assert found <= 1.3 * planned + 500
