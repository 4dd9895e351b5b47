"""examples/first_steps.ipynb as a person has it: `python call_from_python.py NOTEBOOK`, with the model's folder in the folder where it is called.

Run by test_python.py, which looks at what it prints: what each cell shows, and at the end what was told. All in one process, since starting one
takes longer than the runs: the notebook is stopped by Ctrl-C while the stages load, in a process that has joined Ray by itself and stays so; it
goes on from the top in a thread that is not the main one, where no signal handler can be set; then come the same call and one with other prompts.
"""

import _thread
import ast
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

import m2ray
from m2ray.chain.progress import Progress
from m2ray.errors import M2rayError

told: dict[str, Any] = {}


def run_cells(notebook: Path) -> dict[str, Any]:
    """Run the cells and print what each shows, by _repr_html_ where there is one, as a notebook would. Returns their names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            print(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
    return names


def interrupted(self: Progress, statuses: Any, **how: Any) -> None:
    Progress.loading = loading
    _thread.interrupt_main()
    loading(self, statuses, **how)


notebook = Path(sys.argv[1])
loading, Progress.loading = Progress.loading, interrupted
ray.init(logging_level="ERROR")
try:
    run_cells(notebook)
except KeyboardInterrupt:
    told["stopped"] = repr(m2ray.open_run("first-run"))
told["stays"] = ray.is_initialized()
ray.shutdown()

with ThreadPoolExecutor(1) as pool:
    names = pool.submit(run_cells, notebook).result(240)
model, prompts, run = names["MODEL"], names["prompts"], names["run"]
told["finished"], told["accuracies"] = repr(run), names["accuracies"]
told["same"] = [run.text(number) == prompt["text"] for number, prompt in enumerate(prompts)]
told["again"] = repr(m2ray.extract(model=model, prompts=list(prompts), output="first-run", keep_columns=["label"]))
try:
    m2ray.extract(model=model, prompts=[*prompts[:-1], prompts[-1] | {"label": "good"}], output="first-run", keep_columns=["label"])
except M2rayError as refused:
    told["refused"] = str(refused)
print(json.dumps(told))
