"""What a micro-batch's rows of one site and layer come to, computed where the rows are, before they are copied anywhere.

In float32, piece by piece and centred, and the pieces summed in float64, products in float64 altogether: so that neither the number of rows nor a mean far from zero costs
digits, and little memory is needed beside the rows. What is found here is merged with other micro-batches' on the host. On a GPU kernels do
it (m2ray.model.fused_statistics), if Triton can make them.
"""

from collections.abc import Collection, Mapping, Sequence

import torch

from m2ray.batches import PartSpec
from m2ray.model import fused_statistics
from m2ray.statistics import NORM_BINS, NORM_SHIFT, PAIRS_AT_ONCE, PIECE_ROWS, ROWS_AT_ONCE


class Statistics:
    """Which statistics are taken of a stage's parts; none by default.

    Attributes:
        kinds: by part those that are taken of it.
    """

    def __init__(self, kinds: Mapping[PartSpec, frozenset[str]] | None = None, num_experts: int = 0) -> None:
        self.kinds = dict(kinds or {})
        self._num_experts = num_experts

    def of(self, part: PartSpec, columns: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of a part's rows of a micro-batch, a tensor [N, W] a column, as they are stored; on their device."""
        kinds = self.kinds.get(part, frozenset())
        if "experts" in kinds:
            return experts_statistics(columns[0], self._num_experts)
        return rows_statistics(kinds, columns[0]) if kinds else {}


def rows_statistics(kinds: Collection[str], rows_NW: torch.Tensor) -> dict[str, torch.Tensor]:
    """The kinds "moments", "norms" and "covariance" of rows [N, W] in the dtype that they are stored in, on their device.

    Returns:
        `moments` float64 [4, W]: mean, sum of squared deviations from it, minimum, maximum. `norms` int32 [NORM_BINS]: rows by
        the bin of their norm. `covariance` float32 [W, W]: sum of the products of deviations. Of no rows: zeros, and no extremes.
    """
    found = {}
    by_kernels = bool(len(rows_NW)) and fused_statistics.has_kernels(rows_NW.device, rows_NW.dtype)
    if "moments" in kinds:
        found["moments"], centre_W, rest_W = fused_statistics.moments(rows_NW) if by_kernels else _moments(rows_NW)
        if "covariance" in kinds:
            found["covariance"] = _products(rows_NW, centre_W, rest_W)
    if "norms" in kinds:
        found["norms"] = fused_statistics.norms(rows_NW) if by_kernels else _norms(rows_NW)
    return found


def experts_statistics(expert_ids_NK: torch.Tensor, num_experts: int) -> dict[str, torch.Tensor]:
    """`experts`, int32 [E, E]: rows that chose both experts; on the diagonal those that chose the one."""
    pairs = expert_ids_NK.new_zeros(num_experts**2, dtype=torch.int32)
    one = pairs.new_ones(1)
    for some_NK in expert_ids_NK.split(max(1, PAIRS_AT_ONCE // expert_ids_NK.shape[1] ** 2)):
        ids_NK = some_NK.long()
        both_NKK = ids_NK[:, :, None] * num_experts + ids_NK[:, None, :]
        pairs.index_add_(0, both_NKK.view(-1), one.expand(both_NKK.numel()))
    return {"experts": pairs.view(num_experts, num_experts)}


def _moments(rows_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The moments; and about which values float32 [W] deviations are taken, and the mean of these deviations float64 [W]."""
    num_rows, width = rows_NW.shape
    sums_W = rows_NW.new_zeros(width, dtype=torch.float64)
    if not num_rows:
        none_W = torch.full_like(sums_W, torch.inf)
        return torch.stack([sums_W, sums_W, none_W, -none_W]), sums_W.float(), sums_W
    for some_NW in rows_NW.split(ROWS_AT_ONCE):
        sums_W += _sums(some_NW)
    smallest_W, largest_W = torch.aminmax(rows_NW, dim=0)
    # Near the mean, and a value that rows may have: deviations of 16-bit rows are short numbers then, and their products exact. Of a channel
    # that never changes they are zero.
    centre_W = torch.where(smallest_W == largest_W, smallest_W, (sums_W / num_rows).to(rows_NW.dtype)).float()
    rest_W, squares_W = torch.zeros_like(sums_W), torch.zeros_like(sums_W)
    for some_NW in rows_NW.split(ROWS_AT_ONCE):
        off_NW = some_NW - centre_W
        rest_W += _sums(off_NW)
        squares_W += _sums(off_NW.square_())
    rest_W /= num_rows
    squares_W = (squares_W - num_rows * rest_W.square()).clamp_(min=0)
    return torch.stack([centre_W.double() + rest_W, squares_W, smallest_W.double(), largest_W.double()]), centre_W, rest_W


def _sums(values_NW: torch.Tensor) -> torch.Tensor:
    """Of the rows, float64 [W]: in float32 within a piece, all pieces by one kernel, since a launch takes as long as adding one up."""
    num_pieces = len(values_NW) // PIECE_ROWS
    whole = num_pieces * PIECE_ROWS
    sums_PW = values_NW[:whole].unflatten(0, (num_pieces, PIECE_ROWS)).sum(dim=1, dtype=torch.float32)
    found: torch.Tensor = sums_PW.double().sum(dim=0) + values_NW[whole:].sum(dim=0, dtype=torch.float32)
    return found


def _products(rows_NW: torch.Tensor, centre_W: torch.Tensor, rest_W: torch.Tensor) -> torch.Tensor:
    """Sums of the products of deviations from the mean, which is `centre_W` + `rest_W`."""
    products_WW = torch.outer(rest_W, rest_W).mul_(-len(rows_NW))
    for piece_NW in rows_NW.split(PIECE_ROWS):
        # In float32 sums of 256 products were off by 2e-6 of themselves, on CPUs and on an H200, which multiplies float64 as fast.
        off_NW = (piece_NW - centre_W).double()
        products_WW += off_NW.T @ off_NW
    return products_WW.float()


def _norms(rows_NW: torch.Tensor) -> torch.Tensor:
    counts = rows_NW.new_zeros(NORM_BINS, dtype=torch.int32)
    for piece_NW in rows_NW.split(PIECE_ROWS):
        norms_N = torch.linalg.vector_norm(piece_NW, dim=1, dtype=torch.float64).float()
        bins_N = norms_N.view(torch.int32) >> NORM_SHIFT
        counts.index_add_(0, bins_N, torch.ones_like(bins_N))
    return counts
