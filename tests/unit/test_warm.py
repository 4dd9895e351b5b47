"""What a job may ask of a chain that stands already."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m2ray.batches import LayerSpan, PartSpec
from m2ray.chain.joining import require_cluster
from m2ray.chain.probing import Hardware
from m2ray.chain.progress import Progress
from m2ray.chain.served import Served
from m2ray.chain.warm import Standing
from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, ClusterError, ConfigError, M2rayError
from m2ray.planning.hardware import Cluster

HARDWARE = Hardware(Cluster(()), {}, {})
FILES = {"config.json": "1", "model.safetensors": "2"}


def standing(folder: Path) -> Standing:
    """A chain of layers 0 to 3, in two stages."""
    options = SimpleNamespace(
        compute_dtype="float32", attn_implementation="sdpa", compile=False, threads_per_stage=2, batch_tokens=128, stage_timeout_s=1.0
    )
    plan: Any = SimpleNamespace(
        demand=SimpleNamespace(options=options), stages=[SimpleNamespace(span=LayerSpan(0, 2)), SimpleNamespace(span=LayerSpan(2, 4))]
    )
    return Standing(None, Served("tiny", f"file://{folder}", FILES, {}, plan, HARDWARE, None))


def config(folder: Path, **options: Any) -> ExtractConfig:
    return ExtractConfig.validated({"model": str(folder), "prompts": "p", "output": "o", "chain": "tiny", **options})


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standing:
    from m2ray.chain import warm

    monkeypatch.setattr(warm, "open_store", lambda url: SimpleNamespace(url=f"file://{Path(url)}"))
    return standing(tmp_path)


def test_what_a_job_leaves_open_is_the_chains(chain: Standing, tmp_path: Path) -> None:
    agreed = chain.agreed(config(tmp_path, stages=3, threads_per_stage="auto"))
    names = ("compute_dtype", "attn_implementation", "compile", "threads_per_stage", "batch_tokens", "stages")
    assert [getattr(agreed, name) for name in names] == ["float32", "sdpa", False, 2, 128, "auto"]
    assert chain.agreed(config(tmp_path, batch_tokens=64, compute_dtype="float32")).batch_tokens == 64


def test_all_that_is_not_the_chains_is_refused_by_name(chain: Standing, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        chain.agreed(config(tmp_path / "other", compute_dtype="bfloat16", compile=True, replicas=2, threads_per_stage=1))
    for words in ("5 problems", "other", "compute_dtype = 'bfloat16'", "compile = True", "threads_per_stage = 1", "replicas = 2"):
        assert words in str(raised.value)


def inputs(digests: dict[str, str], layer: int) -> Any:
    options = SimpleNamespace(captured=(PartSpec.of("residual", layer, "float32", 8),))
    checkpoint = SimpleNamespace(url="m", digests=digests)
    return SimpleNamespace(checkpoint=checkpoint, versions={}, options=options, table=SimpleNamespace(num_layers=6))


def test_a_job_of_the_layers_that_are_there_gets_the_chain(chain: Standing) -> None:
    assert chain.hardware_for(inputs(FILES, 3), Progress()).chain is chain


def test_files_of_another_machine_are_held_against_what_the_chain_has_loaded(chain: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a stage is away: nobody asks the stages, of which one that comes back has loaded nothing for minutes."""
    of_files: dict[int | None, str] = {None: "e", 0: "a", 1: "b"}
    wanted = inputs(FILES, 1)
    wanted.versions = {"model.safetensors": "its own"}
    monkeypatch.setattr("m2ray.chain.warm.known_weights", lambda *_, **__: of_files)
    loaded = replace(chain, served=chain.served._replace(weights={**of_files, 2: "c", 3: "d"}))
    assert loaded.hardware_for(wanted, Progress()).chain is loaded
    of_files[1] = "other"
    with pytest.raises(CheckpointError, match="has other weights than the chain tiny"):
        loaded.hardware_for(wanted, Progress())


def test_changed_files_and_layers_that_are_not_there_are_refused(chain: Standing) -> None:
    with pytest.raises(M2rayError) as raised:
        chain.hardware_for(inputs({**FILES, "model.safetensors": "3"}, 4), Progress())
    for words in ("2 problems", "model.safetensors changed", "Layers up to 4", "layers 0 to 3"):
        assert words in str(raised.value)


def test_a_chain_needs_a_cluster_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="RAY_ADDRESS names none"):
        require_cluster()
