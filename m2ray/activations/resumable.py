"""When a run is not gone on with: other versions, another format, other options or fingerprints than its job.json's."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from m2ray.activations.job import JobRecord
from m2ray.activations.schema import FORMAT_VERSION
from m2ray.errors import RunConflictError, in_ranges
from m2ray.provenance import ROW_PACKAGES, differences, versions
from m2ray.storage import Store


def require_resumable(store: Store, recorded: JobRecord, here: str = "now") -> None:
    """Refuse to go on with a run of an older format, or under other versions of what decides the rows than it was begun with.

    Args:
        store, recorded: the run.
        here: what to call this process in the message.

    Raises:
        RunConflictError: naming the version of m2ray that finishes it, or every package that differs, with both versions.
    """
    require_todays_format(store, recorded)
    differing = differences(recorded.versions, versions(), ROW_PACKAGES)
    if differing:
        lines = [f"{package}: {there} in the run, {found} {here}" for package, (there, found) in differing.items()]
        wanted = ", ".join(f"{package} {there}" for package, (there, _) in differing.items())
        raise RunConflictError(
            f"The run at {store.url} was begun under other versions, which may make other rows. What differs:",
            f"Go on with it under {wanted}, or give another output. It can be read as it is.",
            lines,
        )


def require_todays_format(store: Store, recorded: JobRecord) -> None:
    """Refuse to go on with a run of an older format: its parts and records would be of two kinds.

    Raises:
        RunConflictError: naming the version of m2ray that finishes it.
    """
    if recorded.format_version != FORMAT_VERSION:
        raise RunConflictError(
            f"The run at {store.url} was begun by m2ray {recorded.m2ray_version} with format {recorded.format_version}; "
            f"this m2ray goes on with format {FORMAT_VERSION} only.",
            f"Finish it with m2ray {recorded.m2ray_version}, or give another output. It can be read as it is.",
        )


def require_same(store: Store, recorded: JobRecord, options: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    """Refuse other options or fingerprints than the run's. Only the given ones are compared: the prompts' may not be known yet.

    Raises:
        RunConflictError: naming every field that differs, with both values.
    """
    require_todays_format(store, recorded)
    of_the_run = {name: recorded.fingerprints[name] for name in fingerprints if name in recorded.fingerprints}
    _refuse_differences(store, _named(recorded.options, of_the_run), _named(options, fingerprints))


def require_same_job(store: Store, recorded: JobRecord, job: JobRecord) -> None:
    """Refuse another job than the recorded one: options, all fingerprints, and what follows from them.

    Raises:
        RunConflictError: naming every field that differs, with both values.
    """
    require_todays_format(store, recorded)
    there, here = (
        _named(record.options, record.fingerprints)
        | {f"counts.{name}": count for name, count in asdict(record.counts).items()}
        | {"num_shards": record.num_shards, "parts": [asdict(part) for part in record.parts]}
        for record in (recorded, job)
    )
    _refuse_differences(store, there, here)


def _named(options: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    return {**options, **{f"fingerprints.{name}": value for name, value in fingerprints.items()}}


def _refuse_differences(store: Store, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    # JSON is what both are compared as: a tuple and a list are one value there.
    recorded, now = ({name: json.dumps(value, sort_keys=True) for name, value in fields.items()} for fields in (there, here))
    lines = [
        f"{name}: {_in_words(name, there)} in the run, {_in_words(name, here)} now"
        for name in dict.fromkeys([*recorded, *now])
        if recorded.get(name, "null") != now.get(name, "null")  # an option from before it was there asked for nothing
    ]
    if lines:
        raise RunConflictError(
            f"The run at {store.url} was made otherwise. What differs:",
            "Change it back to go on with the run, or give another output.",
            lines,
        )


def _in_words(name: str, fields: Mapping[str, Any]) -> str:
    """A field as JSON, lists of layers as "0-61"."""
    if name not in fields:
        return "absent"
    value = fields[name]
    if name == "parts":
        layers: dict[str, list[int]] = {}
        for part in value:
            layers.setdefault(json.dumps({**part, "layer": "..."}), []).extend([] if part["layer"] is None else [part["layer"]])
        return "; ".join(like.replace('"..."', in_ranges(of_layers) or "null") for like, of_layers in layers.items())
    is_layers = isinstance(value, list | tuple) and len(value) > 1 and all(type(each) is int for each in value)
    return in_ranges(value) if is_layers else json.dumps(value, ensure_ascii=False, sort_keys=True)
