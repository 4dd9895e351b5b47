"""`m2ray inspect RUN --watch`: a run followed from its folder alone, and `m2ray inspect FOLDER`: the runs of a folder."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from m2ray.activations.job import JOB_KEY, JobRecord, read_job
from m2ray.activations.records import CommitRecord, RunSummary, committed_shards, read_commits, read_summary
from m2ray.activations.writing.pulse import Pulse, settle
from m2ray.chain.progress import Progress
from m2ray.errors import M2rayError, StoreError, in_ranges
from m2ray.sites import sites_of
from m2ray.sizes import bytes_in_words, seconds_in_words
from m2ray.statistics import statistic_sites
from m2ray.storage import Store, looking, open_store

_EVERY_S = 2.0
_NOT_YET = "Check the path; a driver that has just been started looks at model and prompts first: ask again in a minute."
_RECENT = 32
"""Commits from whose times the rate is taken."""


@dataclass(frozen=True)
class Standing:
    """How far a run is. Times are the drivers' own, UTC, ISO 8601; `tokens_per_s` is that of the last commits, None before there are two."""

    shards: int
    all_shards: int
    tokens: int
    all_tokens: int
    num_bytes: int
    tokens_per_s: float | None
    last_commit: str | None
    is_complete: bool

    @property
    def left_s(self) -> float | None:
        return (self.all_tokens - self.tokens) / self.tokens_per_s if self.tokens_per_s else None

    def in_words(self) -> list[str]:
        """The most important first."""
        left = [] if self.left_s is None or self.is_complete else [f"{seconds_in_words(self.left_s)} left"]
        rate = [] if self.tokens_per_s is None or self.is_complete else [f"{self.tokens_per_s:,.0f} tokens/s"]
        last = [f"last commit {self.last_commit}"] if self.last_commit else []
        done = f"{self.shards:,} of {self.all_shards:,} shards"
        return [done, *left, *rate, bytes_in_words(self.num_bytes), f"{self.tokens:,} of {self.all_tokens:,} tokens", *last]


class Look:
    """Looks at one run again and again: of its commits it reads those that have come since the last look."""

    def __init__(self, store: Store, job: JobRecord) -> None:
        self._store = store
        self._job = job
        self._commits: dict[int, tuple[str, int, int]] = {}

    def look(self, since: str = "") -> Standing:
        """How far the run is now, with the rate from `since` on, a time of its driver's clock. Raises as `read_commit` does."""
        summary = read_summary(self._store)
        there = committed_shards(self._store)
        for shard in self._commits.keys() - there:  # taken back, to be extracted again
            del self._commits[shard]
        for commit in read_commits(self._store, self._job, sorted(there - self._commits.keys())):
            self._commits[commit.shard] = _of_a_commit(commit)
        return self._standing(summary, since)

    def _standing(self, summary: RunSummary | None, since: str) -> Standing:
        counts = self._job.counts
        share = counts.tokens / max(counts.rows, 1)  # where few tokens are kept, commits count those: of each shard alike
        commits = sorted((at, rows * share, num_bytes) for at, rows, num_bytes in self._commits.values())
        return Standing(
            shards=len(commits),
            all_shards=self._job.num_shards,
            tokens=round(sum(tokens for _, tokens, _ in commits)),
            all_tokens=counts.tokens,
            num_bytes=sum(num_bytes for _, _, num_bytes in commits),
            tokens_per_s=_rate([commit for commit in commits if commit[0] >= since][-_RECENT:]),
            last_commit=commits[-1][0] if commits else None,
            is_complete=summary is not None,
        )


def _of_a_commit(commit: CommitRecord) -> tuple[str, int, int]:
    """(when, rows of each part, bytes)."""
    return commit.committed_at, commit.rows, sum(part.num_bytes for part in commit.parts)


def _rate(commits: Sequence[tuple[str, float, int]]) -> float | None:
    """Tokens a second between the first and the last of some commits, whose times are of one clock, or of clocks that agree."""
    if len(commits) < 2:
        return None
    took_s = (datetime.fromisoformat(commits[-1][0]) - datetime.fromisoformat(commits[0][0])).total_seconds()
    return sum(tokens for _, tokens, _ in commits[1:]) / took_s if took_s > 0 else None


def watch(store: Store, progress: Progress, every_s: float = _EVERY_S) -> bool:
    """Follow a run until it is complete, or until no driver is at it any more. Whether it is complete.

    Raises:
        StoreError: there is no run and no driver, or the folder cannot be read.
        RunDamagedError, RunConflictError: a record cannot be understood.
    """
    pulse, look, said = Pulse(store), None, ""
    while True:
        pulse.look()
        job = read_job(store) if look is None else None
        look = Look(store, job) if job else look
        standing = look.look(pulse.holder.since if pulse.holder else "") if look else None
        if standing and standing.is_complete:
            progress.following(standing.in_words(), 1.0)
            progress.say(f"Complete: {', '.join(standing.in_words())}")
            return True
        if standing is None and pulse.life == "none":
            raise StoreError(f"There is no run at {store.url}: it has no {JOB_KEY}, and no driver is at it.", _NOT_YET)
        words = pulse.in_words()
        if words != said and pulse.life != "unsure":
            progress.say(words)
            said = words
        if standing:
            progress.following(standing.in_words(), standing.tokens / max(standing.all_tokens, 1))
        if not pulse.is_at_work:
            return False
        time.sleep(every_s)


def runs_below(store: Store) -> list[Store]:
    """The run folders right below a folder that is none itself; none for a run folder."""
    if store.size(JOB_KEY) is not None:
        return []
    base, mark, options = store.url.partition("?")
    below = [folder for folder in store.folders() if store.size(f"{folder}/{JOB_KEY}") is not None]
    return [open_store(f"{base.rstrip('/')}/{folder}{mark}{options}") for folder in below]


def list_runs(stores: Sequence[Store]) -> list[dict[str, Any]]:
    """Of each run what `m2ray inspect FOLDER --json` tells; of one that cannot be understood its name and the `problem`."""
    pulses = [Pulse(store) for store in stores]
    settle(pulses)
    return [_told(store, pulse) for store, pulse in zip(stores, pulses, strict=True)]


def _told(store: Store, pulse: Pulse) -> dict[str, Any]:
    try:
        with looking():
            job = read_job(store)
            standing = Look(store, job).look() if job else None
    except M2rayError as problem:
        return {"run": store.url, "problem": problem.what}
    if job is None or standing is None:
        return {"run": store.url, "problem": f"its {JOB_KEY} is gone"}
    return {
        "run": store.url,
        "model": job.names.get("model", job.model.model_type),
        "model_type": job.model.model_type,
        "sites": _sites(job),
        **asdict(standing),
        "driver": pulse.life,
    }


def _sites(job: JobRecord) -> dict[str, list[int]]:
    """Each site with its layers, of which there are rows or, in a run without any, statistics; none for a site of the whole model."""
    return {site: list(layers) for site, layers in (sites_of(job.parts) or statistic_sites(job.statistics)).items()}


HEADINGS = ("run", "model", "sites", "shards", "tokens", "bytes", "last commit", "state")


def row_of(told: Mapping[str, Any]) -> tuple[str, ...]:
    """A run's line in the table below HEADINGS."""
    name = told["run"].partition("?")[0].rpartition("/")[2]
    if "problem" in told:
        return (name, *[""] * (len(HEADINGS) - 2), told["problem"])
    sites = ", ".join(f"{site} {in_ranges(layers)}".strip() for site, layers in told["sites"].items())
    state = "complete" if told["is_complete"] else _STATES[told["driver"]]
    model = told["model"].rstrip("/").rpartition("/")[2]
    shards, tokens = f"{told['shards']:,}/{told['all_shards']:,}", f"{told['tokens']:,}"
    return (
        name,
        model,
        sites,
        shards,
        tokens,
        bytes_in_words(told["num_bytes"]),
        (told["last_commit"] or "")[:16].replace("T", " "),
        state,
    )


_STATES = {"none": "no driver", "alive": "at work", "unsure": "driver unsure", "silent": "driver silent", "dead": "driver dead"}
