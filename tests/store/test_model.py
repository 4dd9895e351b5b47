"""A checkpoint and its tokenizer in an object store: the same weights and tokens as from a disk, each byte read once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.stage import StageSpec, load_stage
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptTokenizer
from m2ray.storage import open_store
from tests.reference import make_minimax, same_bits

TOKENIZER = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"
ROWS = [
    PromptRow(0, "0", text="The river is low. 河水"),
    PromptRow(1, "1", messages=[{"role": "system", "content": "河水"}, {"role": "user", "content": "The river?"}]),
]


def upload(folder: Path, url: str) -> str:
    """Copy a folder to the store; gives its URL there."""
    store = open_store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("minimax") / "model", "fp8")


def test_a_span_is_loaded_from_its_own_ranges(folder: Path, url: str) -> None:
    spec = StageSpec(upload(folder, url), LayerSpan(2, 4), "float32", "auto", "cpu", 1)
    remote, local = load_stage(spec, lambda *_: None), load_stage(replace(spec, model_url=str(folder)), lambda *_: None)
    assert remote.needed_bytes == remote.bytes_read == local.bytes_read
    assert remote.bytes_read < 0.5 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    ours, theirs = (dict(stage._decoder.skeleton.model.named_parameters()) for stage in (remote, local))
    loaded = [name for name, parameter in theirs.items() if not parameter.is_meta]
    assert loaded
    assert all(same_bits(ours[name].detach(), theirs[name].detach()) for name in loaded)


def test_tensors_and_the_fingerprint_are_the_folders(folder: Path, url: str) -> None:
    remote, local = open_checkpoint(upload(folder, url)), open_checkpoint(str(folder))
    remote.check()
    assert remote.digest == local.digest
    chosen = dict(list(local.headers.items())[::5])
    for key, header in chosen.items():
        ours, theirs = (each.read(key).reshape(-1).view(torch.uint8) for each in (remote, local))
        assert torch.equal(ours, theirs), key
        assert len(ours) == header.num_bytes
    assert remote.bytes_read == sum(header.num_bytes for header in chosen.values()) > 0


def test_damage_is_found_there_too(folder: Path, url: str) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json in s3://"):
        open_checkpoint(url)
    store = open_store(upload(folder, url))
    name = min(path.name for path in folder.glob("*.safetensors"))
    store.put(name, (folder / name).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(url).check()


def test_the_tokenizer_gives_the_same_tokens_and_digests(url: str, tmp_path: Path) -> None:
    options = PromptOptions("unused", 1000)
    local = PromptTokenizer.load(str(TOKENIZER), options, 320)
    remote = PromptTokenizer.load(upload(TOKENIZER, url), options, 320)
    assert [ids.tolist() for ids in remote.encode(ROWS)] == [ids.tolist() for ids in local.encode(ROWS)]
    assert (remote.tokenizer_digest, remote.template_digest) == (local.tokenizer_digest, local.template_digest)
    assert remote.template_digest


@pytest.mark.parametrize("layout", ["beside", "in its own folder"])
def test_a_chat_template_in_a_file_of_its_own_comes_along(url: str, tmp_path: Path, layout: str) -> None:
    folder = Path(shutil.copytree(TOKENIZER, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for path in folder.glob("chat_template*"):
        path.unlink()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} of another template")
    if layout == "in its own folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages[0].content }} with tools")
    local, remote = (PromptTokenizer.load(where, PromptOptions("", 1000), 320) for where in (str(folder), upload(folder, url)))
    assert local.template_digest == remote.template_digest != ""
    assert [ids.tolist() for ids in remote.encode(ROWS)] == [ids.tolist() for ids in local.encode(ROWS)]


def test_an_absent_tokenizer_is_named_by_its_url(url: str) -> None:
    with pytest.raises(CheckpointError, match="s3://.*has no tokenizer"):
        PromptTokenizer.load(url, PromptOptions("unused", 1000), 320)
