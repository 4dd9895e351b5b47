"""A run of 10,000 shards and 62 layers: how long it takes to open, to look at, to go on with and to finish, and in how much memory.

    python -m benchmarks.at_size FOLDER                                 on a local disk
    python -m benchmarks.at_size s3://bucket/run --delay-ms 5           each request of the store that many milliseconds late
    python -m benchmarks.at_size FOLDER --before OTHER_CHECKOUT         the same files with another checkout's code, for the baseline

The parts are stubs of one byte, of no rows: none of this reads them. Each figure is of a process of its own.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NUM_LAYERS = 62
ATTEMPT = "0" * 12
SHOWN = {
    "open an unfinished run": ("open_run of an unfinished run", "5 s, 500 MB"),
    "inspect an unfinished run": ("m2ray inspect of an unfinished run", "5 s"),
    "go on": ("a resume, before Ray is started", "30 s"),
    "finish": ("the end: manifest and sweep", "60 s"),
    "open": ("open_run of a finished run", "5 s, 500 MB"),
    "inspect": ("m2ray inspect of a finished run", "5 s"),
    "look whether it is finished": ("the same command on a finished run", ""),
}

IMPORTED = {
    "inspect an unfinished run": ("m2ray.cli.inspect", "click.testing"),
    "inspect": ("m2ray.cli.inspect", "click.testing"),
    "go on": ("m2ray.prompts",),
    "look whether it is finished": ("m2ray.prompts",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="where the run goes; made, and deleted at the end if it is a folder")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--before", type=Path, help="a checkout whose m2ray gives the baseline")
    parser.add_argument("--step", help="one step in this process; prints seconds and peak memory")
    options = parser.parse_args()
    if options.step:
        print(json.dumps(timed(options.step, options.run, options.shards)))
        return
    from benchmarks.records import Row, record

    with delayed(options.delay_ms):
        here = measured(options.run, options.shards, Path.cwd())
        before = measured(options.run, options.shards, options.before) if options.before else {}
    if "://" not in options.run:
        shutil.rmtree(options.run)
    place = f"{urlsplit(options.run).scheme or 'local'}{f', {options.delay_ms:g} ms a request' if options.delay_ms else ''}"
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
    record(f"at_size_{urlsplit(options.run).scheme or 'local'}", title, rows)


def measured(run: str, num_shards: int, checkout: Path) -> dict[str, dict[str, float]]:
    """Each step in a process of its own, with the m2ray of a checkout."""
    found = {}
    for step in ("make", *SHOWN):
        words = [sys.executable, str(Path(__file__).resolve()), run, "--shards", str(num_shards), "--step", step]
        done = subprocess.run(
            words, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True, timeout=3600, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{step}: {done.stderr}")
        found[step] = json.loads(done.stdout.splitlines()[-1])
        print(f"{checkout.name}: {step}: {found[step]}", flush=True)
    return found


def timed(step: str, run: str, num_shards: int) -> dict[str, float]:
    """Seconds that a step takes, imports left out, and the most memory of this process until its end."""
    from m2ray.storage import open_store

    for name in ("m2ray.activations.reading.reader", "m2ray.activations.writing.commits", *IMPORTED.get(step, ())):
        import_module(name)
    store = open_store(run)
    begin: Callable[[], object] = {
        "make": lambda: make(store, num_shards),
        "open an unfinished run": lambda: looked_at(run, is_complete=False),
        "inspect an unfinished run": lambda: inspected(run),
        "go on": lambda: gone_on(store),
        "finish": lambda: finished(store, num_shards),
        "open": lambda: looked_at(run, is_complete=True),
        "inspect": lambda: inspected(run),
        "look whether it is finished": lambda: gone_on(store),
    }[step]
    began, began_cpu = time.monotonic(), time.process_time()
    begin()
    cpu_s = time.process_time() - began_cpu
    return {"seconds": time.monotonic() - began, "cpu_s": cpu_s, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


# -- the steps --------------------------------------------------------------------------------------------------------------


def make(store: Any, num_shards: int) -> None:
    """An unfinished run that lacks the commit of its last shard."""
    from m2ray.activations.job import Counts, JobRecord, ModelFacts, read_job
    from m2ray.batches import PartSpec

    store.delete(["_SUCCESS", "manifest.parquet", *(key for key, _ in store.list("_commits"))])
    job = read_job(store)
    if job is None:
        job = JobRecord.new(
            m2ray_version="benchmark",
            options={},
            fingerprints={"model": "-", "tokenizer": "-"},
            model=ModelFacts("minimax_m2", NUM_LAYERS, 3072),
            parts=tuple(PartSpec.of("residual", layer, "bfloat16", 3072) for layer in range(NUM_LAYERS)),
            num_shards=num_shards,
            counts=Counts(num_shards, num_shards, 0, 0),
            sequence_files=(sequences(store, num_shards),),
            names={"model": "-", "prompts": "-"},
        )
        store.create("job.json", job.to_json())
        write_all(store, ((key, b"-") for shard in range(num_shards) for key in part_keys(job, shard)))
    write_all(store, ((f"_commits/shard-{shard:06d}.json", commit_of(job, shard)) for shard in range(num_shards - 1)))


def sequences(store: Any, num_shards: int) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import xxhash

    from m2ray.batches import SequenceFile

    table = pa.table(
        {
            "sequence_id": pa.array(range(num_shards), pa.int64()),
            "row_id": [str(number) for number in range(num_shards)],
            "prompt_digest": ["0" * 32] * num_shards,
            "token_count": pa.array([0] * num_shards, pa.int32()),
            "shard": pa.array(range(num_shards), pa.int32()),
            "status": ["ready"] * num_shards,
            "reason": pa.nulls(num_shards, pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data, key = sink.getvalue().to_pybytes(), "sequences/sequences-00000-a1.parquet"
    store.put(key, data)
    return SequenceFile(key, num_shards, len(data), xxhash.xxh3_64_hexdigest(data))


def part_keys(job: Any, shard: int) -> list[str]:
    from m2ray.activations.schema import part_key

    return [part_key(spec, shard, ATTEMPT) for spec in job.parts]


def commit_of(job: Any, shard: int) -> bytes:
    from m2ray.activations.records import CommitRecord, CommittedPart

    keys = zip(job.parts, part_keys(job, shard), strict=True)
    parts = tuple(CommittedPart(spec.site, spec.layer, key, 1, f"{shard:016x}", 4096, f"{spec.layer:016x}") for spec, key in keys)
    shapes = ((32, 512), (32, 512))
    record = CommitRecord(job.format_version, job.run_id, shard, ATTEMPT, 1, 0, "0" * 32, shapes, 1.5, job.created_at, parts)
    return record.to_json()


def write_all(store: Any, objects: Iterator[tuple[str, bytes]]) -> None:
    """Many small objects. On a disk without waiting for it, which a benchmark of reading need not."""
    folder = store.folder
    if folder is None:
        with ThreadPoolExecutor(32) as pool:
            for _ in pool.map(lambda each: store.put(*each), objects):
                pass
        return
    made = set()
    for key, data in objects:
        path = folder / key
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        with path.open("wb", buffering=0) as file:
            file.write(data)


def looked_at(run: str, *, is_complete: bool) -> None:
    from m2ray import open_run

    reader = open_run(run)
    assert reader.is_complete == is_complete
    assert reader.num_files == reader.num_shards * NUM_LAYERS


def inspected(run: str) -> None:
    from click.testing import CliRunner

    from m2ray.cli.inspect import command

    done = CliRunner().invoke(command, [run])
    assert done.exit_code == 0, done.output


def gone_on(store: Any) -> None:
    """What a resume does of which the time grows with the run, up to the prompts of the missing shards."""
    from m2ray.activations.job import read_job
    from m2ray.activations.writing.commits import go_on_with
    from m2ray.prompts import load_shards

    job = read_job(store)
    assert job is not None
    shards = load_shards(store, job.sequence_files)
    run = go_on_with(store, job)
    assert run.reopen_damaged() == []
    missing = run.missing(shards)
    assert len(missing) in (0, 1)
    if not missing:
        run.finish()


def finished(store: Any, num_shards: int) -> None:
    from m2ray.activations.job import read_job
    from m2ray.activations.writing.commits import go_on_with

    job = read_job(store)
    assert job is not None
    store.put(f"_commits/shard-{num_shards - 1:06d}.json", commit_of(job, num_shards - 1))
    go_on_with(store, job).finish()


# -- a store that is far away -----------------------------------------------------------------------------------------------


@contextmanager
def delayed(delay_ms: float) -> Iterator[None]:
    """Requests to the server that AWS_ENDPOINT_URL names go through a relay, each so much later."""
    if not delay_ms:
        yield
        return
    upstream = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    ports: multiprocessing.Queue[int] = multiprocessing.Queue()
    relay = multiprocessing.Process(target=_relay, args=(upstream.hostname, upstream.port, delay_ms / 1e3, ports), daemon=True)
    relay.start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{ports.get(timeout=60)}"
    try:
        yield
    finally:
        relay.terminate()
        relay.join(10)


def _relay(host: str, port: int, delay_s: float, ports: "multiprocessing.Queue[int]") -> None:
    async def serve() -> None:
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection(host, port)
            answered = [True]

            async def hand_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_request: bool) -> None:
                while data := await source.read(1 << 16):
                    if is_request and answered[0]:
                        await asyncio.sleep(delay_s)
                    answered[0] = not is_request
                    target.write(data)
                    await target.drain()
                target.close()

            ways = hand_on(reader, there_writer, is_request=True), hand_on(there_reader, writer, is_request=False)
            await asyncio.gather(*ways, return_exceptions=True)

        server = await asyncio.start_server(take, "127.0.0.1", 0)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
