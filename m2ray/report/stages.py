"""When and on what the stages spent their time, and how much memory they took."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup

from m2ray.activations.records import CommitRecord
from m2ray.report.drawing import COLOURS, INK, drawn
from m2ray.report.elements import figure, paragraph, section, table
from m2ray.report.measured import ABSENT, Report
from m2ray.sizes import bytes_in_words

_DRAWN_STAGES = 64
_SHOWN_COMMITS = 200


def timeline(report: Report | None, commits: Sequence[CommitRecord], num_shards: int) -> Markup:
    """The section. `commits`: all, or some that are spread evenly over `num_shards`."""
    return section(
        "timeline",
        "Timeline of the stages",
        paragraph(ABSENT) if report is None else _spent(report["stages"]),
        _commits(commits, num_shards) if commits else paragraph("No shard is committed."),
    )


def memory(report: Report | None) -> Markup:
    """The section: of each GPU, or where there is none of each stage's host."""
    title = "Memory"
    if report is None:
        return section("memory", title, paragraph(ABSENT))
    gpus = [(f"{_name(stage)} GPU {gpu['index']}", gpu) for stage in report["stages"] for gpu in stage["gpus"]]
    if gpus:
        rows = [(name, gpu["planned_peak_bytes"], gpu["peak_reserved_bytes"], gpu["total_bytes"]) for name, gpu in gpus]
        return section("memory", title, _memory("GPU memory, planned and at its peak", "GPU", rows))
    rows = [(_name(stage), stage["planned_host_bytes"], stage["peak_rss_bytes"], None) for stage in report["stages"]]
    return section("memory", title, paragraph("The run had no GPU."), _memory("Host memory, planned and at its peak", "stage", rows))


# -- time -------------------------------------------------------------------------------------------------------------


def _spent(stages: Sequence[dict[str, Any]]) -> Markup:
    parts = [_parts(stage) for stage in stages]
    kinds = ("compute", "wait", "copy", "encode", "store")
    rows = [
        (_name(stage), _layers(stage), *(f"{each[kind]:.1f}" for kind in kinds), f"{stage['write_wait_s']:.1f}", f"{stage['load_s']:.1f}")
        for stage, each in zip(stages, parts, strict=True)
    ]
    headings = ("stage", "layers", *(f"{kind} (s)" for kind in kinds), "blocked by the writer (s)", "load (s)")
    numbers = table("Seconds of each stage", headings, rows)
    some = list(zip(stages, parts, strict=True))[:_DRAWN_STAGES]

    def draw(axes: Any) -> None:
        for place, (_, each) in enumerate(some):
            for offset, of_bar in ((-0.2, kinds[:2]), (0.2, kinds[2:])):
                start = 0.0
                for kind in of_bar:
                    colour = COLOURS[(0, 4, 1, 2, 3)[kinds.index(kind)]]
                    axes.barh(place + offset, each[kind], 0.36, start, color=colour, label="" if place else kind)
                    start += each[kind]
        axes.set_yticks(range(len(some)), [_name(stage) for stage, _ in some])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds since a stage's first micro-batch")
        axes.figure.legend(loc="outside upper left", ncols=5)

    busiest = max(zip(stages, parts, strict=True), key=lambda each: each[1]["compute"], default=None)
    said = "" if busiest is None else f"{_name(busiest[0])} computed longest, {busiest[1]['compute']:.1f} s."
    caption = (
        "Each stage's time: above, what it computed and waited; below, what went on beside that for its rows: the copy to the host, "
        "encoding, and the store. Times of several writer threads are added up."
    )
    if len(stages) > len(some):
        caption += f" The first {len(some)} of {len(stages)} stages are drawn."
    return figure(drawn("spent", "Time of each stage", said, draw, 1.5 + 0.5 * len(some)), caption, numbers)


def _parts(stage: dict[str, Any]) -> dict[str, float]:
    return {
        "compute": stage["compute_s"],
        "wait": stage["wait_s"],
        "copy": stage["copy_s"],
        "encode": max(0.0, stage["write_s"] - stage["store_s"]),
        "store": stage["store_s"],
    }


def _commits(commits: Sequence[CommitRecord], num_shards: int) -> Markup:
    ordered = sorted(commits, key=lambda commit: commit.committed_at)
    times = [datetime.fromisoformat(commit.committed_at) for commit in ordered]
    done = [(place + 1) * num_shards / len(ordered) for place in range(len(ordered))]
    passed_s = [(time - times[0]).total_seconds() for time in times]
    step = -(-len(ordered) // _SHOWN_COMMITS)
    rows = [
        (commit.committed_at[:19].replace("T", " "), f"{count:,.0f}", str(commit.shard), f"{commit.elapsed_s:.1f}")
        for commit, count in list(zip(ordered, done, strict=True))[::step]
    ]
    numbers = table("Commits in the order of time", ("committed (UTC)", "shards so far", "shard", "its attempt took (s)"), rows)

    unit, seconds = ("seconds", 1) if passed_s[-1] < 120 else ("minutes", 60) if passed_s[-1] < 7200 else ("hours", 3600)
    passed = [each / seconds for each in passed_s]

    def draw(axes: Any) -> None:
        axes.step(passed, done, where="post", color=COLOURS[0], marker=".", markersize=4)
        axes.axhline(num_shards, color=INK, linewidth=0.6, linestyle=":")
        axes.set(xlabel=f"{unit} since the first commit", ylabel="shards committed", ylim=(0, num_shards * 1.05))

    said = f"{num_shards:,} shards were committed, the last one {passed[-1]:,.1f} {unit} after the first."
    if not passed_s[-1]:
        return paragraph(said)
    return figure(drawn("commits", "Shards committed over time", said, draw), said, numbers)


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory(caption: str, what: str, rows: Sequence[tuple[str, int, int, int | None]]) -> Markup:
    numbers = table(
        caption,
        (what, "planned", "at its peak", "of"),
        (
            (name, bytes_in_words(planned), bytes_in_words(peak), bytes_in_words(total) if total else "")
            for name, planned, peak, total in rows
        ),
    )
    some = rows[:_DRAWN_STAGES]

    def draw(axes: Any) -> None:
        for offset, colour, label, sizes in (
            (-0.2, COLOURS[4], "planned", [planned for _, planned, _, _ in some]),
            (0.2, COLOURS[0], "at its peak", [peak for _, _, peak, _ in some]),
        ):
            places = [place + offset for place in range(len(some))]
            axes.barh(places, [each / 1e9 for each in sizes], 0.36, color=colour, label=label)
        for place, (_, _, _, total) in enumerate(some):
            if total:
                axes.plot([total / 1e9] * 2, [place - 0.45, place + 0.45], color=INK)
        axes.set_yticks(range(len(some)), [row[0] for row in some])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("GB")
        axes.figure.legend(loc="outside upper left", ncols=2)

    said = "; ".join(f"{name}: {bytes_in_words(peak)} of {bytes_in_words(planned)} planned" for name, planned, peak, _ in some[:8])
    ends = " A line marks the whole of a GPU." if any(total for *_, total in some) else ""
    return figure(drawn("memory-drawn", caption, said, draw, 1.3 + 0.45 * len(some)), f"{caption}.{ends}", numbers)


def _name(stage: dict[str, Any]) -> str:
    return f"stage {stage['replica']}.{stage['stage']}"


def _layers(stage: dict[str, Any]) -> str:
    return "-".join(map(str, stage["layers"]))
