"""Summary: statistics of more and more rows of one site and layer, merged in float64.

Two groups of rows are merged by their counts, means and sums of deviations (Chan, Golub and LeVeque 1979), so that a mean far from zero
costs no digits. The result depends on the order in which groups are added, and on nothing else.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from m2ray.activations.statistics import Arrays

_STRIP = 128
"""Rows of a covariance that are merged at one time."""


class Summary:
    """What the rows that were added come to.

    Attributes:
        rows: how many they are.
        arrays: their statistics by kind, as `Arrays`; float64, and int64 for counts. Empty before the first.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.arrays: dict[str, npt.NDArray[Any]] = {}

    def add(self, rows: int, arrays: Arrays) -> None:
        """Merge the statistics of `rows` further rows, of the same kinds each time."""
        if not self.arrays:
            self.rows = rows
            self.arrays = {kind: values.astype(np.int64 if values.dtype.kind in "iu" else np.float64) for kind, values in arrays.items()}
            return
        assert arrays.keys() == self.arrays.keys(), f"{sorted(arrays)} came, not {sorted(self.arrays)}"
        for kind in ("norms", "experts"):
            if kind in arrays:
                self.arrays[kind] += arrays[kind]
        if "moments" in arrays:
            self._add_moments(rows, arrays)
        self.rows += rows

    def _add_moments(self, rows: int, arrays: Arrays) -> None:
        total = max(1, self.rows + rows)
        weight = self.rows * rows / total
        (mean_W, squares_W, smallest_W, largest_W), added = self.arrays["moments"], arrays["moments"]
        off_W = added[0] - mean_W
        if "covariance" in arrays:
            products_WW, added_WW = self.arrays["covariance"], arrays["covariance"]
            for start in range(0, len(off_W), _STRIP):
                strip = slice(start, start + _STRIP)
                products_WW[strip] += added_WW[strip]
                products_WW[strip] += np.multiply.outer(off_W[strip] * weight, off_W)
        mean_W += off_W * (rows / total)
        squares_W += added[1]
        squares_W += off_W * off_W * weight
        np.minimum(smallest_W, added[2], out=smallest_W)
        np.maximum(largest_W, added[3], out=largest_W)
