"""Threads in which torch's operations run alone: several pieces of a model are unpacked side by side, each small enough for a core's cache.

torch splits every operation of 32,768 elements over as many OpenMP threads as a process computes with, and waits for all of them; four
threads that each do so are in one another's way, and unpacking takes twice as long.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch


def lone_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads whose operations are not split. OpenMP's number of threads is each thread's own: nothing else in the process changes."""
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_compute_alone)


def _compute_alone() -> None:
    torch.get_num_threads()  # asked for the first time in a thread, it sets OpenMP's number, which has to be over
    set_number = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_number is not None:  # a torch that was built without OpenMP splits by threads of its own, and stays as it is
        set_number(1)
