"""Ray Data reads a run by the lines that docs/data_format.md gives."""

import re
from pathlib import Path

from m2ray.storage import LocalStore
from tests.ray.conftest import REPOSITORY, RayCluster
from tests.unit import activation_runs as runs

COMPARE = """
found = sorted((row["sequence_id"], row["position"], row["token_id"], row["activation"]) for row in rows.take_all())
run = m2ray.open_run(RUN).layer(7)
bits = run.tensor().view(torch.uint8).numpy()
expected = [(*token, row.tobytes()) for token, row in zip(run.tokens().tolist(), bits)]
assert found == sorted(expected), "other rows"
assert torch.equal(numbers([row[3] for row in found]).view(torch.uint8), torch.from_numpy(bits)[run.tokens().argsort()])
print(len(found), "rows are equal")
"""


def test_the_documented_lines_of_ray_data(cluster: RayCluster, tmp_path: Path) -> None:
    """Every bit of every row of a layer, NaN payloads included. Run as a user's script: its tasks read the files."""
    store = LocalStore(tmp_path / "run")
    job = runs.finished_run(store).job
    runs.write_shard(store, job, runs.shard(1), "dead")  # left by a driver that lost
    page = (REPOSITORY / "docs" / "data_format.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    chosen = [next(block for block in blocks if mark in block) for mark in ("def numbers", "def files", "import ray.data")]
    script = "\n".join(["import m2ray", f"RUN = {str(tmp_path / 'run')!r}", *chosen, COMPARE])
    done = cluster.run("python", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "67 rows are equal" in done.stdout
