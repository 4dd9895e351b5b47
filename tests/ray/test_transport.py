"""How a stage hands on to the next one."""

import json
import sys
from pathlib import Path

from tests.ray.conftest import RayCluster

SCRIPT = str(Path(__file__).with_name("send_to_a_slow_stage.py"))


def test_hidden_states_are_sent_while_the_ones_before_are_taken_over(cluster: RayCluster, tmp_path: Path) -> None:
    """Or a GPU waits for every way to the next stage that takes longer than a micro-batch; and no more than two are on their way."""
    done = cluster.run(sys.executable, SCRIPT, str(tmp_path), PYTHONPATH=".")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "none taken": [0, 1],
        "two more computed": [0, 1],
        "one taken": [0, 1, 2],
        "begun anew, none taken": [0, 1],
        "begun anew, all taken": [0, 1, 2, 3, 4, 5],
    }
