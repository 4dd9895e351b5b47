"""open_run: the bits that went in, only what is committed, and a damaged file is refused by name."""

import json
import math
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from m2ray.activations.job import JobRecord, read_job
from m2ray.activations.json_record import digest
from m2ray.activations.reading.catalogue import Catalogue
from m2ray.activations.reading.part_reader import PartReader
from m2ray.activations.reading.reader import RunReader, open_run
from m2ray.activations.records import commit_key, read_commit
from m2ray.activations.schema import ORIGIN, part_key
from m2ray.activations.writing.commits import claim_run
from m2ray.batches import CapturedLayer, Column, PartSpec
from m2ray.cli import main
from m2ray.errors import M2rayError, NotInRunError, RunConflictError, RunDamagedError, StoreError
from m2ray.storage import LocalStore
from tests.unit import activation_runs as runs

EMBEDDING = PartSpec.of("embedding", None, "float32", 5)
HALF = PartSpec.of("mlp", 7, "float16", 13)
ROUTED = PartSpec("router_topk", 7, (Column("expert_ids", "int16", 3), Column("expert_weights", "float32", 3)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    runs.finished_run(LocalStore(folder), [*runs.PARTS, HALF, EMBEDDING, ROUTED])
    return folder


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "damaged")


def part_path(folder: Path, spec: PartSpec, shard: int) -> Path:
    return folder / part_key(spec, shard, f"{0xA0 + shard:012x}")


def same_bits(tensor: torch.Tensor, expected: np.ndarray) -> bool:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() == expected.tobytes()


def all_bits(spec: PartSpec) -> np.ndarray:
    return np.concatenate([runs.bits(spec, i) for ids in runs.SHARD_SEQUENCES for i in ids])


class ThreadsOf(LocalStore):
    """A store that notes which threads read from it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.threads: set[int] = set()

    def read_range(self, key: str, start: int, num_bytes: int) -> bytearray:
        self.threads.add(threading.get_ident())
        return super().read_range(key, start, num_bytes)


# -- values -----------------------------------------------------------------------------------------------------------


def test_one_sequence_of_one_layer(finished: Path) -> None:
    view = open_run(finished).layer(7).site("residual")
    for ids in runs.SHARD_SEQUENCES:
        for sequence_id in ids:
            tensor = view.sequence(sequence_id)
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, (runs.token_count(sequence_id), runs.WIDTH))
            assert same_bits(tensor, runs.bits(runs.PARTS[1], sequence_id))


def test_rows_are_the_hosts_whatever_the_callers_default_device_is(finished: Path) -> None:
    view = open_run(finished).site("residual").layer(7)
    with torch.device("meta"):
        found = [view.sequence(4), *(shard.activations for shard in view.shards())]
    assert same_bits(found[0], runs.bits(runs.PARTS[1], 4))
    assert same_bits(torch.cat(found[1:]), all_bits(runs.PARTS[1]))


def test_a_run_opened_by_a_relative_path_is_read_on_from_another_folder(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    run = open_run(finished.name)
    monkeypatch.chdir("/")
    assert same_bits(run.site("residual").layer(7).sequence(4), runs.bits(runs.PARTS[1], 4))


def test_tokens_are_read_on_the_callers_thread_alone(finished: Path) -> None:
    """What another thread still holds of the store's stream while Python ends aborts the process: one `m2ray verify` in some hundred."""
    store = ThreadsOf(finished)
    job = read_job(store)
    assert job
    receipt = next(part for part in read_commit(store, job, 0).receipts() if (part.site, part.layer) == ("residual", 0))
    for _ in range(20):
        PartReader(store, runs.PARTS[0], job.run_metadata(), receipt).tokens()
    assert store.threads == {threading.get_ident()}


def test_views_chain_in_any_order(finished: Path) -> None:
    run = open_run(str(finished))
    assert same_bits(run.site("residual").layer(7).sequence(4), runs.bits(runs.PARTS[1], 4))
    assert same_bits(run.layer(7).site("mlp").sequence(4), runs.bits(HALF, 4))
    embedding = run.site("embedding").sequence(4)
    assert (embedding.dtype, tuple(embedding.shape)) == (torch.float32, (12, 5))
    assert same_bits(embedding, runs.bits(EMBEDDING, 4))
    assert run.sites == ("residual", "mlp", "embedding", "router_topk")
    assert run.site("residual").layer_numbers == (0, 7, 11)
    assert run.site("embedding").layer_numbers == ()


def test_several_layers_keep_their_axis_in_the_order_asked_for(finished: Path) -> None:
    residual = open_run(finished).site("residual")
    assert tuple(residual.sequence(4).shape) == (3, 12, 24)
    view = residual.layers([11, 0])
    assert view.layer_numbers == (11, 0)
    for layer, spec in zip(view.sequence(9), (runs.PARTS[2], runs.PARTS[0]), strict=True):
        assert same_bits(layer, runs.bits(spec, 9))
    assert tuple(residual.layers([7]).sequence(4).shape) == (1, 12, 24)


def test_all_rows_and_their_tokens(finished: Path) -> None:
    run = open_run(finished)
    tensor, tokens = run.site("mlp").layer(7).tensor(), run.tokens()
    assert tuple(tensor.shape) == (67, 13)
    assert tensor.dtype == torch.float16
    assert same_bits(tensor, all_bits(HALF))
    order = [i for ids in runs.SHARD_SEQUENCES for i in ids]
    assert tokens["sequence_id"].tolist() == [i for i in order for _ in range(runs.token_count(i))]
    assert tokens["position"].tolist() == [position for i in order for position in range(runs.token_count(i))]
    assert tokens["token_id"].tolist() == [token for i in order for token in runs.token_ids(i).tolist()]
    stacked = run.site("residual").tensor()
    assert tuple(stacked.shape) == (3, 67, 24)
    assert all(same_bits(rows, all_bits(spec)) for rows, spec in zip(stacked, runs.PARTS, strict=True))


def same_columns(found: dict[str, torch.Tensor], expected: np.ndarray) -> bool:
    ids, weights = found["expert_ids"], found["expert_weights"]
    assert (ids.dtype, weights.dtype, ids.shape[1:], weights.shape[1:]) == (torch.int16, torch.float32, (3,), (3,))
    return same_bits(ids, expected[:, :6]) and same_bits(weights, expected[:, 6:])


@pytest.mark.parametrize("compression", ["none", "planes"])
def test_the_chosen_experts_are_two_columns_wherever_rows_are_read(tmp_path: Path, compression: str) -> None:
    runs.finished_run(LocalStore(tmp_path), [*runs.PARTS, ROUTED], [compression])
    run, expected = open_run(tmp_path), all_bits(ROUTED)
    view = run.site("router_topk").layer(7)
    assert same_columns(view.tensor(), expected)
    assert same_columns(view.sequence(4), runs.bits(ROUTED, 4))
    assert same_columns(view.rows([5, 0, 60, 5]), expected[[5, 0, 60, 5]])
    for mistaken in (np.arange(67) < 5, [1.5], [[1, 2]], ["1"]):  # none of them is a number of 0, 1 or 2
        with pytest.raises(NotInRunError, match=r"not by .*np\.flatnonzero\(mask\)"):
            view.rows(mistaken)
    assert len(view.rows([])["expert_ids"]) == 0
    assert same_columns(next(view.shards()).activations, expected[:25])
    assert tuple(run.site("router_topk").tensor()["expert_ids"].shape) == (1, 67, 3)
    rows = {}
    for batch in view.stream(batch_rows=16):
        places = zip(batch["sequence_id"].tolist(), batch["position"].tolist(), strict=True)
        rows.update({place: (batch["expert_ids"][number], batch["expert_weights"][number]) for number, place in enumerate(places)})
    ids, weights = (torch.stack(column) for column in zip(*(rows[row[0], row[1]] for row in run.tokens().tolist()), strict=True))
    assert same_columns({"expert_ids": ids, "expert_weights": weights}, expected)
    assert same_bits(run.site("residual").layer(7).tensor(), all_bits(runs.PARTS[1]))
    assert b"planes" not in (tmp_path / part_key(ROUTED, 0, f"{0xA0:012x}")).read_bytes()


@pytest.mark.parametrize("ask", [lambda view: view.iterator(), lambda view: view.mean_norm(), lambda view: view.as_data_provider()])
def test_what_takes_one_tensor_says_that_there_are_two(finished: Path, ask: Callable[[RunReader], object]) -> None:
    with pytest.raises(NotInRunError, match="router_topk have the columns expert_ids, expert_weights"):
        ask(open_run(finished).site("router_topk").layer(7))


def test_shard_by_shard(finished: Path) -> None:
    shards = list(open_run(finished).site("residual").layer(11).shards())
    assert [shard.index for shard in shards] == [0, 1, 2]
    assert same_bits(torch.cat([shard.activations for shard in shards]), all_bits(runs.PARTS[2]))
    assert np.array_equal(np.concatenate([shard.tokens for shard in shards]), open_run(finished).tokens())
    assert tuple(next(open_run(finished).site("residual").shards()).activations.shape) == (3, 25, 24)


def test_tensors_are_the_readers_own(finished: Path) -> None:
    view = open_run(finished).site("residual").layer(7)
    view.sequence(4).zero_()
    assert same_bits(view.sequence(4), runs.bits(runs.PARTS[1], 4))


@pytest.mark.parametrize(("told", "is_right"), [({}, True), (dict.fromkeys(ORIGIN), True), ({"model": "/models/other"}, False)])
def test_a_part_names_its_origin_unless_it_is_from_before_any_did(
    told: dict[str, str | None], is_right: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        said = JobRecord.run_metadata
        patch.setattr(JobRecord, "run_metadata", lambda job: {key: text for key, text in (said(job) | told).items() if text is not None})
        runs.finished_run(LocalStore(tmp_path))
    footer = pq.read_schema(part_path(tmp_path, runs.PARTS[0], 0)).metadata
    if not told:
        job = json.loads((tmp_path / "job.json").read_text())
        versions = ", ".join(f"{name} {version}" for name, version in {"m2ray": job["m2ray_version"], **job["versions"]}.items())
        assert [footer[f"m2ray.{key}".encode()].decode() for key in ORIGIN] == ["/models/m", "prompts.jsonl", versions]
        assert f"python {platform.python_version()}" in versions
    with nullcontext() if is_right else pytest.raises(RunDamagedError, match=r"m2ray\.model = /models/other, not /models/m"):
        open_run(tmp_path).layer(0).tensor()


def test_mean_norm(tmp_path: Path) -> None:
    """float64 sums of float32 rows, against torch on the whole; a row of large numbers would overflow a float16 sum."""
    store, part = LocalStore(tmp_path), PartSpec.of("residual", 0, "float16", 64)
    run = claim_run(store, runs.job(store, [part]))
    generator, rows = torch.Generator().manual_seed(1), []
    for shard in runs.shards():
        writer = runs.writer(store, run.job)
        for micro_batch in runs.micro_batches(shard):
            rows.append((torch.randn(micro_batch.num_tokens, 64, generator=generator) * 2000).half())
            bits = rows[-1].view(torch.uint8).numpy()
            writer.submit("a1", micro_batch, [CapturedLayer("residual", 0, (bits,))], timeout_s=10)
        run.commit(shard, "a1", writer.collect(shard.index, "a1", 10), [(len(shard.sequence_ids), 1)], 1.0)
        writer.close()
    expected = torch.cat(rows).double().norm(dim=1).mean().item()
    assert open_run(tmp_path).layer(0).mean_norm() == pytest.approx(expected, rel=1e-12)


# -- what a run is ----------------------------------------------------------------------------------------------------


def test_facts(finished: Path) -> None:
    run = open_run(finished)
    assert run.is_complete
    assert (run.num_tokens, run.num_shards, run.num_files) == (67, 3, 18)
    assert run.num_bytes == sum(path.stat().st_size for path in (finished / "data").rglob("*.parquet"))
    assert run.layer(7).num_files == 9
    assert run.job.model.model_type == "minimax_m2"
    assert len(run.sequences) == 12
    assert run.sequences["sequence_id"].to_pylist() == list(range(12))
    assert {row["sequence_id"]: row["reason"] for row in run.quarantined.to_pylist()} == runs.QUARANTINED


def test_a_run_from_before_there_were_columns_is_read_as_it_was(damaged: Path) -> None:
    """Of format 2, too: parts with one dtype and width, of one site."""
    path = damaged / "job.json"
    fields = json.loads(path.read_text())
    fields["parts"] = [{**part, "dtype": "bfloat16", "width": 24} for part in fields["parts"] if part["site"] == "residual"]
    for part in fields["parts"]:
        del part["columns"]
    fields["options"] |= {"sites": "residual", "layers": [0, 7, 11]}
    path.write_text(json.dumps(fields | {"digest": digest(fields)}, indent=2))
    shutil.rmtree(damaged / "_commits")
    for name in ("manifest.parquet", "_SUCCESS"):
        (damaged / name).unlink()
    run = open_run(damaged)
    assert run.parts == runs.PARTS
    assert run.job.options["sites"] == {"residual": [0, 7, 11]}
    fields["parts"][1]["width"] = "24"
    path.write_text(json.dumps(fields | {"digest": digest(fields)}, indent=2))
    with pytest.raises(RunDamagedError, match="job.json"):
        open_run(damaged)


def test_layers_of_a_store_far_away_are_not_waited_for_one_by_one(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, summed = threading.Barrier(3, timeout=30), RunReader.mean_norm

    def mean_norm(view: RunReader, most_rows: int | None = None) -> float:
        if view.parts[0].site == "residual":  # of three layers
            together.wait()
        return summed(view, most_rows)

    monkeypatch.setattr(RunReader, "mean_norm", mean_norm)
    shown = CliRunner().invoke(main, ["inspect", str(finished), "--json"])
    assert shown.exit_code == 0, shown.output
    assert [each["layer"] for each in json.loads(shown.stdout)["layers"] if each["site"] == "residual"] == [0, 7, 11]


def test_a_run_says_what_it_holds(finished: Path) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(finished), "--json"])
    (routed,) = (each for each in json.loads(shown.stdout)["layers"] if each["site"] == "router_topk")
    assert (routed["layer"], routed["mean_norm"]) == (7, None)
    assert routed["columns"] == [
        {"name": "expert_ids", "dtype": "int16", "width": 3},
        {"name": "expert_weights", "dtype": "float32", "width": 3},
    ]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: run.layer(3), "no layer 3 .*It has layers 0, 7, 11"),
        (lambda run: run.layers([0, 12]), "no layer 12 "),
        (lambda run: run.site("router_logits"), "no site 'router_logits'.*It has: residual, mlp, embedding, router_topk"),
        (lambda run: run.site("embedding").layer(0), "It has no layers"),
        (lambda run: run.layer(7).sequence(0), r"several sites|has the sites residual, mlp.*\.site\(NAME\)"),
        (lambda run: run.site("mlp").sequence(12), "no sequence 12: .* sequences 0 to 11"),
        (lambda run: run.site("mlp").sequence(-1), "no sequence -1"),
        (lambda run: run.site("mlp").sequence(6), r"Sequence 6 \(row row-6\) .*quarantined: not a string but int"),
    ],
)
def test_what_is_not_there_is_said_clearly(finished: Path, ask: Callable[[RunReader], object], message: str) -> None:
    with pytest.raises(NotInRunError, match=message):
        ask(open_run(finished))


def test_only_committed_shards_are_seen(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = claim_run(store, runs.job(store))
    assert tuple(open_run(tmp_path).tensor().shape) == (3, 0, 24)
    assert math.isnan(open_run(tmp_path).layer(0).mean_norm())
    runs.write_shard(store, run.job, runs.shard(0), "a1")
    runs.commit_shard(run, runs.shard(1), "a1")
    runs.write_shard(store, run.job, runs.shard(1), "b2")
    unfinished = store.open_part(part_key(runs.PARTS[0], 2, "a1"))
    unfinished.write(b"PAR1 half a part")
    seen = open_run(tmp_path)
    assert not seen.is_complete
    assert (seen.num_shards, seen.num_tokens, seen.num_files) == (1, 18, 3)
    assert [shard.index for shard in seen.shards()] == [1]
    assert set(seen.tokens()["sequence_id"].tolist()) == {1, 3, 11}
    assert same_bits(seen.layer(0).sequence(3), runs.bits(runs.PARTS[0], 3))
    with pytest.raises(NotInRunError, match="Sequence 4 is not extracted yet: its shard 0"):
        seen.layer(0).sequence(4)
    unfinished.abort()


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no run at .*nowhere: it has no job.json"):
        open_run(tmp_path / "nowhere")
    LocalStore(tmp_path).put("photo.jpg", b"")
    with pytest.raises(RunConflictError, match="photo.jpg"):
        open_run(tmp_path)


def test_importing_m2ray_stays_light() -> None:
    script = "import sys, m2ray, m2ray.activations.reading.reader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], timeout=60, check=False).returncode == 0


def test_the_documented_lines_run(damaged: Path) -> None:
    """Every line of Python in docs/data_format.md, in order, on a run where a driver that lost left parts. Those of Ray Data run in tests/ray."""
    finished = damaged
    store = LocalStore(finished)
    runs.write_shard(store, open_run(finished).job, runs.shard(1), "dead")
    page = (Path(__file__).parents[2] / "docs" / "data_format.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import ray" not in block]
    assert len(blocks) == 14
    names: dict[str, Any] = {"RUN": str(finished)}
    for block in blocks:
        exec(block, names)
    for rows, layer_7 in (
        (names["table"]["activation"].to_pylist(), all_bits(runs.PARTS[1])),
        ([row[3] for row in names["found"]], runs.bits(runs.PARTS[1], 4)),
        (names["selected"]["activation"].to_list(), runs.bits(runs.PARTS[1], 4)),
        (names["frame"]["activation"].tolist(), all_bits(runs.PARTS[1])),
        ([row["activation"][0].as_py() for row in names["dataset"]], all_bits(runs.PARTS[1])),
    ):
        assert same_bits(names["numbers"](rows), layer_7)
    routed = open_run(finished).site("router_topk").layer(7)
    ids, weights = routed.tensor()["expert_ids"], routed.tensor()["expert_weights"]
    order = torch.from_numpy(open_run(finished).tokens().argsort())
    assert torch.equal(names["experts"], ids[order])
    assert same_bits(names["weights"], weights[order].numpy().view(np.uint8))
    assert names["load"].select("expert_ids", "len").rows() == sorted(Counter(ids.flatten().tolist()).items())
    assert [(row["sequence_id"][0].as_py(), row["position"][0].as_py()) for row in names["dataset"]] == open_run(finished).tokens()[
        ["sequence_id", "position"]
    ].tolist()


# -- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path, folder: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path, folder: Path) -> None:
    path.unlink()


def overwrite_with_zeros(path: Path, folder: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def put_layer_0_there(path: Path, folder: Path) -> None:
    shutil.copy(part_path(folder, runs.PARTS[0], 1), path)


def put_shard_2_there(path: Path, folder: Path) -> None:
    shutil.copy(part_path(folder, runs.PARTS[1], 2), path)


def change_in_footer(old: bytes, new: bytes) -> Callable[[Path, Path], None]:
    def damage(path: Path, folder: Path) -> None:
        data = path.read_bytes()
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        assert data[footer:].count(old) == 1
        assert len(old) == len(new)
        path.write_bytes(data[:footer] + data[footer:].replace(old, new))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"has \d+ bytes; \d+ bytes were written"),
        (remove, "it is absent"),
        (overwrite_with_zeros, "are not what was written"),
        (put_layer_0_there, "are not what was written"),
        (put_shard_2_there, r"bytes; \d+ bytes were written"),
        (change_in_footer(b"bfloat16", b"bfloat61"), "are not what was written"),
        (change_in_footer(b"[24]", b"[42]"), "are not what was written"),
        (change_in_footer(b"0000000000a1", b"0000000000a9"), "are not what was written"),
    ],
)
def test_a_damaged_part_is_refused_by_name(damaged: Path, damage: Callable[[Path, Path], None], message: str) -> None:
    path = part_path(damaged, runs.PARTS[1], 1)
    damage(path, damaged)
    view = open_run(damaged).site("residual").layer(7)
    for read in (lambda: view.sequence(3), view.tensor, view.tokens, lambda: list(view.shards()), view.mean_norm):
        with pytest.raises(RunDamagedError, match=f"{path} is damaged: .*{message}"):
            read()
    assert same_bits(view.sequence(4), runs.bits(runs.PARTS[1], 4)), "another shard's part is not touched"


@pytest.mark.parametrize(("sequence_id", "num_tokens"), [(3, 6), (3, 8), (2, 1), (12, 4)])
def test_a_part_without_exactly_the_sequences_positions_is_damaged(finished: Path, sequence_id: int, num_tokens: int) -> None:
    catalogue = Catalogue(LocalStore(finished))
    part = catalogue.open_part(runs.PARTS[1], catalogue.part_of_shard(runs.PARTS[1], 1))
    assert len(part.sequence(3, runs.token_count(3))) == 7
    with pytest.raises(RunDamagedError, match=f"does not hold the {num_tokens} rows of sequence {sequence_id}"):
        part.sequence(sequence_id, num_tokens)


def test_swapped_layers_of_one_size_are_refused(tmp_path: Path) -> None:
    """Two layers' files of the same size change places: only their footers, whose digests the commit has, can tell."""
    store = LocalStore(tmp_path)
    run = claim_run(store, runs.job(store, [PartSpec.of("residual", layer, "bfloat16", 24) for layer in (3, 4)]))
    runs.commit_shard(run, runs.shard(0), "a1")
    three, four = (tmp_path / part.key for part in read_commit(store, run.job, 0).receipts())
    assert three.stat().st_size == four.stat().st_size
    content = three.read_bytes()
    shutil.copy(four, three)
    four.write_bytes(content)
    with pytest.raises(RunDamagedError, match=f"{three} is damaged: its page indexes or its footer are not what was written"):
        open_run(tmp_path).layer(3).sequence(4)
    with pytest.raises(RunDamagedError, match=f"{four} is damaged: its page indexes or its footer are not what was written"):
        open_run(tmp_path).layers([4, 3]).tensor()


def test_every_flipped_byte_of_a_footer_is_refused_or_harmless(damaged: Path) -> None:
    """No flip may crash, or change what is read in silence. Offsets of the activations are what this cannot promise."""
    path = part_path(damaged, runs.PARTS[1], 1)
    good = path.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    rng, refused = np.random.default_rng(3), []
    for place in rng.choice(np.arange(footer, len(good)), 600, replace=False).tolist():
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            tensor = open_run(damaged).site("residual").layer(7).sequence(3)
        except M2rayError as error:
            refused.append(str(error))
        else:
            assert same_bits(tensor, runs.bits(runs.PARTS[1], 3)), place
    assert len(refused) > 100
    assert all(str(path) in message for message in refused)


def test_damaged_records_are_refused_by_name(damaged: Path) -> None:
    manifest = damaged / "manifest.parquet"
    good = manifest.read_bytes()
    manifest.write_bytes(good[:-1])
    with pytest.raises(RunDamagedError, match=r"manifest\.parquet"):
        open_run(damaged)
    manifest.write_bytes(good)
    sequences = sorted((damaged / "sequences").iterdir())[1]
    data = bytearray(sequences.read_bytes())
    data[50] ^= 1
    sequences.write_bytes(data)
    run = open_run(damaged)
    assert same_bits(run.site("mlp").layer(7).sequence(4), runs.bits(HALF, 4)), "it lies in the other file"
    for read in (lambda: run.sequences, lambda: run.site("mlp").sequence(5)):
        with pytest.raises(RunDamagedError, match=f"{sequences} is damaged"):
            read()
    (damaged / "_SUCCESS").unlink()
    (damaged / commit_key(1)).write_bytes(b"{}")
    with pytest.raises(RunDamagedError, match=r"_commits/shard-000001\.json"):
        open_run(damaged)
