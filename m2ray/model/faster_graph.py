"""What is put in the place of torch's operations in compiled layers, where a GPU has kernels that were proved on it."""

from collections.abc import Callable

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from m2ray.model import causal_attention, expert_products, experts, routing

Replacing = Callable[[Graph], None]


def replacements(device: torch.device) -> tuple[Replacing, ...]:
    """Those whose kernels this device has."""
    known = (routing.has_kernel, routing.replace_choice), (causal_attention.has_kernel, causal_attention.replace_attention)
    return tuple(replace for has_kernel, replace in known if has_kernel(device))


class FasterGraph(CustomGraphPass):
    """Torch.compile calls it with a layer's graph. Graphs that are kept between processes are known by it, and what their operations say of sizes."""

    def __init__(self, replacing: tuple[Replacing, ...]) -> None:
        self._replacing = replacing

    def __call__(self, graph: Graph) -> None:
        for replace in self._replacing:
            replace(graph)

    def uuid(self) -> bytes:
        files = (routing.__file__, causal_attention.__file__, experts.__file__, expert_products.__file__)
        return bytes(get_hash_for_files(files, " ".join(replace.__name__ for replace in self._replacing)))
