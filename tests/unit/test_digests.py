"""What is loaded of each layer, as a digest: of the checkpoint's tensors alone, and of all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open

from m2ray.batches import LayerSpan
from m2ray.errors import CheckpointError
from m2ray.model import pieces, weights
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.known_weights import known_weights
from m2ray.model.stage import StageSpec, load_stage
from tests.reference import MINIMAX_TINY, edited, make_family, make_minimax, other_weights

NUM_LAYERS = MINIMAX_TINY["layers"]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minimax(tmp_path_factory.mktemp("fp8") / "model", "fp8")


def spec(folder: Path, start: int, stop: int, dtype: str = "bfloat16") -> StageSpec:
    return StageSpec(str(folder), LayerSpan(start, stop), dtype, "auto", "cpu", None)


def digests(specs: Sequence[StageSpec]) -> dict[int | None, str]:
    found: dict[int | None, str] = {}
    for each in specs:
        loaded = load_stage(each, lambda *_: None).digests
        assert not loaded.keys() & found.keys()
        found |= loaded
    return found


def as_documented(folder: Path, piece_bytes: int, block_rows: int) -> dict[int | None, str]:
    """Each digest as docs/data_format.md defines it, from the files alone."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                tensors[key] = (opened.get_tensor(key), opened.get_slice(key).get_dtype())
    found: dict[int | None, xxhash.xxh3_128] = {}
    for key in sorted(tensors):
        if key.startswith(("lm_head", "model.norm")):
            continue
        layer = int(key.split(".")[2]) if ".layers." in key else None
        values, dtype = tensors[key]
        hashed = found.setdefault(layer, xxhash.xxh3_128())
        hashed.update(f"{key} {dtype} {list(values.shape)}\n".encode())
        weight = tensors.get(key.removesuffix("_scale_inv"), (values,))[0]
        rows = pieces_of(weight, piece_bytes, block_rows)
        step = rows if weight is values else -(-rows // block_rows)
        for piece in values.split(step):
            hashed.update(xxhash.xxh3_128_digest(piece.contiguous().view(torch.uint8).numpy().tobytes()))
    return {layer: hashed.hexdigest() for layer, hashed in found.items()}


def pieces_of(values: torch.Tensor, piece_bytes: int, block_rows: int) -> int:
    """The rows of a tensor's piece."""
    if values.nbytes <= piece_bytes:
        return len(values)
    rows = max(1, piece_bytes // (values.nbytes // len(values)))
    return max(block_rows, rows // block_rows * block_rows) if values.dtype == torch.float8_e4m3fn else rows


@pytest.mark.parametrize("piece_bytes", [pieces.PIECE_BYTES, 10_000])
def test_a_digest_is_what_the_docs_say(fp8: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    found = digests([spec(fp8, 0, NUM_LAYERS)])
    assert found == as_documented(fp8, piece_bytes, 128)
    assert found.keys() == {None, *range(NUM_LAYERS)}
    assert len(set(found.values())) == NUM_LAYERS + 1
    last = NUM_LAYERS - 2
    assert weights.hash_weights(open_checkpoint(str(fp8)), last + 1) == {None: found[None], last: found[last]}


def test_files_that_nobody_loads_are_hashed_once_until_one_is_written_anew(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def known() -> tuple[Mapping[int | None, str], int]:
        checkpoint = open_checkpoint(str(fp8))
        return known_weights(checkpoint, NUM_LAYERS, with_final_norm=False), checkpoint.bytes_read

    found, read_bytes = known()
    assert found == digests([spec(fp8, 0, NUM_LAYERS)])
    assert read_bytes > 0
    assert known() == (found, 0)
    with other_weights(fp8, "model.layers.3."):
        of_others, _ = known()
        assert [layer for layer in found if of_others[layer] != found[layer]] == [3]
    assert known() == (found, 0)
    for file in (tmp_path / "m2ray" / "weights").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    assert known() == (found, read_bytes), "what was kept cannot be read"


def offloaded(folder: Path, home: Path) -> list[StageSpec]:
    return [
        replace(spec(folder, 0, NUM_LAYERS), residency={1: "host", 2: "host", 4: "checkpoint", 5: "checkpoint"}, offload_folder=str(home))
    ]


WAYS: dict[str, Callable[[Path, Path], list[StageSpec]]] = {
    "three stages": lambda folder, _: [spec(folder, *ends) for ends in ((0, 2), (2, 6), (6, NUM_LAYERS))],
    "float32": lambda folder, _: [spec(folder, 0, NUM_LAYERS, "float32")],
    "offloaded": offloaded,
    "one file, sorted otherwise": lambda folder, home: [spec(edited(folder, home / "one", lambda _: None), 0, NUM_LAYERS)],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_digest_does_not_depend_on_the_way_of_loading(fp8: Path, tmp_path: Path, way: str) -> None:
    assert digests(WAYS[way](fp8, tmp_path)) == digests([spec(fp8, 0, NUM_LAYERS)])


@pytest.mark.parametrize("key", ["model.layers.3.block_sparse_moe.experts.5.w2.weight_scale_inv", "model.embed_tokens.weight"])
def test_a_changed_byte_changes_the_digest_of_its_layer_alone(fp8: Path, tmp_path: Path, key: str) -> None:
    folder = edited(fp8, tmp_path / "changed", partial(flip, key))
    before, after = digests([spec(fp8, 0, NUM_LAYERS)]), digests([spec(folder, 0, NUM_LAYERS)])
    assert [layer for layer in before if before[layer] != after[layer]] == [3 if "layers.3" in key else None]


def flip(key: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors[key].view(torch.uint8).view(-1)[-1] ^= 1


def test_bytes_that_are_read_where_they_belong_are_hashed(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "llama", "llama", torch.bfloat16)
    before = digests([spec(folder, 0, 5)])
    with other_weights(folder):
        after = digests([spec(folder, 0, 5)])
    assert all(before[layer] != after[layer] for layer in before)
    assert digests([spec(folder, 0, 3), spec(folder, 3, 5)]) == before


def test_a_stage_refuses_another_checkpoint_than_the_run_began_with(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "llama", "llama", torch.bfloat16)
    wanted = replace(spec(folder, 0, 1), model_files=open_checkpoint(str(folder)).digests)
    load_stage(wanted, lambda *_: None)
    config = (folder / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in config
    (folder / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(CheckpointError, match=r"not the checkpoint that the run began with: config\.json"):
        load_stage(wanted, lambda *_: None)
