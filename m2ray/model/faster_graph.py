"""What is put in the place of torch's operations in compiled layers, where a GPU has kernels that were proved on it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from m2ray.model import causal_attention, expert_products, expert_sums, experts, graph_values, rotary, router_product, routing
from m2ray.model.float8 import attention, norms, rounding

Replacing = Callable[[Graph], None]


def replacements(device: torch.device, *, rounds: bool) -> tuple[Replacing, ...]:
    """Those whose kernels this device has. `rounds`: whether layers round activations to FP8."""
    known = (
        (routing.has_kernel, routing.replace_choice),
        (router_product.has_kernel, router_product.replace_product),
        (rotary.has_kernel, rotary.replace_turned),
        (causal_attention.has_kernel, causal_attention.replace_attention),
        (experts.has_kernels, expert_sums.replace_sum),
    )
    found = [replace for has_kernel, replace in known if has_kernel(device)]
    if found and rounds:
        to_float8 = (norms.has_kernel, norms.replace_norm), (attention.has_kernel, attention.replace_rounded)
        found += [rounding.share_rounded, *(replace for has_kernel, replace in to_float8 if has_kernel(device))]
    return tuple(found)


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
        modules = (
            routing,
            router_product,
            rotary,
            graph_values,
            causal_attention,
            experts,
            expert_products,
            expert_sums,
            attention,
            norms,
            rounding,
        )
        files = (*(str(module.__file__) for module in modules), kernel)
        return bytes(get_hash_for_files(files, " ".join(replace.__name__ for replace in self.replacing)))
