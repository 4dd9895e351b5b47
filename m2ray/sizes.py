"""Sizes as users write them: bytes, and MaxMemory, how much of each GPU may be taken; and bytes and times as they are shown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from m2ray.errors import ConfigError, did_you_mean, raise_all

_UNITS_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """Bytes from "40GB" (decimal), "40GiB" (binary) or a plain number. Raises ConfigError naming `option`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS_BYTES or float(match[1]) <= 0:
        raise ConfigError(f"{option} = {text!r} is not a size.", 'Write for example "40GB" (10^9 bytes) or "40GiB" (2^30 bytes).')
    return int(float(match[1]) * _UNITS_BYTES[match[2].upper()])


def bytes_in_words(num_bytes: float) -> str:
    """Bytes for people: "457.4 GB" (10^9), rounded to a tenth of its unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def seconds_in_words(seconds: float) -> str:
    """A length of time for people: "12 s", "5 min 03 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class MaxMemory:
    """How much m2ray may take on each GPU, all that it needs there counted.

    Attributes:
        everywhere: (index, bytes) pairs for nodes not named; index None stands for every GPU. No pairs: no limit.
        by_node: the same for nodes by name.
    """

    everywhere: tuple[tuple[int | None, int], ...] = ()
    by_node: Mapping[str, tuple[tuple[int | None, int], ...]] = field(default_factory=dict)

    def usable_bytes(self, node: str, gpu: int, free_bytes: int) -> int:
        """The least of what is free on GPU number `gpu` of a node and what may be used; 0 for one that a list of indices leaves out."""
        limits = self.by_node.get(node, self.everywhere)
        if not limits:
            return free_bytes
        allowed = {index: num_bytes for index, num_bytes in limits if index in (None, gpu)}
        return min(free_bytes, allowed.get(gpu, allowed.get(None, 0)))

    def require_known(self, num_gpus: Mapping[str, int]) -> None:
        """Raise ConfigError, all at once, for nodes and GPUs that are named and not there; `num_gpus` are each node's, by its name."""
        problems = [
            ConfigError(f"max_memory names the node {name!r}.", f"{did_you_mean(name, num_gpus)}The nodes are {', '.join(num_gpus)}.")
            for name in self.by_node
            if name not in num_gpus
        ]
        for node, has in num_gpus.items():
            for index, _ in self.by_node.get(node, ()):
                if index is not None and index >= has:
                    problems.append(ConfigError(f"max_memory names GPU {index} of node {node!r}, which has {has}."))
        most = max(num_gpus.values(), default=0)
        for index, _ in self.everywhere:
            if index is not None and index >= most:
                problems.append(ConfigError(f"max_memory names GPU {index}; no node has more than {most}."))
        raise_all(problems)


def parse_max_memory(text: str | None) -> MaxMemory:
    """The option `max_memory`.

    "40GB": every GPU; "0:60GB,1:60GB,2:40GB": GPUs 0 to 2 of every node and no others; "node-a=40GB;node-b=0:60GB,1:40GB": node by
    node, a piece without a name being for all the others.

    Raises:
        ConfigError: malformed.
    """
    if text is None:
        return MaxMemory()
    by_node: dict[str | None, tuple[tuple[int | None, int], ...]] = {}
    for piece in text.split(";"):
        name, equals, limits = piece.rpartition("=")
        node = name.strip() if equals else None
        if node in by_node or node == "":
            raise ConfigError(f"max_memory = {text!r} names {'the same node twice' if node else 'no node before ='}.", _MAX_MEMORY_FORMS)
        by_node[node] = _parse_limits(limits, text)
    everywhere = by_node.pop(None, ())
    return MaxMemory(everywhere, {name: limits for name, limits in by_node.items() if name is not None})


_MAX_MEMORY_FORMS = 'Write "40GB", "0:60GB,1:40GB" or "node-a=40GB;node-b=60GB".'


def _parse_limits(limits: str, text: str) -> tuple[tuple[int | None, int], ...]:
    pieces: Sequence[str] = limits.split(",")
    if len(pieces) == 1 and ":" not in limits:
        return ((None, parse_bytes(limits, "max_memory")),)
    parsed: dict[int | None, int] = {}
    for piece in pieces:
        index, colon, size = piece.partition(":")
        if not colon or not index.strip().isdecimal() or int(index) in parsed:
            raise ConfigError(f"max_memory = {text!r}: {piece.strip()!r} is not INDEX:SIZE, or names a GPU twice.", _MAX_MEMORY_FORMS)
        parsed[int(index)] = parse_bytes(size, "max_memory")
    return tuple(parsed.items())
