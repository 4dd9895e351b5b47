"""Which file format a name stands for."""

from pathlib import Path

from m2ray.prompts.arrow_files import ParquetFile
from m2ray.prompts.readers import CsvFile, JsonLinesFile, PromptFile, TextFile
from m2ray.prompts.remote import RemotePath

FORMATS: dict[str, type[PromptFile]] = {
    ".jsonl": JsonLinesFile,
    ".jsonl.gz": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".csv": CsvFile,
    ".csv.gz": CsvFile,
    ".txt": TextFile,
    ".txt.gz": TextFile,
    ".parquet": ParquetFile,
}


def format_of(path: Path | RemotePath) -> type[PromptFile] | None:
    """The format that a file's name ends in (".gz" counts with the ending before it), or None."""
    endings = [ending.lower() for ending in path.suffixes]
    ending = "".join(endings[-2:]) if endings[-1:] == [".gz"] else "".join(endings[-1:])
    return FORMATS.get(ending)
