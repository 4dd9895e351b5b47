"""Catalogue: what a run folder holds that counts. Parts are resolved through commits only, so half a shard is invisible."""

from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2ray.activations.commit_table import read_committed
from m2ray.activations.job import JobRecord, read_job
from m2ray.activations.manifest import MANIFEST_KEY, read_manifest, receipts_of
from m2ray.activations.reading.part_reader import Check, PartReader
from m2ray.activations.records import committed_shards, read_summary
from m2ray.batches import PartReceipt, PartSpec, SequenceFile
from m2ray.errors import NotInRunError, StoreError
from m2ray.sequences import read_sequences
from m2ray.storage import Store

if TYPE_CHECKING:
    from collections.abc import Sequence


class Words(Protocol):
    """A tokenizer, as far as readers need it."""

    def text(self, token_ids: "Sequence[int]") -> str: ...

    def words(self, token_ids: "Sequence[int]") -> list[str]: ...


OpenTokenizer = Callable[[JobRecord, str | None], Words]
"""From a run and a model's folder, None for where the run's model was, to its tokenizer."""


class Catalogue:
    """A run as it was when this object was made; later commits are not seen.

    Raises:
        StoreError: there is no run, or it cannot be read.
        RunDamagedError: job.json, a commit or the manifest cannot be understood or is of another run.
        RunConflictError: a newer m2ray wrote it.
    """

    def __init__(self, store: Store, check: Check = "pages", open_tokenizer: OpenTokenizer | None = None) -> None:
        self.store = store
        self._check = check
        self._open_tokenizer = open_tokenizer
        self._tokenizers: dict[str | None, Words] = {}
        job = read_job(store)
        if job is None:
            raise StoreError(
                f"There is no run at {store.url}: it has no job.json.", "Check the path; a run that still reads its prompts has none yet."
            )
        self.job: JobRecord = job
        # The end of a run writes the manifest first; without it a run is read by its commits.
        self.summary = read_summary(store) if store.size(MANIFEST_KEY) is not None else None
        if self.summary is not None:
            self.parts = read_manifest(store, job, self.summary.parts)
            self.committed: Sequence[int] = range(self.summary.shards)
        else:
            self.committed = sorted(committed_shards(store))
            self.parts = read_committed(store, job, self.committed).parts
        self._held: tuple[SequenceFile, Any] | None = None

    def parts_of(self, spec: PartSpec) -> Any:
        """The committed parts of one site and layer, ascending by shard: a table of MANIFEST_SCHEMA."""
        start, stop = self._bounds.get((spec.site, spec.layer), (0, 0))
        return self.parts.slice(start, stop - start)

    @cached_property
    def _bounds(self) -> dict[tuple[str, int | None], tuple[int, int]]:
        """Where the parts of each site and layer begin and end in the table, which is sorted by them."""
        sites = self.parts["site"].combine_chunks().dictionary_encode()
        kinds = np.stack([sites.indices.to_numpy(), self.parts["layer"].fill_null(-1).to_numpy()])
        starts = np.flatnonzero(np.r_[True, (kinds[:, 1:] != kinds[:, :-1]).any(axis=0)]) if len(self.parts) else np.empty(0, np.int64)
        names = zip(self.parts["site"].take(starts).to_pylist(), self.parts["layer"].take(starts).to_pylist(), strict=True)
        return dict(zip(names, pairwise([*starts.tolist(), len(self.parts)]), strict=True))

    def receipts_of(self, spec: PartSpec) -> list[PartReceipt]:
        """The receipts of one site and layer, ascending by shard."""
        return receipts_of(self.parts_of(spec))

    def open_part(self, spec: PartSpec, receipt: PartReceipt) -> PartReader:
        """Open a part after its size and footer were checked. Raises RunDamagedError or StoreError."""
        return PartReader(self.store, spec, self.job.run_metadata(), receipt, self._check)

    def part_of_shard(self, spec: PartSpec, shard: int) -> PartReceipt | None:
        """One part's receipt; None if the shard is not committed."""
        table = self.parts_of(spec)
        place = int(np.searchsorted(table["shard"].to_numpy(), shard))
        found = receipts_of(table.slice(place, 1))
        return found[0] if found and found[0].shard == shard else None

    def tokenizer(self, model: str | None) -> Words:
        """The run's tokenizer, from the folder `model` or from where the run's model was; loaded once. Raises what opening it raises."""
        if self._open_tokenizer is None:
            raise NotInRunError("This run was opened without a way to its tokenizer.", "Open it by m2ray.open_run.")
        if model not in self._tokenizers:
            self._tokenizers[model] = self._open_tokenizer(self.job, model)
        return self._tokenizers[model]

    # -- sequences ----------------------------------------------------------------------------------------------------

    def sequence(self, sequence_id: int) -> dict[str, Any]:
        """A row of `sequences/`, by its columns: what became of a row of the source. Reads only the file that holds it.

        Raises:
            NotInRunError: the source has no such row.
            RunDamagedError: the file differs from what job.json says.
        """
        if not 0 <= sequence_id < self.job.counts.sequences:
            raise NotInRunError(
                f"There is no sequence {sequence_id}: the run at {self.store.url} has sequences 0 to {self.job.counts.sequences - 1}."
            )
        number = bisect_right(self.first_ids, sequence_id) - 1
        table = self._sequence_table(self.job.sequence_files[number])
        (row,) = table.slice(sequence_id - self.first_ids[number], 1).to_pylist()
        return dict(row)

    def sequences(self) -> Any:
        """Every row of the source, ascending by sequence id: the whole of `sequences/` as one pyarrow table."""
        return pa.concat_tables(read_sequences(self.store, file) for file in self.job.sequence_files)

    def num_tokens(self) -> int:
        """Tokens of the sequences whose shards are committed. Reads `sequences/`, a file at a time; raises as `sequences` does."""
        shards, num_tokens = pa.array(self.committed, pa.int32()), 0
        for number in range(len(self.first_ids)):
            table = self.sequences_of_file(number, ["token_count", "shard"])
            num_tokens += pc.sum(table.filter(pc.is_in(table["shard"], value_set=shards))["token_count"]).as_py() or 0
        return num_tokens

    def sequences_of_file(self, number: int, columns: list[str]) -> Any:
        """Some columns of one file of `sequences/`, those that it has. Raises as `sequences` does."""
        return read_sequences(self.store, self.job.sequence_files[number], columns)

    @cached_property
    def first_ids(self) -> list[int]:
        """The sequence id that each file begins with: together they hold every id from 0 on."""
        return [0, *accumulate(file.rows for file in self.job.sequence_files)][:-1]

    def _sequence_table(self, file: SequenceFile) -> Any:
        """One file's table. The last one stays in memory: neighbours are often asked for next."""
        if self._held is None or self._held[0] != file:
            self._held = (file, read_sequences(self.store, file))
        return self._held[1]
