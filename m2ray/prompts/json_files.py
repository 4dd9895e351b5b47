"""Files that end in .json: one list of objects, read element by element in bounded memory, or an object a line."""

import io
import re
from collections.abc import Generator, Iterator, Sequence

from m2ray.errors import PromptsError
from m2ray.prompts.nested import dotted
from m2ray.prompts.readers import JsonLinesFile, json_record, reading_file
from m2ray.prompts.rows import MAX_PROMPT_BYTES, Record
from m2ray.prompts.text_encoding import BYTE_ORDER_MARK, TextDecoder, opened_text

_PIECE_BYTES = 1 << 18
_PEEKED_BYTES = 256

_OUTSIDE = re.compile(rb'[^"\[\]{},]*+')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class JsonFile(JsonLinesFile):
    """What is called .json: many such files hold an object a line.

    In a list a wrong element costs only itself, as long as its quotes and brackets close.
    """

    def records(self, columns: Sequence[str]) -> Generator[Record]:
        with reading_file(self.path), opened_text(self.path, self.encoding) as file:
            head = file.peek(_PEEKED_BYTES)[:_PEEKED_BYTES]
            if head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
                decoder = TextDecoder(self.path, self.encoding, "element")
                decoder.begin(head)
                yield from self._of_list(file, decoder, columns)
                return
            for row, record in enumerate(self._of_lines(file, columns)):
                if row == 0 and record.problem is not None:
                    raise self._neither(record.problem)
                yield record

    def _of_list(self, file: io.BufferedReader, decoder: TextDecoder, columns: Sequence[str]) -> Iterator[Record]:
        nested = dotted(columns)
        try:
            for element in _elements(file):
                if element is None:
                    yield Record({}, f"an element of more than {MAX_PROMPT_BYTES} bytes")
                else:
                    yield json_record(*decoder.decode(element), nested)
        except _NoListError as error:
            raise PromptsError(f"{self.path} is no list in JSON: {error}.", "Copy it again, or give JSON lines.") from error
        decoder.judge()

    def _neither(self, problem: str) -> PromptsError:
        return PromptsError(
            f"{self.path} is neither a list of objects nor an object a line: its first line is no object ({problem}).",
            "Write its rows as one list, [{...}, {...}], or as JSON lines. Of an object that holds the list, give the list alone.",
        )


class _NoListError(ValueError):
    """What is wrong with the list itself."""


def _elements(file: io.BufferedReader) -> Iterator[bytes | None]:
    """The elements of the list that the file is, each as it is written; None for one that is too long."""
    element = bytearray()
    num_elements = depth = 0
    is_too_long = False
    pieces = _pieces(file)
    for text, sign in pieces:
        opens, closes = sign in (b"[", b"{"), sign in (b"]", b"}")
        depth += opens - closes
        if (opens and depth == 1) or (not closes and depth == 0):
            continue  # up to where the list begins
        is_whole = (sign == b"," and depth == 1) or (closes and depth == 0)
        element += text if is_whole else text + sign
        if len(element) > MAX_PROMPT_BYTES:
            is_too_long = True
            element.clear()
        if is_whole:
            if sign == b"," or num_elements or element.strip():
                yield None if is_too_long else bytes(element)
                num_elements += 1
            element.clear()
            is_too_long = False
        if closes and depth == 0:
            break
    else:
        raise _NoListError(f"it ends within element {num_elements:,}, or a quote or a bracket before it never closes")
    if any(text.strip() or sign for text, sign in pieces):
        raise _NoListError(f"something follows its end, after {num_elements:,} elements")


def _pieces(file: io.BufferedReader) -> Iterator[tuple[bytes, bytes]]:
    """The text up to each bracket and comma that no string holds, with that sign; without one where the text goes on."""
    rest, in_string = b"", False
    while data := file.read(_PIECE_BYTES):
        data = rest + data
        start = at = 0
        while at < len(data):
            at = _end(_IN_STRING if in_string else _OUTSIDE, data, at)
            sign = data[at : at + 1]
            if not sign or sign == b"\\":  # a backslash whose character is still to come
                break
            at += 1
            if sign == b'"':
                in_string = not in_string
            else:
                yield data[start : at - 1], sign
                start = at
        yield data[start:at], b""
        rest = data[at:]


def _end(what: "re.Pattern[bytes]", data: bytes, at: int) -> int:
    found = what.match(data, at)
    assert found is not None  # both patterns match nothing as well
    return found.end()
