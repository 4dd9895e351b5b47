"""Runs to be audited: made by the real command, but for Ray, from rows that a test may have tampered with. All their digests are right."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from m2ray.activations.reading.values import tensor_of
from m2ray.activations.writing.weights_record import hold_weights
from m2ray.activations.writing.writer import ActivationWriter
from m2ray.batches import CapturedLayer, LayerSpan, MicroBatch
from m2ray.chain import beginning, extract
from m2ray.chain.probing import Hardware
from m2ray.cli import main
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.planning.hardware import Cluster, Node
from m2ray.prompts import micro_batches
from m2ray.provenance import cpu_kind
from scripts.make_checkpoint import make_checkpoint
from tests.reference import DATA, MINIMAX_TINY
from tests.unit.activation_runs import by_column

TOKENIZER = DATA / "prompts" / "tokenizer"
"""It begins every text by <s>."""

LLAMA_TINY = {"layers": 5, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 384}
WORDS = ["the", "river", "carries", "what", "mountains", "give", "it", "and", "children", "walk", "across", "when", "water", "is", "low"]

RowsOf = Callable[[MicroBatch], Sequence[torch.Tensor]]
"""A micro-batch's rows [N, W] of each layer, in the store dtype."""


def make_model(folder: Path, model_type: str, seed: int = 11) -> Path:
    """A tiny llama or minimax_m2 (FP8) with TOKENIZER."""
    config = json.loads((DATA / model_type / "config.json").read_text())
    is_minimax = model_type == "minimax_m2"
    fmt, overrides = ("fp8", MINIMAX_TINY | {"layers": 4}) if is_minimax else ("bf16", LLAMA_TINY)
    make_checkpoint(folder, config, overrides=overrides, fmt=fmt, seed=seed, max_shard_bytes=2_000_000)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


def write_prompts(path: Path) -> Path:
    """16 texts of mixed lengths."""
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(WORDS, size)) for size in (3, 9, 1, 6, 12, 2, 5, 7, 1, 8, 4, 10, 3, 2, 11, 6)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def extracted(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    prompts: Path,
    run: Path,
    rows_of: RowsOf | None = None,
    computed_on: str | None = None,
    **options: Any,
) -> Path:
    """Run `m2ray extract` to its end, with the rows that `rows_of` makes in the place of the stages'."""

    def hardware(*_: object) -> Hardware:
        return Hardware(Cluster((Node("here"),)), {"here": "id"}, {"here": 2.0})

    def in_this_process(work: Any, *_: object) -> None:
        resolved = work.inputs.options
        job = work.run.job
        span = LayerSpan(0, job.layers_run)
        spec = StageSpec(str(model), span, resolved.compute_dtype, "auto", "cpu", 1, with_final_norm=job.with_final_norm)
        stage = load_stage(spec, lambda *_: None)
        stage.begin(CaptureSpec(resolved.sites, resolved.store_dtype, resolved.prompts.selection))
        hold_weights(work.run.store, work.run.job, stage.digests)
        for shard in work.missing:
            _commit(work, shard, rows_of or (lambda micro_batch: rows_of_stage(stage, micro_batch)), computed_on or cpu_kind())

    given = {"model": model, "prompts": prompts, "output": run, "shard-tokens": 150, "batch-tokens": 60, **options}
    words = [word for name, value in given.items() for word in (f"--{name}", *([] if value is True else [str(value)]))]
    with monkeypatch.context() as patch:
        patch.setattr(beginning, "_hardware", hardware)
        patch.setattr(extract, "_run", in_this_process)
        result = CliRunner().invoke(main, ["extract", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return run


def rows_of_stage(stage: Stage, micro_batch: MicroBatch) -> list[torch.Tensor]:
    """What a stage from layer 0 on captures; of several columns their bytes, side by side."""
    rows = []
    for part, each in zip(stage.parts, stage.forward(micro_batch, None).captured, strict=True):
        bytes_NB = torch.from_numpy(np.concatenate(each.columns, axis=1))
        rows.append(tensor_of(part.columns[0], bytes_NB) if len(part.columns) == 1 else bytes_NB)
    return rows


def _commit(work: Any, shard: Any, rows_of: RowsOf, computed_on: str) -> None:
    job, store, attempt = work.run.job, work.run.store, f"{shard.index:012x}"
    writer = ActivationWriter(store, job.run_metadata(), job.parts, queue_bytes=1 << 20, threads=1, selection=job.selection)
    shapes = []
    try:
        for micro_batch in micro_batches(shard, work.tokens, job.options["batch_tokens"]):
            rows = zip(job.parts, rows_of(micro_batch), strict=True)
            bits = [(part, each.contiguous().view(torch.uint8).numpy()) for part, each in rows]
            captured = [CapturedLayer(part.site, part.layer, by_column(part, each)) for part, each in bits]
            writer.submit(attempt, micro_batch, captured, timeout_s=10)
            shapes.append(micro_batch.token_ids_BT.shape)
        receipts = writer.collect(shard.index, attempt, timeout_s=10)
    finally:
        writer.close()
    assert work.run.commit(shard, attempt, receipts, shapes, 1.0, computed_on)


def verify(run: Path, *more: str) -> Result:
    """`m2ray verify RUN`, which never ends with a traceback."""
    result = CliRunner().invoke(main, ["verify", str(run), *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def audited(run: Path, *more: str) -> dict[str, Any]:
    """The audit of all sequences, once every file was found to be what its digests say."""
    assert verify(run, "--checksums").exit_code == 0, "only the audit sees it"
    result = verify(run, "--sample", "1", "--json", *more)
    assert result.stdout, result.output
    audit = json.loads(result.stdout)["audit"]
    assert result.exit_code == (0 if audit["passed"] else 1)
    return audit
