"""What `m2ray bench` measured on a machine, kept as a file for `m2ray plan --profile`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from m2ray.errors import ConfigError
from m2ray.planning.hardware import find_gpu_model

FORMAT_VERSION = 1
_AGAIN = "Run `m2ray bench` again."


@dataclass(frozen=True)
class LayerTime:
    """One decoder layer's forward pass over `sequences` of `length` tokens each, all real: a median of several."""

    sequences: int
    length: int
    compiled: bool
    layer_ms: float

    @property
    def tokens_per_s(self) -> float:
        return self.sequences * self.length / self.layer_ms * 1e3


@dataclass(frozen=True)
class Profile:
    """A machine's measured rates. Bytes a second are of 1 byte; None is what could not be measured there.

    Attributes:
        gpu: the GPU's name as the driver gives it; None where the layer ran on the CPU.
        gpus, cpus: of the machine; a stage's writer gets half of its GPU's share of the cores.
        versions: of python, m2ray, torch, transformers, cuda and so on.
        model_type: of the model whose layer was run.
        compute_dtype: that it was run in.
        active_elements: weights of that layer that one token is multiplied with.
        layer: its times, by shape, compiled and not.
        copy_bytes_per_s: from the GPU to pinned host memory.
        encode_bytes_per_s: activations turned into Parquet by one writer thread that makes their CRCs, nothing stored.
        encode_given_crcs_bytes_per_s: the same with rows whose CRCs the GPU has made; None where none makes them.
        store: the output folder that was written to.
        store_bytes_per_s: what a run's writers get into it from this machine while rows are always there, made durable.
        read_bytes_per_s: of the model's files by one thread, past the page cache where the system allows.
        elapsed_s: seconds that all of it took.
    """

    gpu: str | None
    gpus: int
    cpus: int
    versions: Mapping[str, str]
    model_type: str
    compute_dtype: str
    active_elements: float
    layer: tuple[LayerTime, ...]
    copy_bytes_per_s: float | None
    encode_bytes_per_s: float
    store: str | None = None
    store_bytes_per_s: float | None = None
    read_bytes_per_s: float | None = None
    elapsed_s: float = 0.0
    encode_given_crcs_bytes_per_s: float | None = None

    @property
    def writer_threads(self) -> int:
        """Of each stage, as a run on this machine has them."""
        return max(1, self.cpus // self.gpus // 2) if self.gpus else 1

    def encoder_bytes_per_s(self, *, with_crcs: bool) -> float:
        """Of a writer thread in a run of which the GPU makes rows' CRCs, if it can (`RunOptions.with_crcs`), or of another."""
        return (self.encode_given_crcs_bytes_per_s if with_crcs else None) or self.encode_bytes_per_s

    def operations_per_s(self, *, compiled: bool) -> float:
        """Two for each weight that a token meets, at the slowest shape: so the time of attention and of all else is in it.

        Raises:
            ConfigError: no compiled (or no other) layer was run.
        """
        return 2 * self.active_elements * self._slowest(compiled=compiled).tokens_per_s

    def tokens_at(self, *, compiled: bool) -> int:
        """Of the micro-batches at which that was measured. Raises ConfigError as `operations_per_s`."""
        slowest = self._slowest(compiled=compiled)
        return slowest.sequences * slowest.length

    def _slowest(self, *, compiled: bool) -> LayerTime:
        times = [time for time in self.layer if time.compiled == compiled]
        if not times:
            raise ConfigError(f"The profile has no layer {'compiled' if compiled else 'that was not compiled'}.", _AGAIN)
        return min(times, key=lambda time: time.tokens_per_s)

    def require(self, compute_dtype: str, gpu_names: Sequence[str | None]) -> None:
        """Raise ConfigError, unless it was taken in this dtype and on GPUs like all of these (None for a CPU)."""
        if self.compute_dtype != compute_dtype:
            remedy = "Leave --profile out: `m2ray bench` multiplies no FP8." if compute_dtype == "float8" else _AGAIN
            raise ConfigError(f"The profile was taken in {self.compute_dtype}, the plan is for {compute_dtype}.", remedy)
        others = sorted({str(name or "CPU") for name in gpu_names if not self._is_of(name)})
        if others:
            raise ConfigError(
                f"The profile is of {self.gpu or 'a CPU'}; the plan has {', '.join(others)}.",
                "Run `m2ray bench` there, or leave --profile out for an estimate from the GPUs' names.",
            )

    def _is_of(self, name: str | None) -> bool:
        if name is None or self.gpu is None:
            return name is self.gpu
        return name == self.gpu or (find_gpu_model(name) is not None and find_gpu_model(name) == find_gpu_model(self.gpu))

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The profile of a file's text. Raises ConfigError where it is none, or of another version."""
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise ConfigError(f"The profile has format_version {version}, this m2ray reads {FORMAT_VERSION}.", _AGAIN)
            return cls(**{**fields, "layer": tuple(LayerTime(**time) for time in fields["layer"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"This is no profile of `m2ray bench`: {error!r}.", _AGAIN) from error
