"""The graphs that torch.compile makes of a stage's layer, as m2ray's passes leave them."""

from collections.abc import Sequence

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import Graph

from m2ray.model import compilation
from m2ray.model.faster_graph import Replacing
from m2ray.model.stage import Stage
from tests.reference import micro_batch_of


def graphs_of(stage: Stage, passes: Sequence[Replacing], monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Of micro-batches of two shapes: the second graph has sizes that are open. Neither is made into code, which takes longest."""
    graphs: list[Graph] = []

    def keep(graph: Graph) -> None:
        graphs.append(graph)
        raise NotImplementedError

    monkeypatch.setattr(compilation, "replacements", lambda _, **__: (*passes, keep))
    torch._dynamo.reset()
    stage._decoder.compile_layers()
    for lengths in ((15, 7), (12, 9, 8)):
        with pytest.raises(BackendCompilerFailed):
            stage.forward(micro_batch_of(lengths, 96), None)
    torch._dynamo.reset()
    return graphs
