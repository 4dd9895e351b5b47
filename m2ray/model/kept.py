"""The user's folder for what one run leaves for the next: configurations that were proved, and compiled graphs."""

import os
from contextlib import suppress
from pathlib import Path


def kept_folder(name: str) -> Path | None:
    """`$XDG_CACHE_HOME/m2ray/NAME`, made for the user alone if that can be done; None for a user without a home."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "m2ray" / name
    except RuntimeError:
        return None
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
