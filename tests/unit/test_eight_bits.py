"""Rows in 8 bits: encoded as the page says, read back by every reader, refused where a value is none, and their loss is told."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from m2ray.activations.reading.reader import open_run
from m2ray.activations.schema import part_key
from m2ray.batches import CapturedLayer, MicroBatch, PartSpec
from m2ray.errors import StageError
from m2ray.model import eight_bits
from m2ray.model.capture import Capture
from m2ray.model.eight_bits import Encoder
from m2ray.selection import Selection
from m2ray.sites import parts_of_run
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

WIDTH = 300
LARGEST = {"float8": 448.0, "int8": 127.0}
STORED = pytest.mark.parametrize("store_dtype", ["float8", "int8"])


def part_of(store_dtype: str, layer: int = 7) -> PartSpec:
    (part,) = parts_of_run({"residual": (layer,)}, store_dtype, WIDTH)
    return part


def rows_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    """Rows whose channels differ in scale by far more than bits reach: a residual stream has a few such channels."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, WIDTH, generator=generator) * torch.exp(torch.randn(WIDTH, generator=generator))
    rows[:, 7] *= 1000
    return rows.bfloat16()


def exact(rows: torch.Tensor, store_dtype: str) -> torch.Tensor:
    """What is to be stored, by whole numbers of float64 and without a block at a time."""
    out = torch.empty(rows.shape, dtype=torch.float64)
    for start in range(0, WIDTH, 128):
        block = rows[:, start : start + 128].double()
        scale = (block.abs().amax(1, keepdim=True).float() / LARGEST[store_dtype]).double()
        quotient = (block.float() / scale.float()).double()
        if store_dtype == "int8":
            out[:, start : start + 128] = torch.from_numpy(np.rint(quotient.numpy())) * scale
        else:
            exponent = torch.frexp(quotient)[1].clamp(min=-5)
            step = 2.0 ** (exponent - 4).double()
            out[:, start : start + 128] = torch.from_numpy(np.rint((quotient / step).numpy())) * step * scale
    return out


def decoded(columns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    values, scales = columns
    return values.double() * scales.double().repeat_interleave(128, dim=1)[:, : values.shape[1]]


@STORED
def test_a_channel_is_its_scale_times_the_nearest_of_8_bits(store_dtype: str) -> None:
    rows = rows_of(40)
    rows[3] = 0
    rows[4] = 1e-38
    rows[5, 0] = torch.finfo(torch.bfloat16).max
    values, scales = Encoder().encode(part_of(store_dtype), rows)
    assert (tuple(values.shape), tuple(scales.shape), scales.dtype) == ((40, WIDTH), (40, 3), torch.float32)
    assert values.float().isfinite().all()
    assert torch.equal(values[3].float(), torch.zeros(WIDTH))
    others = [number for number in range(40) if number not in (3, 4)]
    assert torch.equal(decoded((values, scales))[others], exact(rows, store_dtype)[others])


@STORED
def test_the_loss_is_what_was_lost(store_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is encoded at a time."""
    rows, part, encoder = rows_of(100), part_of(store_dtype), Encoder()
    whole = encoder.encode(part, rows[:60]), encoder.encode(part, rows[60:])
    monkeypatch.setattr(eight_bits, "ENCODED_BYTES", 4 * WIDTH * 7)
    pieces = encoder.encode(part, rows)
    for column in range(2):
        assert torch.equal(torch.cat([each[column] for each in whole]).float(), pieces[column].float())
    ((site, layer, lost, total),) = encoder.losses()
    assert (site, layer) == ("residual", 7)
    assert lost == pytest.approx(2 * float((decoded(pieces) - rows.double()).square().sum()), rel=1e-5)
    assert total == pytest.approx(2 * float(rows.double().square().sum()), rel=1e-5)
    assert 0.001 < (lost / total) ** 0.5 < 0.04


def test_no_rows_are_encoded_too() -> None:
    values, scales = Encoder().encode(part_of("int8"), rows_of(0))
    assert (tuple(values.shape), tuple(scales.shape)) == ((0, WIDTH), (0, 3))


def capture(part: PartSpec, micro_batch: MicroBatch, hidden_BTH: torch.Tensor) -> tuple[CapturedLayer, ...]:
    kept = Capture(micro_batch, [part], Selection(), Encoder(), None)
    kept.keep(part.site, part.layer, hidden_BTH)
    kept.end()
    return kept.finish()


@STORED
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused_with_its_sequence(store_dtype: str, bad: float) -> None:
    micro_batch = runs.micro_batches(runs.shard(0))[0]
    hidden_BTH = torch.randn(*micro_batch.token_ids_BT.shape, WIDTH).bfloat16()
    hidden_BTH[1, 2, 299] = bad
    with pytest.raises(StageError, match=f"Residual of layer 7, sequences {micro_batch.sequence_ids[1]}: values from"):
        capture(part_of(store_dtype), micro_batch, hidden_BTH)


@pytest.fixture(scope="module", params=["float8", "int8"])
def stored(request, tmp_path_factory) -> tuple[Path, PartSpec, Mapping[int, torch.Tensor]]:
    """A run of real parts in 8 bits, and the rows of each sequence before they were encoded."""
    folder, part = tmp_path_factory.mktemp("stored"), part_of(request.param)
    record = runs.job(LocalStore(folder), [part])
    run = runs.claim_run(LocalStore(folder), record)
    rows: dict[int, torch.Tensor] = {}
    for shard in runs.shards():
        writer = runs.writer(run.store, run.job)
        for micro_batch in runs.micro_batches(shard):
            hidden_BTH = torch.zeros(*micro_batch.token_ids_BT.shape, WIDTH, dtype=torch.bfloat16)
            for place, number in enumerate(micro_batch.sequence_ids.tolist()):
                rows[number] = rows_of(runs.token_count(number), number)
                hidden_BTH[place, : len(rows[number])] = rows[number]
            writer.submit("a1", micro_batch, capture(part, micro_batch, hidden_BTH), timeout_s=10)
        assert run.commit(shard, "a1", writer.collect(shard.index, "a1", 10), [(len(shard.sequence_ids), 1)], 1.0)
        writer.close()
    return folder, part, rows


def test_readers_decode(stored: tuple[Path, PartSpec, Mapping[int, torch.Tensor]]) -> None:
    folder, part, rows = stored
    order = [number for ids in runs.SHARD_SEQUENCES for number in ids]
    store_dtype = "int8" if part.columns[0].dtype == "int8" else "float8"
    expected = torch.cat([exact(rows[number], store_dtype) for number in order]).float()
    view = open_run(folder).layer(7)
    assert view.tensor().dtype == torch.float32
    assert torch.equal(view.tensor(), expected)
    assert torch.equal(view.sequence(4), exact(rows[4], store_dtype).float())
    assert torch.equal(view.rows([5, 0, 60]), expected[[5, 0, 60]])
    assert torch.equal(torch.cat([shard.activations for shard in view.shards()]), expected)
    assert view.mean_norm() == pytest.approx(float(expected.double().norm(dim=1).mean()))
    found = {
        (sequence, position): row
        for batch in view.stream(batch_rows=16)
        for sequence, position, row in zip(batch["sequence_id"].tolist(), batch["position"].tolist(), batch["activations"], strict=True)
    }
    tokens = open_run(folder).tokens()
    assert torch.equal(torch.stack([found[sequence, position] for sequence, position, _ in tokens.tolist()]), expected)
    assert next(view.iterator(rows=8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_part_says_what_it_holds(stored: tuple[Path, PartSpec, Mapping[int, torch.Tensor]]) -> None:
    folder, part, _ = stored
    schema = pq.read_schema(folder / part_key(part, 0, "a1"))
    assert schema.names == ["sequence_id", "position", "token_id", "activation", "scale"]
    assert [schema.field(name).type.byte_width for name in ("activation", "scale")] == [300, 12]
    assert schema.metadata[b"m2ray.dtype"].decode() == f"{part.columns[0].dtype}, float32"
    assert schema.metadata[b"m2ray.shape"] == b"[300], [3]"


def test_the_documented_lines_decode(stored: tuple[Path, PartSpec, Mapping[int, torch.Tensor]]) -> None:
    folder, part, _ = stored
    page = (Path(__file__).parents[2] / "docs" / "data_format.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if "def numbers" in block or "def decode" in block:
            exec(block, names)
    table = pq.read_table(folder / part_key(part, 0, "a1"), partitioning=None)
    found = names["decode"](table["activation"].to_pylist(), table["scale"].to_pylist(), getattr(torch, part.columns[0].dtype))
    assert torch.equal(found, next(open_run(folder).layer(7).shards()).activations)
