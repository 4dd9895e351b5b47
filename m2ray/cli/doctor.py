"""`m2ray doctor`: everything that would stop or slow a run on this machine or cluster, at once, each with its remedy."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from m2ray.cli import Command
from m2ray.cli.output import say
from m2ray.doctor.checks import Finding, check_nodes
from m2ray.doctor.cluster import look
from m2ray.doctor.node_facts import NodeFacts
from m2ray.errors import ClusterError, M2rayError, shown
from m2ray.hub import folder_of
from m2ray.sizes import parse_bytes
from m2ray.storage import looking


@click.command(cls=Command)
@click.option("--address", envvar="RAY_ADDRESS", help="A Ray cluster, host:port; all its nodes are looked at. Default: this machine.")
@click.option("--model", help="Checkpoint folder: files, tensors and read speed are checked.")
@click.option("--output", help="Run folder: whether it can be written and honours create-if-absent. One object is made and deleted.")
@click.option("--in-flight", default="4GiB", show_default=True, help="As in the run: what /dev/shm must hold.")
@click.option("--json", "as_json", is_flag=True, help="Findings and facts as JSON.")
@click.pass_context
def command(ctx: click.Context, /, address: str | None, model: str | None, output: str | None, in_flight: str, *, as_json: bool) -> None:
    """Look for everything that would stop or slow a run; each problem comes with its remedy. Exit code 1 if there is any."""
    in_flight_bytes = parse_bytes(in_flight, "in_flight")
    model = folder_of(model) if model else None
    with looking():
        findings, model_bytes = check_model(model) if model else ([], None)
    nodes: list[NodeFacts] = []
    silent: dict[str, str] = {}
    try:
        nodes, silent = look(address, None if model_bytes is None else model, output)  # of what cannot be opened no node reads faster
    except ClusterError as error:  # the model's problems are told all the same
        findings.append(Finding("cluster", "problem", address or "cluster", error.what, error.remedy))
    findings += [
        Finding("node", "problem", name, f"The node could not be looked at: {why}.", "Install the same m2ray, torch and Ray there.")
        for name, why in silent.items()
    ]
    findings += check_nodes(nodes, in_flight_bytes, model_bytes)
    is_sound = all(finding.level != "problem" for finding in findings)
    if as_json:
        record = {
            "format_version": 1,
            "ok": is_sound,
            "findings": [asdict(one) for one in findings],
            "nodes": [asdict(one) for one in nodes],
        }
        click.echo(json.dumps(record, indent=2))
    else:
        _print(nodes, findings)
    ctx.exit(0 if is_sound else 1)


def check_model(model: str) -> tuple[list[Finding], int | None]:
    """Index against files and sizes, tensor names, shapes and dtypes against the architecture, its proof; and the checkpoint's bytes."""
    from m2ray.model.interpreter import quick_imports

    with quick_imports():
        from m2ray.model.checkpoint import open_checkpoint
        from m2ray.model.proof import prove
        from m2ray.model.tensor_table import tensor_table

    try:
        checkpoint = open_checkpoint(model)
        checkpoint.check()
    except M2rayError as error:
        return [Finding("checkpoint_files", "problem", model, error.what, error.remedy)], None
    num_bytes = sum(header.num_bytes for header in checkpoint.headers.values())
    try:
        prove(checkpoint.whole_config)
        table = tensor_table(checkpoint)
    except M2rayError as error:
        return [Finding("checkpoint_tensors", "problem", model, error.what, error.remedy)], num_bytes
    what = (
        f"{len(checkpoint.headers):,} tensors in {num_bytes:,} bytes fill {table.num_layers} layers of {checkpoint.whole_config.model_type}"
    )
    what += "".join(
        f", {on_disk:,} of these {name}, in bfloat16 {in_memory:,}"
        for name, (on_disk, in_memory) in table.bytes_by_method(2).items()
        if name
    )
    what += "; a tiny copy of it gives transformers' own rows bit by bit."
    found = [Finding("checkpoint_tensors", "note", model, what)]
    if checkpoint.indexed_bytes not in (None, num_bytes):
        what = f"The index says {checkpoint.indexed_bytes:,} bytes, the files hold {num_bytes:,}."
        found.append(Finding("checkpoint_files", "note", model, what))
    return found, num_bytes


def _print(nodes: Sequence[NodeFacts], findings: Sequence[Finding]) -> None:
    for facts in nodes:
        gpus = ", ".join(gpu.name for gpu in facts.hardware.gpus) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in facts.hardware.versions.items())
        say(f"{facts.hardware.name}: {gpus}; {versions}")
    for finding in sorted(findings, key=lambda finding: finding.level == "problem"):  # problems last, where a terminal shows them
        for line in f"{finding.level} [{finding.check}] {shown(finding.where)}: {finding.what}".split("\n"):
            say(line)
        if finding.remedy:
            say(f"    {finding.remedy}")
    problems = sum(finding.level == "problem" for finding in findings)
    click.echo({0: "No problems.", 1: "1 problem."}.get(problems, f"{problems} problems."))
