"""`m2ray inspect`: what a run holds, whether it is complete, and what was left out and why."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import click
from rich.table import Table

from m2ray.activations.audits import read_audits
from m2ray.activations.reading.reader import RunReader, open_run
from m2ray.activations.writing.pulse import Pulse, settle
from m2ray.audit import report
from m2ray.chain.progress import Progress
from m2ray.cli import Command
from m2ray.cli.output import console_of_tables, say, terminal
from m2ray.cli.watch import HEADINGS, list_runs, row_of, runs_below, watch
from m2ray.errors import shown
from m2ray.sites import shown_layers
from m2ray.storage import looking, open_store

_SHOWN_ROWS = 20
_NORM_ROWS = 4096
_LAYERS_AT_ONCE = 8
"""Whose rows are read: of a store that is far away each request is waited for."""


def describe(run: RunReader) -> dict[str, Any]:
    """What inspect shows, as JSON values: the stable keys of `--json`. Reads some rows of each layer for the norms."""
    job = run.job
    views = [run.site(site) for site in run.sites]
    parts = [one for view in views for one in ([view.layer(number) for number in view.layer_numbers] or [view])]
    with ThreadPoolExecutor(_LAYERS_AT_ONCE, thread_name_prefix="norms") as pool:
        try:
            layers = list(pool.map(_part_facts, parts))
        finally:
            pool.shutdown(cancel_futures=True)
    quarantined = run.quarantined.select(["sequence_id", "row_id", "reason"]).to_pylist()
    return {
        "run_id": job.run_id,
        "created_at": job.created_at,
        "m2ray_version": job.m2ray_version,
        "versions": dict(job.versions),
        "names": dict(job.names),
        "complete": run.is_complete,
        "model": asdict(job.model),
        "options": dict(job.options),
        "fingerprints": dict(job.fingerprints),
        "shards": {"committed": run.num_shards, "all": job.num_shards},
        "sequences": {"all": job.counts.sequences, "ready": job.counts.ready, "quarantined": job.counts.quarantined},
        "tokens": {"committed": run.num_tokens, "all": job.counts.tokens},
        "rows": {"committed": run.num_rows, "all": job.counts.rows, "sequences_without": job.counts.without_rows},
        "files": run.num_files,
        "num_bytes": run.num_bytes,
        "layers": layers,
        "quarantined": quarantined,
    }


def _part_facts(view: RunReader) -> dict[str, Any]:
    """One site and layer: its columns, files, their bytes, and the mean L2 norm of 4,096 of its rows (None before any is committed, and of
    router_topk).
    """
    (part,) = view.parts
    return {
        "site": part.site,
        "layer": part.layer,
        "columns": [column._asdict() for column in part.columns],
        "files": view.num_files,
        "num_bytes": view.num_bytes,
        "mean_norm": view.mean_norm(_NORM_ROWS) if view.num_rows and part.columns[0].name == "activation" else None,
    }


@click.command(cls=Command)
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option("--watch", "watched", is_flag=True, help="Follow RUN until it is complete, or no driver is at it any more (exit code 1).")
@click.option("--foreign", is_flag=True, help="RUN is another tool's dump: tell its faults. Ends with exit code 1 if there are any.")
@click.option("--tokenizer", metavar="FOLDER", help="Of --foreign: the tokenizer whose token ids the dump should have.")
@click.pass_context
def command(ctx: click.Context, run: str, as_json: bool, watched: bool, foreign: bool, tokenizer: str | None) -> None:
    """Show what the run folder RUN holds: layers, sequences, tokens, files, quarantined rows, mean norms of up to 4,096 rows a layer.

    RUN may be a folder of runs: they are listed with model, sites, how far they are, bytes and last commit. With --watch RUN is followed, from
    any machine: shards, time left, rate, and whether its driver lives. With --foreign RUN is a dump of speculators, SpecForge, ModelOpt or activault.
    """
    if tokenizer and not foreign:
        raise click.UsageError("--tokenizer is of --foreign alone.")
    if watched and (as_json or foreign):
        raise click.UsageError("--watch goes with neither --json nor --foreign.")
    if foreign:
        from m2ray.cli.foreign import inspect_foreign

        ctx.exit(0 if inspect_foreign(run, tokenizer, as_json=as_json) else 1)
    with looking():
        runs = runs_below(open_store(run))
    if watched:
        if runs:
            raise click.UsageError(f"--watch follows one run, and {run} holds {len(runs)}: name one.")
        with Progress(terminal()) as progress:
            ctx.exit(0 if watch(open_store(run), progress) else 1)
    if runs:
        _print_runs(list_runs(runs), as_json=as_json)
        return
    with looking():
        pulse = Pulse(open_store(run))
        opened = open_run(run)
        if opened.is_complete:
            pulse.look()
        else:
            settle([pulse])
        holder = pulse.holder
        audits = {key: report.summary(record) for key, record in read_audits(open_store(run), opened.job)}
        facts = describe(opened) | {
            "driver": asdict(holder) | {"is_dead": holder.is_dead, "life": pulse.life} if holder else None,
            "audits": audits,
        }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts, "complete" if facts["complete"] else f"not complete: {pulse.in_words()}")


def _print_runs(runs: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"runs": runs}, indent=2))
        return
    table = Table(*HEADINGS, box=None, padding=(0, 2, 0, 0))
    for told in runs:
        table.add_row(*map(shown, row_of(told)))
    console_of_tables().print(table)


def _print(facts: dict[str, Any], state: str) -> None:
    shards, sequences, tokens, model = facts["shards"], facts["sequences"], facts["tokens"], facts["model"]
    rows = facts["rows"]
    say(f"{model['model_type']}, {model['num_layers']} layers, hidden size {model['hidden_size']}; begun {facts['created_at']}; {state}")
    for kind, name in facts["names"].items():
        say(f"{kind.removeprefix('chat_'):<11}{name}")
    versions = {"m2ray": facts["m2ray_version"], **facts["versions"]}
    say(f"begun by   {', '.join(f'{package} {version}' for package, version in versions.items())}")
    if facts["options"].get("compute_dtype") == "float8":
        say("computed   in float8: products of FP8 weights with activations rounded to FP8, all else in bfloat16")
    say(f"shards     {shards['committed']:,} of {shards['all']:,} committed")
    say(f"sequences  {sequences['all']:,} = {sequences['ready']:,} ready + {sequences['quarantined']:,} quarantined")
    if facts["options"].get("keep_columns"):
        say(f"kept       {', '.join(facts['options']['keep_columns'])}")
    say(f"tokens     {tokens['committed']:,} of {tokens['all']:,}")
    if not facts["layers"]:
        say(f"rows       none are kept; statistics are of {rows['all']:,} in each site and layer")
    elif rows["all"] != tokens["all"]:
        without = f"; {rows['sequences_without']:,} sequences have none" if rows["sequences_without"] else ""
        say(f"rows       {rows['committed']:,} of {rows['all']:,} in each site and layer{without}")
    say(f"files      {facts['files']:,} with {facts['num_bytes']:,} bytes")
    for kind, sites in (facts["options"].get("statistics") or {}).items():
        say(f"{kind:<11}{'; '.join(f'{site} {shown_layers(layers)}'.strip() for site, layers in sites.items())}")
    for audit in facts["audits"].values():
        say(f"audited    {report.line(audit)}")
    table = Table("site", "layer", "columns", "files", "bytes", "mean norm", box=None, padding=(0, 2, 0, 0))
    for fact in facts["layers"]:
        norm = "" if fact["mean_norm"] is None else f"{fact['mean_norm']:.4g}"
        layer = "" if fact["layer"] is None else str(fact["layer"])
        columns = ", ".join(f"{column['name']} {column['dtype']} [{column['width']}]" for column in fact["columns"])
        table.add_row(fact["site"], layer, columns, f"{fact['files']:,}", f"{fact['num_bytes']:,}", norm)
    if facts["layers"]:
        console_of_tables().print(table)
    quarantined = facts["quarantined"]
    for row in quarantined[:_SHOWN_ROWS]:
        say(f"quarantined: row {row['row_id']} (sequence {row['sequence_id']}): {row['reason']}")
    if len(quarantined) > _SHOWN_ROWS:
        say(f"and {len(quarantined) - _SHOWN_ROWS:,} more quarantined rows: --json lists all.")
