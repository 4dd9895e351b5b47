"""m2ray: per-layer activations of decoder-only language models too large for one GPU, over whole prompt datasets."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from m2ray.extras import naming_extras

if TYPE_CHECKING:
    from m2ray.api.connecting import connect as connect
    from m2ray.api.extracting import extract as extract
    from m2ray.api.opening import open_run as open_run
    from m2ray.api.planning import plan as plan

__version__ = "0.2.0"
__all__ = ["__version__", "connect", "extract", "open_run", "plan"]

_MODULES = {"connect": "connecting", "extract": "extracting", "open_run": "opening", "plan": "planning"}


@naming_extras()
def __getattr__(name: str) -> Any:
    # Each needs packages that take seconds to import; `m2ray --help` should not wait for them.
    if name in _MODULES:
        return getattr(import_module(f"m2ray.api.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'm2ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
