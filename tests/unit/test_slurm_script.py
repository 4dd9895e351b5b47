"""cluster/slurm/extract.sbatch under stand-ins for Slurm's and Ray's commands; `scripts/slurm_here` runs it under the real ones."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster/slurm/extract.sbatch"

# The second srun, which starts Ray on each node, is the one with an option of this name.
ON_ALL_NODES = '[[ "$1" == --kill-on-bad-exit=1 ]]'
MAKE_THE_MARK = 'touch "${@: -1}"'


def run_script(folder: Path, **stand_ins: str) -> subprocess.CompletedProcess[str]:
    """In `folder`, with bash bodies for commands, by name; what they write to `$RECORD` is in `folder / "record"`."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text("")
    for name, body in {"scontrol": "echo a; echo b", **stand_ins}.items():
        stand_in = folder / name
        stand_in.write_text(f"#!/bin/bash\n{body}\n")
        stand_in.chmod(0o755)
    slurm = {
        "SUBMIT_DIR": str(folder),
        "JOB_ID": "1",
        "JOB_NODELIST": "a,b",
        "JOB_NUM_NODES": "2",
        "NODEID": "0",
        "CPUS_PER_TASK": "64",
        "GPUS_ON_NODE": "4",
    }
    env = {name: value for name, value in os.environ.items() if not re.match("SLURM_|SRUN_|M2RAY_", name)}
    env |= {f"SLURM_{name}": value for name, value in slurm.items()}
    env |= {"HOME": str(folder), "PATH": f"{folder}:{env['PATH']}", "RECORD": str(folder / "record")}
    return subprocess.run(["bash", SCRIPT], env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_each_srun_asks_for_the_cores_of_a_task(tmp_path: Path) -> None:
    done = run_script(tmp_path, srun=f'echo "$SRUN_CPUS_PER_TASK" >>"$RECORD"; echo 10.0.0.1; {ON_ALL_NODES} && {MAKE_THE_MARK} || true')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "record").read_text().split() == ["64"] * len(re.findall(r"\bsrun --", SCRIPT.read_text()))


@pytest.mark.parametrize(("mark", "srun_code", "code"), [(MAKE_THE_MARK, 143, 0), (":", 0, 1), (":", 1, 1)])
def test_the_commands_mark_decides_and_the_token_goes(tmp_path: Path, mark: str, srun_code: int, code: int) -> None:
    """srun ends nodes that still look for the first one's Ray, and then says 143; symmetric-run says 0 whatever Ray did."""
    done = run_script(tmp_path, srun=f"echo 10.0.0.1; if {ON_ALL_NODES}; then {mark}; exit {srun_code}; fi")
    assert done.returncode == code, done.stderr
    assert ("did not finish" in done.stderr) == (code != 0)
    assert list(tmp_path.glob(".m2ray-token*")) == []


def test_a_node_whose_ray_does_not_start_ends_the_others(tmp_path: Path) -> None:
    """A node's part, with a `ray` that says 0 as symmetric-run does, fails without the mark; it asks for what Slurm gave the node."""
    node = f'echo 10.0.0.1; if {ON_ALL_NODES}; then shift 2; "$@"; echo "code $?" >>"$RECORD"; fi'
    done = run_script(tmp_path, srun=node, ray='echo "$@" >>"$RECORD"')
    assert done.returncode == 1
    started, code = (tmp_path / "record").read_text().splitlines()
    assert code == "code 1"
    assert re.search(r"--temp-dir /tmp/m2ray-\w{8}/ray ", started)
    assert "--num-gpus 4 --num-cpus 64 --object-store-memory 68719476736 -- bash -c" in started


def test_another_node_stops_its_ray_once_the_mark_is_there(tmp_path: Path) -> None:
    """Its symmetric-run would go on looking for the first node's Ray; it is ended, and the node counts as done."""
    address = f"10.1.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"  # the node's pkill looks for it, beside other tests' nodes
    node = f"""echo {address}; if {ON_ALL_NODES}; then
        export SLURM_NODEID=1; shift 2; {{ sleep 0.2; {MAKE_THE_MARK}; }} & "$@"; echo "code $?" >>"$RECORD"; fi"""
    ray = 'echo "$1" >>"$RECORD"; [[ "$1" == stop ]] || exec -a "ray $*" sleep 50'
    done = run_script(tmp_path, srun=node, ray=ray)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "record").read_text().split("\n") == ["symmetric-run", "stop", "code 0", ""]


def test_the_last_node_does_not_wait_for_a_ray_that_is_gone() -> None:
    assert re.search(r"^srun --kill-on-bad-exit=1 --wait=\d+ bash", SCRIPT.read_text(), re.MULTILINE)
