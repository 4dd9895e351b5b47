"""What the files of a checkpoint may ask for before anything is built of them: they come from strangers. docs/operations.md lists the limits."""

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from m2ray.errors import CheckpointError
from m2ray.storage import Store

MAX_CONFIG_BYTES = 4 << 20
MAX_JSON_BYTES = 32 << 20
"""Of the index, and of one file's header; MiniMax-M2's index has 10 MB. Read, it takes up to 24 bytes of memory for each of its own."""

MAX_HEADERS_BYTES = 64 << 20
"""Of the headers of all files together."""

MAX_JSON_VALUES = 4_000_000
MAX_TENSORS = 500_000
MAX_FILES = 2000
MAX_AXES = 16
MAX_LAYERS = 1000
MAX_COUNT = 32_767
"""Of experts, heads, groups, labels: of all that a configuration counts, but for layers."""

MAX_NUMBER = 2**63 - 1
_MAX_DEPTH = 64

_LAYERS = re.compile(r"(^|_)(layers?|depth)$")
_EXPERTS = re.compile(r"experts$")
_COUNTED = re.compile(r"experts|labels$|heads?$|groups?$|blocks?$|stages?$")

_EXPERTS_ARE_ROWS = ("doge",)
"""Model types of which an expert is a row of two tables, so that thousands are usual."""

_TOO_MUCH = "A damaged or a forged file says so: copy it again, from where the model was published."

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlevel = 3


def short_repr(value: Any) -> str:
    """A JSON value in a line that can be read, whatever it holds."""
    return _SHORT.repr(value)


def read_limited(store: Store, key: str, max_bytes: int) -> bytes:
    """A whole object, unless it is larger than its kind ever is. Raises CheckpointError or StoreError."""
    num_bytes = store.size(key) or 0
    if num_bytes > max_bytes:
        raise CheckpointError(f"{key} in {store.url} has {num_bytes:,} bytes, and m2ray reads up to {max_bytes:,}.", _TOO_MUCH)
    return store.read(key)


def parse_json(text: bytes, name: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """JSON of a stranger, in bounded memory. `name` begins a sentence. Raises CheckpointError."""
    num_values = sum(map(text.count, (b",", b"[", b"{")))
    if len(text) > MAX_JSON_BYTES or num_values > MAX_JSON_VALUES:
        what = f"{name} has {len(text):,} bytes with some {num_values:,} values"
        raise CheckpointError(f"{what}, and m2ray reads up to {MAX_JSON_BYTES:,} and {MAX_JSON_VALUES:,}.", _TOO_MUCH)
    try:
        return json.loads(text, object_hook=object_hook)
    except RecursionError as error:
        raise CheckpointError(f"{name} is nested too deeply.", "Copy the file again.") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of more digits than Python reads
        raise CheckpointError(f"{name} is not JSON: {error}.", "Copy the file again.") from error


def require_sizes(fields: Mapping[str, Any]) -> None:
    """Refuse a configuration that is nested deeply, or counts more than any model has: building its lists would take all memory.

    Raises:
        CheckpointError: naming every such field with its value.
    """
    problems = list(_excesses(fields))
    if problems:
        raise CheckpointError("config.json asks for what no model has:", _TOO_MUCH, problems)


def require_layers(config: Any) -> None:
    """Raise CheckpointError for a configuration, as transformers has read it, with no layer, too many, or a number that is none."""
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise CheckpointError(f"config.json: {short_repr(layers)} decoder layers; m2ray runs models of 1 to {MAX_LAYERS}.", _TOO_MUCH)


def _excesses(fields: Mapping[str, Any]) -> Iterator[str]:
    pending: list[tuple[str, Any, int]] = [("", fields, 0)]
    while pending:
        place, value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            yield f"{place[:100]}... is nested more than {_MAX_DEPTH} deep"
            return
        if isinstance(value, Mapping):
            yield from _excess_experts(place, value)
            pending += [(f"{place}.{name}".lstrip("."), one, depth + 1) for name, one in value.items()]
        elif isinstance(value, list):
            pending += [(place, one, depth + 1) for one in value]
        elif type(value) is int and value > (most := _most(place.rpartition(".")[2])):
            yield f"{place} = {short_repr(value)}, more than {most}"


def _most(name: str) -> int:
    if _LAYERS.search(name):
        return MAX_LAYERS
    return MAX_COUNT if _COUNTED.search(name) else MAX_NUMBER


def _excess_experts(place: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Each expert of each layer is three tensors at least."""
    if not place and fields.get("model_type") in _EXPERTS_ARE_ROWS:
        return
    layers, experts = (
        max((one for name, one in fields.items() if pattern.search(name) and type(one) is int), default=0)
        for pattern in (_LAYERS, _EXPERTS)
    )
    if layers <= MAX_LAYERS and experts <= MAX_COUNT and 3 * layers * experts > MAX_TENSORS:
        yield f"{place or 'its'} {layers} layers of {experts} experts each: more than {MAX_TENSORS} tensors"
