"""m2ray: per-layer activations of decoder-only language models too large for one GPU, over whole prompt datasets."""

from typing import TYPE_CHECKING, Any

from m2ray.extras import naming_extras

if TYPE_CHECKING:
    from m2ray.activations.reading.reader import open_run as open_run

__version__ = "0.2.0"
__all__ = ["__version__", "open_run"]


@naming_extras()
def __getattr__(name: str) -> Any:
    # Reading a run needs pyarrow; `m2ray --help` should not wait for it.
    if name == "open_run":
        from m2ray.activations.reading.reader import open_run

        return open_run
    raise AttributeError(f"module 'm2ray' has no attribute {name!r}")
