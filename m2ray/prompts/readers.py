"""The file formats: how each yields records one at a time, in bounded memory, whatever single rows hold.

A row that cannot be read is a Record with a problem. A file that cannot be read is a PromptsError.
"""

import csv
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from m2ray.errors import PromptsError
from m2ray.prompts.kept import kind_of_values
from m2ray.prompts.nested import dotted, with_nested
from m2ray.prompts.remote import RemotePath, reading_store
from m2ray.prompts.rows import MAX_PROMPT_BYTES, Record
from m2ray.prompts.text_encoding import BYTE_ORDER_MARK, UTF_8, TextDecoder, opened_text

_LONGEST_ROW_BYTES = 4 * MAX_PROMPT_BYTES
"""Of CSV, all columns together."""

_PEEKED_ROWS = 1000
_MOST_COLUMNS = 10_000


class PromptFile(ABC):
    """One file of the source. `name` is its path below the source's folder, with "/" between its parts; `encoding` that of its text."""

    is_read_in_order = True
    """Whether `records` reads the file's bytes once, from front to back, through `path.open`."""

    is_text = True
    """Whether it is written in an encoding."""

    def __init__(self, path: Path | RemotePath, name: str, encoding: str = UTF_8) -> None:
        self.path = path
        self.name = name
        self.encoding = encoding

    @abstractmethod
    def columns(self, nested: Sequence[str] = ()) -> Mapping[str, int] | None:
        """The columns, each with the first row that has it, and those of `nested`, dotted names, that are there (m2ray/prompts/nested.py).

        None if the format has none, empty if the file shows none. Raises PromptsError.
        """

    def kinds(self, columns: Sequence[str]) -> Mapping[str, Any]:
        """The Arrow types of those of the columns that the file shows. Without a schema all is text. Raises PromptsError."""
        present = self.columns(columns) or {}
        return {name: pa.string() for name in columns if name in present}

    @abstractmethod
    def records(self, columns: Sequence[str]) -> Generator[Record]:
        """Each row's values in `columns`, the prompt's first (others may come along). Raises PromptsError if the file cannot be read."""


class JsonLinesFile(PromptFile):
    """One JSON object a line."""

    def columns(self, nested: Sequence[str] = ()) -> Mapping[str, int] | None:
        """The keys of the first 1,000 rows."""
        found: dict[str, int] = {}
        for row, record in enumerate(islice(self.records(nested), _PEEKED_ROWS)):
            for key in record.values:
                found.setdefault(key, row)
            if len(found) > _MOST_COLUMNS:
                raise PromptsError(f"{self.path} has more than {_MOST_COLUMNS} columns.", "Write its rows with the same few keys.")
        return found

    def kinds(self, columns: Sequence[str]) -> Mapping[str, Any]:
        """As JSON's values of the first 1,000 rows show them; of a column that has none there, its first value."""
        records = self.records(columns)
        rows = [record.values for record in islice(records, _PEEKED_ROWS)]
        found = {name: [values.get(name) for values in rows] for name in columns}
        unknown = {name for name, values in found.items() if all(value is None for value in values)}
        while unknown and (record := next(records, None)) is not None:
            for name in [name for name in unknown if record.values.get(name) is not None]:
                found[name].append(record.values[name])
                unknown.remove(name)
        records.close()
        kinds = {}
        for name, values in found.items():
            try:
                kinds[name] = kind_of_values(values)
            except (pa.ArrowException, ValueError, OverflowError) as error:
                raise PromptsError(
                    f"The values of {name!r} in {self.path} have no type in common: {error}.", "Write them as one type, text for one."
                ) from error
        return kinds

    def records(self, columns: Sequence[str]) -> Generator[Record]:
        with reading_file(self.path), opened_text(self.path, self.encoding) as file:
            yield from self._of_lines(file, columns)

    def _of_lines(self, file: io.BufferedReader, columns: Sequence[str]) -> Iterator[Record]:
        lines, nested = _Lines(file, TextDecoder(self.path, self.encoding)), dotted(columns)
        for line in lines:
            yield json_record(line, lines.take_problem(), nested)


class CsvFile(PromptFile):
    """Comma-separated values with a header, quoted as in RFC 4180; a quoted value may hold line ends. A wrong quote is a PromptsError."""

    delimiter = ","

    def columns(self, nested: Sequence[str] = ()) -> Mapping[str, int] | None:
        with reading_file(self.path), opened_text(self.path, self.encoding) as file:
            decoder = TextDecoder(self.path, self.encoding)
            header = self._header(self._reader(_Lines(file, decoder)))
            decoder.judge()
            return distinct(header, f"The header of {self.path}")

    def records(self, columns: Sequence[str]) -> Generator[Record]:
        # Python's own limit is less than a long prompt. A line that was not cut passes: only a value of several lines is refused for its size.
        csv.field_size_limit(MAX_PROMPT_BYTES + 2)
        with reading_file(self.path), opened_text(self.path, self.encoding) as file:
            lines = _Lines(file, TextDecoder(self.path, self.encoding))
            reader = self._reader(lines)
            header = self._header(reader)
            lines.take_problem()
            for row in count():
                line = reader.line_num + 1
                lines.bytes_left = _LONGEST_ROW_BYTES
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise self._malformed(row, line, str(error)) from error
                if lines.cut_quote:
                    raise self._malformed(row, line, f"a line of more than {MAX_PROMPT_BYTES} bytes has quotes")
                yield _match_header(header, values, lines.take_problem())

    def _reader(self, lines: "_Lines") -> Any:
        return csv.reader(lines, strict=True, delimiter=self.delimiter)

    def _malformed(self, row: int, line: int, why: str) -> PromptsError:
        """Where a quote is wrong, nobody knows which of the next lines are rows, and which the rest of a value."""
        what = f"Row {row} of {self.path}, which begins in line {line}, is malformed CSV: {why}. Where the next row begins is not known."
        return PromptsError(what, 'Quote the file as RFC 4180 says ("" for a quote within quotes), or give JSONL or Parquet.')

    def _header(self, reader: Iterator[list[str]]) -> list[str]:
        try:
            return next(reader, [])
        except csv.Error as error:
            raise PromptsError(f"The header of {self.path} is malformed: {error}.", "Correct the file's first line.") from error


class TsvFile(CsvFile):
    """The same with tabs instead of commas."""

    delimiter = "\t"


class TextFile(PromptFile):
    """Plain text, one prompt a line, in a column of the asked-for name. An empty line is a row, so that positions equal line numbers less one."""

    def columns(self, nested: Sequence[str] = ()) -> Mapping[str, int] | None:
        return None

    def records(self, columns: Sequence[str]) -> Generator[Record]:
        with reading_file(self.path), opened_text(self.path, self.encoding) as file:
            lines = _Lines(file, TextDecoder(self.path, self.encoding))
            for line in lines:
                yield Record({columns[0]: _without_line_end(line)}, lines.take_problem())


class _Lines(Iterator[str]):
    """The lines of a file of bytes, with their line ends. Bytes that are not of its encoding become lone surrogates.

    `cut_quote` says whether a quote was in a line that was too long to be given; `bytes_left` is what may still be given, for who joins lines.
    """

    bytes_left: float = float("inf")

    def __init__(self, file: io.BufferedReader, decoder: TextDecoder) -> None:
        self.cut_quote = False
        self._file = file
        self._decoder = decoder
        self._problem: str | None = None
        self._is_first = True

    def __next__(self) -> str:
        line = self._file.readline(MAX_PROMPT_BYTES + 2)
        if not line:
            self._decoder.judge()
            raise StopIteration
        self.bytes_left -= len(line)
        if self.bytes_left < 0:
            raise csv.Error(f"it has more than {_LONGEST_ROW_BYTES} bytes")
        if self._is_first:
            self._decoder.begin(line)
            line = line.removeprefix(BYTE_ORDER_MARK)
            self._is_first = False
        if len(line) > MAX_PROMPT_BYTES and not line.endswith(b"\n"):
            self._skip_line(line)
            self._problem = self._problem or f"a line of more than {MAX_PROMPT_BYTES} bytes"
            return "\n"
        text, problem = self._decoder.decode(line)
        self._problem = self._problem or problem
        return text

    def take_problem(self) -> str | None:
        """What was wrong with the lines since the last call."""
        problem, self._problem = self._problem, None
        return problem

    def _skip_line(self, piece: bytes) -> None:
        self.cut_quote |= b'"' in piece
        while not piece.endswith(b"\n") and (piece := self._file.readline(1 << 20)):
            self.cut_quote |= b'"' in piece


def distinct(names: Sequence[str], where: str) -> dict[str, int]:
    """The columns of a file that lists them in its first row. Raises PromptsError where two have one name."""
    doubled = sorted(name for name, times in Counter(names).items() if times > 1)
    if doubled:
        raise PromptsError(f"{where} names {', '.join(map(repr, doubled))} more than once.", "Rename the columns.")
    return dict.fromkeys(names, 0)


def _without_line_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def json_record(line: str, problem: str | None, nested: Sequence[str]) -> Record:
    """The row that an object in JSON is, with what lies deeper in it under the dotted names `nested`."""
    if problem is None and not line.strip():
        return Record({}, "empty")
    try:
        value = json.loads(_without_line_end(line))
    except json.JSONDecodeError as error:
        return Record({}, problem or f"malformed JSON: {error.msg} (character {error.pos})")
    except RecursionError:
        return Record({}, problem or "malformed JSON: nested too deeply")
    except ValueError as error:  # a number of more digits than Python parses
        return Record({}, problem or f"malformed JSON: {error}")
    if not isinstance(value, dict):
        return Record({}, problem or f"not a JSON object but {type(value).__name__}")
    return Record(with_nested(value, nested), problem)


def _match_header(header: Sequence[str], values: Sequence[str], problem: str | None) -> Record:
    if problem is None and not values:
        return Record({}, "empty")
    if len(values) != len(header):
        # An unquoted comma in a text would otherwise cut that text short without a word.
        return Record({}, problem or f"{len(values)} values under a header of {len(header)}")
    return Record(dict(zip(header, values, strict=True)), problem)


@contextmanager
def reading_file(path: Path | RemotePath) -> Iterator[None]:
    """Around whatever reads a file: what goes wrong becomes a PromptsError that names it."""
    try:
        with reading_store():
            yield
    except (EOFError, zlib.error, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # of what unpacks it, such as gzip.BadGzipFile
            raise _damaged(path, error) from error
        raise PromptsError(f"Cannot read {path}: {error.strerror or error}.", "Check the file and the permission to read it.") from error


def _damaged(path: Path | RemotePath, error: Exception) -> PromptsError:
    return PromptsError(f"{path} is damaged or not of the format its name says: {error}.", "Copy it again, or correct its name.")
