"""Rows a second into a dictionary trainer: `.stream()` against a torch DataLoader over .pt megabatches and SAELens' cached activations.

    python -m benchmarks.training_readers FOLDER [--sae-lens .consumers/row-iterators/bin/python]

All read the same rows, in batches of 4,096 rows, with a shuffle buffer of 1 GiB, from files in the page cache: activault's layout
({states [N, T, d], input_ids [N, T]} in .pt files, of which one is given out while the next is loaded: half of the buffer each), a .pt file a
prompt [T, d], as people save them, of which the DataLoader draws so many at random as make a batch (a prompt's rows stay together), and what
SAELens caches (a saved data set of [T, d] a row, in float16, so that its rows have as many bytes as ours). SAELens runs in an interpreter of its own,
one that has it: `scripts/consumers row-iterators` makes it. What is compared is the second epoch of each. Needs 7 GB of disk.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import m2ray
from benchmarks.records import Row, record
from benchmarks.synthetic import HIDDEN_SIZE, LAYER, make_run
from m2ray.activations.reading.reader import RunReader

LENGTH, BATCH_ROWS, BUFFER_BYTES = 512, 4096, 1 << 30
ROW_BYTES = 2 * HIDDEN_SIZE
HOOK = f"blocks.{LAYER}.hook_resid_post"
PROMPTS_AT_ONCE = 8
TIMEOUT_S = 1800.0


class Megabatches(IterableDataset[torch.Tensor]):
    """Rows of .pt files, shuffled within each file."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in torch.randperm(len(self.files)).tolist():
            rows = torch.load(self.files[number], weights_only=True)["states"].flatten(0, 1)
            for chosen in torch.randperm(len(rows)).split(BATCH_ROWS):
                yield rows[chosen]


class Prompts(Dataset[torch.Tensor]):
    """The rows of .pt files, one a prompt."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        rows: torch.Tensor = torch.load(self.files[number], weights_only=True)
        return rows


def write_prompts(run: RunReader, folder: Path) -> list[Path]:
    folder.mkdir()
    files = []
    for number, rows in enumerate(run.tensor().view(-1, LENGTH, HIDDEN_SIZE)):
        files.append(folder / f"{number}.pt")
        torch.save(rows.clone(), files[-1])
    return files


def write_megabatches(run: RunReader, folder: Path) -> list[Path]:
    rows = run.tensor().view(-1, LENGTH, HIDDEN_SIZE)
    ids = torch.from_numpy(run.tokens()["token_id"].copy()).view(-1, LENGTH)
    of_file = BUFFER_BYTES // 2 // (LENGTH * ROW_BYTES)
    folder.mkdir()
    files = []
    for number, start in enumerate(range(0, len(rows), of_file)):
        files.append(folder / f"{number}.saved.pt")
        torch.save({"states": rows[start : start + of_file].clone(), "input_ids": ids[start : start + of_file].clone()}, files[-1])
    return files


def write_cached_activations(run: RunReader, folder: Path) -> None:
    import datasets

    features = datasets.Features({HOOK: datasets.Array2D((LENGTH, HIDDEN_SIZE), "float16")})
    pieces = []
    for shard in run.shards():
        values = pa.array(shard.activations.view(torch.float16).numpy().reshape(-1))
        rows = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, HIDDEN_SIZE).astype(np.int32), values)
        prompts = pa.ListArray.from_arrays(np.arange(0, len(rows) + 1, LENGTH).astype(np.int32), rows)
        column = pa.ExtensionArray.from_storage(features.arrow_schema.field(HOOK).type, prompts)
        pieces.append(
            datasets.Dataset(datasets.table.InMemoryTable(pa.table({HOOK: column})), info=datasets.DatasetInfo(features=features))
        )
    datasets.concatenate_datasets(pieces).save_to_disk(folder)


def saelens_s(folder: Path, num_rows: int) -> list[float]:
    """Seconds of each of two epochs of SAELens' own store."""
    import datasets

    store = import_module("sae_lens.training.activations_store").ActivationsStore(
        model=torch.nn.Module(),
        dataset=datasets.Dataset.from_dict({"input_ids": [[1] * LENGTH]}),
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=LENGTH,
        d_in=HIDDEN_SIZE,
        n_batches_in_buffer=BUFFER_BYTES // ROW_BYTES // LENGTH,
        total_training_tokens=1,
        store_batch_size_prompts=PROMPTS_AT_ONCE,
        train_batch_size_tokens=BATCH_ROWS,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float16",
        cached_activations_path=str(folder),
    )
    return [seconds(lambda: (next(store) for _ in range(num_rows // BATCH_ROWS))) for _ in range(2)]


def seconds(epoch: Callable[[], Iterator[torch.Tensor]]) -> float:
    """Until the last batch of an epoch is there. Each batch is let go of before the next."""
    begin = time.perf_counter()
    for batch in epoch():
        assert len(batch)
        del batch
    return time.perf_counter() - begin


def measure(folder: Path, shards: int, sae_lens: str | None, repeats: int) -> list[Row]:
    make_run(folder / "run", shards)
    run = m2ray.open_run(folder / "run").layer(LAYER)
    num_rows, files, prompt_files = run.num_tokens, write_megabatches(run, folder / "pt"), write_prompts(run, folder / "prompts")
    stream = run.stream(batch_rows=BATCH_ROWS, shuffle_buffer_bytes=BUFFER_BYTES)

    def ours() -> Iterator[torch.Tensor]:
        return (batch["activations"] for batch in stream)

    def megabatches(workers: int) -> Callable[[], Iterator[torch.Tensor]]:
        loader = DataLoader(Megabatches(files), batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        return lambda: iter(loader)

    def by_prompt(workers: int) -> Callable[[], Iterator[torch.Tensor]]:
        at_once = BATCH_ROWS // LENGTH
        loader = DataLoader(
            Prompts(prompt_files), at_once, shuffle=True, collate_fn=torch.cat, num_workers=workers, persistent_workers=workers > 0
        )
        return lambda: iter(loader)

    others = {f"torch DataLoader over .pt megabatches, {workers} workers": megabatches(workers) for workers in (0, 1)}
    others |= {f"torch DataLoader over a .pt file a prompt, {workers} workers": by_prompt(workers) for workers in (0, 1)}
    for epoch in (ours, *others.values()):
        seconds(epoch)
    taken = [{name: seconds(epoch) for name, epoch in {"": ours, **others}.items()} for _ in range(repeats)]
    found = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
    if sae_lens:
        write_cached_activations(run, folder / "saelens")
        words = [sae_lens, "-m", "benchmarks.training_readers", str(folder / "saelens"), "--measure-sae-lens", str(num_rows)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        found["SAELens 6.54's cached activations store"] = float(done.stdout.split()[-1])
    what, note = (
        "stream, 1 GiB shuffle buffer",
        f"{num_rows} rows of {ROW_BYTES} bytes, batches of {BATCH_ROWS}; load {os.getloadavg()[1]:.0f}",
    )
    ours_s = found.pop("")
    return [
        Row(what, num_rows / ours_s, "rows/s", num_rows / taken_s, name, taken_s / ours_s, "3", note) for name, taken_s in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made, and stays")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sae-lens", help="a Python that has SAELens")
    parser.add_argument("--measure-sae-lens", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_sae_lens:
        print(saelens_s(options.folder, options.measure_sae_lens)[-1])
        sys.exit()
    record("training_readers", "Rows for a dictionary trainer", measure(options.folder, options.shards, options.sae_lens, options.repeats))


if __name__ == "__main__":
    main()
