"""Statistics as one pass of numpy in float64 over all rows gives them, and how close those of a run have to be."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from m2ray.statistics import NORM_BINS

Rows = npt.NDArray[np.float64]


def expected_norms(rows_NW: Rows) -> npt.NDArray[np.int64]:
    """Rows by the bits of their norm as float32, without the last 18."""
    with np.errstate(over="ignore"):
        norms = np.sqrt((rows_NW**2).sum(axis=1)).astype(np.float32)
    return np.bincount(norms.view(np.uint32) >> 18, minlength=NORM_BINS)


def close_moments(mean: Any, variance: Any, smallest: Any, largest: Any, rows_NW: Rows) -> None:
    assert (np.abs(mean - rows_NW.mean(axis=0)) <= 1e-6 * np.abs(rows_NW).mean(axis=0)).all()
    assert (np.abs(variance - rows_NW.var(axis=0)) <= 1e-6 * rows_NW.var(axis=0) + 1e-18 * rows_NW.mean(axis=0) ** 2).all()
    assert np.array_equal(smallest, rows_NW.min(axis=0)), "minima are exact"
    assert np.array_equal(largest, rows_NW.max(axis=0)), "maxima are exact"


def close_covariance(covariance: Any, rows_NW: Rows) -> None:
    off = rows_NW - rows_NW.mean(axis=0)
    scale = np.sqrt(np.outer(rows_NW.var(axis=0), rows_NW.var(axis=0)))
    assert (np.abs(covariance - off.T @ off / len(rows_NW)) <= 1e-6 * scale + 1e-18).all()


def against_numpy(count: int, arrays: Mapping[str, Any], rows_NW: Rows) -> None:
    """Hold sums over `count` rows, as Arrays, against numpy."""
    assert count == len(rows_NW)
    mean, squares, smallest, largest = arrays["moments"]
    close_moments(mean, squares / count, smallest, largest, rows_NW)
    close_covariance(arrays["covariance"] / count, rows_NW)
    assert np.array_equal(arrays["norms"], expected_norms(rows_NW))
