"""Parquet and Arrow: rows in bounded memory, though a few kilobytes of such a file may be written out as gigabytes."""

from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m2ray.errors import PromptsError
from m2ray.prompts.arrow_sizes import row_sizes
from m2ray.prompts.arrow_values import arrow_records
from m2ray.prompts.memory import READ_BYTES, limited
from m2ray.prompts.nested import chosen, fields_of, kinds_of
from m2ray.prompts.readers import PromptFile, distinct, reading_file
from m2ray.prompts.remote import RemotePath
from m2ray.prompts.rows import Record
from m2ray.storage import StoreFile

_ROWS = (256, 16, 1)
"""Rows of Parquet that are decoded at a time; fewer where more do not fit in READ_BYTES."""

_FILE_MAGIC = b"ARROW1"

_BUFFER_BYTES = 8 << 20
"""Of a column chunk, which may have gigabytes, is read at a time."""


class _FileWithSchema(PromptFile):
    """What has a schema: it names all columns, and no text has an encoding of its own."""

    is_read_in_order = False
    is_text = False

    def kinds(self, columns: Sequence[str]) -> Mapping[str, Any]:
        with self._schema() as schema:
            return kinds_of(schema, columns)

    @abstractmethod
    def _schema(self) -> AbstractContextManager[Any]:
        """The file's Arrow schema, as long as it is open."""

    def _named(self, schema: Any, nested: Sequence[str]) -> Mapping[str, int]:
        return {**distinct(schema.names, f"The schema of {self.path}"), **dict.fromkeys(fields_of(schema, nested), 0)}


class ParquetFile(_FileWithSchema):
    """Parquet, read page by page; of a struct only the fields that are asked for."""

    def columns(self, nested: Sequence[str] = ()) -> Mapping[str, int] | None:
        with reading_file(self.path), self._opened() as file:
            return self._named(file.schema_arrow, nested)

    @contextmanager
    def _schema(self) -> Iterator[Any]:
        with reading_file(self.path), self._opened() as file:
            yield file.schema_arrow

    def records(self, columns: Sequence[str]) -> Generator[Record]:
        with reading_file(self.path), self._opened() as file:
            columns = fields_of(file.schema_arrow, columns)
            for group in range(file.num_row_groups):
                for batch, sizes in self._batches(file, group, columns):
                    yield from arrow_records(batch, columns, sizes)
                    del batch, sizes  # so that the next one is not made beside it

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with reading_file(self.path):
            try:
                with limited(READ_BYTES), _system_pool():
                    file = pq.ParquetFile(_seekable(self.path), pre_buffer=False, buffer_size=_BUFFER_BYTES)
            except MemoryError as error:
                raise _too_large(f"The footer of {self.path}", "fewer columns and row groups") from error
        with file:
            yield file

    def _batches(self, file: Any, group: int, columns: Sequence[str]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """A row group's rows with their sizes. A few kilobytes may be written out as gigabytes: then fewer rows are decoded at a time."""
        done = 0
        for num_rows in _ROWS:
            try:
                # On this thread alone: as in m2ray/sequences.py.
                batches = file.iter_batches(num_rows, [group], list(columns), use_threads=False)
                row = 0
                for batch, sizes in _bounded(batches, columns):
                    known = min(max(done - row, 0), batch.num_rows)  # given before, when more were decoded at a time
                    row += batch.num_rows
                    done = max(done, row)
                    left = batch.slice(known), {name: of_rows[known:] for name, of_rows in sizes.items()}
                    del batch, sizes
                    yield left
                    del left
            except MemoryError:
                continue
            return
        raise _too_large(f"Row {done} of row group {group} of {self.path}", "smaller pages (data_page_size)")


class ArrowFile(_FileWithSchema):
    """Arrow's streaming format, which `datasets.Dataset.save_to_disk` writes, or its file format."""

    def columns(self, nested: Sequence[str] = ()) -> Mapping[str, int] | None:
        with reading_file(self.path), self._opened() as (schema, _):
            return self._named(schema, nested)

    @contextmanager
    def _schema(self) -> Iterator[Any]:
        with reading_file(self.path), self._opened() as (schema, _):
            yield schema

    def records(self, columns: Sequence[str]) -> Generator[Record]:
        with reading_file(self.path), self._opened() as (schema, batches):
            columns = fields_of(schema, columns)
            try:
                for batch, sizes in _bounded(batches, columns):
                    yield from arrow_records(batch, columns, sizes)
                    del batch, sizes
            except MemoryError as error:
                raise _too_large(f"A record batch of {self.path}", "smaller batches") from error

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Iterable[Any]]]:
        """The schema and the record batches."""
        with _arrow_file(self.path) as file:
            is_stream = file.read(len(_FILE_MAGIC)) != _FILE_MAGIC
            file.seek(0)
            with (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(file, memory_pool=pa.system_memory_pool()) as reader:
                yield reader.schema, reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))


def _bounded(batches: Iterable[Any], columns: Sequence[str]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Record batches with their rows' sizes. Raises MemoryError where making one takes more than READ_BYTES."""
    following = iter(batches)
    while True:
        with limited(READ_BYTES):
            batch = next(following, None)
            if batch is None:
                return
            batch = chosen(batch, columns)
            sizes = row_sizes(batch, columns)
        yield batch, sizes
        del batch, sizes


@contextmanager
def _system_pool() -> Iterator[None]:
    """What is opened here takes its memory from the system: Arrow's own pool asks for address space far beyond its need."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def _too_large(what: str, smaller: str) -> PromptsError:
    return PromptsError(
        f"{what} takes more than {READ_BYTES:,} bytes of memory to be read.", f"Write the file again with {smaller}, or give JSON lines."
    )


def _seekable(path: Path | RemotePath) -> Path | StoreFile:
    """What pyarrow reads Parquet from: it has a buffer of its own."""
    return path.file() if isinstance(path, RemotePath) else path


def _arrow_file(path: Path | RemotePath) -> Any:
    return pa.PythonFile(path.open(), mode="r") if isinstance(path, RemotePath) else pa.memory_map(str(path))
