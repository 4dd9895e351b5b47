"""A run of 10,000 shards and 62 layers: how long it takes to open, to look at, to go on with and to finish, and in how much memory.

    python -m benchmarks.at_size FOLDER                                 on a local disk
    python -m benchmarks.at_size FOLDER --delay-ms 5                    as a bucket, each request answered that many milliseconds late
    python -m benchmarks.at_size FOLDER --before OTHER_CHECKOUT         the same files with another checkout's code, for the baseline

`m2ray extract` begins the run: a tiny model, one prompt of 512 tokens a shard. The first shard's parts then become those of the others, but for the last
four shards, which the same command extracts: copies where `inspect` reads rows, elsewhere links, of which only names and sizes are looked at. Each figure is of a process of its own; what has "command" in its name is timed from
its start, imports included. The disk is not waited for where a bucket is looked at (served_folder.py).
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import xxhash

NUM_LAYERS = 62
LEFT_SHARDS = 4
PROMPT_TOKENS = 512
MODEL = {"layers": NUM_LAYERS, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 512}
OPTIONS = {"max_length": PROMPT_TOKENS, "truncation": "cut", "shard_tokens": 1, "compute_dtype": "float32"}
TIMEOUT_S = 3600.0
SHOWN = {
    "open an unfinished run": ("open_run of an unfinished run", "5 s, 500 MB"),
    "inspect an unfinished run": ("m2ray inspect of an unfinished run", "5 s"),
    "go on": ("a resume's command, to its first commit", "30 s"),
    "finish": ("that command, from its last commit to its end: manifest and sweep", "60 s"),
    "open": ("open_run of a finished run", "5 s, 500 MB"),
    "inspect": ("m2ray inspect of a finished run", "5 s"),
    "again": ("the same command on a finished run", ""),
}

Figures = dict[str, float]
"""`seconds`, `cpu_s` of the process, and its `peak_mb` of memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="in it `at_size` is made, for model, prompts and run, and deleted at the end")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--before", type=Path, help="a checkout whose m2ray gives the baseline")
    parser.add_argument("--keep", action="store_true", help="print the rows and leave results/ as it is")
    parser.add_argument("--look", nargs=2, metavar=("STEP", "RUN"), help="one step in this process; prints its figures")
    options = parser.parse_args()
    if options.look:
        print(json.dumps(looked(*options.look)))
        return
    from benchmarks.records import Row, record
    from benchmarks.served_folder import served

    folder: Path = options.folder.resolve() / "at_size"
    shutil.rmtree(folder, ignore_errors=True)
    place = f"S3, {options.delay_ms:g} ms a request" if options.delay_ms else "local"
    with ExitStack() as stack:
        if options.delay_ms:
            os.environ.update(stack.enter_context(served(folder, options.delay_ms)))
        run = "s3://bench/run" if options.delay_ms else str(folder / "run")
        here = measured(folder, run, options.shards, Path.cwd())
        before = measured(folder, run, options.shards, options.before) if options.before else {}
    shutil.rmtree(folder)
    rows = []
    for name, (what, target) in SHOWN.items():
        baseline, note = before.get(name), f"{here[name]['cpu_s']:.1f} s of CPU, {here[name]['peak_mb']:.0f} MB at the most"
        if baseline:
            note += f"; before {baseline['cpu_s']:.1f} s of CPU, {baseline['peak_mb']:.0f} MB"
        was_s, now_s = baseline["seconds"] if baseline else None, here[name]["seconds"]
        rows.append(
            Row(f"{place}: {what}", now_s, "s", was_s, "before" if baseline else "", now_s / was_s if was_s else None, target, note)
        )
    title = f"A run of {options.shards:,} shards and {NUM_LAYERS} layers, {place} (load {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores)"
    _ = print(*rows, sep="\n") if options.keep else record(f"at_size_{'s3' if options.delay_ms else 'local'}", title, rows)


def measured(folder: Path, run: str, num_shards: int, checkout: Path) -> dict[str, Figures]:
    """Each step with the m2ray of a checkout."""
    os.environ["PYTHONPATH"] = str(checkout)
    begin(folder, num_shards)
    found: dict[str, Figures] = {}
    for step in SHOWN:
        if step == "go on":
            found |= dict(zip(("go on", "finish"), gone_on(folder, run, num_shards), strict=True))
        elif step == "again":
            found[step] = command(folder, run)[0]
        elif step != "finish":
            words = [sys.executable, str(Path(__file__).resolve()), str(folder), "--look", step, run]
            done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode:
                raise RuntimeError(f"{step}: {done.stderr}")
            found[step] = json.loads(done.stdout.splitlines()[-1])
        print(f"{checkout.name}: {step}: {found[step]}", flush=True)
    return found


# -- the run ----------------------------------------------------------------------------------------------------------------


def begin(folder: Path, num_shards: int) -> None:
    """An unfinished run that lacks the commits of its last shards."""
    run = folder / "run"
    if not (run / "job.json").exists():
        make_inputs(folder, num_shards)
        process = start(folder, str(run))
        deadline = time.monotonic() + TIMEOUT_S
        while not commit_of(folder, 0).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT_S)
        if not commit_of(folder, 0).exists():
            raise RuntimeError((folder / "extract.log").read_text())
        copy_first_shard(run, num_shards)
    for path in (run / "_SUCCESS", run / "manifest.parquet", *left(folder, num_shards)):
        path.unlink(missing_ok=True)


def make_inputs(folder: Path, num_shards: int) -> None:
    from benchmarks.runs import ROOT
    from scripts.make_checkpoint import make_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / "tests/data/llama/config.json").read_text())
    make_checkpoint(folder / "model", config, overrides=MODEL, fmt="bf16", seed=1)
    words = (ROOT / "scripts/corpus.txt").read_text(encoding="utf-8").split()[:PROMPT_TOKENS]
    (folder / "prompts.txt").write_text(num_shards * f"{' '.join(words)}\n", encoding="utf-8")


def copy_first_shard(run: Path, num_shards: int) -> None:
    """The commit of shard 0, and its parts, under the names of all the others but the last: prompts and rows are the same."""
    from m2ray.activations.job import read_job
    from m2ray.activations.records import commit_key, read_commit
    from m2ray.storage import open_store

    store = open_store(run)
    job = read_job(store)
    assert job is not None
    assert job.num_shards == num_shards
    first = read_commit(store, job, 0)
    read = read_by_inspect(num_shards - LEFT_SHARDS) | read_by_inspect(num_shards)
    for shard in range(1, num_shards - LEFT_SHARDS):
        place = copied if shard in read else linked
        parts = tuple(place(run, part, shard) for part in first.parts)
        (run / commit_key(shard)).write_bytes(replace(first, shard=shard, parts=parts).to_json())


def read_by_inspect(num_shards: int) -> set[int]:
    """Of so many shards those whose rows `inspect` reads: 4,096 of each layer."""
    count = math.ceil(4096 / PROMPT_TOKENS)
    return {(2 * place + 1) * num_shards // (2 * count) for place in range(count)}


def linked(run: Path, part: Any, shard: int) -> Any:
    """The part of shard 0 under another shard's name."""
    copy = replace(part, key=part.key.replace("shard-000000-", f"shard-{shard:06d}-"))
    (run / copy.key).unlink(missing_ok=True)
    os.link(run / part.key, run / copy.key)
    return copy


def copied(run: Path, part: Any, shard: int) -> Any:
    """The same with another shard's number in its footer: what is longer by it is the footer, whose bytes the file's last eight count."""
    copy = replace(part, key=part.key.replace("shard-000000-", f"shard-{shard:06d}-"))
    data, was, now = (run / part.key).read_bytes(), b"m2ray.shard\x18\x010", b"m2ray.shard\x18%c%d" % (len(str(shard)), shard)
    footer_bytes = int.from_bytes(data[-8:-4], "little") + len(now) - len(was)
    data = data[:-8].replace(was, now) + footer_bytes.to_bytes(4, "little") + data[-4:]
    tail_bytes = part.tail_bytes + len(now) - len(was)
    (run / copy.key).unlink(missing_ok=True)
    (run / copy.key).write_bytes(data)
    return replace(copy, num_bytes=len(data), tail_bytes=tail_bytes, tail_xxh3=xxhash.xxh3_64_hexdigest(data[-tail_bytes:]))


def commit_of(folder: Path, shard: int) -> Path:
    return folder / f"run/_commits/shard-{shard:06d}.json"


def left(folder: Path, num_shards: int) -> list[Path]:
    return [commit_of(folder, shard) for shard in range(num_shards - LEFT_SHARDS, num_shards)]


# -- the steps --------------------------------------------------------------------------------------------------------------


def start(folder: Path, run: str) -> subprocess.Popen[bytes]:
    from benchmarks.runs import start_extract

    return start_extract(folder / "extract.log", model=folder / "model", prompts=folder / "prompts.txt", output=run, **OPTIONS)


def gone_on(folder: Path, run: str, num_shards: int) -> tuple[Figures, Figures]:
    """A resume to its first commit, and from its last commit to its end; CPU and memory are those of the whole command."""
    whole, commits_s = command(folder, run, left(folder, num_shards))
    return whole | {"seconds": commits_s[0]}, whole | {"seconds": whole["seconds"] - commits_s[-1]}


def command(folder: Path, run: str, awaited: list[Path] | None = None) -> tuple[Figures, list[float]]:
    """The same command again, and after how many seconds each of the files was there."""
    from benchmarks.runs import peak_rss_bytes

    began = time.monotonic()
    process = start(folder, run)
    absent, seen_s, ended, most_bytes = list(awaited or ()), [], 0, 0
    while not ended:
        time.sleep(0.005)
        most_bytes = max(most_bytes, peak_rss_bytes(process.pid))
        seen_s += [time.monotonic() - began for path in absent if path.exists()]
        absent = [path for path in absent if not path.exists()]
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
        if time.monotonic() > began + TIMEOUT_S:
            process.kill()
    if status or absent:
        raise RuntimeError((folder / "extract.log").read_text())
    figures = {"seconds": time.monotonic() - began, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": most_bytes / 1e6}
    return figures, sorted(seen_s)


def looked(step: str, run: str) -> Figures:
    """A run opened or inspected in this process, imports left out."""
    look = inspected if step.startswith("inspect") else opened
    for name in ("m2ray.cli.inspect", "click.testing") if look is inspected else ("m2ray.activations.reading.reader",):
        import_module(name)
    began, began_cpu = time.monotonic(), time.process_time()
    look(run)
    seconds, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
    # getrusage would say no less than what the process that started this one had.
    (peak_kb,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "cpu_s": cpu_s, "peak_mb": int(peak_kb) * 1024 / 1e6}


def opened(run: str) -> None:
    from m2ray import open_run

    reader: Any = open_run(run)
    assert reader.num_files == reader.num_shards * NUM_LAYERS


def inspected(run: str) -> None:
    from click.testing import CliRunner

    from m2ray.cli.inspect import command as inspect

    done = CliRunner().invoke(inspect, [run])
    assert done.exit_code == 0, done.output


if __name__ == "__main__":
    main()
