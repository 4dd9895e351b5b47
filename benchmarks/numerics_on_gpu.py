"""What `compile` does to bfloat16 rows on a GPU, layer by layer, against the same layers in float32 and not compiled.

    python -m benchmarks.numerics_on_gpu                     # 8 layers at MiniMax-M2's real dimensions
    python -m benchmarks.numerics_on_gpu --tiny              # to try the script on a CPU

Three streams of hidden states go through the layers: float32, bfloat16, and bfloat16 compiled. Weights are random, drawn on the device
from a seed, one layer at a time, as large as scripts/make_checkpoint.py makes them. A layer's own error is that of its update from the
same input, |update - update in float32| / |update in float32| of each token; the accumulated one is that of its output, each stream
having gone its own way. Needs a GPU with 32 GB.
"""

import argparse
import json
import math
from typing import Any

import torch

from benchmarks.against_guide import TINY
from benchmarks.records import Row, record
from benchmarks.runs import ROOT
from m2ray.bench.trial import TrialLayer
from m2ray.model.boundary import Boundary
from m2ray.model.families import parse_config
from scripts.make_checkpoint import OVERRIDES, RELATIVE_UPDATE, SILU_GATED_RMS, resolve_config

SHAPE = (8, 512)
WARM_UP = ((4, 1024), (16, 256), (1, 1024))
"""As a stage warms up: what is measured then runs in the graph for all shapes."""


class Layer:
    """A decoder layer whose weights are drawn anew for each depth, in one dtype."""

    def __init__(self, config: Any, dtype: torch.dtype, device: str) -> None:
        self._trial = TrialLayer(config, dtype, device)
        self._decoder = self._trial._decoder  # noqa: SLF001 - the layer without a stage around it
        self._model = self._decoder.skeleton.model
        self.names = [tensor.name for tensor in self._decoder.skeleton.needed(self._decoder.span)]
        self._experts = torch.zeros(0)
        router: Any = self._decoder.skeleton.layers[self._trial.number].mlp
        router.gate.register_forward_hook(self._keep_experts)
        self._top_k, self.dtype, self.device = config.num_experts_per_tok, dtype, device

    def compile(self) -> None:
        self._trial.compile()

    def _keep_experts(self, _: Any, __: Any, output: Any) -> None:
        self._experts.copy_(output[2])

    def tensor(self, name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(module), leaf)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def __call__(self, hidden_BTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, _ = hidden_BTH.shape
        self._experts = torch.zeros((batch * length, self._top_k), dtype=torch.int64, device=self.device)
        token_ids_BT = torch.zeros((batch, length), dtype=torch.int64, device=self.device)
        output = self._decoder.run(token_ids_BT, Boundary(hidden_BTH.to(self.dtype).clone()), lambda *_: None)
        return output.hidden_BTH.float(), self._experts.sort(dim=1).values


@torch.inference_mode()
def draw(layers: list[Layer], depth: int, experts_per_token: int) -> None:
    """Give the layers the same weights, those of this depth: drawn in the first one's dtype, the router in float32."""
    first, device = layers[0], layers[0].device
    generator = torch.Generator(device).manual_seed(depth)
    for name in first.names:
        values = first.tensor(name)
        if "norm" in name:
            values.uniform_(0.9, 1.1, generator=generator)
        elif "correction_bias" in name:
            values.uniform_(-1, 1, generator=generator).mul_(0.3 / math.sqrt(values.numel())).add_(1)
        else:
            std = 1 / math.sqrt(values.shape[-1])
            if name.endswith(("o_proj.weight", "down_proj")):  # a layer's update stays in proportion to the stream
                std *= RELATIVE_UPDATE * (1 + RELATIVE_UPDATE**2) ** (depth / 2)
            if name.endswith("down_proj"):
                std *= math.sqrt(experts_per_token) / SILU_GATED_RMS
            values.normal_(0, std, generator=generator)
        for other in layers[1:]:
            other.tensor(name).copy_(values)


def error(value_BTH: torch.Tensor, expected_BTH: torch.Tensor) -> tuple[float, float]:
    """Median and 99th percentile over the tokens of |value - expected| / |expected|."""
    error_N = ((value_BTH - expected_BTH).norm(dim=-1) / expected_BTH.norm(dim=-1)).flatten()
    p50, p99 = error_N.quantile(torch.tensor([0.5, 0.99], device=error_N.device)).tolist()
    return p50, p99


def changed(experts_NK: torch.Tensor, expected_NK: torch.Tensor) -> float:
    """The share of tokens that have another set of experts."""
    return float((experts_NK != expected_NK).any(dim=1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="small layers, printed and not recorded")
    options = parser.parse_args()
    fields = json.loads((ROOT / "tests/data/minimax_m2/config.json").read_text())
    fields = resolve_config(fields, {name: size for name, size in TINY.items() if name in OVERRIDES} if options.tiny else {}, "fp8")
    config = parse_config(json.dumps(fields).encode())
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    plain, compiled = Layer(config, torch.bfloat16, device), Layer(config, torch.bfloat16, device)
    exact = Layer(config, torch.float32, device)
    layers = [plain, compiled, exact]
    draw(layers, 0, config.num_experts_per_tok)
    compiled.compile()
    shape = (2, 64) if options.tiny else SHAPE
    for warm in ((2, 32), (4, 16)) if options.tiny else WARM_UP:
        compiled(torch.zeros((*warm, config.hidden_size), device=device))
    generator = torch.Generator(device).manual_seed(0)
    hidden_BTH = torch.empty((*shape, config.hidden_size), device=device).normal_(generator=generator).bfloat16().float()
    streams = {"float32": hidden_BTH, "eager": hidden_BTH, "compiled": hidden_BTH}
    rows: list[Row] = []
    print("| layer | | own p50 | own p99 | other experts | accumulated p50 | p99 | other experts |\n|---|---|---|---|---|---|---|---|")
    for depth in range(options.layers):
        draw(layers, depth, config.num_experts_per_tok)
        start_BTH = streams["float32"].bfloat16().float()
        own_BTH, own_experts = exact(start_BTH)
        streams["float32"], chosen = exact(streams["float32"])
        found = {}
        for name, layer in (("eager", plain), ("compiled", compiled)):
            output_BTH, experts = layer(start_BTH)
            own = (*error(output_BTH - start_BTH, own_BTH - start_BTH), changed(experts, own_experts))
            streams[name], experts = layer(streams[name])
            found[name] = (*own, *error(streams[name], streams["float32"]), changed(experts, chosen))
            figures = found[name]
            print(f"| {depth} | {name} | {figures[0]:.2e} | {figures[1]:.2e} | {figures[2]:.2%} | ", end="")
            print(f"{figures[3]:.2e} | {figures[4]:.2e} | {figures[5]:.2%} |", flush=True)
        rows += rows_of(depth, found["eager"], found["compiled"])
    title = (
        f"Compiled bfloat16 layers against float32, {options.layers} layers at MiniMax-M2's real dimensions, {shape[0]} x {shape[1]} tokens"
    )
    _ = print(*rows, sep="\n") if options.tiny else record("numerics_on_gpu", title, rows)


def rows_of(depth: int, eager: tuple[float, ...], compiled: tuple[float, ...]) -> list[Row]:
    """Compiled, and as the baseline not compiled: a layer's own error, the tokens with other experts, and the accumulated error."""
    names = [f"{kind} error, {share}" for kind in ("own", "accumulated") for share in ("p50", "p99")]
    names.insert(2, "tokens with other experts than float32, from the same input")
    names.append("tokens with other experts than float32, each stream for itself")
    units = ("", "", "of 1", "", "", "of 1")
    return [
        Row(f"layer {depth}: {name}", value, unit, base, "not compiled:", value / base if base else None)
        for name, unit, value, base in zip(names, units, compiled, eager, strict=True)
    ]


if __name__ == "__main__":
    main()
