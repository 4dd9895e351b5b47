"""What placement makes of the whole MiniMax-M2 on three nodes with 8 GPUs each that only Ray counts: printed as JSON.

Run by test_replicas.py in a process of its own: it starts a cluster of several nodes, and answers for their drivers.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group_table

from m2ray.chain import placement, probing
from m2ray.config import ExtractConfig
from m2ray.errors import ClusterError
from m2ray.model.tensor_table import table_without_weights
from m2ray.options import PromptOptions
from m2ray.planning.demand import Assumptions, Demand
from m2ray.planning.hardware import Node, parse_gpus
from m2ray.planning.plan import Plan, plan_run
from m2ray.planning.resolve import resolve
from m2ray.planning.shape import ModelShape
from tests.reference import minimax_config

config = minimax_config()
table = table_without_weights(config)


def node_of_fake_gpus(name: str, folder: str) -> Node:
    assert not folder, "no layer is kept on a disk"
    return replace(parse_gpus("8xH100-80GB").nodes[0], name=name)


@ray.remote(num_cpus=0)
def fake_gpus_here():
    return tuple(node_of_fake_gpus("here", "").gpus[index] for index in ray.get_gpu_ids())


def planned(hardware: probing.Hardware, **options: object) -> Plan:
    shape = ModelShape.of(config, "sdpa")
    wanted = ExtractConfig(model="m", prompts="p", output="o", batch_tokens=16384, **options)
    return plan_run(
        Demand(table, shape, resolve(wanted, PromptOptions.of(wanted, 1), table, shape, hardware.cluster, Assumptions())), hardware.cluster
    )


def reserved(hardware: probing.Hardware, plan: Plan, timeout_s: float = 30.0) -> dict[str, Any]:
    with placement.reserve(plan, hardware, timeout_s) as (final, held):
        names = {node_id: name for name, node_id in hardware.node_ids.items()}
        return {
            "planned": [[stage.node for stage in plan.stages if stage.replica == replica] for replica in range(len(held))],
            "got": [[names[node_of(*place)] for place in each.places] for each in held],
            "spans": [str(stage.span) for stage in final.stages],
            "planned_spans": [str(stage.span) for stage in plan.stages],
            "gpus": [(gpu.device.node.name, gpu.device.gpu.index) for gpu in final.gpus],
        }


def moved(hardware: probing.Hardware, plan: Plan) -> dict[str, Any]:
    """Where stages go that lose their room, while all nodes with the labels are full, and once these are free."""
    with placement.reserve(plan, hardware, 30.0) as (_, held):
        names = {node_id: name for name, node_id in hardware.node_ids.items()}
        full, _ = refused(lambda: held[0].replace([0], 3.0))
        held[0].renew(30.0)
        return {"full": full, "got": [names.get(node_of(*place), "another") for place in held[0].places]}


def node_of(group: PlacementGroup, bundle: int) -> str:
    return placement_group_table(group)["bundles_to_node_id"][bundle]


def refused(attempt: Callable[[], Any]) -> tuple[str, float]:
    begin = time.monotonic()
    try:
        attempt()
    except ClusterError as error:
        return str(error), time.monotonic() - begin
    raise AssertionError("it was not refused")


def main() -> None:
    probing.probe_node, placement._gpus_here = node_of_fake_gpus, fake_gpus_here
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 8, "labels": {"kind": "a"}})
    for _ in range(2):
        nodes.add_node(num_cpus=8, num_gpus=8, labels={"kind": "b"})
    ray.init(address=nodes.address, logging_level="ERROR")
    hardware = probing.probe_hardware({})
    found = {"replicas": reserved(hardware, planned(hardware, stages=12, replicas=2))}
    found["left_out"] = reserved(hardware, planned(hardware, max_memory="2:60GB,3:70GB,5:70GB", stages=9))
    of_kind = probing.probe_hardware({"kind": "b"})
    found["labels"] = reserved(of_kind, planned(of_kind, stages=16))
    found["moved"] = moved(of_kind, planned(of_kind, stages=16, node_labels="kind=b"))
    found["two_a_stage"] = reserved(hardware, planned(hardware, stages=5, gpus_per_stage=2))
    found["too_many"] = refused(lambda: planned(hardware, stages=13, replicas=2))
    held = ray.util.placement_group([{"GPU": 3}])
    held.wait(30)
    found["taken"] = refused(lambda: reserved(hardware, planned(hardware, stages=24), 3.0))
    print(json.dumps(found))  # noqa: T201 - what the test reads
    ray.shutdown()
    nodes.shutdown()


if __name__ == "__main__":
    main()
