"""`compute_dtype = "float8"` beside bfloat16 on a GPU, at MiniMax-M2's real dimensions: a layer's speed and memory, and how far rows are apart.

    python -m benchmarks.float8_on_gpu FOLDER [--layers N]     # the checkpoint is made there: 3.7 GB a layer and 2.5 GB

Both stages load the same FP8 checkpoint. The distance of a layer's own is that of its update from the same input, |update - update in
bfloat16| / |update in bfloat16| of each token; the accumulated one that of its output, each stream having gone its own way. Random weights:
trained ones choose experts by larger margins. Needs 11 GB of GPU memory a layer, and 20 more.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import free, real_size
from benchmarks.gpu_stage import BATCH_TOKENS, SHAPES, bare_ms, layer_operations, micro_batch
from benchmarks.numerics_on_gpu import changed, error
from benchmarks.records import Row, record
from m2ray.batches import LayerSpan
from m2ray.model.boundary import Boundary
from m2ray.model.stage import Stage, StageSpec, load_stage

DTYPES = ("bfloat16", "float8")
DISTANCE_SHAPE = (8, 512)
REPEATS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    arguments = parser.parse_args()
    model = real_size(arguments.folder, arguments.layers)
    config = json.loads((model / "config.json").read_text())
    stages = {dtype: load(model, arguments.layers, dtype) for dtype in DTYPES}
    size = f"{arguments.layers} layers at MiniMax-M2's real dimensions, FP8 checkpoint"
    rows = [memory(stages, arguments.layers), *distances(stages, arguments.layers)]
    record("float8_on_gpu", f"compute_dtype float8 beside bfloat16, {size}", [*speeds(stages, arguments.layers, config), *rows])


def load(model: Path, num_layers: int, dtype: str) -> Stage:
    began = time.monotonic()
    stage = load_stage(StageSpec(str(model), LayerSpan(0, num_layers), dtype, "auto", "cuda:0", None), lambda *_: None)
    print(f"{dtype}: loaded in {time.monotonic() - began:.1f} s", flush=True)
    return stage


def memory(stages: dict[str, Stage], num_layers: int) -> Row:
    """What the weights of a layer take, the embedding left out."""
    embedding = next(iter(stages["float8"]._decoder.skeleton.decoder.embed_tokens.parameters())).nbytes  # noqa: SLF001 - benchmarks look inside
    float8, bfloat16 = ((stages[dtype].parameter_bytes - embedding) / num_layers / 1e9 for dtype in reversed(DTYPES))
    return Row("weights of a layer in GPU memory, float8", float8, "GB", bfloat16, "bfloat16", float8 / bfloat16)


def speeds(stages: dict[str, Stage], num_layers: int, config: dict[str, int]) -> list[Row]:
    """Of a layer, first as it is, then compiled; the two in turn."""
    rows = []
    for compiled in (False, True):
        if compiled:
            for stage in stages.values():
                stage._decoder.compile_layers()  # noqa: SLF001 - the same weights, compiled
                stage.warm_up(BATCH_TOKENS)
        for shape in SHAPES if compiled else SHAPES[:1]:
            repeats = range(REPEATS if compiled else 1)
            times = [{dtype: bare_ms(stage, shape) / num_layers for dtype, stage in stages.items()} for _ in repeats]
            float8, bfloat16 = (statistics.median(each[dtype] for each in times) for dtype in reversed(DTYPES))
            operations, name = layer_operations(config, *shape), "compiled layer" if compiled else "layer, not compiled"
            note = f"{float8:.2f} ms and {bfloat16:.2f} ms; the ratio is of speeds"
            rows.append(
                Row(
                    f"{name} in float8, {shape[0]} x {shape[1]}",
                    operations / float8 / 1e9,
                    "TFLOP/s",
                    operations / bfloat16 / 1e9,
                    "bfloat16",
                    bfloat16 / float8,
                    "1.45" if compiled else "",
                    note,
                )
            )
            print(rows[-1], flush=True)
            free()
    return rows


@torch.inference_mode()
def distances(stages: dict[str, Stage], num_layers: int) -> list[Row]:
    """Of each layer's rows in float8 from those in bfloat16, neither compiled."""
    device = stages["float8"]._decoder.device  # noqa: SLF001
    token_ids_BT = torch.from_numpy(micro_batch(DISTANCE_SHAPE).token_ids_BT).to(device, torch.int64)
    streams: dict[str, Boundary | None] = dict.fromkeys(DTYPES)
    rows: list[Row] = []
    for layer in range(num_layers):
        start = streams["bfloat16"]
        expected, chosen = step(stages["bfloat16"], token_ids_BT, start, layer)
        own, own_chosen = step(stages["float8"], token_ids_BT, start, layer)
        streams["bfloat16"] = expected
        streams["float8"], gone_chosen = step(stages["float8"], token_ids_BT, streams["float8"], layer)
        if start is None:  # what enters the first layer
            start = Boundary(stages["bfloat16"]._decoder.skeleton.decoder.embed_tokens(token_ids_BT))  # noqa: SLF001
        before = start.hidden_BTH.float()
        own_error = error(own.hidden_BTH.float() - before, expected.hidden_BTH.float() - before)
        gone = streams["float8"]
        assert gone is not None
        accumulated = error(gone.hidden_BTH.float(), expected.hidden_BTH.float())
        figures = {
            "own distance, p50": (own_error[0], ""),
            "own distance, p99": (own_error[1], ""),
            "tokens with other experts than bfloat16, from the same input": (changed(own_chosen, chosen), "of 1"),
            "accumulated distance, p50": (accumulated[0], ""),
            "accumulated distance, p99": (accumulated[1], ""),
            "tokens with other experts than bfloat16, each stream for itself": (changed(gone_chosen, chosen), "of 1"),
        }
        rows += [Row(f"layer {layer}: {name}", value, unit) for name, (value, unit) in figures.items()]
        print(layer, {name: round(value, 5) for name, (value, _) in figures.items()}, flush=True)
    for stage in stages.values():
        stage._decoder.watch(())  # noqa: SLF001 - what is timed next shows nothing
    return rows


def step(stage: Stage, token_ids_BT: torch.Tensor, incoming: Boundary | None, layer: int) -> tuple[Boundary, torch.Tensor]:
    """A layer's output, and the experts that it chose for each token, ascending."""
    found: list[torch.Tensor] = []

    def on_site(site: str, _: int | None, *values: Any) -> None:
        if site == "router_topk":
            found.append(values[0].flatten(0, -2).long().sort(dim=-1).values)

    stage._decoder.watch({("router_topk", layer)})  # noqa: SLF001 - one layer of a stage, from any input
    return stage._decoder.run(token_ids_BT, incoming, on_site, LayerSpan(layer, layer + 1)), found[0]  # noqa: SLF001


if __name__ == "__main__":
    main()
