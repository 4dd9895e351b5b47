"""What a model's final norm and its scores make of any layer's rows: the likeliest next token of each."""

from collections.abc import Callable

import torch

from m2ray.model.boundary import residual_dtype
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.final_norm import final_norm
from m2ray.model.scores import require_scores, scores_by
from m2ray.model.skeleton import build_skeleton
from m2ray.model.target_weights import target_weights

NextTokens = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def next_tokens(folder: str, fingerprint: str, layers_run: int, dtype: torch.dtype) -> NextTokens:
    """From rows [N, H] to the likeliest next token of each, int64 [N], and its probability, float32 [N], on the CPU.

    The head is read some MiB at a time. Scores are transformers' own (m2ray.model.scores).

    Args:
        folder: the run's checkpoint.
        fingerprint: the run's, of its model.
        layers_run: how many layers the run loaded, by which the fingerprint is taken.
        dtype: in which the run computed.

    Raises:
        RunConflictError, CheckpointError, ConfigError, StoreError: as `final_norm`, `target_weights` and `require_scores`.
    """
    norm, target = final_norm(folder, fingerprint, layers_run, dtype), target_weights(folder, fingerprint, layers_run)
    of_rows = residual_dtype(open_checkpoint(folder).config) or dtype
    require_scores(target.config)
    scores = scores_by(build_skeleton(target.config, torch.float32))

    def apply(rows_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed_NH = norm(rows_NH.to(of_rows)).to(dtype).float()  # Mamba's stay float32 up to the head, which takes its own dtype
        best_N = torch.full((len(rows_NH),), -torch.inf)
        ids_N, sum_N, start = torch.zeros(len(rows_NH), dtype=torch.int64), torch.full((len(rows_NH),), -torch.inf), 0
        for piece_VH in target.pieces("head", dtype):
            bias_V = None if target.head_bias is None else target.head_bias[start : start + len(piece_VH)]
            scores_NV = scores(normed_NH, piece_VH.float(), bias_V)
            highest_N, places_N = scores_NV.max(dim=1)
            ids_N = torch.where(highest_N > best_N, places_N + start, ids_N)
            best_N = torch.maximum(best_N, highest_N)
            sum_N = torch.logaddexp(sum_N, scores_NV.logsumexp(dim=1))
            start += len(piece_VH)
        return ids_N, (best_N - sum_N).exp()

    return apply
