"""Proof that a configuration can be run as m2ray runs it, on a tiny copy of it with random weights.

Three things are proved: a chain of stages gives transformers' own rows bit by bit, however its layers are cut; the model is causal; and a
prompt's rows do not depend on the prompts beside it. So a model type that nobody listed runs if it is right, and a field of the
configuration that breaks one of them is found even if m2ray does not know it.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
import xxhash

from m2ray.errors import CheckpointError, M2rayError, raise_all
from m2ray.model.kept import kept_folder
from m2ray.model.rehearsal import NOT_RUN, Rehearsal, rehearse, told

TOLERANCE = 1e-4
"""Of a row's norm, in float32. Rounding moves rows by 1e-6; what leaks moves them by 1e-2 and more."""

_SEEDS = (0, 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_REMEDY = "m2ray runs a model only if its chain gives transformers' own rows bit by bit on a tiny copy of its configuration."


def prove(config: Any) -> None:
    """Try a configuration on a tiny copy of it; what was proved once is remembered in the user's cache folder.

    Args:
        config: transformers' configuration of a causal language model, as `parse_config` gives it.

    Raises:
        CheckpointError: no tiny copy can be made; or a chain's rows are not transformers' (says from which layer on, in which dtype, over
            how many stages, by how much); or a prompt's rows depend on later tokens or on the prompts beside it. All that is found.
    """
    once(config, "", lambda: _prove(config))


def once(config: Any, what: str, proof: Callable[[], None]) -> None:
    """Run a proof, which raises what it finds, unless it is remembered of this configuration; a proof of `what` beside the one above."""
    cached = _cached_at(config, what)
    with suppress(OSError):  # a folder that may not be looked into remembers nothing
        if cached and cached.exists():
            return
    # A caller in Python may compute by autocast or on a default device of its own; the copy is computed as a stage computes, on the CPU.
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        proof()
    if cached:
        with suppress(OSError):  # where nothing can be written, the next run proves it again
            cached.touch()


def _prove(config: Any) -> None:
    problems: list[CheckpointError] = []
    for seed in _SEEDS:  # rounding may flip the choice of an expert with one seed; what leaks, leaks with all
        with TemporaryDirectory(prefix="m2ray-proof-") as folder:
            rehearsal = rehearse(config, seed, Path(folder))
            problems = [*_differences(rehearsal), *_leaks(rehearsal)]
        if not problems:
            break
    raise_all(problems)


def _differences(rehearsal: Rehearsal) -> Iterator[CheckpointError]:
    """Where chains of one, three and as many stages as layers differ from transformers, or waves in one stage: the first of them in each dtype."""
    ways = [(bounds, False) for bounds in cuts(rehearsal.num_layers)] + [((0, rehearsal.num_layers), True)]
    for name, dtype in DTYPES.items():
        try:
            expected = rehearsal.by_transformers(dtype)
        except NOT_RUN as error:
            yield _refusal(rehearsal, f"transformers' own model fails in {name}: {told(error)}.")
            return
        for bounds, in_waves in ways:
            where = f"a chain of {len(bounds) - 1} stage{'s' * (len(bounds) > 2)}{' in waves' * in_waves} in {name}"
            try:
                found = rehearsal.by_chain(dtype, bounds, in_waves=in_waves)
            except (M2rayError, *NOT_RUN) as error:
                what = str(error) if isinstance(error, M2rayError) else f"{type(error).__name__}: {error}"
                yield _refusal(rehearsal, f"{where} fails: {' '.join(what.split())[:300]}")
                return
            difference = _first_difference(rehearsal, expected, found)
            if difference:
                yield _refusal(rehearsal, f"{where} differs from transformers' own model {difference}.")
                break


def cuts(num_layers: int) -> list[tuple[int, ...]]:
    """Where the layers are cut: nowhere, in three, everywhere."""
    cuts = [(0, num_layers), (0, num_layers // 3, 2 * num_layers // 3, num_layers), tuple(range(num_layers + 1))]
    return sorted({tuple(sorted(set(cut))) for cut in cuts}, key=len)


def _first_difference(rehearsal: Rehearsal, expected: list[torch.Tensor], found: list[torch.Tensor]) -> str:
    """In words; nothing where each real token's row has the same bits at every layer."""
    if len(expected) != len(found):
        return f"in that it runs its {len(found)} layers {len(expected)} times"
    for layer, (theirs_BTH, ours_BTH) in enumerate(zip(expected, found, strict=True)):
        if theirs_BTH.shape != ours_BTH.shape or theirs_BTH.dtype != ours_BTH.dtype:
            described = [f"{list(rows.shape)} {rows.dtype}" for rows in (ours_BTH, theirs_BTH)]
            return f"at layer {layer}: {' instead of '.join(described)}"
        for prompt, count in enumerate(rehearsal.token_counts):
            ours_TH, theirs_TH = ours_BTH[prompt, :count], theirs_BTH[prompt, :count]
            if not torch.equal(ours_TH.view(torch.uint8), theirs_TH.view(torch.uint8)):
                moved = ((ours_TH.double() - theirs_TH.double()).norm(dim=-1) / theirs_TH.double().norm(dim=-1)).max().item()
                return f"from layer {layer} on, by {moved:.2g} of a row's norm"
    return ""


def _leaks(rehearsal: Rehearsal) -> Iterator[CheckpointError]:
    try:
        moved_rows = rehearsal.moved_rows()
    except NOT_RUN as error:
        yield _refusal(rehearsal, f"transformers' own model fails with a prompt alone: {told(error)}")
        return
    for change, moved in moved_rows.items():
        if not moved <= TOLERANCE:
            yield CheckpointError(
                f"config.json: rows of a tiny {rehearsal.tiny.model_type} with its fields differ by {moved:.2g} of their norm {change}.",
                "m2ray runs causal decoders, whose rows depend on nothing but the tokens before them.",
            )


def _refusal(rehearsal: Rehearsal, what: str) -> CheckpointError:
    return CheckpointError(f"config.json: of a tiny {rehearsal.tiny.model_type} with its fields, {what}", _REMEDY)


def _digest(config: Any, what: str) -> str:
    """The digest of all that a proof depends on: the configuration, torch, transformers, and m2ray's own code of models."""
    digest = xxhash.xxh3_128(f"{what}{torch.__version__} {transformers.__version__}".encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _cached_at(config: Any, what: str) -> Path | None:
    """The file whose being there says that a configuration was proved; None for a user who has no home to write to."""
    folder = kept_folder("proofs")
    return folder and folder / _digest(config, what)
