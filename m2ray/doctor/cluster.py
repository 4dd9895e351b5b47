"""The doctor's look at this machine, or at every node of a Ray cluster at once."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from m2ray.doctor.node_facts import NodeFacts, look_at_node
from m2ray.errors import M2rayError
from m2ray.storage import no_empty_folders, open_store

_CONNECT_TIMEOUT_S = 30.0


def look(address: str | None, model: str | None, output: str | None) -> tuple[list[NodeFacts], dict[str, str]]:
    """(the facts of each node that answered, why the others did not, by name). Folders that this makes are gone afterwards.

    Args:
        address: of a Ray cluster; without one it is this machine alone.
        model: checkpoint folder.
        output: run folder. The nodes of a cluster must all see the object that this machine makes there.

    Raises:
        ClusterError: the cluster cannot be joined.
    """
    with no_empty_folders(output):
        return _look_at_cluster(address, model, output) if address else ([look_at_node(model=model, output=output)], {})


def _look_at_cluster(address: str, model: str | None, output: str | None) -> tuple[list[NodeFacts], dict[str, str]]:
    from m2ray.chain.joining import cluster
    from m2ray.chain.probing import LOOK_TIMEOUT_S, living_nodes, on_nodes

    os.environ["RAY_ADDRESS"] = address
    with _marked(output) as marker, cluster(_CONNECT_TIMEOUT_S):
        facts, silent = on_nodes(living_nodes(), look_at_node, {"model": model, "output": output, "marker": marker}, LOOK_TIMEOUT_S)
    return list(facts.values()), silent


@contextmanager
def _marked(output: str | None) -> Iterator[str | None]:
    """The key of an object in the run folder that is there for the time being; None where it cannot be made."""
    store, marker = open_store(output) if output else None, f"_doctor-{uuid.uuid4().hex}"
    try:
        if store is not None:
            store.put(marker, b"")
    except M2rayError:  # every node will say the same of this store, with its remedy
        store = None
    if store is None:
        yield None
        return
    try:
        yield marker
    finally:
        store.delete([marker])
