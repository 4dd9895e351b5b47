"""Which file format a name stands for."""

from pathlib import Path

from m2ray.prompts.arrow_files import ArrowFile, ParquetFile
from m2ray.prompts.json_files import JsonFile
from m2ray.prompts.readers import CsvFile, JsonLinesFile, PromptFile, TextFile, TsvFile
from m2ray.prompts.remote import RemotePath

_TEXT: dict[str, type[PromptFile]] = {
    ".json": JsonFile,
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".csv": CsvFile,
    ".tsv": TsvFile,
    ".txt": TextFile,
}
_ARROW: dict[str, type[PromptFile]] = {".parquet": ParquetFile, ".arrow": ArrowFile}
_PACKED = (".gz", ".zst")

READ = f"m2ray reads {', '.join(_TEXT)} (also packed: {', '.join(_PACKED)}), {', '.join(_ARROW)} and folders of Hugging Face datasets."


def format_of(path: Path | RemotePath) -> type[PromptFile] | None:
    """The format that a file's name ends in, before the ending of what packs it, or None."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] and endings[-1] in _PACKED:
        return _TEXT.get("".join(endings[-2:-1]))
    return {**_TEXT, **_ARROW}.get("".join(endings[-1:]))
