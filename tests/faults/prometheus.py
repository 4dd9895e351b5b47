"""A real Prometheus that scrapes the suite's cluster by cluster/monitoring, and the queries of the board there."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from tests.faults.cluster import Cluster
from tests.ray.conftest import REPOSITORY, free_ports

MONITORING = REPOSITORY / "cluster/monitoring"
_RAYS_FOLDER = "/tmp/ray"
_START_S = 60.0


class Prometheus:
    """One that has started."""

    def __init__(self, address: str) -> None:
        self._address = address

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        found: list[dict[str, Any]] = self._get(f"query?{urlencode({'query': expression})}")["result"]
        return found

    def firing(self) -> set[str]:
        """The alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"}

    def is_up(self) -> bool:
        try:
            return bool(self.query("vector(1)"))
        except OSError:  # nothing listens yet
            return False

    def _get(self, what: str) -> dict[str, Any]:
        with urlopen(f"{self._address}/api/v1/{what}", timeout=10) as answer:
            content: dict[str, Any] = json.load(answer)["data"]
        return content


@contextmanager
def prometheus(folder: Path, cluster: Cluster) -> Iterator[Prometheus]:
    """Prometheus with the configuration that m2ray ships, checked by promtool; but for the cluster's folder, which is not Ray's default."""
    programs = Path(
        subprocess.run([REPOSITORY / "scripts/prometheus", folder / "debian"], capture_output=True, text=True, check=True).stdout.strip()
    )
    config = folder / "prometheus.yml"
    shutil.copy(MONITORING / "rules.yml", folder)
    config.write_text((MONITORING / "prometheus.yml").read_text().replace(_RAYS_FOLDER, str(cluster.folder)))
    subprocess.run([programs / "promtool", "check", "config", config], check=True, timeout=60)
    (port,) = free_ports(1)
    words = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'series'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([programs / "prometheus", *words], stdout=log, stderr=subprocess.STDOUT)
    try:
        server, deadline = Prometheus(f"http://127.0.0.1:{port}"), time.monotonic() + _START_S
        while not server.is_up():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "prometheus.log").read_text())
            time.sleep(0.2)  # asks again; nothing rests on the interval
        yield server
    finally:
        process.terminate()
        process.wait(30)


def board_queries() -> list[str]:
    """What the panels of the board ask for, of all runs."""
    board = json.loads((MONITORING / "board.json").read_text())
    return [target["expr"].replace("$run", ".*") for panel in board["panels"] for target in panel["targets"]]
