"""Parts: every one opens in stock pyarrow, DuckDB, polars and pandas, and gives back the bits that went in."""

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from m2ray.activations.schema import LAYER_CONVENTION, parse_part_key, part_key, part_schema
from m2ray.batches import Column, PartSpec
from m2ray.storage import open_store
from tests.unit import activation_runs as runs

SITES = (
    PartSpec.of("residual", 3, "bfloat16", 24),
    PartSpec.of("attention", 3, "float16", 31),
    PartSpec.of("mlp", 3, "float32", 17),
    PartSpec.of("embedding", None, "bfloat16", 24),
    PartSpec("router_topk", 3, (Column("expert_ids", "int16", 3), Column("expert_weights", "float32", 3))),
    PartSpec("mlp_in", 3, (Column("activation", "int8", 200), Column("scale", "float32", 2))),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run with parts of every dtype, odd widths, and a site of the whole model."""
    folder = tmp_path_factory.mktemp("run")
    runs.finished_run(open_store(folder), SITES)
    return folder


def expected(spec: PartSpec) -> list[tuple[int | bytes, ...]]:
    """The rows of one part's site and layer, over all shards."""
    rows = []
    for shard in runs.shards():
        for sequence_id in shard.sequence_ids.tolist():
            columns = [[row.tobytes() for row in column] for column in runs.by_column(spec, runs.bits(spec, sequence_id))]
            tokens = runs.token_ids(sequence_id).tolist()
            rows += [(sequence_id, position, token, *(column[position] for column in columns)) for position, token in enumerate(tokens)]
    return sorted(rows)


def glob(folder: Path, spec: PartSpec) -> str:
    return str(folder / Path(part_key(spec, 0, "a")).parent / "*.parquet")


def test_keys() -> None:
    assert part_key(SITES[0], 12, "9f3c") == "data/site=residual/layer=003/shard-000012-9f3c.parquet"
    assert part_key(SITES[3], 1_234_567, "9f3c") == "data/site=embedding/shard-1234567-9f3c.parquet"
    assert parse_part_key("data/site=embedding/shard-1234567-9f3c.parquet") == (1_234_567, "9f3c")
    for foreign in ("data/notes.parquet", "other/site=residual/shard-000001-9f3c.parquet", "data/site=x/shard-1-9f3c.parquet", "job.json"):
        assert parse_part_key(foreign) is None


def test_columns_and_footer(folder: Path) -> None:
    for spec in SITES:
        path = folder / part_key(spec, 1, "0000000000a1")
        schema = pq.read_schema(path)
        assert [(field.name, field.type, field.nullable) for field in schema] == [
            ("sequence_id", pa.int64(), False),
            ("position", pa.int32(), False),
            ("token_id", pa.int32(), False),
            *((column.name, pa.binary(column.row_bytes), False) for column in spec.columns),
        ]
        footer = {key.decode(): value.decode() for key, value in schema.metadata.items()}
        assert footer == {
            "m2ray.format_version": "2",
            "m2ray.model": "/models/m",
            "m2ray.prompts": "prompts.jsonl",
            "m2ray.versions": footer["m2ray.versions"],
            "m2ray.run_id": footer["m2ray.run_id"],
            "m2ray.model_type": "minimax_m2",
            "m2ray.num_layers": "12",
            "m2ray.model_digest": "aa",
            "m2ray.tokenizer_digest": "bb",
            "m2ray.layer_convention": LAYER_CONVENTION,
            "m2ray.site": spec.site,
            "m2ray.layer": "" if spec.layer is None else "3",
            "m2ray.dtype": {"router_topk": "int16, float32", "mlp_in": "int8, float32"}.get(spec.site, spec.columns[0].dtype),
            "m2ray.shape": {"router_topk": "[3], [3]", "mlp_in": "[200], [2]"}.get(spec.site, f"[{spec.columns[0].width}]"),
            "m2ray.byte_order": "little",
            "m2ray.compression": "none",
            "m2ray.shard": "1",
            "m2ray.attempt": "0000000000a1",
        }
        assert schema.equals(part_schema(spec, {}, 0, "a"))


def test_activations_are_plain_and_tokens_can_be_pruned(folder: Path) -> None:
    metadata = pq.read_metadata(folder / part_key(SITES[0], 0, "0000000000a0"))
    micro_batches = runs.micro_batches(runs.shard(0))
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [each.num_tokens for each in micro_batches]
    for number, micro_batch in enumerate(micro_batches):
        columns = {column.path_in_schema: column for column in (metadata.row_group(number).column(i) for i in range(4))}
        activation = columns["activation"]
        assert (activation.compression, activation.statistics, activation.has_dictionary_page) == ("UNCOMPRESSED", None, False)
        ids = columns["sequence_id"].statistics
        assert (ids.min, ids.max) == (micro_batch.sequence_ids[0], micro_batch.sequence_ids[-1])
        positions = columns["position"].statistics
        assert (positions.min, positions.max) == (0, micro_batch.token_counts.max() - 1)


@pytest.mark.parametrize("spec", SITES, ids=lambda spec: spec.site)
def test_stock_readers_give_the_same_bits(folder: Path, spec: PartSpec) -> None:
    columns = ["sequence_id", "position", "token_id", *(column.name for column in spec.columns)]
    rows = expected(spec)
    files = sorted(folder.glob(glob(folder, spec).removeprefix(f"{folder}/")))
    assert len(files) == 3

    table = ds.dataset(files).to_table(columns=columns)
    assert sorted(tuple(row.values()) for row in table.to_pylist()) == rows

    found = duckdb.sql(f"select {', '.join(columns)} from '{glob(folder, spec)}'").fetchall()
    assert sorted(found) == rows

    assert sorted(pl.read_parquet(glob(folder, spec), hive_partitioning=False).select(columns).rows()) == rows

    frame = pd.concat([pd.read_parquet(file) for file in files])
    assert sorted(frame[columns].itertuples(index=False, name=None)) == rows


def test_the_data_folder_is_one_hive_dataset(folder: Path) -> None:
    """What a user does without a line of m2ray: pick a site and a layer by folder, then turn bytes into numbers."""
    data = ds.dataset(folder / "data", format="parquet", partitioning="hive", schema=None)
    mlp = data.to_table(filter=(ds.field("site") == "mlp") & (ds.field("layer") == 3), columns=["sequence_id", "position"])
    assert len(mlp) == sum(shard.num_tokens for shard in runs.shards())
    one = duckdb.sql(
        f"select activation from read_parquet('{folder}/data/site=mlp/*/*.parquet', hive_partitioning=true) "
        "where layer = 3 and sequence_id = 4 order by position"
    ).fetchall()
    decoded = np.frombuffer(b"".join(row[0] for row in one), np.float32).reshape(-1, 17)
    assert np.array_equal(decoded.view(np.uint8), runs.bits(SITES[2], 4))


def test_polars_prunes_by_sequence(folder: Path) -> None:
    rows = pl.scan_parquet(glob(folder, SITES[0])).filter(pl.col("sequence_id") == 10).sort("position").collect()
    assert b"".join(rows["activation"]) == runs.bits(SITES[0], 10).tobytes()
