"""What is put in the place of torch's operations in compiled layers, where a GPU has kernels that were proved on it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from m2ray.model import causal_attention, expert_products, experts, routing

Replacing = Callable[[Graph], None]


def replacements(device: torch.device) -> tuple[Replacing, ...]:
    """Those whose kernels this device has."""
    known = (routing.has_kernel, routing.replace_choice), (causal_attention.has_kernel, causal_attention.replace_attention)
    return tuple(replace for has_kernel, replace in known if has_kernel(device))


@dataclass(frozen=True)
class FasterGraph(CustomGraphPass):
    """Torch.compile calls it with a layer's graph. Graphs that are kept between processes are known by it, and what their operations say of sizes.

    One is another's equal: layers that are loaded later in a process have the graphs of those before.
    """

    replacing: tuple[Replacing, ...]

    def __call__(self, graph: Graph) -> None:
        for replace in self.replacing:
            replace(graph)

    def uuid(self) -> bytes:
        kernel = str(Path(__file__).with_name("attention_kernel.py"))  # torch's CPU builds cannot import it
        files = (routing.__file__, causal_attention.__file__, kernel, experts.__file__, expert_products.__file__)
        return bytes(get_hash_for_files(files, " ".join(replace.__name__ for replace in self.replacing)))
