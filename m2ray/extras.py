"""What m2ray's extras bring: the packages that not every install has, and what is said where one is asked for and absent."""

from collections.abc import Iterator
from contextlib import contextmanager

from m2ray.errors import MissingPackageError

EXTRAS = {
    "extract": ("accelerate", "aiohttp", "huggingface_hub", "jinja2", "ray", "regex", "tokenizers", "torch", "transformers"),
    "report": ("matplotlib",),
    "serve": ("aiorwlock", "fastapi", "grpc_reflection", "starlette", "uvicorn", "watchfiles"),
}
"""The packages of each extra, as they are imported. What is in none is of every install: with it runs are read as NumPy, Arrow or frames."""


@contextmanager
def naming_extras() -> Iterator[None]:
    """Around what imports packages of an extra, or as a decorator: where one is absent, the error says what installs it.

    Raises:
        MissingPackageError: a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = next((extra for extra, packages in EXTRAS.items() if error.name in packages), None)
        if extra is None:
            raise
        raise MissingPackageError(f"This needs {error.name}, which is not installed.", f"pip install 'm2ray[{extra}]'") from error
