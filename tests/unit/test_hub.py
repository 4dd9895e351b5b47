"""Names on the hub: what the cache of this machine holds of them, without a network."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, M2rayError, PromptsError
from m2ray.hub import folder_of, is_name, located, name_of, without_revision
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.headers import read_file_header
from m2ray.model.weight_files import find_weights, no_weights
from m2ray.prompts.tokenizer_files import digest_files
from m2ray.storage import LocalStore, Store, open_store
from tests.unit.hub_cache import COMMIT, OLDER, cached


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as `hf download` leaves it: a model at main and at another commit, a model of one word, a data set with folders."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cached(folder / "models--Qwen--Qwen3-0.6B", {"config.json": b"{}"}, COMMIT, OLDER)
    cached(folder / "models--gpt2", {"config.json": b"{}"}, COMMIT)
    cached(folder / "datasets--openai--gsm8k", {"main/train.jsonl": b'{"text": "a"}\n', "socratic/train.jsonl": b'{"text": "b"}\n'}, COMMIT)
    return folder


def test_a_name_is_the_folder_of_its_revision(cache: Path) -> None:
    snapshots = cache / "models--Qwen--Qwen3-0.6B" / "snapshots"
    assert folder_of("Qwen/Qwen3-0.6B") == str(snapshots / COMMIT)
    assert folder_of(f"Qwen/Qwen3-0.6B@{OLDER}") == str(snapshots / OLDER)
    assert folder_of("gpt2") == str(cache / "models--gpt2" / "snapshots" / COMMIT)
    assert folder_of("openai/gsm8k/main", "dataset") == str(cache / "datasets--openai--gsm8k" / "snapshots" / COMMIT / "main")


@pytest.mark.parametrize("address", ["/models/m", "./m", "m", "a/b/c.jsonl", "s3://bucket/m", "data/*.jsonl", "~/m", "..", "here/../m"])
def test_paths_and_urls_are_left_as_they_are(cache: Path, address: str) -> None:
    assert folder_of(address) == folder_of(address, "dataset") == name_of(address) == address


def test_what_lies_on_the_disk_comes_first(cache: Path) -> None:
    Path("Qwen/Qwen3-0.6B").mkdir(parents=True)
    assert folder_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert not is_name("Qwen/Qwen3-0.6B")
    assert folder_of("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B", "beside a folder of that name it is a path that is absent"
    assert is_name("openai/gsm8k")


def test_what_the_cache_lacks_is_told_with_the_line_that_brings_it(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing of the model Qwen/Qwen3-8B\. hf download Qwen/Qwen3-8B brings it there"):
        folder_of("Qwen/Qwen3-8B")
    with pytest.raises(CheckpointError, match=r"hf download Qwen/Qwen3-0\.6B --revision v2 brings"):
        folder_of("Qwen/Qwen3-0.6B@v2")
    with pytest.raises(PromptsError, match=r"hf download openai/other --repo-type dataset brings"):
        folder_of("openai/other", "dataset")
    config = ExtractConfig.validated({"model": "Qwen/Qwen3-8B", "prompts": "openai/other", "output": "run"})
    with pytest.raises(M2rayError, match=r"(?s)2 problems.*hf download Qwen/Qwen3-8B.*--repo-type dataset"):
        located(config)


def test_a_part_of_a_data_set_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import IncompleteSnapshotError

    def partly(name: str, **_: object) -> str:
        raise IncompleteSnapshotError("3 files are missing", str(cache / name))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", partly)
    with pytest.raises(PromptsError, match=r"a part of the data set openai/gsm8k alone\. hf download openai/gsm8k --repo-type dataset"):
        folder_of("openai/gsm8k", "dataset")
    assert folder_of("Qwen/Qwen3-0.6B") == str(cache / "Qwen/Qwen3-0.6B"), "which of a model's files are needed, its checkpoint says"


def test_a_model_of_which_a_part_was_downloaded_is_told_with_the_line_that_brings_the_rest(cache: Path, tmp_path: Path) -> None:
    line = f"hf download Qwen/Qwen3-0.6B --revision {COMMIT} brings it there."
    store = open_store(folder_of("Qwen/Qwen3-0.6B"))
    copied = LocalStore(Path(shutil.copytree(store.url, tmp_path / "copied")))
    for refuse in (
        lambda at: read_file_header(at, "model-00002-of-00002.safetensors"),
        lambda at: find_weights(at, "model.safetensors.index.json"),
        lambda at: digest_files(Path(at.url), at.url),
        no_weights,
    ):
        assert _told(refuse, store).remedy == line
        assert "hf download" not in _told(refuse, copied).remedy
    cached(cache / "models--o--bare", {"README.md": b""}, OLDER)
    assert _told(lambda at: open_checkpoint(at.url), open_store(folder_of("o/bare"))).remedy.startswith(
        "hf download o/bare --revision bbbb"
    )


def _told(refuse: Callable[[Store], object], store: Store) -> CheckpointError:
    """What is raised, or given to be raised."""
    try:
        given = refuse(store)
    except CheckpointError as error:
        return error
    assert isinstance(given, CheckpointError)
    return given


@pytest.mark.parametrize(("name", "kind"), [("Qwen/Qwen3-0.6B", "model"), ("gpt2", "model"), ("openai/gsm8k/main", "dataset")])
def test_a_record_names_the_commit_by_which_the_folder_is_found_again(cache: Path, name: str, kind: str) -> None:
    folder = folder_of(name, kind)  # type: ignore[arg-type]
    recorded = name_of(folder)
    assert recorded == (f"openai/gsm8k@{COMMIT}/main" if kind == "dataset" else f"{name}@{COMMIT}")
    assert folder_of(recorded, kind) == folder  # type: ignore[arg-type]
    assert without_revision(recorded) == name.removesuffix("/main")


def test_a_cache_elsewhere_is_named_by_its_path(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "models--a--b" / "snapshots" / COMMIT
    other.mkdir(parents=True)
    assert name_of(str(other)) == str(other)
