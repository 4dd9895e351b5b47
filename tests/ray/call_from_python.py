"""m2ray.extract as a notebook calls it, several times in one process: `python call_from_python.py MODEL FOLDER`. Prints what test_python.py looks at.

Ctrl-C comes while the stages load, in a process that has joined Ray by itself and stays so; the same call goes on in a thread that is not the
main one, where no signal handler can be set.
"""

import _thread
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray

import m2ray
from m2ray.chain.progress import Progress
from m2ray.errors import M2rayError

model, folder = sys.argv[1:]
rng = np.random.default_rng(0)
TEXTS = [" ".join(rng.choice(["sea", "wind", "stone", "水"], int(count))) for count in rng.integers(1, 30, 40)]
told: dict[str, Any] = {}


def extract(texts: list[str]) -> Any:
    return m2ray.extract(
        model=model, prompts=texts, output=f"{folder}/run", layers=[0, 2], compute_dtype="float32", store_dtype="float32", shard_tokens=100
    )


loading = Progress.loading


def interrupted(self: Progress, statuses: Any) -> None:
    Progress.loading = loading
    _thread.interrupt_main()
    loading(self, statuses)


Progress.loading = interrupted
ray.init(logging_level="ERROR")
try:
    extract(TEXTS)
except KeyboardInterrupt:
    told["stopped"] = repr(m2ray.open_run(f"{folder}/run"))
told["stays"] = ray.is_initialized()
ray.shutdown()

with ThreadPoolExecutor(1) as pool:
    run = pool.submit(extract, TEXTS).result(240)
told["finished"] = repr(run)
told["layers"], told["same"] = run.layer_numbers, [run.text(number) == text for number, text in enumerate(TEXTS)]
told["again"] = repr(extract(list(TEXTS)))
try:
    extract([*TEXTS[:-1], "another"])
except M2rayError as refused:
    told["refused"] = str(refused)
print(json.dumps(told))
