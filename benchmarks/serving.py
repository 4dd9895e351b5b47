"""Small requests to a warm chain, held against a job with the same micro-batches and against a bare forward pass of transformers.

    scripts/trained_model /tmp/smollm2
    python -m benchmarks.serving /tmp/smollm2
    scripts/demo
    python -m benchmarks.serving demo/model --demo                the demo's jobs alone: how soon a later one has committed its first shard

Starts Ray on this machine and a chain of one stage. A request is one prompt, and so is a micro-batch of a job. Requests come in blocks, each
behind a job of the same prompts, so that whatever else the machine does meets both. The forward pass is transformers' own model up to the last
layer, with as many threads as the stage, in this process, between the requests it is held against.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM

import m2ray
from benchmarks.records import Row, record
from m2ray.api.connecting import WarmChain
from m2ray.chain.progress import Progress
from m2ray.chain.serving import serve, stop
from m2ray.config import ExtractConfig

NAME = "benchmark"
SITES = "residual:15"
DEMO = Path(__file__).parents[1] / "jobs" / "configs" / "demo.toml"
SMALL_SHARD_TOKENS = 256
DEMO_JOBS, DEMO_PROMPTS = 5, 40


def prompts_of(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Token ids drawn by chance."""
    drawn: list[list[int]] = np.random.default_rng(0).integers(100, vocab_size, (count, length)).tolist()
    return drawn


def by_clients(prompts: list[list[int]], clients: int, chain: WarmChain) -> float:
    """Seconds that so many clients take for all prompts, each prompt a request, each client one after another."""
    waiting, lock = iter(prompts), threading.Lock()

    def next_prompt() -> list[int] | None:
        with lock:
            return next(waiting, None)

    def ask() -> None:
        while (prompt := next_prompt()) is not None:
            chain.activations([prompt], sites=SITES)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - began


def job(chain: WarmChain, prompts: list[list[int]], folder: Path, shard_prompts: int = 10) -> tuple[float, float]:
    """Of a job whose every micro-batch is one prompt: tokens a second from its first micro-batch to its last commit, and the seconds from the call to
    its first commit, which has `shard_prompts` of them.
    """
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"input_ids": prompt}) + "\n" for prompt in prompts))
    output = folder / f"run-{time.monotonic_ns()}"
    began = time.time()
    chain.extract(
        prompts=str(source), output=str(output), sites=SITES, batch_tokens=len(prompts[0]), shard_tokens=shard_prompts * len(prompts[0])
    )
    measured: float = json.loads((output / "report.json").read_text())["tokens_per_s"]["measured"]
    return measured, first_commit(output) - began


def first_commit(output: Path) -> float:
    """When a run's first shard was committed, as time.time()."""
    return min(file.stat().st_mtime for file in (output / "_commits").iterdir())


def demo_jobs(model: Path) -> list[Row]:
    """Jobs of the demo's first prompts by its options, and with smaller shards, one after another on its chain; the first of them is not counted."""
    options = tomllib.loads(DEMO.read_text())
    found_s: dict[int, list[float]] = {}
    with Progress() as progress:
        serve(ExtractConfig.validated({"model": str(model), "output": "none", **options}), NAME, progress)
    asked = {name: value for name, value in options.items() if name not in ("prompts", "stages")}
    with m2ray.connect(NAME) as chain, tempfile.TemporaryDirectory() as folder:
        for shard_tokens in (options["shard_tokens"], SMALL_SHARD_TOKENS):
            found_s[shard_tokens] = []
            for number in range(1 + DEMO_JOBS):
                output, began = Path(folder) / f"{shard_tokens}-{number}", time.time()
                chain.extract(prompts=options["prompts"], output=str(output), limit=DEMO_PROMPTS, **asked | {"shard_tokens": shard_tokens})
                found_s[shard_tokens].append(first_commit(output) - began)
    stop(NAME)
    return [
        Row(
            what=f"the demo: a later job's first committed shard, the shortest of those of up to {shard_tokens:,} tokens, from the call",
            value=statistics.median(seconds[1:]),
            unit="s",
            target="2",
            note=f"{DEMO_PROMPTS} prompts; the jobs: {', '.join(f'{each:.2f}' for each in seconds[1:])} s, "
            f"the first {seconds[0]:.2f}; load of the machine {os.getloadavg()[0]:.0f}",
        )
        for shard_tokens, seconds in found_s.items()
    ]


def pairs_of(chain: WarmChain, model: Any, prompts: list[list[int]]) -> Iterator[tuple[float, float]]:
    """Seconds of a request and of a forward pass of the same prompt, one after the other."""
    for prompt in prompts:
        began = time.perf_counter()
        chain.activations([prompt], sites=f"residual:{model.config.num_hidden_layers - 1}")
        answered = time.perf_counter()
        with torch.inference_mode():
            model.model(input_ids=torch.tensor([prompt]), use_cache=False)
        yield answered - began, time.perf_counter() - answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--demo", action="store_true", help="the demo's jobs alone")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    ray.init(address="local", include_dashboard=False, logging_level="ERROR")
    if asked.demo:
        record("serving_demo", "A later job on the demo's warm chain", demo_jobs(asked.model))
        return
    config = ExtractConfig.validated(
        {"model": str(asked.model), "prompts": "none", "output": "none", "threads_per_stage": asked.threads, "stages": 1, "compile": False}
    )
    with Progress() as progress:
        serve(config, NAME, progress)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16)
    prompts = prompts_of(asked.requests, asked.length, model.config.vocab_size)
    blocks = [prompts[number :: asked.blocks] for number in range(asked.blocks)]
    jobs: list[float] = []
    first_commits_s: list[float] = []
    requests_s = 0.0
    with m2ray.connect(NAME) as chain, tempfile.TemporaryDirectory() as folder:
        by_clients(prompts[:16], asked.clients, chain)
        for block in blocks:
            jobs.append(job(chain, block, Path(folder))[0])
            first_commits_s.append(job(chain, block[:4], Path(folder), shard_prompts=1)[1])
            requests_s += by_clients(block, asked.clients, chain)
        measured = list(pairs_of(chain, model, prompts[:120]))[20:]
    stop(NAME)
    requests, rate = asked.requests * asked.length / requests_s, statistics.harmonic_mean(jobs)
    request_s, forward_s = (statistics.median(values) for values in zip(*measured, strict=True))
    shape = f"{asked.length} tokens, {asked.threads} thread{'s' if asked.threads > 1 else ''}"
    rows = [
        Row(
            what=f"{asked.requests:,} requests of {shape}, by {asked.clients} clients",
            value=requests,
            unit="tokens/s",
            baseline=rate,
            baseline_is=f"jobs with the same micro-batches, each before {len(blocks[0])} of the requests",
            ratio=requests / rate,
            target="0.9",
            note=f"the jobs: {', '.join(f'{rate:,.0f}' for rate in jobs)} tokens/s",
        ),
        Row(
            what=f"one request of {shape}, p50",
            value=request_s,
            unit="s",
            baseline=forward_s,
            baseline_is="a forward pass of transformers, p50",
            ratio=request_s / forward_s,
            target="1.3",
            note=f"{len(measured)} pairs, one after the other",
        ),
        Row(
            what="a later job's first committed shard, from the call",
            value=statistics.median(first_commits_s),
            unit="s",
            target="2",
            note=f"shards of one prompt; the jobs: {', '.join(f'{seconds:.2f}' for seconds in first_commits_s)} s",
        ),
    ]
    record("serving", "Small requests to a warm chain of one stage", rows)


if __name__ == "__main__":
    main()
