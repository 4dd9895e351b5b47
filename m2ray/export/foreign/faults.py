"""The faults that dumps of hidden states are known for, each looked for in one sample, or between it and those before it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import xxhash

from m2ray.export.foreign.dumps import Dump
from m2ray.export.foreign.samples import Problem, Sample
from m2ray.export.foreign.vocabulary import Vocabulary

KINDS = {
    "unreadable": "cannot be read",
    "missing": "have tokens without states, or states without tokens",
    "lengths": "have lengths that disagree",
    "tokens_disagree": "have other tokens beside their states than elsewhere in the dump",
    "not_finite": "hold NaN or infinity",
    "zero_plane": "have a plane that is zero throughout",
    "zero_rows": "have rows that are zero throughout",
    "equal_planes": "have a plane that equals its neighbour bit by bit",
    "same_tokens": "have the tokens of an earlier sample",
    "same_states": "have the states of an earlier sample, but other tokens",
    "zero_mask": "have a loss mask without a single 1",
    "mask_values": "have a loss mask of other values than 0 and 1",
    "vocabulary": "have token ids that the tokenizer has not",
    "other_tokens": "have other token ids than the tokenizer makes of their text",
}
"""Each kind of fault, and what is said of the samples that have it."""

_SHOWN = 20


@dataclass
class Found:
    """The samples with one kind of fault: how many, and the first of them with what was seen."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, sample: str, what: str) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append((sample, what))


@dataclass
class Findings:
    """What was seen of a dump: how many samples and tokens it has, the first sample's planes, and faults by their kinds, `KINDS`."""

    num_samples: int = 0
    num_tokens: int = 0
    planes: tuple[str, ...] = ()
    faults: dict[str, Found] = field(default_factory=dict)


def look(dump: Dump, vocabulary: Vocabulary | None, on_progress: Callable[[int, int], None]) -> Findings:
    """Look at every sample, one in memory at a time; of those before it only digests and names are kept.

    `on_progress` is told the samples and tokens so far.
    """
    findings, seen = Findings(), _Seen()
    for sample in dump.samples():
        planes = {name: _digest(plane) for name, plane in sample.planes.items()}
        for problem in [*_within(sample, planes), *seen.problems(sample, planes), *(vocabulary.problems(sample) if vocabulary else ())]:
            findings.faults.setdefault(problem.kind, Found()).add(sample.name, problem.what)
        findings.num_samples += 1
        findings.num_tokens += _num_tokens(sample)
        findings.planes = findings.planes or tuple(planes)
        on_progress(findings.num_samples, findings.num_tokens)
    return findings


def _within(sample: Sample, planes: dict[str, bytes]) -> Iterator[Problem]:
    yield from sample.problems
    yield from _lengths(sample)
    yield from _mask(sample)
    yield from _rows(sample)
    equal = [pair for pair in pairwise(planes) if planes[pair[0]] == planes[pair[1]] and not _is_zero(sample.planes[pair[0]])]
    if equal:
        yield Problem("equal_planes", ", ".join(" = ".join(pair) for pair in equal))


def _lengths(sample: Sample) -> Iterator[Problem]:
    lengths = {name: len(plane) for name, plane in sample.planes.items()}
    lengths |= {name: len(of) for name, of in (("token_ids", sample.token_ids), ("loss_mask", sample.loss_mask)) if of is not None}
    if len(set(lengths.values())) > 1:
        yield Problem("lengths", ", ".join(f"{name} {length:,}" for name, length in lengths.items()))


def _mask(sample: Sample) -> Iterator[Problem]:
    mask_T = sample.loss_mask
    if mask_T is None or not len(mask_T):
        return
    if not mask_T.any():
        yield Problem("zero_mask", f"{len(mask_T):,} zeros")
    if others := [value for value in mask_T.unique().tolist() if value not in {0, 1}]:
        yield Problem("mask_values", f"it has {', '.join(map(str, others[:5]))}")


def _rows(sample: Sample) -> Iterator[Problem]:
    """Planes and rows that no model gives."""
    found: dict[str, list[str]] = {"zero_plane": [], "zero_rows": [], "not_finite": []}
    for name, plane_TW in sample.planes.items():
        values_TW = plane_TW.float() if plane_TW.element_size() == 1 else plane_TW  # torch has no isfinite for FP8
        bad_T = ~torch.isfinite(values_TW).all(1)
        if bad_T.any():
            found["not_finite"].append(_places(name, bad_T))
        zero_T = (values_TW == 0).all(1)
        if zero_T.any():
            found["zero_plane" if zero_T.all() else "zero_rows"].append(_places(name, zero_T))
    for kind, places in found.items():
        if places:
            yield Problem(kind, "; ".join(places))


def _places(name: str, is_bad_T: torch.Tensor) -> str:
    return f"{name}: {int(is_bad_T.sum()):,} of {len(is_bad_T):,} rows, the first at position {int(is_bad_T.nonzero()[0])}"


def _is_zero(plane: torch.Tensor) -> bool:
    return not plane.float().any()


class _Seen:
    """Digests of the tokens and states of the samples so far, with the samples' names."""

    def __init__(self) -> None:
        self._tokens: dict[bytes, str] = {}
        self._states: dict[bytes, str] = {}

    def problems(self, sample: Sample, planes: dict[str, bytes]) -> Iterator[Problem]:
        tokens = None if sample.token_ids is None or not len(sample.token_ids) else _digest(sample.token_ids.long())
        earlier = self._tokens.setdefault(tokens, sample.name) if tokens else sample.name
        if earlier != sample.name:
            yield Problem("same_tokens", f"those of {earlier}")
        if not planes or all(_is_zero(plane) for plane in sample.planes.values()):
            return
        like = self._states.setdefault(xxhash.xxh3_128_digest(b"".join(planes.values())), sample.name)
        if like not in {sample.name, earlier}:
            yield Problem("same_states", f"those of {like}")


def _num_tokens(sample: Sample) -> int:
    return max([len(plane) for plane in sample.planes.values()] + [0 if sample.token_ids is None else len(sample.token_ids)])


def _digest(tensor: torch.Tensor) -> bytes:
    """xxh3-128 of a tensor's shape and bytes."""
    hashed = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    hashed.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return hashed.digest()
