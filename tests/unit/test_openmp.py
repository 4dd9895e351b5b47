"""Threads whose operations torch does not split."""

from concurrent.futures import ThreadPoolExecutor

import torch

from m2ray.model.openmp import lone_threads


def test_no_other_thread_computes_with_another_number() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with lone_threads(2, "alone") as pool, ThreadPoolExecutor(1) as usual:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
            assert usual.submit(torch.get_num_threads).result() == 3
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
