"""What every ring shares: small checkpoints in the real on-disk layout, and transformers' own model as the reference."""

import os
import signal
from collections.abc import Generator

import pytest

# Before torch is imported anywhere: bitwise comparisons hold for the same number of threads only.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

from m2ray.model.interpreter import quick_imports

# The same examples in each run, however busy the machine is.
settings.register_profile("m2ray", deadline=None, derandomize=True)
settings.load_profile("m2ray")

# Programs that the tests start hear Ctrl-C and a closed terminal, also where the tests themselves run in the background or under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All tests are imported here, and torch and transformers with them: Python's collector would look through them again and again."""
    with quick_imports():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow ones begin first: one that begins last leaves all other workers idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
