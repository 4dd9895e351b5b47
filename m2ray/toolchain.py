"""What a machine needs beside torch's wheel, so that kernels can be made on it: Triton builds their launchers with a C compiler."""

import os
import shutil
import sysconfig
from pathlib import Path

from m2ray.errors import StageError

TRITON_REMEDY = "Install gcc and Python's headers (Debian: apt-get install gcc libc6-dev python3-dev), or set compile = false."

_COMPILERS = ("gcc", "clang")


def triton_problem() -> str:
    """Why Triton can build no launcher here; "" if it can. It looks for CC, gcc, clang and Python.h (triton/runtime/build.py)."""
    compiler = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([compiler] if compiler else _COMPILERS)):
        return f"CC names {compiler!r}, which is not there" if compiler else "there is no C compiler: no gcc and no clang"
    headers = sysconfig.get_paths(scheme=_scheme())["include"]
    return "" if Path(headers, "Python.h").is_file() else f"Python's headers are missing: no Python.h in {headers}"


def require_triton(why: str) -> None:
    """Raise StageError unless Triton can build launchers here; `why` says what asks for it."""
    if problem := triton_problem():
        raise StageError(f"{why} needs Triton, which makes kernels with a C compiler, and {problem}.", TRITON_REMEDY)


def _scheme() -> str:
    """The scheme of Python's paths: Debian's default one names a folder without headers."""
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme
