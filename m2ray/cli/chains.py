"""`m2ray chains`: the warm chains of the cluster of RAY_ADDRESS, and what they do."""

from typing import TYPE_CHECKING

import click

from m2ray.cli import Command
from m2ray.cli.output import console_of_tables, say

if TYPE_CHECKING:
    from m2ray.chain.served import ChainStatus

_CONNECT_S = 30.0


@click.command(cls=Command)
def command() -> None:
    """List the warm chains of the cluster that RAY_ADDRESS names: what they hold, what they do, and for how long they have been idle."""
    from m2ray.chain.joining import cluster, require_cluster

    require_cluster()  # said before torch is imported
    from rich.table import Table

    from m2ray.chain.http import stop_left_behind
    from m2ray.chain.serving import left_behind
    from m2ray.chain.warm import find, names, status
    from m2ray.errors import ClusterError
    from m2ray.sizes import bytes_in_words, seconds_in_words

    with cluster(_CONNECT_S):
        for name in stop_left_behind():
            say(left_behind(name))
        table = Table("chain", "model", "computes in", "stages", "weights", "now", "jobs", "requests", "idle", box=None)
        for name in names():
            try:
                standing = find(name)
                now = status(standing)
            except ClusterError as problem:  # it ended a moment ago
                table.add_row(name, "", "", "", "", problem.what)
                continue
            table.add_row(
                name,
                standing.served.model_url,
                standing.served.plan.demand.options.compute_dtype,
                str(len(standing.served.plan.stages)),
                bytes_in_words(sum(stage.parameter_bytes for stage in now.stages)),
                _words(now),
                f"{now.jobs:,}",
                f"{now.answered:,}",
                seconds_in_words(now.idle_s) if now.idle_s else "",
            )
    if table.row_count:
        console_of_tables().print(table)
    else:
        say("There are no chains: `m2ray serve CONFIG.toml` starts one.")


def _words(now: "ChainStatus") -> str:
    """What a chain does."""
    if now.trouble:
        return now.trouble
    if not now.is_loaded:
        return "loading"
    busy = [f"job {now.job}"] if now.job else []
    busy += [f"{now.waiting} waiting"] if now.waiting else []
    busy += [f"{now.requests} requests"] if now.requests else []
    return ", ".join(busy) or "idle"
