"""DraftSamples: whole sequences for training a draft model: token ids, loss mask, the states of some layers and the last one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import IterableDataset

from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.open_parts import OpenParts
from m2ray.activations.reading.random_rows import RandomRows
from m2ray.activations.reading.shares import consumer_of, require_same, require_share
from m2ray.activations.reading.values import tensors_of
from m2ray.batches import Bits, Int64Array, PartSpec
from m2ray.errors import ConfigError, NotInRunError, RunDamagedError

Sample = dict[str, torch.Tensor]
"""`input_ids` int64 [T], `loss_mask` int64 [T] of 0 and 1, `aux_hidden_states` [T, k * H]: the chosen layers' states side by side, in their order,
and `last_hidden_states` [T, H], the last layer's before the final norm; both in the store dtype. And `sequence_id` int64 []."""


@dataclass(frozen=True)
class DraftOptions:
    """What decides which samples come when, and whether a sequence without a mask is one of which all tokens count."""

    all_tokens: bool
    seed: int
    rank: int
    world_size: int


class DraftSamples(IterableDataset[Sample]):
    """The committed sequences of a run in random order, one a sample, each once an epoch over all ranks and workers.

    Give it to a DataLoader with `batch_size=None`, or with the collate function of a trainer, which pads. Of a finished run workers and ranks
    have as many samples, but for one. Those that opened an unfinished run at different times have none in common. Call `set_epoch` for
    another order. The next sample is read meanwhile.

    Besides two samples a worker keeps at most 256 MiB of token ids, where the rows of the parts in use lie, and 24 bytes a sequence of the run.
    """

    def __init__(self, catalogue: Catalogue, layers: Sequence[PartSpec], last: PartSpec, options: DraftOptions) -> None:
        require_share(options.rank, options.world_size, options.seed)
        if not layers:
            raise ConfigError("layers = [] names none.", "Give those whose states the draft model takes.")
        self._catalogue = catalogue
        self._specs = (*layers, last)
        self._options = options
        keys = [key for spec in self._specs for key in catalogue.parts_of(spec)["key"].to_pylist()]
        self._fingerprint = xxhash.xxh3_128_hexdigest("\n".join(keys).encode())
        self._epoch = 0
        self._samples_given = 0
        self._resumed: Mapping[str, Any] | None = None
        # Of the process that iterates alone: a forked worker must not wait for its parent's threads.
        self._held: tuple[int, _Reader] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, which begins at its first sample."""
        self._epoch, self._samples_given, self._resumed = epoch, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, as plain values: the samples given so far are behind it. With workers it is each worker's own."""
        return {**asdict(self._options), **self._place(), "epoch": self._epoch, "samples_given": self._samples_given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state` was taken. Raises ConfigError if it is of other layers, another run or other options."""
        require_same(state, {**asdict(self._options), "parts": self._fingerprint})
        self._epoch, self._samples_given, self._resumed = int(state["epoch"]), int(state["samples_given"]), dict(state)

    def __iter__(self) -> Iterator[Sample]:
        """The samples from the first on, or from where a loaded state stood.

        Raises:
            ConfigError: the loaded state was taken with another number of workers.
            NotInRunError: a sequence has no loss mask, unless `all_tokens` says that all its tokens count.
            RunDamagedError: a file is not what its commit says.
        """
        skip = 0
        if self._resumed is not None:
            require_same(self._resumed, self._place())
            skip = self._samples_given
        self._samples_given, self._resumed = skip, None
        if self._held is None or self._held[0] != os.getpid():
            self._held = os.getpid(), _Reader(self._catalogue, self._specs, all_tokens=self._options.all_tokens)
        place = consumer_of(self._options.rank, self._options.world_size)
        reader, rng = self._held[1], np.random.default_rng([self._options.seed, self._epoch])
        for sample in reader.samples(reader.in_random_order(rng, **place)[skip:]):
            self._samples_given += 1
            yield sample

    def _place(self) -> dict[str, Any]:
        return {"parts": self._fingerprint, **consumer_of(self._options.rank, self._options.world_size), "dealt": "by sequence"}


class _Reader:
    """Samples by the place of their sequence: part, sequence id and tokens."""

    def __init__(self, catalogue: Catalogue, specs: Sequence[PartSpec], *, all_tokens: bool) -> None:
        self._catalogue = catalogue
        self._specs = specs
        self._all_tokens = all_tokens
        self._parts = OpenParts(catalogue, specs[-1])
        self._others = [RandomRows(catalogue, spec) for spec in specs[:-1]]
        self._sequences = self._ready()

    def _ready(self) -> Int64Array:
        """Part, or -1 if it is not committed, sequence id and tokens of each sequence of the run that is not quarantined: int64 [sequences, 3]."""
        found, shards = [np.empty((0, 3), np.int64)], self._parts.shards
        for number in range(len(self._catalogue.first_ids)):
            table = self._catalogue.sequences_of_file(number, ["sequence_id", "token_count", "shard"])
            table = table.filter(table["shard"].is_valid())
            shard = table["shard"].to_numpy()
            part = np.where(np.isin(shard, shards), np.searchsorted(shards, shard), -1)
            found.append(np.stack([part, table["sequence_id"].to_numpy(), table["token_count"].to_numpy()], axis=1).astype(np.int64))
        return np.concatenate(found)

    def in_random_order(self, rng: np.random.Generator, consumer: int, consumers: int) -> Int64Array:
        """A consumer's share of them, as far as they are committed. Parts come in groups, so that each is opened once.

        All sequences are dealt out, whichever are committed: what each consumer has seen by now may differ.
        """
        dealt = rng.permutation(self._sequences)[consumer::consumers]
        dealt = dealt[dealt[:, 0] >= 0]
        turn_of_part = rng.permutation(len(self._parts.shards)) // max(1, self._parts.kept // 2)
        return dealt[np.argsort(turn_of_part[dealt[:, 0]], kind="stable")]

    def samples(self, order: Int64Array) -> Iterator[Sample]:
        """One after the other, the next one being read."""
        # Two samples at a time wait on threads of the pool for their states, which are read by the others.
        with ThreadPoolExecutor(2 + len(self._specs), thread_name_prefix="samples") as pool:
            ahead: Future[Sample] | None = None
            for place in chain(order, [None]):
                now, ahead = ahead, None if place is None else pool.submit(self._sample, pool, *place.tolist())
                if now is not None:
                    yield now.result()

    def _sample(self, pool: ThreadPoolExecutor, part: int, sequence_id: int, num_tokens: int) -> Sample:
        _, tokens = self._parts(part)
        start, stop = np.searchsorted(tokens["sequence_id"], [sequence_id, sequence_id + 1])
        of_sequence = tokens[start:stop]
        if not np.array_equal(of_sequence["position"], np.arange(num_tokens)):
            raise RunDamagedError(
                f"The run at {self._catalogue.store.url} is damaged: a part does not hold the {num_tokens} positions of sequence {sequence_id}."
            )
        states = list(pool.map(lambda number: self._states(number, part, int(start), num_tokens), range(len(self._specs))))
        tensors = [tensors_of(spec.columns, torch.from_numpy(bits)) for bits, spec in zip(states, self._specs, strict=True)]
        return {
            "sequence_id": torch.tensor(sequence_id, device="cpu"),
            "input_ids": torch.from_numpy(of_sequence["token_id"].astype(np.int64)),
            "loss_mask": torch.from_numpy(self._mask(sequence_id, of_sequence["position"]).astype(np.int64)),
            "aux_hidden_states": torch.cat(tensors[:-1], dim=1),
            "last_hidden_states": tensors[-1],
        }

    def _states(self, number: int, part: int, start: int, num_tokens: int) -> Bits:
        pages = self._parts(part)[0] if number == len(self._others) else self._others[number].pages(part)
        rows = np.empty((num_tokens, self._specs[number].row_bytes), np.uint8)
        pages.read(start, rows)
        return rows

    def _mask(self, sequence_id: int, positions: Any) -> Bits:
        counts, is_known = self._parts.masks.of(np.full(len(positions), sequence_id, np.int64), positions)
        if not self._all_tokens and not is_known.all():
            raise NotInRunError(
                f"Sequence {sequence_id} of the run at {self._catalogue.store.url} has no loss mask: its prompt gave none.",
                "Extract with a mask, or give all_tokens=True: then all tokens of such a sequence count.",
            )
        return counts
