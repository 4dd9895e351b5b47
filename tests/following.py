"""A stream that follows a run on a thread of its own, while a test does to the run what it does."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

import m2ray
from m2ray.activations.reading.windows import Batch


def follow(run: str, layer: int) -> Future[list[Batch]]:
    """Begin to follow the residual of a run that has its job.json. What comes of it ends with the run, or in time without a driver."""
    stream = (
        m2ray.open_run(run).site("residual").layer(layer).stream(batch_rows=16, shuffle_buffer_bytes=1 << 16, follow=True, idle_s=240.0)
    )
    with_one_thread = ThreadPoolExecutor(1, thread_name_prefix="follow")
    try:
        return with_one_thread.submit(list, stream)
    finally:
        with_one_thread.shutdown(wait=False)


def assert_every_row_once(batches: list[Batch], run: str, layer: int) -> None:
    """Each row of the finished run, bit by bit."""
    view = m2ray.open_run(run).site("residual").layer(layer)
    assert view.is_complete
    expected = _rows(view.tokens()["sequence_id"].tolist(), view.tokens()["position"].tolist(), view.tensor())
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    found = _rows(columns["sequence_id"].tolist(), columns["position"].tolist(), columns["activations"])
    assert found == expected


def _rows(sequence_ids: list[int], positions: list[int], activations: torch.Tensor) -> list[tuple[int, int, bytes]]:
    bits = activations.contiguous().view(torch.uint8).numpy()
    return sorted(zip(sequence_ids, positions, (row.tobytes() for row in bits), strict=True))
