"""A bit flipped in any file of a finished run is named or harmless: no wrong value is read in silence, and nothing ends in a traceback."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from m2ray.activations.reading.reader import open_run
from m2ray.activations.reading.verify import verify
from m2ray.activations.schema import Compression
from m2ray.batches import PartSpec
from m2ray.errors import M2rayError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

FLIPS, SEED = (int(os.environ.get(f"M2RAY_TEST_{name}", value)) for name, value in (("FLIPS", 150), ("FLIPS_SEED", 0)))
"""`M2RAY_TEST_FLIPS=2000` takes half a minute of a core."""

PARTS = (runs.PARTS[1], PartSpec.of("final_norm", None, "float16", 130))


def everything(folder: Path, sites: Sequence[str] = ("residual", "final_norm")) -> dict[str, Any]:
    """All that a reader gives of a run, by each way to it; of the rows those of some sites."""
    run = open_run(folder)
    found: dict[str, Any] = {"run": [asdict(run.job), run.is_complete, run.num_tokens, run.sequences.to_pylist(), run.tokens().tobytes()]}
    for site in sites:
        view = run.site(site).layer(7) if site == "residual" else run.site(site)
        rows = np.random.default_rng(0).permutation(view.num_tokens)
        tensors = [view.tensor(), view.rows(rows), view.sequence(3), *(shard.activations for shard in view.shards())]
        for batch in view.stream(batch_rows=17):
            tensors += [tensor.clone() for tensor in batch.values()]
        found[site] = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flipped") / "run"
    runs.finished_run(LocalStore(folder), PARTS, ("none", "planes"))
    return folder


def flip(folder: Path, flips: int, seed: int) -> int:
    """Flip one bit at a time, in any file of the folder, and read what that file could change; how many were named. The others make no difference."""
    expected, files = everything(folder), sorted(path for path in folder.rglob("*") if path.is_file())
    rng = np.random.default_rng(seed)
    named = 0
    for number in range(flips):
        path = files[number % len(files)]
        good = path.read_bytes()
        place = int(rng.integers(0, len(good) * 8))
        changed = bytearray(good)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        sites = [site for site in ("residual", "final_norm") if f"site={site}" in str(path)]
        try:
            found = everything(folder, sites or ("residual", "final_norm"))
            assert found == {name: expected[name] for name in found}, f"bit {place} of {path}"
        except M2rayError as error:
            named += 1
            assert path.name in str(error) or path.name in ("job.json", "_SUCCESS"), f"{error}, but the flip is in {path}"
        finally:
            path.write_bytes(good)
    return named


@pytest.mark.timeout(max(300, FLIPS))
@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "unfinished"])
def test_a_flipped_bit_is_named_or_harmless(run: Path, tmp_path: Path, *, is_finished: bool) -> None:
    """A finished run is read by its manifest, an unfinished one by its commits."""
    folder = shutil.copytree(run, tmp_path / "run")
    if not is_finished:
        for name in ("_SUCCESS", "manifest.parquet"):
            (folder / name).unlink()
    named = flip(folder, FLIPS // 2, SEED)
    print(f"{named} of {FLIPS // 2} flips were named, the others made no difference")  # noqa: T201 - what -s shows
    assert named > FLIPS // 4


@pytest.mark.parametrize("compression", ["none", "planes"])
def test_pages_of_another_part_are_refused(tmp_path: Path, compression: Compression) -> None:
    """Each of them is whole, and its header right: layer 7 of the first shard has pages of layer 11."""
    runs.finished_run(LocalStore(tmp_path), compressions=(compression,))
    path, other = (next((tmp_path / "data/site=residual" / f"layer={layer:03d}").glob("shard-000000-*")) for layer in (7, 11))
    data, theirs = bytearray(path.read_bytes()), other.read_bytes()
    for number in range(pq.read_metadata(path).num_row_groups):
        chunk, their_chunk = ([*each.row_group(number).to_dict()["columns"]][-1] for each in map(pq.read_metadata, (path, other)))
        begin, their_begin, size = chunk["data_page_offset"], their_chunk["data_page_offset"], chunk["total_compressed_size"]
        data[begin : begin + size] = theirs[their_begin : their_begin + size]
    assert bytes(data) != path.read_bytes()
    path.write_bytes(data)

    damages = verify(LocalStore(tmp_path), checksums=True).damages
    assert {damage.key for damage in damages} == {path.relative_to(tmp_path).as_posix()}
    view = open_run(tmp_path).layer(7)
    reads: list[Callable[[], object]] = [view.tensor, partial(view.rows, [1]), partial(view.sequence, 0)]
    for read in [*reads, lambda: list(view.shards()), lambda: list(view.stream(batch_rows=17))]:
        with pytest.raises(M2rayError, match=f"{path.name}.* is not the one whose CRC the footer has"):
            read()


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
