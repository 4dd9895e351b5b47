"""A short job on several GPUs, as people try first: the demo's prompts a few times over, through few layers, against `m2ray plan` and the layer's rate.

    python -m benchmarks.short_run FOLDER                # 4 layers at MiniMax-M2's real dimensions, 2 stages, the prompts six times
    python -m benchmarks.short_run FOLDER --tiny         # to try the script on a CPU

Runs it twice: the second start finds the compiled graphs of the first. Rows are written into --memory. Needs 4 GB of disk a layer and 3 GB.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.against_guide import TINY, Prompts
from benchmarks.checkpoints import real_size
from benchmarks.depth import BATCH_TOKENS, Depth, Ran, run, speed_row
from benchmarks.extract_on_gpu import MEMORY, measure_profile
from benchmarks.records import Row, record
from benchmarks.runs import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--times", type=int, default=6)
    parser.add_argument("--memory", type=Path, default=MEMORY / "m2ray", help="a folder of a file system in memory")
    parser.add_argument("--starts", type=int, default=2, help="1: no second one")
    parser.add_argument("--tiny", action="store_true", help="small layers, printed and not recorded")
    options = parser.parse_args()
    folder, memory = options.folder.resolve(), options.memory.resolve()
    memory.mkdir(parents=True, exist_ok=True)
    model = real_size(folder, options.layers, TINY if options.tiny else None)
    prompts = demo_prompts(folder, options.times)
    if not (profile := folder / "profile.json").exists():
        measure_profile(profile, memory, model, BATCH_TOKENS)
    depth = Depth(folder, memory, options.layers, options.stages, len(prompts.texts), 0, options.tiny)
    rows: list[Row] = []
    for name in ("first", "second")[: options.starts]:
        found = run(depth, f"short-{name}", prompts, model=model, stages=options.stages, batch_tokens="auto")
        rows += rows_of(f"{len(prompts.texts):,} prompts, the {name} time", found)
        title = f"A short run: {options.layers} layers at MiniMax-M2's real dimensions, {options.stages} stages"
        _ = print(*rows, sep="\n", flush=True) if options.tiny else record("short_run", title, rows)


def demo_prompts(folder: Path, times: int) -> Prompts:
    """Those of scripts/demo, so many times over, under ids of their own."""
    path = folder / "short.jsonl"
    records = [json.loads(line) for line in (ROOT / "scripts/demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    again = [{**each, "id": f"{each['id']}-{number}"} for number in range(times) for each in records]
    path.write_text("".join(json.dumps(each) + "\n" for each in again), encoding="utf-8")
    return Prompts(path, [each["text"] for each in again], [])


def rows_of(what: str, found: Ran) -> Iterator[Row]:
    """The whole run against the plan, and its slowest stage's computation against the layer's rate."""
    yield replace(speed_row(what, found), target="0.75 to 1.25")
    if (layers := found.rates["tokens_per_s"]) is not None:
        rate = found.report["tokens"] / max(stage["compute_s"] for stage in found.report["stages"])
        yield Row(
            f"computation of the slowest stage, {what}", rate, "tokens/s", layers, "the layer's rate, padding counted", rate / layers, "0.8"
        )


if __name__ == "__main__":
    main()
