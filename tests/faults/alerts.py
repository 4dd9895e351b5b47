"""What an operator sees of a run: all that the board asks for is there, and within a minute the alerts fire, that of the store where it is the store."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.faults.cluster import Cluster, ray_cluster
from tests.faults.driver import Driver
from tests.faults.prometheus import Prometheus, board_queries, prometheus
from tests.faults.server import FaultyServer, faulty_server
from tests.reference import make_minimax

STALLED, FAILING = "M2rayRunStalled", "M2rayStoreFailing"
_WITHIN_S = 60.0
_OVER_S = 120.0
_START_S = 240.0
_NUM_PROMPTS = 40_000
"""Still at work when all was seen."""


def watch() -> list[str]:
    """Strike a run in an S3 server, with a real Prometheus beside it. Gives what should not have happened."""
    folder = Path(tempfile.mkdtemp(prefix="m2ray-alerts-", dir="/tmp"))
    with ExitStack() as stack:
        server = stack.enter_context(faulty_server())
        cluster = stack.enter_context(ray_cluster(2, server.env))
        seen = stack.enter_context(prometheus(folder, cluster))
        driver = Driver(cluster, server.url("alerts"), _words(folder), folder / "driver.log", as_job=False)
        stack.callback(driver.end)
        problems = _look(seen, driver)
        for fault in () if problems else (_hanging_store(server), _stopped_stages(cluster)):
            with fault as expected:
                problems += _await_alerts(seen, expected)
            problems += _await(lambda: not seen.firing(), _OVER_S, "no alert fires any more")
        if not driver.is_running:
            problems.append(f"the driver ended: {driver.printed[-2000:]}")
    if problems:
        print(f"The logs are in {folder}.")
    else:
        subprocess.run(["rm", "-rf", folder], check=True, timeout=60)
    return problems


def _words(folder: Path) -> list[str]:
    make_minimax(folder / "model", "fp8")
    rows = [json.dumps({"text": " ".join(["sea", "wind"] * (1 + number % 20))}) for number in range(_NUM_PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join([*rows, json.dumps({"text": ""})]) + "\n", encoding="utf-8")
    words = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), "--stages", "2"]
    return [*words, "--batch-tokens", "256", "--shard-tokens", "300", "--stage-timeout-s", "300"]


def _look(seen: Prometheus, driver: Driver) -> list[str]:
    """Every query of the board gives something, those of GPUs excepted, which Prometheus has to understand all the same; and no alert fires."""
    of_gpus = [query for query in board_queries() if "_gpu_" in query and not seen.query(query)]
    queries = [query for query in board_queries() if query not in of_gpus]
    problems = _await(
        lambda: bool(seen.query("ray_m2ray_committed_shards_total")) or not driver.is_running, _START_S, "a shard was committed"
    )
    problems += _await(lambda: all(map(seen.query, queries)), _WITHIN_S, "the board was full")
    problems += [f"the board's query gives nothing: {query}" for query in queries if not seen.query(query)]
    problems += [f"{alert} fires without a cause" for alert in seen.firing()]
    names = {series["metric"]["__name__"] for series in seen.query('{__name__=~"ray_m2ray_.*"}')}
    print(f"{len(queries)} queries of the board give data; {len(names)} metrics are there")
    return problems


@contextmanager
def _hanging_store(server: FaultyServer) -> Iterator[set[str]]:
    print("the store takes requests and does not answer")
    server.proxy.lasting = "hang"
    yield {STALLED, FAILING}
    server.proxy.lasting = None


@contextmanager
def _stopped_stages(cluster: Cluster) -> Iterator[set[str]]:
    """SIGSTOP: what the stages said last may be that rows wait for the store, which is not why."""
    print("the stages' processes are stopped")
    stages = cluster.stage_pids()
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for pid in stages:
            os.kill(pid, signum)
        if signum == signal.SIGSTOP:
            yield {STALLED}


def _await_alerts(seen: Prometheus, expected: set[str]) -> list[str]:
    """These and no others fire within a minute."""
    began, fired_s = time.monotonic(), dict[str, float]()
    while time.monotonic() - began < _WITHIN_S:
        for alert in seen.firing() - fired_s.keys():
            fired_s[alert] = time.monotonic() - began
            print(f"{alert} fires after {fired_s[alert]:.0f} s", flush=True)
        time.sleep(0.5)  # asks again; the seconds above are as coarse
    problems = [f"{alert} did not fire within {_WITHIN_S:g} s" for alert in expected - fired_s.keys()]
    return problems + [f"{alert} fires without a cause" for alert in fired_s.keys() - expected]


def _await(condition: Callable[[], bool], timeout_s: float, what: str) -> list[str]:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            return [f"it took more than {timeout_s:g} s until {what}"]
        time.sleep(0.5)  # asks again; nothing rests on the interval
    print(f"{what} after {time.monotonic() - began:.0f} s", flush=True)
    return []
