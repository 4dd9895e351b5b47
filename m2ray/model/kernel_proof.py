"""Whether a kernel of Triton's may be used: it is held against what it stands for on the very GPU, since Triton, driver and GPU differ from machine
to machine.
"""

import warnings
from collections.abc import Callable
from subprocess import CalledProcessError

import torch

from m2ray.toolchain import triton_problem


def is_proved(device: torch.device, does: str, problem_on: Callable[[torch.device], str]) -> bool:
    """Whether there are such kernels for this device, and nothing is wrong with what they make. Triton compiles them here.

    Otherwise what stands for them does the work, and a warning says so, but where nothing can be compiled at all.

    Args:
        does: what they do, as the warning begins: "Weights are hashed".
        problem_on: runs them, and says what is wrong with what they make; "" if nothing is.
    """
    if device.type != "cuda" or triton_problem():
        return False
    with torch.cuda.device(device), torch.inference_mode():
        try:
            problem = problem_on(device)
        except making_errors() as error:
            problem = f"Triton cannot make the kernel: {error}"
    if problem:
        warnings.warn(f"{does} without a kernel on {device}, which takes longer: {problem}.", RuntimeWarning, stacklevel=3)
    return not problem


def making_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where it cannot make a kernel: of its own, or since the C compiler fails, or nothing can be written in its cache's folder."""
    from triton.errors import TritonError

    return TritonError, CalledProcessError, OSError
