"""Packer: documents joined in the order of the source, BOS between them, and cut into contexts of one length, as dictionary trainers do.

A context takes the place of a row: it is one sequence, and the next number is its id. A document that cannot be used keeps a row of its
own, with the reason; so does the remainder, which is too short for a context and is left out, as trainers leave it out.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from m2ray.prompts.masks import Document, Marked
from m2ray.prompts.rows import PromptRow
from m2ray.prompts.shards import WINDOW_ROWS

if TYPE_CHECKING:
    from m2ray.batches import Int32Array

Batch = tuple[list[PromptRow], list[Marked | str]]
"""Rows, and of each its tokens, or why it is quarantined."""


class Packer:
    """Contexts of `size` tokens. `bos` comes before each document that does not begin with it.

    Attributes:
        bos: it.
        num_documents, num_refused: that came so far; of them those that cannot be used.
    """

    def __init__(self, size: int, bos: int) -> None:
        self.num_documents = self.num_refused = 0
        self._size = size
        self.bos = bos
        self._pieces: list[Int32Array] = []
        self._masks: list[bytes | None] = []
        self._documents: list[Document] = []
        self._filled = 0
        self._next_id = 0

    def packed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The contexts that batches of documents make, in batches that do not cross a window's end."""
        for rows, marked_rows in batches:
            found: list[tuple[str, Marked | str]] = []
            for row, marked in zip(rows, marked_rows, strict=True):
                self.num_documents += 1
                self.num_refused += isinstance(marked, str)
                found += [(row.row_id, marked)] if isinstance(marked, str) else [("", each) for each in self._add(row.row_id, marked)]
            yield from self._numbered(found)
        if self._filled:
            first = self._documents[0]
            where = f"from token {first.offset} of row {first.row_id} on"
            yield from self._numbered(
                [("remainder", f"the last {self._filled} tokens, {where}, fill no context of {self._size}: left out")]
            )

    def _add(self, row_id: str, marked: Marked) -> Iterator[Marked]:
        """Take a document, and give the contexts that it fills."""
        token_ids, mask = marked.token_ids, marked.loss_mask
        if token_ids[0] != self.bos:
            token_ids, mask = np.concatenate([[self.bos], token_ids]).astype(np.int32), mask and b"\0" + mask
        begin = 0
        while begin < len(token_ids):
            end = min(len(token_ids), begin + self._size - self._filled)
            self._documents.append(Document(row_id, self._filled, begin))
            self._pieces.append(token_ids[begin:end])
            self._masks.append(mask and mask[begin:end])
            self._filled += end - begin
            begin = end
            if self._filled == self._size:
                yield self._context()

    def _context(self) -> Marked:
        """The full context; the next one is empty. A document without a mask has 0 at each token, if another one of the context has a mask."""
        mask = None
        if any(piece is not None for piece in self._masks):
            pairs = zip(self._masks, self._pieces, strict=True)
            mask = b"".join(bytes(len(token_ids)) if piece is None else piece for piece, token_ids in pairs)
        context = Marked(np.concatenate(self._pieces), mask, None, tuple(self._documents))
        self._pieces, self._masks, self._documents, self._filled = [], [], [], 0
        return context

    def _numbered(self, found: Sequence[tuple[str, Marked | str]]) -> Iterator[Batch]:
        """With rows of the next numbers, whose ids are these where none is given; cut at the windows' ends."""
        start = 0
        while start < len(found):
            stop = min(len(found), start + WINDOW_ROWS - self._next_id % WINDOW_ROWS)
            numbers = range(self._next_id, self._next_id + stop - start)
            rows = [PromptRow(number, row_id or str(number)) for number, (row_id, _) in zip(numbers, found[start:stop], strict=True)]
            yield rows, [marked for _, marked in found[start:stop]]
            self._next_id, start = numbers.stop, stop
