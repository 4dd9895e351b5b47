"""Which versions rows come from. Those of this process are held against a run's record, and against what the nodes have."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

ROW_PACKAGES = ("torch", "transformers", "tokenizers")
"""Whose other versions may make other tokens of a prompt, or other bits of a row."""


def versions(packages: Iterable[str] = ROW_PACKAGES) -> dict[str, str]:
    """Of those of the packages that are installed here."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def differences(wanted: Mapping[str, str], found: Mapping[str, str], packages: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(wanted, found) of each package whose versions differ, "absent" where one has none.

    Local labels are not compared: 2.13.0+cpu and 2.13.0+cu130 are builds of one version, for a driver without a GPU and for its nodes.
    """
    pairs = {package: (wanted.get(package, "absent"), found.get(package, "absent")) for package in packages}
    return {package: pair for package, pair in pairs.items() if len({each.partition("+")[0] for each in pair}) > 1}
