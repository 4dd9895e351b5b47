"""JobRecord: `job.json`, what a run is of and how far it goes. Written once, never changed."""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self
from uuid import uuid4

from pydantic import TypeAdapter

from m2ray.activations.json_record import read_record, to_json
from m2ray.activations.schema import FORMAT_VERSION, LAYER_CONVENTION, LEASE_FOLDER, ORIGIN
from m2ray.batches import PartSpec, SequenceFile
from m2ray.errors import RunConflictError
from m2ray.provenance import versions
from m2ray.selection import Selection
from m2ray.sites import layers_run
from m2ray.statistics import Asked, places, statistic_sites
from m2ray.storage import Store

JOB_KEY = "job.json"
_OF_A_RUN = ("data/", "_commits/")
SEQUENCE_FILE = r"sequences/[^/.][^/]*\.parquet"


@dataclass(frozen=True)
class ModelFacts:
    """What a reader needs to know of the model."""

    model_type: str
    num_layers: int
    hidden_size: int


@dataclass(frozen=True)
class Counts:
    """The account that a finished run is held to: sequences = ready + quarantined; `tokens` are those of the ready ones.

    `rows` are those of each site and layer: as many as tokens where nothing else is said. `without_rows` of the ready ones have no chosen token.
    """

    sequences: int
    ready: int
    quarantined: int
    tokens: int
    rows: int = -1
    without_rows: int = 0

    def __post_init__(self) -> None:
        if self.rows < 0:
            object.__setattr__(self, "rows", self.tokens)


@dataclass(frozen=True)
class JobRecord:
    """A run's identity card.

    Attributes:
        run_id: 32 hex digits, unlike any other run's.
        created_at: UTC, ISO 8601.
        m2ray_version: the version that began the run.
        options: the options that change rows, "auto" values resolved.
        fingerprints: digests of what rows are made from: `model` and `tokenizer`, `template`, `prompts`.
        parts: what every shard consists of, in order.
        sequence_files: the whole of `sequences/`, in order of sequence id.
        versions: of the packages that decide the rows, and of Python, as the driver that began the run had them; none in format 1.
        names: `model` and `prompts` as the user named them, which hold no credentials (m2ray.storage.address); none in format 1.
    """

    format_version: int
    m2ray_version: str
    run_id: str
    created_at: str
    options: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    model: ModelFacts
    layer_convention: str
    parts: tuple[PartSpec, ...]
    num_shards: int
    counts: Counts
    sequence_files: tuple[SequenceFile, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        absent = {"model", "tokenizer"} - self.fingerprints.keys()
        if absent:
            raise ValueError(f"fingerprints lack {sorted(absent)}")
        if self.counts.ready + self.counts.quarantined != self.counts.sequences:
            raise ValueError(f"{self.counts}: ready + quarantined != sequences")
        strange = [file.key for file in self.sequence_files if not re.fullmatch(SEQUENCE_FILE, file.key)]
        if strange:
            raise ValueError(f"sequence_files name {strange[0]!r}, which is no file of sequences/")

    @classmethod
    def new(
        cls,
        *,
        m2ray_version: str,
        options: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        model: ModelFacts,
        parts: tuple[PartSpec, ...],
        num_shards: int,
        counts: Counts,
        sequence_files: tuple[SequenceFile, ...],
        names: Mapping[str, str],
    ) -> Self:
        """The record of a run that begins now, under the versions that are installed here."""
        return cls(
            format_version=FORMAT_VERSION,
            m2ray_version=m2ray_version,
            run_id=uuid4().hex,
            created_at=utc_now(),
            options=json.loads(json.dumps(dict(options))),
            fingerprints=dict(fingerprints),
            model=model,
            layer_convention=LAYER_CONVENTION,
            parts=parts,
            num_shards=num_shards,
            counts=counts,
            sequence_files=sequence_files,
            versions={**versions(), "python": platform.python_version()},
            names=dict(names),
        )

    @property
    def statistics(self) -> Asked:
        """Which statistics are taken of what; none in runs from before there were any."""
        asked: Asked = self.options.get("statistics") or {}
        return asked

    @property
    def selection(self) -> Selection:
        """Which tokens have rows."""
        return Selection(self.options.get("tokens", "all"), tuple(self.options.get("skip_ids", ())))

    @property
    def in_float8(self) -> bool:
        """Whether rows are of another arithmetic than their dtype's, which whatever is made of them has to say."""
        return bool(self.options.get("compute_dtype") == "float8")

    @property
    def layers_run(self) -> int:
        """How many layers a chain loads: up to the last whose stage captures something."""
        of_statistics = (PartSpec(site, layer, ()) for site, layer in places(self.statistics))
        return layers_run((*self.parts, *of_statistics), self.model.num_layers)

    @property
    def with_final_norm(self) -> bool:
        """Whether its chains load the final norm."""
        return any(site == "final_norm" for site in (*(part.site for part in self.parts), *statistic_sites(self.statistics)))

    def to_json(self) -> bytes:
        return to_json(self, indent=2)

    def run_metadata(self) -> dict[str, str]:
        """What every part's footer says of the run; what ORIGIN names is for people."""
        by = {"m2ray": self.m2ray_version, **self.versions}
        origin = {**self.names, "versions": ", ".join(f"{package} {version}" for package, version in by.items())}
        return {
            **{key: origin[key] for key in ORIGIN if key in origin},
            "format_version": str(self.format_version),
            "run_id": self.run_id,
            "model_type": self.model.model_type,
            "num_layers": str(self.model.num_layers),
            "model_digest": self.fingerprints["model"],
            "tokenizer_digest": self.fingerprints["tokenizer"],
            # Rows of another arithmetic than their dtype's: a file that was copied away still has to say so.
            **({"compute_dtype": "float8"} if self.in_float8 else {}),
        }


def read_job(store: Store) -> JobRecord | None:
    """The run's record; None where a new run may begin: an empty folder, or one where m2ray was cut off before.

    Raises:
        RunConflictError: the folder holds something else, or a run of a newer format.
        RunDamagedError: job.json cannot be understood.
        StoreError: the folder cannot be read.
    """
    foreign = next((key for key, _ in store.list("") if not _may_precede_a_job(key)), None)
    # In this order: job.json precedes everything else of a run, so what another driver has created by now is not foreign.
    if store.size(JOB_KEY) is not None:
        return read_record(store, JOB_KEY, _JOB, _as_now)
    if foreign is not None:
        if foreign.startswith(_OF_A_RUN):
            raise moved_away(store)
        what = f"{store.url} is not empty and is no run folder: it holds {foreign} and no {JOB_KEY}."
        raise RunConflictError(what, "Give a run folder, or, to begin a run, another output.")
    return None


def _as_now(fields: dict[str, Any]) -> dict[str, Any]:
    """A record from before parts had columns, as it would be now: each has one, of the part's `dtype` and `width`, at the one site there was."""
    if all("columns" in part for part in fields["parts"]):
        return fields
    parts = [
        {"site": part["site"], "layer": part["layer"], "columns": [["activation", part["dtype"], part["width"]]]}
        for part in fields["parts"]
    ]
    sites = {"sites": {"residual": fields["options"]["layers"]}} if "sites" in fields["options"] else {}
    return fields | {"parts": parts, "options": fields["options"] | sites}


def moved_away(store: Store) -> RunConflictError:
    """What is said where a run's files are without its job.json: a driver goes on to write below the name by which it knows the folder."""
    return RunConflictError(
        f"{store.url} holds files of a run and no {JOB_KEY}: the run's folder was renamed, moved or deleted while a driver was at work.",
        "Give the folder's new name as output: what was committed there is kept, and the same command does the rest. What lies under the old "
        "name belongs to no run: delete it, or, to use that name again, move the run back in its place.",
    )


def _may_precede_a_job(key: str) -> bool:
    """Whether m2ray leaves such a key behind if it is killed before job.json: a survey's files, a lease, a probe of the store or the doctor's."""
    return re.fullmatch(SEQUENCE_FILE, key) is not None or key.startswith(("_probe-", "_doctor-", f"{LEASE_FOLDER}/"))


def utc_now() -> str:
    """The time as files of a run give it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_JOB = TypeAdapter(JobRecord)
