"""Run a notebook's cells in this process, one after the other, and print of each what it shows: `python run_notebook.py NOTEBOOK`.

Run by test_python.py. What a cell ends with is shown as a notebook would, by _repr_html_ where there is one.
"""

import ast
import json
import sys
from pathlib import Path

names: dict[str, object] = {"__name__": "__main__"}
for cell in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"]:
    if cell["cell_type"] != "code":
        continue
    body = ast.parse("".join(cell["source"])).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        print(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
