"""Text files as UTF-8: decompressed, and recoded from the encoding that the user named. None is guessed."""

import codecs
import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from m2ray.errors import PromptsError
from m2ray.prompts.remote import RemotePath

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

UTF_8 = "utf-8"
BYTE_ORDER_MARK = codecs.BOM_UTF8

_PIECE_BYTES = 1 << 18
_JUDGED_LINES = 1000
_SHOWN_BYTES = 4096
_SHOWN_CHARACTERS = 16
_SHOWN_ENCODINGS = ("gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "cp1252")
"""As which a line is shown that is no UTF-8: a person sees which of them it is."""

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextmanager
def opened_text(path: Path | RemotePath, encoding: str) -> Iterator[io.BufferedReader]:
    """A file's text as bytes in UTF-8, whatever it is packed (.gz, .zst) and written in; bytes that its encoding lacks are no UTF-8 here either.

    Raises PromptsError, while it is read, where nobody can say what follows a wrong byte.
    """
    with ExitStack() as stack:
        data = stack.enter_context(path.open("rb"))
        ending = path.suffix.lower()
        if ending == ".gz":
            data = stack.enter_context(cast("io.BufferedReader", gzip.GzipFile(fileobj=data)))
        elif ending == ".zst":
            unpacked = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(data, mode="r"), "zstd"))
            data = io.BufferedReader(_Stream(unpacked.read), _PIECE_BYTES)
        if encoding != UTF_8:
            data = io.BufferedReader(_Stream(_recoding(data, encoding, path)), _PIECE_BYTES)
        yield data


class _Stream(io.RawIOBase):
    """A file of what a function gives, asked for so many bytes; it may give more, and gives none at the end only."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read = read
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        out = memoryview(buffer).cast("B")
        if not self._rest:
            self._rest = memoryview(self._read(len(out)))
        num_bytes = min(len(out), len(self._rest))
        out[:num_bytes] = self._rest[:num_bytes]
        self._rest = self._rest[num_bytes:]
        return num_bytes


def _recoding(data: io.BufferedReader, encoding: str, path: Path | RemotePath) -> Callable[[int], bytes]:
    """Bytes that the encoding lacks become lone surrogates, which UTF-8 lacks: their rows are told by that."""
    lone = "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    decoder = codecs.getincrementaldecoder(encoding)(lone)

    def read(num_bytes: int) -> bytes:
        while True:
            piece = data.read(num_bytes)
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                what = f"{path} is not {encoding}: {error.reason} (bytes {error.object[error.start : error.end].hex(' ')})."
                raise PromptsError(what, "Set encoding to what the file was written in, or copy it again.") from error
            except UnicodeError as error:  # UTF-16 and UTF-32 without their mark
                raise PromptsError(
                    f"{path} is not {encoding}: {error}.",
                    "Set encoding to what the file was written in; where UTF-16 begins without a mark, that is utf-16-le or utf-16-be.",
                ) from error
            if text or not piece:
                return text.encode(UTF_8, "surrogatepass")

    return read


class TextDecoder:
    """Lines of a file, or other units, to text. Where more than half of the first 1,000 are not of the encoding, the file is not."""

    def __init__(self, path: Path | RemotePath, encoding: str, unit: str = "line") -> None:
        self._path = path
        self._encoding = encoding
        self._unit = unit
        self._num_lines = self._num_wrong = 0
        self._first_wrong = ""
        self._shown: list[str] = []

    def begin(self, head: bytes) -> None:
        """Look at the file's first bytes: raise PromptsError if they are UTF-16 or UTF-32, and that was not said."""
        if self._encoding != UTF_8:
            return
        for mark, name in _MARKS.items():
            if head.startswith(mark):
                raise PromptsError(
                    f"{self._path} is not {UTF_8}: it begins with the bytes {mark.hex(' ')}, as {name} does.", f'Set encoding = "{name}".'
                )
        if 4 * head.count(0) > len(head):
            name = "utf-16-le" if head.find(0) % 2 else "utf-16-be"
            raise PromptsError(
                f"{self._path} is hardly {UTF_8}: its byte {head.find(0)} and {head.count(0) - 1:,} more of its first {len(head):,} bytes are zero, "
                f"as in {name}.",
                f'Set encoding = "{name}".',
            )

    def decode(self, line: bytes) -> tuple[str, str | None]:
        """Its text, where wrong bytes are lone surrogates, and what is wrong with it. Raises PromptsError if that is the file's encoding."""
        self._num_lines += 1
        try:
            text, problem = line.decode(UTF_8), None
        except UnicodeDecodeError as error:
            text, problem = line.decode(UTF_8, "surrogateescape"), self._wrong(line, error)
        if self._num_lines == _JUDGED_LINES:
            self.judge()
        return text, problem

    def judge(self) -> None:
        """At the end of a file of fewer lines: raise PromptsError if it is in another encoding."""
        if self._num_lines > _JUDGED_LINES or 2 * self._num_wrong <= self._num_lines:
            return
        raise PromptsError(
            f"{self._path} is not {self._encoding}: {self._first_wrong}, and so in {self._num_wrong:,} of its first {self._num_lines:,} "
            f"{self._unit}s.{' In other encodings that is:' if self._shown else ''}",
            "Set encoding to what the file was written in.",
            self._shown,
        )

    def _wrong(self, line: bytes, error: UnicodeDecodeError) -> str:
        self._num_wrong += 1
        where = f"{self._unit} {self._num_lines}"
        if self._encoding == UTF_8:
            problem = f"invalid UTF-8 at byte {error.start} of its {self._unit}"
            wrong = f"byte {error.start} of {where} (0x{line[error.start]:02x}) is wrong"
        else:
            place = len(line[: error.start].decode(UTF_8))
            problem = f"invalid {self._encoding} at character {place} of its {self._unit}"
            wrong = f"character {place} of {where} is wrong"
        if self._num_wrong == 1:
            self._first_wrong = wrong
            self._shown = _as_others_read(line) if self._encoding == UTF_8 else []
        return problem


def _as_others_read(line: bytes) -> list[str]:
    """From the first character on that is not ASCII."""
    shown = []
    for encoding in _SHOWN_ENCODINGS:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(line[:_SHOWN_BYTES]).rstrip()
        except UnicodeDecodeError:
            continue
        start = next((place for place, character in enumerate(text) if not character.isascii()), 0)
        shown.append(f"{encoding}: {text[start : start + _SHOWN_CHARACTERS]!r}")
    return shown
