"""Digests of all layers of a checkpoint that nobody loads: hashed once, and kept in the user's cache folder for as long as its files stay as they are."""

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import xxhash
from pydantic import TypeAdapter

from m2ray.model.checkpoint import Checkpoint
from m2ray.model.kept import kept_folder
from m2ray.model.pieces import PIECE_BYTES
from m2ray.model.weights import hash_weights

_PAIRS = TypeAdapter(list[tuple[int | None, str]])


def known_weights(checkpoint: Checkpoint, layers_run: int, *, with_final_norm: bool) -> Mapping[int | None, str]:
    """What `hash_weights` gives of every layer. Files that were hashed before, by this user on this machine, are not read again unless one of them
    has been written anew since (`Checkpoint.versions`). Raises as `hash_weights`.
    """
    versions = checkpoint.versions(checkpoint.weight_files)
    what = [platform.node(), checkpoint.url, checkpoint.digest, versions, layers_run, with_final_norm, PIECE_BYTES]
    folder = kept_folder("weights")
    at = folder and folder / xxhash.xxh3_128_hexdigest(json.dumps(what).encode())
    if at and (known := _kept(at)):
        return known
    found = hash_weights(checkpoint, layers_run, with_final_norm=with_final_norm, every_layer=True)
    if at and checkpoint.versions(versions) == versions:
        _keep(at, found)
    return found


def _kept(at: Path) -> Mapping[int | None, str]:
    """What lies there; nothing where there is none, or none that can be read."""
    try:
        return dict(_PAIRS.validate_json(at.read_bytes()))
    except (OSError, ValueError):
        return {}


def _keep(at: Path, digests: Mapping[int | None, str]) -> None:
    """Whole or not at all; where nothing can be written, the next one hashes again."""
    with suppress(OSError):
        begun = at.with_suffix(f".{uuid4().hex[:12]}")
        begun.write_text(json.dumps(list(digests.items())))
        begun.replace(at)
