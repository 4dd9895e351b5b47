"""A finished run's statistics of one site and layer, as torch tensors."""

import io
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from m2ray.activations.job import JobRecord
from m2ray.activations.statistics import FOLDER, RESTORE, STATISTICS_KEY, StatisticsRecord, covariance_key, read_statistics_record
from m2ray.errors import ConfigError, NotInRunError, RunDamagedError
from m2ray.extras import naming_extras
from m2ray.sites import shown_layers
from m2ray.statistics import places, statistic_sites
from m2ray.storage import Store

if TYPE_CHECKING:
    import torch


class LayerStatistics:
    """What is known of the rows of one site and layer. Each file is read, and held against its digest, when it is first needed.

    Raises:
        NotInRunError: no statistics were asked for there, or the run is not finished; and by each attribute whose kind was not asked for.
        RunDamagedError: a file is not what was written.
        StoreError: one cannot be read.
    """

    def __init__(self, store: Store, job: JobRecord, site: str, layer: int | None) -> None:
        self._store = store
        self._place = (site, layer)
        self._name = site if layer is None else f"{site} of layer {layer}"
        taken = places(job.statistics)
        if self._place not in taken:
            has = "; ".join(f"{name} {shown_layers(layers)}".strip() for name, layers in statistic_sites(job.statistics).items()) or "none"
            raise NotInRunError(f"The run at {store.url} has no statistics of {self._name}.", f"It has those of: {has}.")
        self._kinds = taken[self._place]
        record = read_statistics_record(store, job)
        if record is None:
            raise NotInRunError(f"The statistics of the run at {store.url} are not merged yet: the run is not finished.", "Finish the run.")
        self._record: StatisticsRecord = record

    @property
    def count(self) -> int:
        """Rows."""
        return self._record.rows

    @property
    def mean(self) -> "torch.Tensor":
        """float64 [W]."""
        return self._channels("mean")

    @property
    def variance(self) -> "torch.Tensor":
        """float64 [W], over the count: not one less."""
        return self._channels("variance")

    @property
    def min(self) -> "torch.Tensor":
        """float32 [W]."""
        return self._channels("min")

    @property
    def max(self) -> "torch.Tensor":
        """float32 [W]."""
        return self._channels("max")

    @cached_property
    @naming_extras()
    def covariance(self) -> "torch.Tensor":
        """float32 [W, W], over the count."""
        self._require("covariance")
        from safetensors.torch import load

        covariance: torch.Tensor = load(self._read(covariance_key(self._place)))["covariance"]
        return covariance

    @cached_property
    def norms(self) -> Any:
        """Rows by their norm: a pyarrow table of `at_least` and `below`, the ends of each bin that holds any, and `rows`; ascending."""
        self._require("norms")
        return self._table("norms")

    def norm_quantile(self, share: float) -> float:
        """A norm that this share of the rows, from 0 to 1, does not exceed: the upper end of a bin, so at most 1/32 too large; NaN of no rows.

        Raises ConfigError for any other share.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"A share of {share} of the rows is none.", "Give one from 0 to 1, such as 0.99.")
        below = np.cumsum(self.norms["rows"].to_numpy())
        if not len(below):
            return float("nan")
        return float(self.norms["below"][int(np.searchsorted(below, share * below[-1]))].as_py())

    @cached_property
    @naming_extras()
    def expert_load(self) -> "torch.Tensor":
        """How many rows chose each expert: int64 [E]."""
        import torch

        self._require("experts")
        return torch.from_numpy(self._table("experts")["rows"].to_numpy().copy())

    @cached_property
    @naming_extras()
    def coactivation(self) -> "torch.Tensor":
        """How many rows chose both of two experts: int64 [E, E]; on the diagonal the one."""
        import torch

        pairs_EE = torch.diag(self.expert_load)
        table = self._table("coactivation")
        one, other = (torch.from_numpy(table[name].to_numpy().astype(np.int64)) for name in ("expert", "other"))
        rows = torch.from_numpy(table["rows"].to_numpy().copy())
        pairs_EE[one, other] = rows
        pairs_EE[other, one] = rows
        return pairs_EE

    # -- inside -------------------------------------------------------------------------------------------------------

    @naming_extras()
    def _channels(self, name: str) -> "torch.Tensor":
        import torch

        self._require("moments")
        return torch.from_numpy(self._moments[name].to_numpy().copy())

    @cached_property
    def _moments(self) -> Any:
        return self._table("moments")

    def _table(self, name: str) -> Any:
        """The rows of a table that are of this site and layer."""
        site, layer = self._place
        table = pq.read_table(io.BytesIO(self._read(f"{FOLDER}/{name}.parquet")))
        of_layer = pc.is_null(table["layer"]) if layer is None else pc.equal(table["layer"], pa.scalar(layer, pa.int32()))
        return table.filter(pc.and_(pc.equal(table["site"], site), of_layer))

    def _require(self, kind: str) -> None:
        if kind not in self._kinds:
            raise NotInRunError(f"Of {self._name} there are no {kind}.", f"There are: {', '.join(sorted(self._kinds))}.")

    def _read(self, key: str) -> bytes:
        file = next((file for file in self._record.files if file.key == key), None)
        data = self._store.read(key) if file else b""
        if file is None or xxhash.xxh3_64_hexdigest(data) != file.xxh3:
            what = f"{self._store.where(key)} is not what {STATISTICS_KEY} says."
            raise RunDamagedError(what, RESTORE)
        return data
