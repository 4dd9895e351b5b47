"""Which versions and which kind of CPU rows come from. Those of this process are held against a run's record, and against what the nodes have."""

import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash

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


_OF_A_KIND = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU architecture", "CPU part", "Features")
"""What /proc/cpuinfo says of a processor by which torch and its libraries choose their kernels, on x86 and on ARM."""


def cpu_kind() -> str:
    """This machine's kind of CPU: its name, and 8 hex digits of what it can do. Equal kinds round alike under the same versions."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        first = ""
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    digest = xxhash.xxh3_64_hexdigest("\n".join(f"{name}: {said.get(name, '')}" for name in _OF_A_KIND).encode())
    return f"{said.get('model name') or platform.machine()} {digest[:8]}"
