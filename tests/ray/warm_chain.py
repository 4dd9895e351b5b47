"""What one process does with a warm chain: jobs, requests beside them, stages that are killed. Prints what it saw as JSON.

    python warm_chain.py NAME PROMPTS OUTPUT OPTION...

Run by test_warm_chain.py; the runs are OUTPUT/first, OUTPUT/second and OUTPUT/asked, the requests' rows OUTPUT/*.safetensors. The chain is
started by a process of its own, with the options of `m2ray serve`, and stopped at the end. The layers of its second stage are read from files, in waves.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from click.testing import CliRunner
from safetensors.torch import save_file

import m2ray
from m2ray.api.connecting import WarmChain
from m2ray.chain.http import start_http
from m2ray.cli import chains, serve
from m2ray.errors import M2rayError
from m2ray.planning import placing, residency
from m2ray.planning.demand import Demand
from m2ray.planning.devices import Device
from tests.reference import other_weights

OPTIONS = {"store_dtype": "float32", "id_column": "id", "shard_tokens": 400}
SITES = "residual:all, mlp:2"


def pids(chain: WarmChain) -> list[int]:
    return [stage.pid for stage in chain.status().stages]


def refused(chain: WarmChain, prompts: str, output: str, **options: object) -> str:
    """What a job that names a model or a way to compute itself is refused with."""
    model = chain._standing.served.model_url
    try:
        m2ray.extract(**{"model": model, "prompts": prompts, "output": output, "chain": chain.name, **OPTIONS, **options})
    except M2rayError as error:
        return str(error)
    return "not refused"


def refused_request(chain: WarmChain, prompts: list[str]) -> str:
    try:
        chain.activations(prompts, sites="residual:0")
    except M2rayError as error:
        return str(error)
    return "not refused"


def over_http(chain: WarmChain, asked: dict[str, object], file: Path) -> list[int]:
    """The statuses of a request, whose answer is kept, and of one without the token."""
    url, statuses = chain._standing.served.http, []
    for token in (os.environ["M2RAY_SERVE_TOKEN"], "wrong"):
        request = Request(url, json.dumps(asked).encode(), {"Authorization": f"Bearer {token}"})
        try:
            with urlopen(request, timeout=60) as answer:
                file.write_bytes(answer.read())
                statuses.append(answer.status)
        except HTTPError as error:
            statuses.append(error.code)
    return statuses


def in_a_process(work: Callable[[], object]) -> int:
    """The process that does this and ends: another driver, which has imported already what takes longest."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told, whatever it is
            print(repr(error), flush=True)  # noqa: T201 - what a failed test shows
            os._exit(1)
        os._exit(0)
    return pid


def killed_at_work(name: str, model: str, prompts: str, output: Path) -> None:
    """A job on the chain, whose driver is killed once a shard is committed."""
    options = {**OPTIONS, "chain": name, "shard_tokens": 40, "batch_tokens": 40}
    driver = in_a_process(lambda: m2ray.extract(model=model, prompts=prompts, output=output, **options))
    deadline = time.monotonic() + 60
    while not list((output / "_commits").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(driver, signal.SIGKILL)
    status = os.waitpid(driver, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGKILL, "it was at work"


def left_behind(url: str) -> None:
    """Something that answers at the chain's address, for a chain whose keeper is no more."""
    address = urlsplit(url)
    start_http("ghost", str(address.hostname), int(address.port or 0), "/ghost")


def stopped_at_work(chain: WarmChain, prompts: str, output: Path) -> list[str]:
    """What `m2ray serve --stop` says while a job has the chain, and what the job says then."""
    said: list[str] = []
    many = output.with_suffix(".jsonl")
    many.write_text(20 * Path(prompts).read_text(encoding="utf-8"), encoding="utf-8")  # more than it can do meanwhile

    def work() -> None:
        try:
            chain.extract(prompts=str(many), output=str(output), **{**OPTIONS, "shard_tokens": 40, "batch_tokens": 40})
        except M2rayError as error:
            said.append(str(error))

    working = threading.Thread(target=work)
    working.start()
    deadline = time.monotonic() + 60
    while not list((output / "_commits").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    ended = CliRunner().invoke(serve.command, ["--stop", chain.name]).output
    working.join(60)
    return [ended, *said]


def last_stage_in_files(demand: Demand, chain: Sequence[Device]) -> tuple[int, residency.Spans]:
    """As planned, but for the last stage's layers, which are read from the model's files each time: memory has room for many such models."""
    short_bytes, spans = residency.deal(demand, chain)
    span, _ = spans[max(spans)]
    return short_bytes, {**spans, max(spans): (span, dict.fromkeys(range(span.start, span.stop), "checkpoint"))}


def main() -> None:
    placing.deal = last_stage_in_files
    name, prompts, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    served = in_a_process(lambda: serve.command.main(sys.argv[4:], standalone_mode=False))
    assert os.waitpid(served, 0)[1] == 0
    killed_at_work(name, sys.argv[sys.argv.index("--model") + 1], prompts, output / "killed")
    texts = [json.loads(line)["text"] for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    asked = [text for text in texts if text][:9]
    seen: dict[str, object] = {}
    with m2ray.connect(name) as chain:
        seen["repr"] = repr(chain)
        seen["before"] = pids(chain)
        save_file(chain.activations(asked, sites=SITES), output / "idle.safetensors")
        chain.extract(prompts=prompts, output=str(output / "first"), **OPTIONS)
        beside: list[dict[str, object]] = []

        def ask() -> None:
            beside.extend(chain.activations(asked, sites=SITES) for _ in range(3))

        asking = threading.Thread(target=ask)
        asking.start()
        chain.extract(prompts=prompts, output=str(output / "second"), sites="residual:0,3, mlp:2", **OPTIONS)
        asking.join(60)
        save_file(beside[0], output / "beside.safetensors")
        seen["beside"] = len(beside)
        seen["after"] = pids(chain)
        reports = [json.loads((output / run / "report.json").read_text()) for run in ("first", "second")]
        seen["read_bytes"] = [[stage["read_bytes"] for stage in report["stages"]] for report in reports]
        left_behind(chain._standing.served.http)
        seen["http"] = over_http(chain, {"prompts": asked, "sites": SITES}, output / "http.safetensors")
        seen["refused"] = [
            refused(chain, prompts, str(output / "refused"), compute_dtype="bfloat16", threads_per_stage=7),
            refused(chain, prompts, str(output / "refused"), model=str(output)),
        ]
        os.kill(pids(chain)[1], signal.SIGKILL)
        chain.extract(prompts=asked, output=str(output / "asked"), sites=SITES, store_dtype="float32", shard_tokens=400)
        with other_weights(Path(chain._standing.served.model_url.removeprefix("file://"))):
            seen["replaced"] = [refused(chain, prompts, str(output / "refused"))]
            os.kill(pids(chain)[0], signal.SIGKILL)
            seen["replaced"] += [refused_request(chain, asked) for _ in range(2)]
        save_file(chain.activations(asked, sites=SITES), output / "mended.safetensors")
        seen["mended"] = pids(chain)
        status, deadline = chain.status(), time.monotonic() + 60
        while status.trouble and time.monotonic() < deadline:  # the keeper's next look ends what its last one saw of the other weights
            time.sleep(0.1)
            status = chain.status()
        seen["status"] = [status.is_loaded, status.jobs, status.answered, status.job, status.trouble]
        seen["listed"] = CliRunner().invoke(chains.command, []).output
        seen["after_http"] = over_http(chain, {"prompts": asked, "sites": SITES}, output / "http.safetensors")
        seen["stopped"] = stopped_at_work(chain, prompts, output / "stopped")
        seen["none"] = CliRunner().invoke(chains.command, []).output
    print(json.dumps(seen))  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
