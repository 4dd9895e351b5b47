"""Layers that live packed, in memory or in files: the bits of those that are ready, in bounded memory, read when they have to be."""

import gc
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from m2ray.batches import LayerSpan, MicroBatch, Residency
from m2ray.errors import CheckpointError, StageError, StoreError
from m2ray.model import stage as stage_module
from m2ray.model.checkpoint import Checkpoint, open_checkpoint
from m2ray.model.quantization import fused
from m2ray.model.residency import unpacking
from m2ray.model.residency.packed_layer import PackedLayer, lay_out
from m2ray.model.residency.places import InCheckpoint, UnnamedFile
from m2ray.model.residency.unpacking import Unpacking
from m2ray.model.selecting import ChosenRows
from m2ray.model.skeleton import build_skeleton
from m2ray.model.stage import Stage, StageSpec
from m2ray.model.tensor_table import tensor_table
from m2ray.model.tensors import match_by_layer
from m2ray.model.weights import _fillings, _unplaced
from m2ray.planning.unpacking import unpacking_bytes
from scripts.checkpoint_formats.table import FORMATS
from tests.host_kernels import RAN, HostKernel
from tests.packed import make_packed
from tests.reference import MINIMAX_TINY, chain_rows, edited, load_capturing, make_family, make_minimax, micro_batch_of, same_bits
from tests.unit.test_node_memory import listening, wait_until_others_listen

FAMILIES = {"mxfp4": "gpt_oss"}
"""Of formats that are one family's own; the others are tried as qwen3_moe."""

PLAIN = {"bf16": ("bf16", "hub"), "fp8": ("fp8", "hub"), "bf16, fused experts": ("bf16", "fused")}


IN_FLOAT32 = ("bf16", "fp8", "mxfp4", "awq")


def make(folder: Path, layout: str) -> Path:
    if layout in PLAIN:
        return make_minimax(folder, *PLAIN[layout])
    return make_packed(folder, FAMILIES.get(layout, "qwen3_moe"), layout)


def spec_of(folder: Path, start: int, stop: int, dtype: str, residency: Mapping[int, Residency], offload_folder: str = "") -> StageSpec:
    return StageSpec(str(folder), LayerSpan(start, stop), dtype, "auto", "cpu", 1, residency=residency, offload_folder=offload_folder)


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((each, "bfloat16") for each in (*PLAIN, *FORMATS)), *((each, "float32") for each in IN_FLOAT32)]
)
def test_packed_layers_of_every_layout_give_the_same_rows_and_digests(layout: str, dtype: str, tmp_path: Path) -> None:
    """In chains of one and of three stages, in every place, micro-batches one after the other and in a wave."""
    folder = make(tmp_path / "model", layout)
    batches = [micro_batch_of((9, 5, 1), 96, seed) for seed in (0, 1)]
    num_layers = MINIMAX_TINY["layers"] if layout in PLAIN else 3
    ready = load_capturing(spec_of(folder, 0, num_layers, dtype, {}))
    expected = [chain_rows([ready], batch) for batch in batches]
    mixed: Mapping[int, Residency] = {0: "host"} | dict.fromkeys(range(1, num_layers), "checkpoint")
    chains = [[load_capturing(spec_of(folder, 0, num_layers, dtype, mixed))]]
    in_three: list[tuple[int, int, Residency]] = [(0, 1, "gpu_packed"), (1, 2, "host"), (2, num_layers, "checkpoint")]
    chains.append(
        [load_capturing(spec_of(folder, first, stop, dtype, dict.fromkeys(range(first, stop), each))) for first, stop, each in in_three]
    )
    for stages in chains:
        assert {layer: digest for stage in stages for layer, digest in stage.digests.items()} == ready.digests
        for batch, rows in zip(batches, expected, strict=True):
            assert all(equal(chain_rows(stages, batch), rows))
    assert all(all(equal(ours, rows)) for ours, rows in zip(rows_of_a_wave(*chains[0], batches), expected, strict=True))


def rows_of_a_wave(stage: Stage, batches: list[MicroBatch]) -> list[list[torch.Tensor]]:
    """Each micro-batch's rows, a layer after the other, of both taken through a layer before the next."""
    found: dict[int, list[torch.Tensor]] = {id(batch): [] for batch in batches}
    for output in stage.forward_wave(deque((batch, None) for batch in batches)):
        rows = (torch.from_numpy(one.columns[0].copy()) for one in output.captured)
        found[id(output.micro_batch)] += [each.view(getattr(torch, stage.parts[0].columns[0].dtype)) for each in rows]
    return list(found.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", [*PLAIN, *FORMATS])
def test_what_a_layer_takes_is_known_before_it_is_loaded(layout: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make(tmp_path / "model", layout)))
    table = tensor_table(checkpoint)
    packed, unpacked = table.packed_bytes(), table.unpacked_bytes(dtype)
    moved = unpacking_bytes(table.rows, table.num_layers, dtype)
    for number, layer in laid_out(checkpoint, dtype):
        needed_bytes = sum(row.disk_bytes for row in table.rows if row.layer == number)
        assert needed_bytes <= layer.num_bytes <= packed[number]
        assert sum(read.stop - read.offset for read in layer.reads) <= 1.01 * needed_bytes
        assert (layer.workspace_bytes > 0) == (unpacked[number] > 0)
        assert layer.workspace_bytes <= unpacked[number]
        assert (layer.workspace_bytes > 0) == (moved[number] > 0), "its method is in the planner's table"
        if dtype == "bfloat16" and layout.startswith("bf16"):
            assert layer.workspace_bytes < 0.05 * layer.num_bytes, "only what the file has in another dtype"


def laid_out(checkpoint: Checkpoint, dtype: str) -> Iterator[tuple[int, PackedLayer]]:
    skeleton = build_skeleton(checkpoint.whole_config, getattr(torch, dtype))
    for matched in match_by_layer(skeleton, checkpoint.headers):
        if matched and matched[0].tensor.layer is not None:
            yield matched[0].tensor.layer, lay_out((filling.tensor, _unplaced(filling)) for each in matched for filling in _fillings(each))


@pytest.mark.parametrize("layout", ["fp8", "mxfp8", "mxfp4", "awq", "gptq", "nvfp4", "pack-quantized-asymmetric"])
def test_kernels_find_all_parts_in_a_run(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their arithmetic on host memory, in a GPU's place."""
    folder, batch = make(tmp_path / "model", layout), micro_batch_of((9, 5, 1), 96)
    ready = load_capturing(spec_of(folder, 0, 3, "bfloat16", {})).forward(batch, None).captured
    monkeypatch.setattr(fused, "has_kernel", lambda device: True)
    monkeypatch.setattr(fused, "_kernel", HostKernel)
    monkeypatch.setattr(unpacking, "is_exact", lambda device: True)
    RAN.clear()
    packed = load_capturing(spec_of(folder, 0, 3, "bfloat16", all_in("checkpoint", 3))).forward(batch, None).captured
    assert RAN
    assert all((one.columns[0] == other.columns[0]).all() for one, other in zip(packed, ready, strict=True))


def test_a_check_that_failed_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel does not look at what it unpacks: of a stage that is asked once more the rows would be wrong, and nobody told."""

    def reorder(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.0.mlp.up_proj.g_idx"
        tensors[key] = tensors[key].flip(0).contiguous()

    folder = edited(make_packed(tmp_path / "model", "llama", "gptq-v2"), tmp_path / "reordered", reorder)
    monkeypatch.setattr(fused, "has_kernel", lambda device: True)
    monkeypatch.setattr(fused, "_kernel", HostKernel)
    monkeypatch.setattr(unpacking, "is_exact", lambda device: True)
    stage = load_capturing(spec_of(folder, 0, 3, "bfloat16", all_in("host", 3)))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="order of their own"):
            stage.forward(micro_batch_of((9, 5, 1), 64), None)


def test_kernels_have_their_gpu_as_the_threads_own(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches them on the thread's current GPU: in a stage of several that is the first, whoever's tensors they take."""
    assert stage_module._current(torch.device("cuda:1")).idx == 1
    own: list[torch.device] = []
    seen: set[tuple[str, tuple[torch.device, ...]]] = set()

    @contextmanager
    def played(device: torch.device) -> Iterator[None]:
        own.append(device)
        yield
        own.pop()

    def watched(kind: type, name: str) -> None:
        was = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *given: (seen.add((kind.__name__, tuple(own))), was(*given))[1])

    stage = load_capturing(spec_of(llama, 0, 5, "bfloat16", all_in("host")))
    monkeypatch.setattr(stage_module, "_current", played)
    watched(Unpacking, "__call__")
    watched(ChosenRows, "of")
    rows_of(stage)
    assert seen == {(name, (torch.device("cpu"),)) for name in ("Unpacking", "ChosenRows")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("llama") / "llama", "llama")


def all_in(where: Residency, num_layers: int = 5) -> Mapping[int, Residency]:
    return dict.fromkeys(range(num_layers), where)


def rows_of(stage: Stage, seed: int = 0) -> list[torch.Tensor]:
    return chain_rows([stage], micro_batch_of((5, 8, 3), 64, seed))


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[bool]:
    return [same_bits(ours, theirs) for ours, theirs in zip(one, other, strict=True)]


def test_what_is_as_it_is_computed_with_is_not_copied(llama: Path) -> None:
    stage = load_capturing(spec_of(llama, 0, 5, "float32", all_in("host")))
    layers = stage._decoder.skeleton.layers
    starts = {parameter.untyped_storage().data_ptr() for parameter in layers[2].parameters()}
    assert len(starts) == 1
    before = [parameter.data_ptr() for parameter in layers.parameters()]
    rows_of(stage)
    assert [parameter.data_ptr() for parameter in layers.parameters()] == before


def test_a_layer_is_read_once_each_time_another_ran_before_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load_capturing(spec_of(llama, 0, 5, "float32", {1: "checkpoint", 3: "checkpoint", 4: "checkpoint"}))
    rows_of(stage)
    read = count_reads(monkeypatch)
    for seed in range(3):
        rows_of(stage, seed)
    layer_bytes = tensor_table(open_checkpoint(str(llama))).layer_bytes(4)
    assert 8 * layer_bytes[1] <= sum(read) <= 10 * layer_bytes[1], "three a pass, but for the first, which had come before, and the next"
    alone = load_capturing(spec_of(llama, 0, 1, "float32", {0: "checkpoint"}))
    for _ in range(2):
        read.clear()
        alone.forward(micro_batch_of((5, 8, 3), 64), None)
    assert not read, "no other layer has run since"


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    was = Checkpoint.read_extent

    def counted(self: Checkpoint, file: str, offset: int, out: memoryview) -> None:
        read.append(len(out))
        was(self, file, offset, out)

    monkeypatch.setattr(Checkpoint, "read_extent", counted)
    return read


def test_model_files_that_change_under_a_run_end_it(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    stage = load_capturing(spec_of(folder, 0, 5, "float32", all_in("checkpoint")))
    expected = rows_of(stage)
    file = folder / open_checkpoint(str(folder)).weight_map["model.layers.3.self_attn.q_proj.weight"]
    os.utime(file)
    with pytest.raises(CheckpointError, match=f"{file.name} of .* changed while layers were read"):
        rows_of(stage)
    again = load_capturing(spec_of(folder, 0, 5, "float32", all_in("checkpoint")))
    file.rename(tmp_path / "away")
    with pytest.raises(StoreError, match=file.name):
        rows_of(again)
    (tmp_path / "away").rename(file)
    assert all(equal(rows_of(again), expected)), "a rename changes no file, and what failed is read again"


@pytest.mark.timeout(60)
def test_stages_of_a_node_have_one_copy_of_the_layers_in_host_memory(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them is still there gives it to the next: nothing is read again, though the bytes are hashed."""
    spec = replace(spec_of(llama, 0, 5, "bfloat16", all_in("host")), shared=frozenset(range(1, 5)))
    before = listening()
    first = load_capturing(spec)
    listened = {address: inode for address, inode in listening().items() if address not in before}
    expected = rows_of(first)
    read = count_reads(monkeypatch)
    second = load_capturing(spec)
    layer_bytes = tensor_table(open_checkpoint(str(llama))).packed_bytes()
    assert sum(read) < 2 * layer_bytes[0], "the embedding, and the layer that each has for itself"
    assert second.bytes_read == first.bytes_read, "it does not stand still while it takes what another one has read"
    assert second.digests == first.digests
    assert all(equal(rows_of(second), expected))
    assert all(count == 2 for count in mappings().values())
    assert len(mappings()) == 4
    assert len(listened) == 4
    del first
    gc.collect()
    wait_until_others_listen(listened)
    read.clear()
    third = load_capturing(spec)
    assert sum(read) < 2 * layer_bytes[0]
    assert all(equal(rows_of(third), expected))
    del second, third
    gc.collect()
    assert not mappings()


def mappings() -> dict[str, int]:
    """How often this process maps each piece of memory that is its node's."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:m2ray" in line]
    return {inode: [line[4] for line in lines].count(inode) for inode in {line[4] for line in lines}}


def test_a_copy_is_read_in_the_files_place(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    stage = load_capturing(spec_of(folder, 0, 5, "float32", all_in("checkpoint"), str(tmp_path / "made" / "here")))
    shutil.rmtree(folder)
    assert all(equal(rows_of(stage), rows_of(load_capturing(spec_of(llama, 0, 5, "float32", {})))))
    assert not list((tmp_path / "made" / "here").iterdir()), "the copies have no names"


def test_a_copy_that_cannot_be_read_or_made_is_said(llama: Path, tmp_path: Path) -> None:
    kept = UnnamedFile(str(tmp_path), 5000)
    with pytest.raises(StageError, match="kept on a disk cannot be read in .*: its file has been cut short"):
        kept.read(4000, memoryview(bytearray(2000)))
    (tmp_path / "file").touch()
    with pytest.raises(StageError, match=r"A layer of [\d,]+ bytes cannot be kept in .*file/below: Not a directory"):
        load_capturing(spec_of(llama, 0, 5, "float32", {3: "checkpoint"}, str(tmp_path / "file" / "below")))


def test_a_pass_that_was_given_up_leaves_the_next_one_right(llama: Path) -> None:
    residency: Mapping[int, Residency] = {1: "host", 2: "checkpoint", 3: "checkpoint", 4: "checkpoint"}
    stage = load_capturing(spec_of(llama, 0, 5, "bfloat16", residency))
    expected = rows_of(stage)

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError

    for layer in (1, 2, 3):
        hook = stage._decoder.skeleton.layers[layer].mlp.register_forward_pre_hook(no_room)
        with pytest.raises(torch.OutOfMemoryError):
            rows_of(stage)
        hook.remove()
        assert all(equal(rows_of(stage), expected))


def test_two_layers_are_read_at_a_time_and_never_into_one_buffer(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one's reading does not wait for the first one's last piece; and what a pass that was given up had begun is waited for."""
    stage = load_capturing(spec_of(llama, 0, 5, "bfloat16", dict.fromkeys(range(1, 5), "checkpoint")))
    expected = rows_of(stage)
    bring, two, filled, delays_s = InCheckpoint.bring, threading.Barrier(2), set(), chain([0, 0.5], repeat(0))

    def together(place: InCheckpoint, run: torch.Tensor) -> None:
        two.wait(20)
        bring(place, run)

    def late(place: InCheckpoint, run: torch.Tensor) -> None:
        assert run.data_ptr() not in filled
        filled.add(run.data_ptr())
        time.sleep(next(delays_s))
        bring(place, run)
        filled.remove(run.data_ptr())

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(InCheckpoint, "bring", together)
    assert all(equal(rows_of(stage), expected))
    monkeypatch.setattr(InCheckpoint, "bring", late)
    hook = stage._decoder.skeleton.layers[2].mlp.register_forward_pre_hook(no_room)
    with pytest.raises(torch.OutOfMemoryError):
        rows_of(stage)
    hook.remove()
    assert all(equal(rows_of(stage), expected))


def test_a_checkpoint_of_many_times_the_memory_is_run_in_bounded_memory(tmp_path: Path) -> None:
    """36 layers of 7 MB in float32 files, converted to bfloat16: two landing buffers, a workspace, and a piece for each thread that reads."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 36, "vocab_size": 64}
    folder = make_family(tmp_path / "large", "llama", **sizes)
    table = tensor_table(open_checkpoint(str(folder)))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = peak_bytes()
    stage = load_capturing(spec_of(folder, 0, 36, "bfloat16", all_in("checkpoint", 36)))
    first = rows_of(stage)
    taken = peak_bytes() - before
    assert taken < table.disk_bytes / 3, f"{taken / 1e6:.0f} MB"
    assert all(equal(first, rows_of(load_capturing(spec_of(folder, 0, 36, "bfloat16", {})))))


def peak_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def test_compiled_layers_are_not_compiled_again_for_other_places(llama: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    residency: Mapping[int, Residency] = {1: "host", 2: "checkpoint", 3: "checkpoint", 4: "checkpoint"}
    stage = load_capturing(replace(spec_of(llama, 0, 5, "bfloat16", residency), compile=True))
    first = rows_of(stage)
    assert counters["stats"]["unique_graphs"] == 1, "layers that are ready and packed ones share it"
    for _ in range(3):
        assert all(equal(rows_of(stage), first))
    assert counters["stats"]["unique_graphs"] == 1
