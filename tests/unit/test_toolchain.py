"""What Triton needs of a machine, found as Triton finds it."""

import sysconfig
from pathlib import Path

import pytest

from m2ray.errors import StageError
from m2ray.toolchain import require_triton, triton_problem


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs and headers, all that this machine has: gcc and Python.h."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    program(tmp_path, "gcc")
    (tmp_path / "Python.h").touch()
    return tmp_path


def program(folder: Path, name: str) -> None:
    (folder / name).touch(mode=0o755)


def test_gcc_or_clang_or_what_cc_names(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_problem() == ""
    (machine / "gcc").rename(machine / "clang")
    assert triton_problem() == ""
    monkeypatch.setenv("CC", "icx")
    assert triton_problem() == "CC names 'icx', which is not there"
    program(machine, "icx")
    assert triton_problem() == ""


def test_debians_own_scheme_is_not_where_headers_are(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(machine) if scheme == "posix_prefix" else "/nowhere"})
    assert triton_problem() == ""


def test_what_is_missing_is_said_with_its_remedy(machine: Path) -> None:
    require_triton("compile = true")
    (machine / "Python.h").unlink()
    with pytest.raises(StageError, match=f"compile = true needs Triton.*no Python.h in {machine}.*Install gcc.*or set compile = false"):
        require_triton("compile = true")
    (machine / "gcc").unlink()
    with pytest.raises(StageError, match="no gcc and no clang"):
        require_triton("compile = true")
