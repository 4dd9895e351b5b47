"""`m2ray.connect`: a warm chain as an object in Python."""

from collections.abc import Sequence
from contextlib import ExitStack
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from m2ray.activations.reading.reader import RunReader
from m2ray.api.extracting import extract
from m2ray.api.options import Options
from m2ray.chain.joining import cluster, require_cluster
from m2ray.chain.requests import Answer, Request
from m2ray.chain.warm import Standing, asked, find, status
from m2ray.errors import PromptsError
from m2ray.prompts.in_memory import Prompts

if TYPE_CHECKING:
    import torch

    from m2ray.chain.served import ChainStatus

_JOIN_S = 30.0
_ANSWER_S = 3600.0


def connect(name: str) -> "WarmChain":
    """The warm chain of that name in the cluster that this process has joined, or that RAY_ADDRESS names. Raises as WarmChain."""
    return WarmChain(name)


class WarmChain:
    """A chain that is loaded and stays (`m2ray serve`). A context: at its end the cluster is left, if this object had joined it.

    Raises:
        ClusterError: no cluster is named, it cannot be joined, or it has no chain of that name.
    """

    def __init__(self, name: str) -> None:
        require_cluster()
        with ExitStack() as stack:
            stack.enter_context(cluster(_JOIN_S))
            self._standing: Standing = find(name)
            self._standing.require_loaded()
            self._joined = stack.pop_all()
        self.name = name

    def __repr__(self) -> str:
        plan = self._standing.served.plan
        last = max(stage.span.stop for stage in plan.stages) - 1
        return f"WarmChain({self.name!r}: layers 0-{last} of {self._standing.served.model_url} in {len(plan.stages)} stages, {plan.demand.options.compute_dtype})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, unless this process had joined it before. The chain stays."""
        self._joined.close()

    def activations(self, prompts: Sequence[Any], *, sites: str, tokens: str = "all") -> "dict[str, torch.Tensor]":
        """The rows of a few prompts, bit for bit those of a run of them.

        Args:
            prompts: texts, chats (lists of messages) or lists of token ids.
            sites: with their layers, as the option of that name: "residual:30, mlp:0-5".
            tokens: whose rows, as the option of that name.

        Returns:
            `residual.30` [N, W] and so on, in the store dtype of the chain; `sequence`, the prompt's place, `position` and `token_id`, each [N].

        Raises:
            ConfigError, PromptsError: what is asked for is not there, or a prompt cannot be run; all problems at once.
            TooLargeError, BusyError: it is too much for one answer, or for now.
            ClusterError: the chain is gone.
        """
        name = _name_of(prompts)
        listed = [each.tolist() if hasattr(each, "tolist") else each for each in prompts]
        request = Request.of({name: listed, "sites": sites, "tokens": tokens})
        answer: Answer = asked(self._standing.keeper.answer.remote(request), _ANSWER_S)
        return answer.tensors()

    def extract(self, *, prompts: Prompts, output: str | PathLike[str], **options: Unpack[Options]) -> RunReader:
        """As `m2ray.extract`, on this chain and so of its model."""
        chosen: Options = {**options, "chain": self.name}
        return extract(model=self._standing.served.model_url, prompts=prompts, output=output, **chosen)

    def status(self) -> "ChainStatus":
        """What the chain does now."""
        return status(self._standing)


def _name_of(prompts: Sequence[Any]) -> str:
    """What a request calls prompts like the first. Raises PromptsError for one prompt alone, whose characters or parts would be prompts."""
    if isinstance(prompts, str | bytes | dict):
        raise PromptsError(f"prompts have to be a list, not {type(prompts).__name__}.", "One prompt is a list of one: [prompt].")
    first = prompts[0] if len(prompts) else ""
    if isinstance(first, str):
        return "prompts"
    is_chat = isinstance(first, dict) or (isinstance(first, list | tuple) and len(first) and isinstance(first[0], dict))
    return "messages" if is_chat else "input_ids"
