"""m2ray: per-layer activations of decoder-only language models too large for one GPU, over whole prompt datasets."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2ray.activations.reading.reader import open_run as open_run
    from m2ray.chain.connecting import connect as connect

__version__ = "0.2.0"
__all__ = ["__version__", "connect", "open_run"]


def __getattr__(name: str) -> Any:
    # Reading a run needs pyarrow and torch; `m2ray --help` should not wait for them.
    if name == "open_run":
        from m2ray.activations.reading.reader import open_run

        return open_run
    if name == "connect":
        from m2ray.chain.connecting import connect

        return connect
    raise AttributeError(f"module 'm2ray' has no attribute {name!r}")
