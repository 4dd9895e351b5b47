"""A bit flipped in any file of a finished run is named or harmless: no wrong value is read in silence, and nothing ends in a traceback."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from m2ray.activations.reading.reader import open_run
from m2ray.activations.reading.verify import verify
from m2ray.batches import PartSpec
from m2ray.errors import M2rayError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

FLIPS = 150
"""Of 2,000 that were tried once; these are the first."""

PARTS = (runs.PARTS[1], PartSpec.of("final_norm", None, "float16", 130))


def everything(folder: Path) -> list[Any]:
    """All that a reader gives of a run, by each way to it."""
    run = open_run(folder)
    found: list[Any] = [asdict(run.job), run.is_complete, run.num_tokens, run.sequences.to_pylist(), run.tokens().tobytes()]
    for view in (run.site("residual").layer(7), run.site("final_norm")):
        rows = np.random.default_rng(0).permutation(view.num_tokens)
        tensors = [view.tensor(), view.rows(rows), view.sequence(3), *(shard.activations for shard in view.shards())]
        for batch in view.stream(batch_rows=17):
            tensors += [tensor.clone() for tensor in batch.values()]
        found += [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flipped") / "run"
    runs.finished_run(LocalStore(folder), PARTS, ("none", "planes"))
    return folder


def flip(folder: Path, flips: int, seed: int = 0) -> tuple[int, int]:
    """Flip one bit at a time, anywhere in the folder, and read everything; how many were named, and how many made no difference."""
    expected, files = everything(folder), sorted(path for path in folder.rglob("*") if path.is_file())
    ends, rng = np.cumsum([path.stat().st_size for path in files]), np.random.default_rng(seed)
    named = 0
    for place in rng.integers(0, ends[-1] * 8, flips).tolist():
        number = int(np.searchsorted(ends, place // 8, "right"))
        path, good = files[number], files[number].read_bytes()
        changed = bytearray(good)
        changed[place // 8 - int(ends[number]) + len(good)] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert everything(folder) == expected, f"bit {place} of the run, in {path}"
        except M2rayError as error:
            named += 1
            assert path.name in str(error) or path.name in ("job.json", "_SUCCESS"), f"{error}, but the flip is in {path}"
        finally:
            path.write_bytes(good)
    return named, flips - named


def test_a_flipped_bit_is_named_or_harmless(run: Path) -> None:
    named, _ = flip(run, FLIPS)
    assert named > FLIPS // 2


def test_without_checks_rows_are_as_they_lie(run: Path) -> None:
    path = next((run / "data/site=residual").rglob("shard-000000-*"))
    good = path.read_bytes()
    rows = np.concatenate([runs.bits(runs.PARTS[1], i) for i in runs.SHARD_SEQUENCES[0]])
    place = good.index(rows[0].tobytes())
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    try:
        view = open_run(run, check="none").site("residual").layer(7)
        assert view.rows([0]).view(torch.uint8).numpy()[0].tobytes() == bytes([rows[0, 0] ^ 1]) + rows[0, 1:].tobytes()
        with pytest.raises(M2rayError, match="do not have the CRC"):
            open_run(run).site("residual").layer(7).rows([0])
        assert {damage.key for damage in verify(LocalStore(run), checksums=True).damages} == {path.relative_to(run).as_posix()}
        with (
            pytest.raises(OSError, match="CRC checksum verification failed"),
            pq.ParquetFile(path, page_checksum_verification=True) as stock,
        ):
            stock.read()
    finally:
        path.write_bytes(good)
