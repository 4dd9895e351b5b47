"""A stage on a CPU that takes the ways of a GPU's: rows go by the copy stream into runs of registered memory, and are written by the process beside it.

What CUDA would do is done at once: streams and events wait for nothing, and pinned memory is any. So what only a GPU shows is order, and speed.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from m2ray.activations.writing.beside import Beside
from m2ray.chain import actor
from m2ray.chain.actor import StageActor
from m2ray.model import capture, pinned, selecting, stage


class Stream:
    device = torch.device("cpu")

    def wait_stream(self, _: object) -> None:
        pass


class Event:
    def __init__(self, **_: bool) -> None:
        pass

    def record(self, _: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Registered:
    """CUDA's runtime, as far as it registers memory. `bytes_at` has what is registered now, by its address; `num_bytes` all that ever was."""

    def __init__(self) -> None:
        self.bytes_at: dict[int, int] = {}
        self.num_bytes = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802 - CUDA's names
        assert flags == 1
        assert address not in self.bytes_at
        self.bytes_at[address] = num_bytes
        self.num_bytes += num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.bytes_at[address]
        return 0


def play(patch: Any) -> Registered:
    """Have every stage's actor of this process be such a one; `patch` is monkeypatch, or has its `setattr`."""
    registered = Registered()
    for name, played in {
        "Event": Event,
        "Stream": Stream,
        "stream": nullcontext,
        "device": nullcontext,
        "current_stream": lambda _: Stream(),
        "cudart": lambda: registered,
        "device_count": lambda: 1,
        "synchronize": lambda _: None,
        "empty_cache": lambda: None,
    }.items():
        patch.setattr(torch.cuda, name, played)
    patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    patch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in registered.bytes_at)
    patch.setattr(capture, "_pinned_like", torch.empty_like)
    patch.setattr(pinned, "_pinned", lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    for module in (selecting, stage):
        patch.setattr(module, "send", lambda values, _: values.clone())
    patch.setattr(actor, "warm_up", lambda loaded, _, *given: loaded.warm_up(*given))
    patch.setattr(actor, "measure_gpus", lambda _: ())
    load_spans, init = actor.load_spans, StageActor.__init__

    def on_gpu(*given: Any) -> Any:
        stages = load_spans(*given)
        for each in stages:
            each._on_gpu, each._copy_out = True, Stream()
        return stages

    def of_gpu(self: Any, specs: Any, **options: Any) -> None:
        init(self, [replace(spec, device="cpu", threads=1, compile=False) for spec in specs], **options)
        self._on_gpu, self._beside, self._devices = True, Beside(), [torch.device("cuda:0")]

    patch.setattr(actor, "load_spans", on_gpu)
    patch.setattr(StageActor, "__init__", of_gpu)
    return registered


def play_for_good() -> Registered:
    """The same in a process of its own, such as Ray's."""
    return play(SimpleNamespace(setattr=setattr))
