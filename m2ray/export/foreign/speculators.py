"""speculators' layout: a saved data set of prompts, and beside it `hidden_states/hs_{i}.safetensors` of row i."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from m2ray.errors import PromptsError
from m2ray.export.foreign.samples import Problem, Sample
from m2ray.prompts.arrow_files import ArrowFile

_NAME = re.compile(r"hs_(\d{1,18})\.safetensors")
_COLUMNS = ("input_ids", "loss_mask", "seq_len")


def number_of(folder: Path, path: Path) -> int | None:
    """Which row of a dump a file's states are of; None if it is no file of states of it."""
    found = _NAME.fullmatch(path.name) if path.parent in {folder, folder / "hidden_states"} else None
    return int(found[1]) if found else None


def samples(folder: Path, states: Sequence[Path]) -> Iterator[Sample]:
    """The data set's rows with their states, then files of states that no row has. Without a data set, the files by themselves."""
    files = {number_of(folder, path): path for path in states}
    has_rows = (folder / "state.json").is_file()
    for number, row in enumerate(_rows(folder) if has_rows else ()):
        if isinstance(row, Problem):
            yield Sample(f"the data set, from row {number} on", problems=(row,))
            return
        path = files.pop(number, None)
        if path is None:
            yield Sample(f"row {number}", problems=(Problem("missing", f"there is no hs_{number}.safetensors"),))
        else:
            yield _sample(path, row)
    stray = (Problem("missing", "the data set has no such row"),) if has_rows else ()
    for path in files.values():
        yield _sample(path, {}, stray)


def _sample(path: Path, row: Mapping[str, Any], problems: tuple[Problem, ...] = ()) -> Sample:
    try:
        token_ids, planes = _states(path)
        row_ids, loss_mask = _ints(row.get("input_ids")), _ints(row.get("loss_mask"))
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        return Sample(path.name, problems=(Problem("unreadable", str(error)),))
    if row_ids is not None and token_ids is not None and not torch.equal(row_ids, token_ids):
        what = f"{len(token_ids):,} token_ids are not the {len(row_ids):,} input_ids of the data set's row"
        problems = (*problems, Problem("tokens_disagree", what))
    if row_ids is not None and row.get("seq_len") not in {None, len(row_ids)}:
        problems = (*problems, Problem("lengths", f"seq_len is {row['seq_len']}, and there are {len(row_ids):,} input_ids"))
    return Sample(path.name, token_ids if token_ids is not None else row_ids, loss_mask, planes, problems)


def _states(path: Path) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """`token_ids` [T] and the planes of `hidden_states` [T, L, W], multiplied with their scales if they are FP8."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if "hidden_states" not in names:
            raise ValueError(f"there are no hidden_states in it, but {', '.join(sorted(names)) or 'nothing'}")
        states_TLW = file.get_tensor("hidden_states")
        token_ids = file.get_tensor("token_ids") if "token_ids" in names else None
        if states_TLW.ndim == 2:
            states_TLW = states_TLW.unsqueeze(1)
        if states_TLW.ndim != 3 or not states_TLW.is_floating_point():
            raise ValueError(f"hidden_states are {states_TLW.dtype} {list(states_TLW.shape)}, not floats [tokens, layers, width]")
        if "hidden_states_scales" in names:
            states_TLW = states_TLW.float() * file.get_tensor("hidden_states_scales").float()
    return token_ids, {f"hidden_states[:, {index}]": plane for index, plane in enumerate(states_TLW.unbind(1))}


def _rows(folder: Path) -> Iterator[Mapping[str, Any] | Problem]:
    """The saved data set's rows; a problem where they end before they should."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        for entry in state["_data_files"]:
            path = folder / Path(str(entry["filename"])).name
            file = ArrowFile(path, path.name)
            columns = [name for name in _COLUMNS if name in (file.columns() or {})]
            for record in file.records(columns):
                yield record.values
    except (PromptsError, OSError, ValueError, LookupError, TypeError) as error:
        yield Problem("unreadable", str(error))


def _ints(values: Any) -> torch.Tensor | None:
    """A row's list as int64 [T]. Raises ValueError or TypeError where it is no list of integers."""
    if values is None:
        return None
    tensor = torch.tensor(values)
    if tensor.is_floating_point() and len(tensor):
        raise ValueError("a column of the data set has floats where integers belong")
    return tensor.long()
