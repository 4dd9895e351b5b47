"""The user's own command with its run folder, its model and its prompts in an object store, killed on the way and finished."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import duckdb
import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset
import pytest
import torch
from obstore.fsspec import FsspecStore
from pyarrow.fs import S3FileSystem

import m2ray
from m2ray.storage import Store, open_store
from tests.following import assert_every_row_once, follow
from tests.ray.conftest import RayCluster, ray_head
from tests.reference import make_minimax, same_bits
from tests.store.conftest import S3Server
from tests.store.test_model import upload

OPTIONS = (
    *("--compute-dtype", "float32", "--store-dtype", "float32", "--threads-per-stage", "1"),
    *("--batch-tokens", "256", "--shard-tokens", "300"),
)
NUM_PROMPTS = 40


@pytest.fixture(scope="module")
def cluster(s3: S3Server) -> Iterator[RayCluster]:
    """Its nodes have the credentials in their environment, as a user's nodes would."""
    with ray_head(num_cpus=2) as head:
        yield head


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and prompts, one of them bad."""
    folder = tmp_path_factory.mktemp("inputs")
    make_minimax(folder / "model", "fp8")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["sea", "wind", "stone", "水"], int(count))) for count in rng.integers(1, 40, NUM_PROMPTS)]
    texts[7] = ""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return folder


def words(inputs: str, output: str, *more: str) -> list[str]:
    return ["m2ray", "extract", "--model", f"{inputs}/model", "--prompts", f"{inputs}/prompts.jsonl", "--output", output, *OPTIONS, *more]


@pytest.fixture(scope="module")
def local_run(cluster: RayCluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same extraction on a disk, not interrupted."""
    run = tmp_path_factory.mktemp("runs") / "local"
    done = cluster.run(*words(str(inputs), str(run)))
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def commits(store: Store) -> dict[str, bytes]:
    return {key: store.read(key) for key, _ in store.list("_commits")}


def wait_for_commits(store: Store, count: int, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while len(list(store.list("_commits"))) < count:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "no commit came"
        time.sleep(0.01)  # polls; the order of events does not rest on it


@pytest.fixture(scope="module")
def remote_run(cluster: RayCluster, inputs: Path, s3: S3Server) -> str:
    """A run in the bucket: the model, the prompts and the output there, the driver killed after two commits, then finished, a stream following it."""
    base = upload(inputs, f"s3://{s3.bucket}/extract")
    url, store = f"{base}/run", open_store(f"{base}/run")
    driver = cluster.start(*words(base, url, "--stages", "2", "--in-flight", "1KB"))
    try:
        wait_for_commits(store, 2, driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate(timeout=30)
    before = commits(store)
    assert store.size("_SUCCESS") is None
    followed = follow(url, 1)
    again = cluster.run(*words(base, url, "--stages", "1"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"Complete: {NUM_PROMPTS - 1} sequences" in again.stdout
    after = commits(store)
    assert 2 <= len(before) < len(after)
    assert {key: after[key] for key in before} == before
    assert_every_row_once(followed.result(60), url, 1)
    return url


def test_the_reader_gives_the_rows_of_the_local_run(remote_run: str, local_run: Path) -> None:
    remote, local = m2ray.open_run(remote_run), m2ray.open_run(local_run)
    assert remote.layer_numbers == local.layer_numbers
    assert np.array_equal(remote.tokens(), local.tokens())
    for layer in local.layer_numbers:
        assert same_bits(remote.layer(layer).tensor(), local.layer(layer).tensor())
    assert len(remote.tokens()) > 500


def rows_by_layer(rows: list[tuple[int, int, int, bytes]]) -> dict[tuple[int, int], dict[int, bytes]]:
    found: dict[tuple[int, int], dict[int, bytes]] = {}
    for sequence_id, position, layer, activation in rows:
        of_token = found.setdefault((sequence_id, position), {})
        assert layer not in of_token, "a row twice"
        of_token[layer] = activation
    return found


def assert_equals(rows: list[tuple[int, int, int, bytes]], local_run: Path) -> None:
    """Every row of every layer, by stock readers' means, against the project's own reader on the local run."""
    found, local = rows_by_layer(rows), m2ray.open_run(local_run)
    tokens = local.tokens()
    assert len(found) == len(tokens)
    for layer in local.layer_numbers:
        expected = local.layer(layer).tensor()
        for (sequence_id, position), row in zip(tokens[["sequence_id", "position"]].tolist(), expected, strict=True):
            bits = torch.frombuffer(bytearray(found[sequence_id, position][layer]), dtype=torch.float32)
            assert same_bits(bits, row)


def test_duckdb_reads_the_finished_run_by_its_manifest(remote_run: str, local_run: Path, s3: S3Server) -> None:
    connection = duckdb.connect()
    connection.register_filesystem(FsspecStore("s3", endpoint=s3.endpoint, client_options={"allow_http": True}))
    connection.execute(f"SET VARIABLE files = (SELECT list('{remote_run}/' || key) FROM '{remote_run}/manifest.parquet')")
    query = (
        "SELECT sequence_id, position, CAST(layer AS INTEGER), activation FROM read_parquet(getvariable('files'), hive_partitioning = true)"
    )
    assert_equals(connection.execute(query).fetchall(), local_run)


def test_an_autoencoder_trains_on_the_run_in_the_bucket(remote_run: str, cluster: RayCluster) -> None:
    """examples/train_sae.py as a user runs it."""
    options = ("--layer", "3", "--features", "128", "--active", "8", "--steps", "100", "--batch-rows", "64")
    trained = cluster.run("python", "examples/train_sae.py", remote_run, *options)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert 0.3 < float(re.search(r"explained variance: ([\d.]+)", trained.stdout)[1]) < 1


def kill_the_driver(url: str) -> None:
    """SIGKILL the entry point of the job that writes to `url`: the process itself, not the shell around it, nor the one that submits."""
    drivers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if url in (words := process.info["cmdline"] or []) and words[1] == "jobs/extract.py"
    ]
    assert len(drivers) == 1, drivers
    drivers[0].kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demos_job_killed_once_is_read_back_by_duckdb_and_by_the_stream(
    cluster: RayCluster, inputs: Path, url: str, s3: S3Server
) -> None:
    """The demo's prompts and configuration on a model of fewer layers, submitted twice. DuckDB's own httpfs is a download, which a
    machine without internet cannot have: it reads through obstore's fsspec file system.
    """
    submit = ("ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--")
    job = (*submit, "python", "jobs/extract.py", "jobs/configs/demo.toml", "--model", str(inputs / "model"), "--output", url)
    store = open_store(url)
    follower = cluster.start(*job)
    try:
        wait_for_commits(store, 3, follower)
        kill_the_driver(url)
        printed, _ = follower.communicate(timeout=120)
    finally:
        follower.kill()
    assert follower.returncode == 1, printed
    before = commits(store)
    assert store.size("_SUCCESS") is None
    again = cluster.run(*job, "--stages", "2", timeout_s=600)  # half as many processes to start
    assert again.returncode == 0, again.stdout + again.stderr
    after = commits(store)
    assert 3 <= len(before) < len(after)
    assert {key: after[key] for key in before} == before

    run = m2ray.open_run(url)
    tokens, sequences = run.tokens(), run.sequences
    assert sequences.num_rows == 300
    assert len(tokens) == len(np.unique(tokens)) == sum(sequences["token_count"].to_pylist())
    connection = duckdb.connect()
    connection.register_filesystem(files := FsspecStore("s3", endpoint=s3.endpoint, client_options={"allow_http": True}))
    for layer in run.layer_numbers:
        rows = run.layer(layer).tensor()
        parts = [f"s3://{path}" for path in files.glob(f"{url.removeprefix('s3://')}/data/site=residual/layer={layer:03d}/*.parquet")]
        found = connection.execute("SELECT sequence_id, position, token_id, activation FROM read_parquet(?)", [parts]).fetchall()
        found.sort()
        order = np.argsort(tokens, order=("sequence_id", "position"))
        assert [row[:3] for row in found] == tokens[order].tolist()
        bits = torch.frombuffer(bytearray(b"".join(row[3] for row in found)), dtype=torch.bfloat16).view(len(tokens), -1)
        assert same_bits(bits, rows[torch.from_numpy(order)])

    place = {key: number for number, key in enumerate(map(tuple, tokens[["sequence_id", "position"]].tolist()))}
    expected, seen = run.layer(3).tensor(), []
    for batch in run.layer(3).stream(batch_rows=1000, shuffle_buffer_bytes=4 << 20):
        places = [place[key] for key in zip(batch["sequence_id"].tolist(), batch["position"].tolist(), strict=True)]
        assert same_bits(batch["activations"], expected[places])
        assert np.array_equal(batch["token_id"].numpy(), tokens["token_id"][places])
        seen += places
    assert sorted(seen) == list(range(len(tokens)))


def test_pyarrow_reads_it_with_its_own_s3_client(remote_run: str, local_run: Path, s3: S3Server) -> None:
    parts = urlsplit(s3.endpoint)
    client = S3FileSystem(
        access_key=s3.access_key, secret_key=s3.secret_key, scheme=parts.scheme, endpoint_override=parts.netloc, region=s3.region
    )
    folder = remote_run.removeprefix("s3://")
    keys = pa_dataset.dataset(f"{folder}/manifest.parquet", filesystem=client).to_table()["key"].to_pylist()
    table = pa_dataset.dataset([f"{folder}/{key}" for key in keys], filesystem=client, partitioning="hive").to_table()
    columns = (table["sequence_id"], table["position"], pc.cast(table["layer"], "int32"), table["activation"])
    assert_equals(list(zip(*(column.to_pylist() for column in columns), strict=True)), local_run)


def test_nothing_of_the_credentials_is_in_the_run(remote_run: str, s3: S3Server) -> None:
    store = open_store(remote_run)
    documents = [store.read(key) for key, _ in store.list("") if not key.startswith("data/")]
    assert len(documents) > 4
    for document in documents:
        assert s3.secret_key.encode() not in document
        assert s3.access_key.encode() not in document


def test_an_output_that_cannot_be_written_stops_before_ray(inputs: Path, cluster: RayCluster) -> None:
    done = cluster.run(*words(str(inputs), "s3://m2ray-no-such-bucket/run"), RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 1
    assert "no such bucket" in done.stderr
    assert "127.0.0.1:9" not in done.stderr
    assert "Traceback" not in done.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.stderr + done.stdout
