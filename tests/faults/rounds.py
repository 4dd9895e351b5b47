"""Rounds: a run is begun, struck again and again, taken up whenever it stopped, and at last held against an undisturbed one."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from m2ray.errors import M2rayError
from tests.faults.cluster import Cluster
from tests.faults.disk import SmallDisk
from tests.faults.driver import Driver
from tests.faults.faults import FAULTS, Fault
from tests.faults.rows import Expected, Watcher, unfinished_files, unnamed_files
from tests.faults.scene import Scene
from tests.faults.server import FaultyServer
from tests.reference import make_minimax

NUM_WORKERS = 3
_NUM_PROMPTS = 420
_LAYOUTS = ((2, 1), (3, 1), (1, 2))
_OPTIONS = ("--batch-tokens", "256", "--shard-tokens", "300")
_READY = ("--in-flight", "1KB")
"""All layers ready, and a micro-batch in flight."""
_PACKED = ("--weights", "packed", "--in-flight", "1MB")
"""In waves of two to four micro-batches."""
_STAGE_TIMEOUT_S, _STAGE_TIMEOUT_S3 = "20", "90"
"""How soon a stage counts as hung; a write may take as long, and an S3 server that is gone for 30 s comes back."""

_SPAN_BYTES = 1_000_000
"""Less than any stage of these layouts loads of the tiny model."""
_STANDSTILL_S = 240.0
_DRIVERS = 40
_NO_FAULT = "no fault"


@dataclass
class Tally:
    """What happened, summed over the rounds."""

    rounds: int = 0
    equal_rounds: int = 0
    shards: int = 0
    drivers: int = 0
    kills: int = 0
    polls: int = 0
    refused_polls: int = 0
    strikes: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    errors: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    tried_again: list[int] = field(default_factory=list)
    recoveries_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """A tiny model and prompts, and what an undisturbed run makes of them; and where drivers have the weights live, each in turn another."""

    words: tuple[str, ...]
    expected: Expected
    places: Sequence[Sequence[str]] = (_READY,)


def make_inputs(folder: Path, cluster: Cluster, *, in_waves: bool = False) -> Inputs:
    """An FP8 MiniMax-M2 with random weights, prompts with a bad one among them, and the undisturbed run: one stage in a process of its own, without Ray."""
    folder.mkdir(parents=True)
    make_minimax(folder / "model", "fp8")
    chance = np.random.default_rng(0)
    texts = [" ".join(chance.choice(["sea", "wind", "stone", "水"], int(count))) for count in chance.integers(1, 40, _NUM_PROMPTS)]
    texts[7] = ""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = ("--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), *_OPTIONS)
    whole = [sys.executable, "-m", "m2ray.cli", "extract", "--output", str(folder / "whole"), *words]
    alone = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(whole, env=alone, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    expected = Expected(str(folder / "whole"))
    return Inputs(words, expected, (_PACKED, _READY)) if in_waves else Inputs(words, expected)


class Round:
    """One run: its place, its drivers one after the other, and the reader that watches it."""

    def __init__(
        self,
        name: str,
        cluster: Cluster,
        disk: SmallDisk,
        server: FaultyServer | None,
        inputs: Inputs,
        chance: Random,
        tally: Tally,
    ) -> None:
        self._name = name
        self._cluster = cluster
        self._disk = disk
        self._server = server
        self._inputs = inputs
        self._chance = chance
        self._tally = tally
        self._folder = disk.folder / name
        self._run = server.url(name) if server else str(self._folder)
        self._logs = disk.folder.parent / "logs"
        self._logs.mkdir(exist_ok=True)
        self._problems: list[str] = []
        self._place = server.url(name, is_direct=True) if server else self._run
        self._watcher = Watcher(self._place, inputs.expected, poll_s=0.5)
        self._is_equal = False
        self._cause = _NO_FAULT
        """The last fault that struck the driver."""
        self._unrecovered: tuple[str, float, int] | None = None
        """A fault after which nothing was committed yet: its name, when it came, and how many shards were committed then."""

    def play(self, faults: Sequence[Fault], until_s: float) -> None:
        """Strike with these faults, one after the other, while the run and the time last; then let it complete and look at it."""
        waiting = list(faults)
        self._watcher.start()
        try:
            for number in range(_DRIVERS):
                scene = self._start_driver(number)
                try:
                    self._disturb(scene, waiting, until_s)
                finally:
                    scene.driver.end()
                self._judge(scene)
                if scene.driver.exit_code == 0 and not scene.driver.was_killed and not self._watcher.lost:
                    break
            else:
                self._problems.append(f"{_DRIVERS} drivers did not complete the run")
        finally:
            self._watcher.end()
        self._examine()
        self._close()

    # -- the run at work ----------------------------------------------------------------------------------------------

    def _start_driver(self, number: int) -> Scene:
        stages, replicas = self._chance.choice(_LAYOUTS)
        as_job = self._chance.random() < 0.3
        words = [*self._inputs.words, "--stages", str(stages), "--replicas", str(replicas)]
        place = self._inputs.places[number % len(self._inputs.places)]
        words += [*place]
        words += ["--stage-timeout-s", _STAGE_TIMEOUT_S3 if self._server else _STAGE_TIMEOUT_S]
        self._say(f"driver {number}{' as a job' if as_job else ''}, {stages} stages, {replicas} replicas, {' '.join(place)}")
        driver = Driver(self._cluster, self._run, words, self._logs / f"{self._name}-{number}.log", as_job=as_job)
        self._tally.drivers += 1
        self._cause, self._unrecovered = _NO_FAULT, None
        return Scene(
            self._cluster,
            driver,
            stages * replicas,
            replicas,
            _SPAN_BYTES,
            self._disk,
            self._server,
            self._watcher,
            self._chance,
            self._problems,
        )

    def _disturb(self, scene: Scene, waiting: list[Fault], until_s: float) -> None:
        """Strike at moments that the seed chooses: most often after some commits, else whatever the run is at."""
        while scene.driver.is_running:
            before, began = self._watcher.shards, time.monotonic()
            in_peace = not waiting or time.monotonic() > until_s
            wanted = before + self._chance.randint(1, 5) if not in_peace else self._inputs.expected.num_shards + 1
            patience_s = self._chance.uniform(0.0, 6.0) if not in_peace and self._chance.random() < 0.2 else _STANDSTILL_S
            self._await_commits(scene, wanted, patience_s)
            if not scene.driver.is_running:
                return
            if self._watcher.shards == before and time.monotonic() - began >= _STANDSTILL_S:
                self._problems.append(f"nothing was committed for {_STANDSTILL_S:g} s")
                return
            if not in_peace:
                scene.is_loaded = scene.num_replicas == 1 and self._watcher.shards > before
                self._strike(scene, waiting.pop(0))

    def _await_commits(self, scene: Scene, wanted: int, patience_s: float) -> None:
        """Wait until so many shards are committed. Nothing for `patience_s`, or the driver's end, ends the waiting too."""
        shards, deadline = self._watcher.shards, time.monotonic() + patience_s
        while scene.driver.is_running and self._watcher.shards < wanted and time.monotonic() < deadline:
            if self._watcher.shards != shards:
                shards, deadline = self._watcher.shards, time.monotonic() + patience_s
                self._note_recovery()
            time.sleep(0.1)  # looks again; nothing rests on the interval

    def _strike(self, scene: Scene, fault: Fault) -> None:
        shards, began = self._watcher.shards, time.monotonic()
        self._cause, self._unrecovered = fault.name, (fault.name, began, shards)
        kills = fault.strike(scene)
        self._note_recovery()
        self._tally.strikes[fault.name] += 1
        self._tally.kills += kills
        self._say(f"{fault.name}: at {shards} shards, {kills} killed, {time.monotonic() - began:.1f} s")

    def _note_recovery(self) -> None:
        if self._unrecovered and self._watcher.shards > self._unrecovered[2]:
            name, at_s, _ = self._unrecovered
            self._tally.recoveries_s[name].append(time.monotonic() - at_s)
            self._unrecovered = None

    def _judge(self, scene: Scene) -> None:
        """A driver that ended was killed, completed its run, or says clearly why it stopped."""
        driver, cause = scene.driver, self._cause
        self._tally.tried_again += driver.tried_again
        if driver.was_killed:
            return
        if "Traceback" in driver.printed:
            self._problems.append(f"it printed a trace after {cause}: {driver.printed[-3000:]}")
        if driver.exit_code == 0:
            if "Complete:" not in driver.printed:
                self._problems.append(f"exit code 0, but: {driver.printed[-2000:]}")
            return
        self._tally.stops[cause] += 1
        self._tally.errors[cause][driver.error[:300]] += 1
        self._say(f"stopped after {cause}: {driver.error}")
        began_work = "survey: " in driver.printed  # before that, while Python still starts, SIGTERM ends it as it does any process
        if cause == _NO_FAULT or (not driver.error and (began_work or cause != "job stopped")):
            self._problems.append(f"it stopped after {cause} without a clear error: {driver.printed[-3000:]}")

    # -- the run at its end -------------------------------------------------------------------------------------------

    def _examine(self) -> None:
        """Every row, every file, the account, and what the reader saw."""
        words = [sys.executable, "-m", "m2ray.cli", "verify", self._place, "--checksums", "--json"]
        done = subprocess.run(words, env=self._cluster.env, capture_output=True, text=True, timeout=240, check=False)
        found = json.loads(done.stdout) if done.stdout else {}
        if done.returncode or not found.get("complete") or found["damaged"]:
            self._problems.append(f"m2ray verify: {done.stdout}{done.stderr}")
        try:
            differences = self._inputs.expected.differences(self._place)
            self._is_equal = not differences
            self._problems += differences
            self._problems += [f"no record names {key}" for key in unnamed_files(self._place)]
            self._problems += self._watcher.changed_commits()
        except M2rayError as error:
            self._problems.append(f"the run cannot be read: {error}")
        self._problems += [f"unfinished: {name}" for name in unfinished_files(self._folder)]
        self._problems += self._watcher.problems
        if not self._server and self._watcher.refused:
            self._problems.append(f"the disk refused {self._watcher.refused} reads")
        if left := self._cluster.stages_left():
            self._problems.append(f"stages were left behind: {left}")

    def _close(self) -> None:
        tally = self._tally
        tally.rounds += 1
        tally.equal_rounds += self._is_equal
        tally.shards += self._inputs.expected.num_shards
        tally.polls += self._watcher.polls
        tally.refused_polls += self._watcher.refused
        tally.problems += [f"{self._name}: {problem}" for problem in self._problems]
        self._say(f"{len(self._problems)} problems after {self._watcher.polls} polls; kills so far: {tally.kills}")
        for problem in self._problems:
            self._say(f"PROBLEM {problem}")
        if not self._problems:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self._name}: {line}", flush=True)


def chosen_faults(chance: Random, count: int, only: str, *, on_s3: bool, can_fill: bool) -> list[Fault]:
    """So many faults by the seed, of those that can be done there and whose names `only` matches."""
    places = {"anywhere", "s3"} if on_s3 else {"anywhere", "local", *(["small disk"] if can_fill else [])}
    possible = [fault for fault in FAULTS if fault.where in places and re.search(only, fault.name)]
    return chance.choices(possible, [fault.weight for fault in possible], k=count) if possible else []
