"""ray_cluster.yaml, read by the cluster launcher itself. Nothing is started and nothing is sent."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def cluster_config() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())


def test_ray_up_accepts_the_cluster(cluster_config: dict[str, Any]) -> None:
    prepared = prepare_config(cluster_config)
    validate_config(prepared)
    assert prepared["head_setup_commands"][: len(cluster_config["setup_commands"])] == cluster_config["setup_commands"]


def test_ray_up_notices_a_misspelt_option(cluster_config: dict[str, Any]) -> None:
    cluster_config["available_node_types"]["gpu-8"]["min_worker"] = 1
    with pytest.raises(ValidationError, match="min_worker"):
        validate_config(prepare_config(cluster_config))


def test_ray_up_notices_more_workers_than_allowed(cluster_config: dict[str, Any]) -> None:
    cluster_config["max_workers"] = 1
    with pytest.raises(ValueError, match="max_workers"):
        validate_config(prepare_config(cluster_config))
