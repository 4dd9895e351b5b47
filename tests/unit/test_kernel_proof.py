"""When a kernel may be used, with the test in the place of GPU and Triton."""

import sys
from contextlib import nullcontext
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch

from m2ray.model import kernel_proof
from m2ray.model.kernel_proof import is_proved

GPU = torch.device("cuda:1")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The GPUs that were made the thread's own."""
    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: found.append(device) or nullcontext())
    monkeypatch.setattr(kernel_proof, "triton_problem", lambda: "")
    monkeypatch.setitem(sys.modules, "triton.errors", SimpleNamespace(TritonError=ArithmeticError))
    return found


def test_one_that_is_right_is_used(asked: list[torch.device]) -> None:
    assert is_proved(GPU, "Rows are captured", lambda device: "" if device == GPU else "elsewhere")
    assert asked == [GPU]


@pytest.mark.parametrize("error", [ArithmeticError("a tile is too large"), CalledProcessError(1, "gcc"), PermissionError(13, "read-only")])
def test_one_that_cannot_be_made_is_told_and_done_without(error: Exception) -> None:
    """A home that cannot be written to, or a compiler that finds no libcuda, must not end a run that needs no kernel."""

    def fail(_: torch.device) -> str:
        raise error

    with pytest.warns(RuntimeWarning, match="Rows are captured without a kernel on cuda:1, which takes longer: Triton cannot make"):
        assert not is_proved(GPU, "Rows are captured", fail)


def test_one_that_is_wrong_is_told_too() -> None:
    with pytest.warns(RuntimeWarning, match="they are not those of torch"):
        assert not is_proved(GPU, "Rows are captured", lambda _: "they are not those of torch")


def test_without_a_compiler_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_proof, "triton_problem", lambda: "there is no C compiler")
    assert not is_proved(GPU, "Rows are captured", lambda _: pytest.fail("it was tried"))


def test_other_errors_are_not_hidden() -> None:
    def fail(_: torch.device) -> str:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        is_proved(GPU, "Rows are captured", fail)
