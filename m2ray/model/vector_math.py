"""Functions such as cos take another way in a process's first call, if two threads make it at once: one thread has to come first."""

import threading

import torch

_FUNCTIONS = (
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "exp2", "expm1"),
    *("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "erf", "erfc", "erfinv", "lgamma"),
)
_LOCK = threading.Lock()
_settled: list[bool] = []


def settle_vector_math() -> None:
    """Call torch's vector functions once with one element, which is one thread's, unless this process has.

    On CPUs they are MKL's, which looks at the processor in its first call. Of two threads that make it together, as torch's do with 2,048 numbers
    and more, one may compute with other instructions: cosines of a rotary embedding were off by a bit in 5 of 1,500 processes (torch 2.13.0,
    findings/torch_first_cosine_of_two_threads.sh), and a stage's first rows with them.
    """
    with _LOCK:
        if _settled:
            return
        for dtype in (torch.float32, torch.float64):
            one = torch.full((1,), 0.5, dtype=dtype)
            for name in _FUNCTIONS:
                getattr(torch, name)(one)
        _settled.append(True)
