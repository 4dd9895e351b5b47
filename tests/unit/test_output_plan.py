"""Planned output bytes against what the writer makes of a survey's shards, over layers, widths, dtypes, compression, shards and lengths."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from m2ray.activations.schema import encode_tokens
from m2ray.activations.writing.part_writer import PartWriter
from m2ray.batches import MicroBatch, PartSpec, Shard
from m2ray.planning.output import plan_output
from m2ray.prompts import batching
from m2ray.prompts.shards import cut_micro_batches, cut_shards
from m2ray.selection import Selection
from m2ray.storage import open_store

METADATA = {"run_id": "0" * 32, "model_type": "minimax_m2", "num_layers": "62", "model_digest": "0" * 32, "tokenizer_digest": "0" * 32}
LENGTHS = {
    "short": np.random.default_rng(0).integers(5, 40, 300),
    "mixed": np.clip(np.exp(np.random.default_rng(1).normal(4.5, 0.9, 80)), 5, 2000),
    "long": np.random.default_rng(2).integers(900, 1100, 10),
}


def shards_of(lengths: str, shard_tokens: int) -> list[Shard]:
    counts = LENGTHS[lengths].astype(np.int32)
    cuts = cut_shards(counts, shard_tokens)
    return [Shard(number, places.astype(np.int64), counts[places]) for number, places in enumerate(cuts)]


def batches_of(shard: Shard, batch_tokens: int) -> Iterator[MicroBatch]:
    """Token ids as frequent as words are, up to 30,000 different ones."""
    rng = np.random.default_rng(shard.index)
    runs = list(pairwise(cut_micro_batches(shard.token_counts, batch_tokens)))
    for index, (start, stop) in enumerate(runs):
        counts = shard.token_counts[start:stop]
        token_ids = np.minimum(rng.zipf(1.2, (stop - start, int(counts.max()))), 30_000).astype(np.int32)
        yield MicroBatch(shard.index, index, index == len(runs) - 1, shard.sequence_ids[start:stop], counts, token_ids)


def written_bytes(folder: str, part: PartSpec, shards: list[Shard], batch_tokens: int, compression: str, sigma: float) -> int:
    """Of one site and layer; rows are normal, and the scales of their elements log-normal."""
    generator = torch.Generator().manual_seed(part.layer)
    scales = torch.exp(sigma * torch.randn(part.columns[0].width, generator=generator))
    total = 0
    for shard in shards:
        writer = PartWriter(open_store(folder), part, METADATA, shard.index, "0123456789ab", compression)
        for batch in batches_of(shard, batch_tokens):
            rows = (torch.randn(batch.num_tokens, part.columns[0].width, generator=generator) * scales).to(
                getattr(torch, part.columns[0].dtype)
            )
            writer.append(encode_tokens(Selection().token_rows(batch)), [rows.view(torch.uint8).numpy()])
        writer.seal()
        writer.finish("0" * 32)
        total += writer.receipt.num_bytes
    return total


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("num_layers", "width", "dtype", "compression", "shard_tokens", "batch_tokens"),
    [
        (1, 3072, "bfloat16", "none", 32_768, 16_384),
        (1, 3072, "bfloat16", "planes", 32_768, 16_384),
        (3, 256, "bfloat16", "none", 2_000, 1_024),
        (3, 256, "bfloat16", "planes", 2_000, 1_024),
        (2, 512, "float16", "none", 4_000, 512),
        (2, 512, "float16", "planes", 4_000, 512),
        (2, 128, "float32", "none", 1_000, 4_096),
    ],
)
def test_planned_output_is_within_two_percent(
    tmp_path, num_layers: int, width: int, dtype: str, compression: str, shard_tokens: int, batch_tokens: int, lengths: str
) -> None:
    shards = shards_of(lengths, shard_tokens)
    parts = [PartSpec.of("residual", layer, dtype, width) for layer in range(num_layers)]
    stats = batching(shards, batch_tokens)
    planned = plan_output(parts, stats, None, compression)
    for part in parts:
        written = written_bytes(str(tmp_path), part, shards, batch_tokens, compression, sigma=1.0)
        assert planned.by_part[part] == pytest.approx(written, rel=0.02)
    assert planned.num_bytes == sum(planned.by_part.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_other_rows_in_planes_are_within_seven_percent(tmp_path, dtype: str, sigma: float) -> None:
    shards, part = shards_of("mixed", 8_000), PartSpec.of("residual", 0, dtype, 1024)
    planned = plan_output([part], batching(shards, 4_096), None, "planes").num_bytes
    assert planned == pytest.approx(written_bytes(str(tmp_path), part, shards, 4_096, "planes", sigma), rel=0.07)
