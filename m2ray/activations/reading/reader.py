"""open_run: a run's activations as torch tensors, or as floats for NumPy, Arrow and frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from m2ray.activations.reading.catalogue import Catalogue, OpenTokenizer
from m2ray.activations.reading.part_reader import Check
from m2ray.activations.reading.random_rows import RandomRows
from m2ray.activations.reading.view import RunView
from m2ray.batches import TOKEN_ROW, PartReceipt
from m2ray.errors import ConfigError, NotInRunError, in_ranges
from m2ray.extras import naming_extras
from m2ray.storage import open_store

if TYPE_CHECKING:
    import torch

    from m2ray.activations.reading.draft_samples import DraftSamples
    from m2ray.activations.reading.row_iterator import RowIterator
    from m2ray.activations.reading.statistics import LayerStatistics
    from m2ray.activations.reading.stream import ActivationStream
    from m2ray.activations.reading.values import Values


@dataclass(frozen=True)
class ShardRows:
    """One shard of a view: `tokens` TOKEN_ROW [N]; `activations` [N, W] of a one-layer view, [L, N, W] otherwise (of router_topk by column)."""

    index: int
    tokens: npt.NDArray[Any]
    activations: "Values"


def open_run(path: str | Path, *, check: Check = "pages", open_tokenizer: OpenTokenizer | None = None) -> "RunReader":
    """As m2ray.open_run (m2ray/api/opening.py), which gives the `open_tokenizer` that `text` and `words` need.

    Raises:
        ConfigError: `check` is neither "pages" nor "none".
        StoreError: there is no run at `path`, or it cannot be read.
        RunDamagedError: its records cannot be understood.
        RunConflictError: a newer m2ray wrote it.
    """
    if check not in get_args(Check):
        raise ConfigError(f"check = {check!r} is not known.", f"Give one of {', '.join(map(repr, get_args(Check)))}.")
    catalogue = Catalogue(open_store(path), check, open_tokenizer)
    return RunReader(catalogue, catalogue.job.parts, has_layer_axis=True)


class RunReader(RunView):
    """A run, or a view of it, whose rows can be read. Each method says which views it takes."""

    # -- statistics ---------------------------------------------------------------------------------------------------

    def statistics(self, site: str, layer: int | None = None) -> "LayerStatistics":
        """What a finished run knows of the rows of a site and layer, such as their mean and covariance; no layer of a site of the whole model.

        Raises:
            NotInRunError: no statistics were asked for there, or the run is not finished.
            RunDamagedError: their record cannot be understood.
        """
        from m2ray.activations.reading.statistics import LayerStatistics

        return LayerStatistics(self._catalogue.store, self.job, site, layer)

    # -- activations --------------------------------------------------------------------------------------------------

    @naming_extras()
    def sequence(self, sequence_id: int) -> "Values":
        """One sequence in the store dtype: [T, W] of a one-layer view, [L, T, W] otherwise. Where tokens were chosen, T are those of them that
        are of this sequence, in order; there may be none.

        Raises:
            NotInRunError: there is no such sequence, it was quarantined (says why), or is not committed yet; or the view has
                several sites.
            RunDamagedError: a file is not what its commit says.
        """
        row = self._catalogue.sequence(sequence_id)
        if row["shard"] is None:
            raise NotInRunError(f"Sequence {sequence_id} (row {row['row_id']}) has no activations: it was quarantined: {row['reason']}.")
        receipts = [self._catalogue.part_of_shard(spec, row["shard"]) for spec in self._one_site()]
        bytes_LTB = self._empty(row["row_count"])
        for bytes_TB, spec, receipt in zip(bytes_LTB.numpy(), self._parts, receipts, strict=True):
            if receipt is None:
                raise NotInRunError(
                    f"Sequence {sequence_id} is not extracted yet: its shard {row['shard']} is not committed.", "Finish the run."
                )
            bytes_TB[:] = self._catalogue.open_part(spec, receipt).sequence(sequence_id, row["row_count"])
        return self._values(bytes_LTB)

    @naming_extras()
    def rows(self, indices: "Sequence[int] | npt.NDArray[np.int64]") -> "Values":
        """Some rows of a one-layer view by their numbers, 0 to `num_rows` - 1 in the order of `tokens`: [N, W], in the order asked for.

        Each row is read by itself, however large its file is. Keep the view: it remembers where rows lie.

        Raises:
            NotInRunError: there is no such row, or the view has several layers or sites.
            RunDamagedError: a file is not what its commit says.
        """
        import torch

        from m2ray.activations.reading.values import tensors_of

        return tensors_of(self._one_layer().columns, torch.from_numpy(self._random_rows.read(indices)))

    @naming_extras()
    def tensor(self) -> "Values":
        """All committed rows in the order of `tokens`: [N, W] of a one-layer view, [L, N, W] otherwise.

        They must fit into memory; `shards` goes shard by shard. Raises as `sequence` does.
        """
        return self._load([self._catalogue.receipts_of(spec) for spec in self._one_site()])

    def tokens(self, sequence_id: int | None = None) -> npt.NDArray[Any]:
        """Which token each row is, shard after shard, or of one sequence: TOKEN_ROW [N] (sequence_id, position, token_id).

        Raises NotInRunError where the sequence is not committed, and as `sequence` does.
        """
        first = self._first_part()
        if sequence_id is not None:
            shard = self._catalogue.sequence(sequence_id)["shard"]
            receipt = None if shard is None else self._catalogue.part_of_shard(first, shard)
            if receipt is None:
                raise NotInRunError(f"Sequence {sequence_id} has no rows: it was quarantined, or is not extracted yet.")
            tokens = self._catalogue.open_part(first, receipt).tokens()
            return tokens[slice(*np.searchsorted(tokens["sequence_id"], [sequence_id, sequence_id + 1]))]
        pieces = [self._catalogue.open_part(first, receipt).tokens() for receipt in self._catalogue.receipts_of(first)]
        return np.concatenate([np.empty(0, TOKEN_ROW), *pieces])

    def shards(self) -> Iterator[ShardRows]:
        """The committed shards, ascending, one in memory at a time. Raises as `sequence` does."""
        receipts_of_layers = [self._catalogue.receipts_of(spec) for spec in self._one_site()]
        for receipts in zip(*receipts_of_layers, strict=True):
            tokens = self._catalogue.open_part(self._parts[0], receipts[0]).tokens()
            yield ShardRows(receipts[0].shard, tokens, self._load([[receipt] for receipt in receipts]))

    @naming_extras()
    def stream(
        self,
        *,
        batch_rows: int = 1024,
        shuffle_buffer_bytes: int = 1 << 30,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        follow: bool = False,
        idle_s: float = 600.0,
    ) -> "ActivationStream":
        """The rows of a one-layer view in random order for training, every one once an epoch: a torch IterableDataset of batches.

        Args:
            batch_rows: rows of a batch; it is a dict of `activations` [N, W], `sequence_id`, `position`, `token_id` and, if the run has
                loss masks, `loss_mask` [N].
            shuffle_buffer_bytes: activations that each worker holds in memory; the more, the better they are mixed.
            seed: with the epoch it decides the order.
            rank, world_size: which share of the rows, out of how many.
            follow: go on with what is committed meanwhile, to the end of the run. Rows are mixed with those that came at the same time alone
                (ActivationStream).
            idle_s: with `follow`, how long to wait for a run that gives no sign of life.

        Raises:
            NotInRunError: the view has several layers or sites.
            ConfigError: an option makes no sense.
        """
        from m2ray.activations.reading.stream import ActivationStream, StreamOptions

        options = StreamOptions(batch_rows, shuffle_buffer_bytes, seed, rank, world_size, follow)
        return ActivationStream(self._catalogue, self._one_layer(), options, idle_s)

    @naming_extras()
    def iterator(self, *, rows: int = 4096, epochs: int | None = 1, dtype: "torch.dtype | None" = None, **stream: Any) -> "RowIterator":
        """The same rows as bare tensors [rows, W]: what dictionary_learning's `trainSAE` takes as `data`, and any loop of one's own.

        Args:
            rows: of a batch.
            epochs: after so many it ends; None goes on without end, with full batches only.
            dtype: of the batches; None gives the stored bits, uncopied. A trainer whose weights are float32 may want torch.float32.
            stream: what else `stream` takes.

        Raises:
            NotInRunError: the view has several layers or sites.
            ConfigError: an option makes no sense.
        """
        from m2ray.activations.reading.row_iterator import RowIterator

        self._require_one_tensor()
        return RowIterator(self.stream(batch_rows=rows, **stream), rows, epochs, dtype)

    @naming_extras()
    def as_data_provider(self, *, rows: int = 4096, **stream: Any) -> "RowIterator":
        """What SAELens' SAETrainer takes as `data_provider`: float32 [rows, W] without end. Its `train_batch_size_samples` has to be `rows`.

        bfloat16 and float16 become float32 without loss. Takes what `stream` takes, and raises as it does.
        """
        import torch

        return self.iterator(rows=rows, epochs=None, dtype=torch.float32, **stream)

    @naming_extras()
    def draft_samples(
        self, layers: Sequence[int], *, all_tokens: bool = False, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> "DraftSamples":
        """Whole sequences for training a draft model, each once an epoch in random order: a torch IterableDataset of samples.

        A sample is a dict of `input_ids`, `loss_mask` [T], `aux_hidden_states` [T, k * H] of the residual of `layers`, side by side in their
        order, `last_hidden_states` [T, H] of the model's last layer, before the final norm, and `sequence_id`.

        Args:
            layers: m2ray's numbers, from 0 on. Other tools number what *enters* a layer: their k is layer k - 1 here.
            all_tokens: let all tokens count of sequences whose prompts gave no loss mask; else these are refused when they are met.
            seed: with the epoch it decides the order.
            rank, world_size: which share of the sequences, out of how many.

        Raises:
            NotInRunError: the view lacks the residual of one of these layers, or of the model's last one.
            ConfigError: an option makes no sense.
        """
        from m2ray.activations.reading.draft_samples import DraftOptions, DraftSamples

        if not self.job.selection.is_all:
            raise NotInRunError(
                f"The run at {self._catalogue.store.url} kept {self.job.selection}: a sample is a whole sequence.",
                'Extract with tokens = "all".',
            )
        last = self.job.model.num_layers - 1
        found = {part.layer: part for part in self._parts if part.site == "residual"}
        absent = sorted({*layers, last} - found.keys())
        if absent:
            raise NotInRunError(
                f"The residual of layer {in_ranges(absent)} is not in this view of {self._catalogue.store.url}.",
                f"A sample holds the states of the layers asked for, and of the model's last one, {last}: extract them too.",
            )
        return DraftSamples(
            self._catalogue, [found[number] for number in layers], found[last], DraftOptions(all_tokens, seed, rank, world_size)
        )

    def mean_norm(self, most_rows: int | None = None) -> float:
        """The mean L2 norm of the committed rows of a one-layer view, summed in float64; NaN if there are none.

        Reads some rows at a time: all of them, or at most `most_rows`, from shards that are spread evenly. Raises as `sequence` does, and
        NotInRunError for router_topk, whose rows are no vectors.
        """
        from m2ray.activations.reading.norms import mean_norm

        self._require_one_tensor()
        return mean_norm(self._catalogue, self._one_layer(), most_rows)

    # -- floats and words ---------------------------------------------------------------------------------------------

    def to_numpy(self) -> Any:
        """All committed rows in the order of `tokens` as float32: [N, W] of a one-layer view, [L, N, W] otherwise; of router_topk a dict by column.

        bfloat16, float16 and 8 bits become float32 without loss. They must fit into memory. Raises as `tensor` does.
        """
        from m2ray.activations.reading.frames import values_of

        layers = [values_of(self._catalogue, spec) for spec in self._one_site()]
        values = {name: np.stack([layer[name] for layer in layers]) if self._has_layer_axis else layers[0][name] for name in layers[0]}
        return values.get("activation", values)

    def to_arrow(self) -> Any:
        """The same rows as a pyarrow table: sequence_id, position, token_id, in a view with a layer axis layer, and `activation`, a
        fixed_size_list of float32 (of router_topk `expert_ids` and `expert_weights`). Raises as `tensor` does.
        """
        from m2ray.activations.reading.frames import table_of

        return table_of(self._catalogue, self._one_site(), has_layer_axis=self._has_layer_axis)

    def to_pandas(self) -> Any:
        """The table of `to_arrow` as a pandas frame; `activation` holds an array a row: np.stack(frame.activation) is [N, W].

        Raises as `tensor` does.
        """
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """The table of `to_arrow` as a polars frame; `activation` is an Array(Float32, W).

        Raises as `tensor` does.
        """
        import polars as pl  # reads slowly where nobody asks for it

        return pl.from_arrow(self.to_arrow())

    def text(self, sequence_id: int, *, model: str | None = None) -> str:
        """The tokens of a sequence that have rows, decoded together: its prompt with special tokens and template, where all have rows.

        Args:
            sequence_id: which one.
            model: the folder of the run's model or tokenizer; default: where the model was.

        Raises:
            NotInRunError: the sequence has no rows, or its rows are means; or the run does not say where its model was.
            CheckpointError, StoreError: the tokenizer is not there.
            RunConflictError: it is not the run's.
        """
        return str(self._catalogue.tokenizer(model).text(self._token_ids(sequence_id)))

    def words(self, sequence_id: int, *, model: str | None = None) -> list[str]:
        """The same token by token, one word a row; a part of a character is U+FFFD. Raises as `text` does."""
        return list(self._catalogue.tokenizer(model).words(self._token_ids(sequence_id)))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _token_ids(self, sequence_id: int) -> list[int]:
        token_ids: list[int] = self.tokens(sequence_id)["token_id"].tolist()
        if -1 in token_ids:
            raise NotInRunError(f"The rows of {self._catalogue.store.url} are means over tokens.", "Their tokens are not kept.")
        return token_ids

    @cached_property
    def _random_rows(self) -> RandomRows:
        return RandomRows(self._catalogue, self._one_layer())

    @naming_extras()
    def _load(self, receipts_of_layers: Sequence[Sequence[PartReceipt]]) -> "Values":
        """All rows of the same shards of each layer."""
        bytes_LNB = self._empty(sum(receipt.rows for receipt in receipts_of_layers[0]))
        for bytes_NB, spec, receipts in zip(bytes_LNB.numpy(), self._parts, receipts_of_layers, strict=True):
            start = 0
            for receipt in receipts:
                self._catalogue.open_part(spec, receipt).pages().read(0, bytes_NB[start : start + receipt.rows])
                start += receipt.rows
        return self._values(bytes_LNB)

    def _empty(self, num_rows: int) -> "torch.Tensor":
        """Memory of the host, whatever torch's default device, for `num_rows` rows of each layer: uint8 [L, N, bytes of a row]."""
        import torch

        return torch.empty((len(self._parts), num_rows, self._parts[0].row_bytes), dtype=torch.uint8, device="cpu")

    def _values(self, bytes_LNB: "torch.Tensor") -> "Values":
        """What these bytes of the view's rows say, with a layer axis where the view has one."""
        from m2ray.activations.reading.values import tensors_of

        return tensors_of(self._parts[0].columns, bytes_LNB if self._has_layer_axis else bytes_LNB[0])
