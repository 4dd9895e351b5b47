"""A plan in the terminal: the verdict, the layout of layers on GPUs on nodes, what fills each GPU, and the output."""

from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from m2ray.batches import Residency
from m2ray.planning.devices import DevicePlan
from m2ray.planning.hardware import Node
from m2ray.planning.lines import in_words, output_lines, rate_lines, site_lines
from m2ray.planning.memory import Memory
from m2ray.planning.plan import Plan
from m2ray.planning.residency import runs
from m2ray.sizes import bytes_in_words

_WIDE = 100
"""Columns of a terminal from which on bars are long."""

_SHADES = {"weights": ("█", "cyan"), "transient": ("▓", "yellow"), "rest": ("▒", "magenta"), "free": ("░", "bright_black")}


def render(plan: Plan, columns: int, *, chose_batch_tokens: bool = False) -> RenderableType:
    """The whole plan for rich to print.

    Args:
        plan: what is shown.
        columns: how wide the terminal is.
        chose_batch_tokens: the verdict tells the size of micro-batches, which nobody asked for.
    """
    bar_width = 24 if columns >= _WIDE else 10
    blocks: list[RenderableType] = [_verdict(plan, chose_batch_tokens=chose_batch_tokens), _weights(plan)]
    blocks += [_node(plan, node, bar_width) for node in plan.cluster.nodes if node.gpus]
    blocks += _residency(plan)
    if plan.gpus:
        blocks += [_legend(), _gpus_memory(plan)]
    if plan.stages:
        blocks += [_hosts_memory(plan), _hosts(plan)]
    blocks.append(Text("\n".join(["", *site_lines(plan), *output_lines(plan), *rate_lines(plan)])))
    return Group(*blocks)


def as_text(plan: Plan) -> str:
    """The same without colours, for a screen of 100 columns."""
    console = Console(file=StringIO(), width=_WIDE, color_system=None, highlight=False, markup=False, emoji=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(render(plan, _WIDE))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _verdict(plan: Plan, *, chose_batch_tokens: bool) -> Text:
    if plan.fits:
        text = Text("It fits", style="bold green")
        if plan.limiting_resource:
            unknown = "" if "store" in plan.rates.limits else ", unless the store does, whose speed is not known (--store-gb-per-s)"
            text.append(f"; {in_words(plan.limiting_resource)} limits the run{unknown}", style="not bold")
        if chose_batch_tokens:
            or_fewer = "" if plan.prompts else ", fewer where prompts suit fewer"
            text.append(f"\nmicro-batches of at most {plan.demand.options.batch_tokens:,} tokens{or_fewer}", style="not bold")
    else:
        text = Text("It does not fit:", style="bold red")
        for shortage in plan.shortages:
            text.append(
                f"\n  {in_words(shortage.resource)} ({shortage.where}) is {shortage.short_by_bytes:,} bytes short", style="not bold"
            )
        for remedy in plan.remedies:
            text.append(f"\n  {remedy.text}", style="not bold green")
        if not plan.remedies:
            text.append("\n  No single change is enough.", style="not bold")
    return text.append("\n")


def _weights(plan: Plan) -> Table:
    weights, demand = plan.weights, plan.demand
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    rows = [
        ("checkpoint", weights.disk_bytes, "on disk, all tensors"),
        ("model", weights.compute_bytes, f"{weights.parameters:,} parameters in {demand.options.compute_dtype}"),
        ("loaded", weights.loaded_bytes, f"layers 0-{demand.num_layers - 1} and the embedding"),
        ("embedding", weights.embedding_bytes, "with layer 0"),
        ("head", weights.head_disk_bytes, "on disk, never loaded"),
    ]
    for name, (on_disk_bytes, computed_bytes) in weights.layouts.items():
        if name:
            rows.insert(-4, ("of it", on_disk_bytes, f"{name}: {computed_bytes:,} in {demand.options.compute_dtype}"))
    for place, note in _OUTSIDE.items():
        num_bytes = sum(demand.bytes_in(each.residency, place) for each in plan.placed if place != "host" or each.device.gpu)
        rows += [("offloaded", num_bytes, note)] if num_bytes else []
    for name, num_bytes, note in rows:
        table.add_row(name, f"{num_bytes:,}", note)
    table.add_row("a layer", _range(weights.layer_bytes), "in memory")
    packed = [demand.packed_bytes[layer] for each in plan.placed for layer, place in each.residency.items() if place != "gpu"]
    if packed:
        table.add_row("", _range(packed), "packed, where it is not ready")
    return table


def _range(sizes: Sequence[int]) -> str:
    least, most = min(sizes), max(sizes)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


_OUTSIDE: Mapping[Residency, str] = {"host": "packed in host memory, copied in turn", "checkpoint": "packed in files, read in turn"}


def _node(plan: Plan, node: Node, bar_width: int) -> Table:
    """One node's GPUs, a line each; those of no chain are free."""
    planned = {gpu.device.gpu.index: gpu for gpu in plan.gpus if gpu.device.gpu and gpu.device.node.name == node.name}
    several = plan.demand.options.replicas > 1
    table = Table(title=node.name, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("GPU", "name", "stage", "layers", "", "peak", "of"):
        table.add_column(column, justify="right" if column in ("GPU", "peak", "of") else "left")
    for gpu in node.gpus:
        found = planned.get(gpu.index)
        if found is None:
            table.add_row(
                str(gpu.index),
                gpu.name,
                "",
                "not used",
                _bar({}, gpu.free_bytes, bar_width),
                "",
                bytes_in_words(gpu.total_bytes),
                style="dim",
            )
            continue
        stage = f"{found.replica}.{found.stage}" if several else str(found.stage)
        layers = str(found.span).removeprefix("layers ") if found.span else "none" if plan.stages else "does not fit"
        usable = found.device.usable_bytes or 0
        table.add_row(
            str(gpu.index),
            gpu.name,
            stage,
            layers,
            _bar_of(found, usable, bar_width),
            bytes_in_words(found.memory.peak_bytes),
            bytes_in_words(usable),
        )
    return table


def _residency(plan: Plan) -> Sequence[RenderableType]:
    """Where the layers of each stage live, if not all are ready, and the wave that it takes through one before the next."""
    lines = []
    for each in plan.placed:
        if each.residency:
            places = "; ".join(
                f"{str(layers).removeprefix('layers ')} {_PLACES[place][each.device.gpu is None]}"
                for layers, place in runs(each.held, each.residency)
            )
            lines.append(f"stage {_stage_name(plan, each.replica, each.stage)}: layers {places}")
    if not lines:
        return []
    tokens, forced_by = plan.wave
    batch_tokens = plan.demand.options.batch_tokens
    wave = (
        f"waves of {tokens:,} tokens, {tokens // batch_tokens} micro-batches, go through a layer before the next"
        if tokens
        else "a micro-batch at a time"
    )
    why = {
        "": "",
        "in_flight": ": larger ones would be faster, and in_flight has no room for them",
        "memory": ": larger ones would be faster, and memory has no room for them",
    }
    return [Text("\n".join([*lines, f"{wave}{why[forced_by]}", ""]))]


_PLACES = {
    "gpu": ("ready on the GPU", "ready in memory"),
    "gpu_packed": ("packed on the GPU", ""),
    "host": ("packed in host memory", "packed in memory"),
    "checkpoint": ("in files", "in files"),
}
"""Where layers live, in words: beside a GPU, and without one."""


def _bar_of(planned: DevicePlan, usable_bytes: int, width: int) -> Text:
    running = dict(planned.memory.running)
    weights = sum(running.pop(name, 0) for name in ("weights", "packed_weights"))
    parts = {"weights": weights, "transient": running.pop("transient", 0)}
    return _bar({**parts, "rest": sum(running.values())}, usable_bytes, width)


def _bar(parts: dict[str, int], usable_bytes: int, bar_width: int) -> Text:
    """A bar of what may be used, cut by largest remainder so that its length never changes."""
    shares = {**parts, "free": max(0, usable_bytes - sum(parts.values()))}
    total = sum(shares.values()) or 1
    exact = {name: num_bytes * bar_width / total for name, num_bytes in shares.items()}
    cells = {name: int(width) for name, width in exact.items()}
    for name in sorted(exact, key=lambda name: cells[name] - exact[name])[: bar_width - sum(cells.values())]:
        cells[name] += 1
    text = Text()
    for name, width in cells.items():
        text.append(_SHADES[name][0] * width, style=_SHADES[name][1])
    return text


def _legend() -> Text:
    text = Text()
    for name, (shade, style) in _SHADES.items():
        text.append(f"{shade} ", style=style).append(f"{name}  ")
    return text.append("\n")


def _stage_name(plan: Plan, replica: int, stage: int) -> str:
    return f"{replica}.{stage}" if plan.demand.options.replicas > 1 else str(stage)


def _gpus_memory(plan: Plan) -> Table:
    """Of a stage with several GPUs each has a line of its own, unless they hold the same."""
    return _memory("GPU", [(_stage_name(plan, gpu.replica, gpu.stage), gpu.memory) for gpu in plan.gpus if gpu.memory.running])


def _hosts_memory(plan: Plan) -> Table:
    return _memory("host", [(_stage_name(plan, each.replica, each.stage), each.host) for each in plan.stages])


def _memory(kind: str, stages: Sequence[tuple[str, Memory]]) -> Table:
    """What makes up each stage's peak, in GB of 10^9 bytes; neighbours that hold the same share a line."""
    names = list(dict.fromkeys(name for _, memory in stages for name in _together(memory)))
    table = Table(title=f"{kind} memory by stage, GB", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("stage", *(name.replace("_", "\n") for name in names), "run", "load"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for memory, group in groupby(stages, key=lambda each: each[1]):
        first, *_, last = [name for name, _ in group] * 2
        items = [_together(memory).get(name) for name in names]
        cells = [
            f"{num_bytes / 1e9:.2f}" if num_bytes else ""
            for num_bytes in (*items, sum(memory.running.values()), sum(memory.loading.values()))
        ]
        table.add_row(first if first == last else f"{first}-{last}", *cells)
    return table


def _together(memory: Memory) -> dict[str, int]:
    """What makes up the peak while running, with items that belong together as one, so that a line has room on a screen."""
    found: dict[str, int] = {}
    for name, num_bytes in memory.running.items():
        shown = _TOGETHER.get(name, name)
        found[shown] = found.get(shown, 0) + num_bytes
    return found


_TOGETHER = {"packed_weights": "weights", "workspace": "unpacking", "landing_buffers": "unpacking", "heap": "transient"}


def _hosts(plan: Plan) -> Table:
    """What each node's host needs, next to what it has."""
    table = Table(title="nodes", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("host", "memory\nneeded", "there", "shared memory\nneeded", "there"):
        table.add_column(column, justify="left" if column == "host" else "right")
    for node, planned in zip(plan.cluster.nodes, plan.nodes, strict=True):
        there = node.host_bytes if node.host_free_bytes is None else node.host_free_bytes
        table.add_row(
            node.name,
            bytes_in_words(planned.host_bytes),
            "unknown" if there is None else bytes_in_words(there),
            bytes_in_words(planned.shm_bytes),
            "unknown" if node.shm_bytes is None else bytes_in_words(node.shm_bytes),
        )
    return table
