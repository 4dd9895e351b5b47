"""Several chains over one prompt set: where they are placed. That they share the work stands in test_faults.py."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import environment

PLACEMENT = Path(__file__).with_name("place_on_fake_gpus.py")


@pytest.fixture(scope="module")
def placed() -> dict[str, Any]:
    """What a cluster of three nodes with 8 GPUs each, that no driver shows, makes of the whole MiniMax-M2."""
    done = subprocess.run(
        [sys.executable, PLACEMENT],
        env=environment(PYTHONPATH=str(PLACEMENT.parents[2])),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_replicas_of_12_stages_are_placed_on_three_nodes_of_8_gpus_as_planned(placed: dict[str, Any]) -> None:
    replicas = placed["replicas"]
    assert replicas["got"] == replicas["planned"]
    assert replicas["spans"] == replicas["planned_spans"]
    assert [len(nodes) for nodes in replicas["got"]] == [12, 12]
    for nodes in replicas["got"]:
        assert sum(one != next_one for one, next_one in pairwise(nodes)) == 1, "12 stages need two nodes of 8, and neighbours share one"
    assert len({tuple(gpu) for gpu in replicas["gpus"]}) == 24, "every stage has a GPU of its own"


def test_gpus_that_max_memory_leaves_out_are_not_used(placed: dict[str, Any]) -> None:
    left_out = placed["left_out"]
    assert left_out["got"] == left_out["planned"]
    assert [index for _, index in left_out["gpus"]] == [2, 3, 5] * 3
    assert left_out["spans"] == left_out["planned_spans"]


def test_only_nodes_with_the_labels_are_used(placed: dict[str, Any]) -> None:
    assert placed["labels"]["got"] == placed["labels"]["planned"]
    assert len(set(placed["labels"]["got"][0])) == 2


def test_stages_that_lose_their_room_get_other_on_nodes_with_the_labels_alone(placed: dict[str, Any]) -> None:
    assert "No room" in placed["moved"]["full"], "the node without the label has room"
    assert set(placed["moved"]["got"]) == set(placed["labels"]["got"][0])


def test_a_stage_of_two_gpus_has_both_on_one_node(placed: dict[str, Any]) -> None:
    gpus = [tuple(gpu) for gpu in placed["two_a_stage"]["gpus"]]
    assert len(gpus) == len(set(gpus)) == 10
    assert all(one[0] == other[0] for one, other in zip(gpus[::2], gpus[1::2], strict=True))


def test_what_does_not_fit_is_refused_in_time_and_says_what_is_missing_where(placed: dict[str, Any]) -> None:
    text, seconds = placed["too_many"]
    assert "2 x 13 stages" in text
    assert "2 too few" in text
    assert seconds < 5
    text, seconds = placed["taken"]
    assert "8 x (0.3333 CPU and 1 GPU) on" in text or "8 x (1 CPU and 1 GPU) on" in text
    assert "5 of 8 GPU free" in text
    assert seconds < 15
