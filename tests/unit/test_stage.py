"""A stage as the chain uses it: what it promises, what it captures, and what it refuses."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import masking_utils

from m2ray.batches import LayerSpan, MicroBatch, PartSpec
from m2ray.errors import ConfigError, StageError
from m2ray.model.boundary import Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, load_stage
from m2ray.selection import Selection
from tests.reference import chain_rows, load_capturing, load_reference, make_family, micro_batch_of, reference_rows, same_bits

LENGTHS = (3, 8, 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("llama") / "llama", "llama")


def spec_of(folder: Path, start: int, stop: int, compute: str = "float32") -> StageSpec:
    return StageSpec(str(folder), LayerSpan(start, stop), compute, "auto", "cpu", 1)


def load(spec: StageSpec, layers: tuple[int, ...] | None = None, store: str | None = None) -> Stage:
    return load_capturing(spec, layers, store)


def test_parts_say_what_forward_will_give(llama: Path) -> None:
    stage = load(spec_of(llama, 1, 4), (1, 3), "bfloat16")
    assert stage.parts == (PartSpec.of("residual", 1, "bfloat16", 48), PartSpec.of("residual", 3, "bfloat16", 48))
    micro_batch = micro_batch_of(LENGTHS, 96)
    captured = stage.forward(micro_batch, Boundary(torch.zeros(3, 8, 48))).captured
    assert [(one.site, one.layer) for one in captured] == [("residual", 1), ("residual", 3)]
    assert all(one.columns[0].shape == (12, 96) and one.columns[0].dtype == np.uint8 for one in captured)


def test_ends_of_the_chain_know_themselves(llama: Path) -> None:
    first, middle, last = (load(spec_of(llama, *span)) for span in ((0, 1), (1, 4), (4, 5)))
    assert [(stage.is_first, stage.is_last) for stage in (first, middle, last)] == [(True, False), (False, False), (False, True)]


def test_a_stage_counts_its_bytes(llama: Path) -> None:
    stage = load(spec_of(llama, 0, 2, compute="bfloat16"))
    assert stage.bytes_read == stage.needed_bytes
    assert stage.parameter_bytes == stage.needed_bytes // 2


def test_what_a_warm_up_lost_is_nobodys_also_where_it_finds_no_room(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load(spec_of(llama, 0, 5), (1, 3), "int8")
    computed, forward = [], Stage._pass

    def no_room_for_two(self: Stage, *given: Any) -> Any:
        computed.append(given)
        if len(computed) == 2:
            raise torch.OutOfMemoryError
        return forward(self, *given)

    monkeypatch.setattr(Stage, "_pass", no_room_for_two)
    with pytest.raises(torch.OutOfMemoryError):
        stage.warm_up(64)
    assert stage.losses() == ()


def test_rows_come_in_token_rows_order(llama: Path) -> None:
    """The embedding's table is its own position: layer outputs of one-token prompts identify the token."""
    stage = load(spec_of(llama, 0, 5))
    tokens = [5, 9, 7]
    together = MicroBatch(0, 0, True, np.array([4, 1, 8]), np.ones(3, np.int32), np.array([[token, 0] for token in tokens], np.int32))
    rows = chain_rows([stage], together)[-1]
    for index, token in enumerate(tokens):
        single = MicroBatch(0, 0, True, np.array([0]), np.ones(1, np.int32), np.array([[token]], np.int32))
        assert torch.allclose(rows[index], chain_rows([stage], single)[-1][0], rtol=1e-4, atol=1e-5)
    assert Selection().token_rows(together)["token_id"].tolist() == tokens


def test_nobody_looks_for_several_sequences_in_a_row(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host would wait for the answer in each pass. Rows are transformers' own, which does look: the other tests."""
    stage, looks = load(spec_of(llama, 0, 5)), lambda *_: pytest.fail("transformers looked")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looks)
    assert chain_rows([stage], micro_batch_of(LENGTHS, 96))
    assert masking_utils.find_packed_sequence_indices is looks, "for others it is as it was"


def test_rows_of_mixed_lengths_match_token_rows(llama: Path) -> None:
    micro_batch = micro_batch_of(LENGTHS, 96)
    rows = chain_rows([load(spec_of(llama, 0, 5))], micro_batch)
    expected = reference_rows(load_reference(llama, torch.float32), micro_batch)
    identities = Selection().token_rows(micro_batch)
    assert len(identities) == len(rows[0]) == 12
    assert identities["sequence_id"].tolist() == [100] * 3 + [101] * 8 + [102]
    assert all(same_bits(ours, theirs) for ours, theirs in zip(rows, expected, strict=True))


def test_captured_rows_survive_later_micro_batches(llama: Path) -> None:
    stage = load(spec_of(llama, 0, 5))
    first = stage.forward(micro_batch_of(LENGTHS, 96), None).captured
    kept = [one.columns[0].copy() for one in first]
    again = stage.forward(micro_batch_of(LENGTHS, 96), None).captured
    stage.forward(micro_batch_of(LENGTHS, 96, seed=9), None)
    assert all(np.array_equal(one.columns[0], copy) for one, copy in zip(first, kept, strict=True))
    assert all(np.array_equal(one.columns[0], other.columns[0]) for one, other in zip(first, again, strict=True))
    assert not any(np.shares_memory(one.columns[0], other.columns[0]) for one, other in zip(first, again, strict=True))


def test_hidden_states_are_not_what_was_captured(llama: Path) -> None:
    """Whoever gets the hidden states may change them in place; the rows must not follow."""
    output = load(spec_of(llama, 0, 2)).forward(micro_batch_of((8,), 96), None)
    before = output.captured[-1].columns[0].copy()
    assert output.boundary is not None
    with torch.inference_mode():
        output.boundary.hidden_BTH.zero_()
    assert np.array_equal(output.captured[-1].columns[0], before)


def test_a_stage_may_capture_nothing(llama: Path) -> None:
    stage = load(spec_of(llama, 0, 2), ())
    output = stage.forward(micro_batch_of(LENGTHS, 96), None)
    assert (stage.parts, output.captured) == ((), ())
    assert output.boundary is not None
    assert output.boundary.hidden_BTH.shape == (3, 8, 48)


def test_values_that_float16_cannot_hold_name_layer_sequences_and_value(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(llama, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][50] *= 1e6
            save_file(tensors, file, metadata={"format": "pt"})
    micro_batch = micro_batch_of((2, 3, 2, 2), 40)
    micro_batch.token_ids_BT[1, 2] = micro_batch.token_ids_BT[3, 0] = 50
    row = reference_rows(load_reference(folder, torch.float32), micro_batch)[0]
    with pytest.raises(StageError) as caught:
        load(spec_of(folder, 0, 2), store="float16").forward(micro_batch, None)
    message = str(caught.value)
    assert message.startswith("Residual of layer 0, sequences 101, 103: values from ")
    assert f"to {row.max():g} do not fit float16" in message
    load(spec_of(folder, 0, 2), store="bfloat16").forward(micro_batch, None)
    micro_batch.token_ids_BT[:] = 5
    load(spec_of(folder, 0, 2), store="float16").forward(micro_batch, None)


def test_padding_that_overflows_stops_nothing(llama: Path) -> None:
    stage = load(spec_of(llama, 1, 3), store="float16")
    hidden_BTH = torch.ones(1, 4, 48)
    hidden_BTH[0, 3] = 1e6
    one_short = replace(micro_batch_of((4,), 96), token_counts=np.array([3], np.int32))
    stage.forward(one_short, Boundary(hidden_BTH))
    with pytest.raises(StageError, match="do not fit float16"):
        stage.forward(micro_batch_of((4,), 96), Boundary(hidden_BTH))


@pytest.mark.parametrize("store", ["float32", "bfloat16"])
def test_rows_that_are_no_numbers_stop_the_run(llama: Path, store: str) -> None:
    hidden_BTH = torch.ones(2, 4, 48)
    hidden_BTH[1, 2] = float("nan")
    with pytest.raises(StageError, match="Residual of layer 1, sequences 101: values from nan to nan"):
        load(spec_of(llama, 1, 3), store=store).forward(micro_batch_of((4, 4), 96), Boundary(hidden_BTH))


def test_threads_are_set_for_the_process(llama: Path) -> None:
    before = torch.get_num_threads()
    try:
        load(replace(spec_of(llama, 4, 5), threads=2))
        assert torch.get_num_threads() == 2
        load(replace(spec_of(llama, 4, 5), threads=None))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"span": LayerSpan(3, 6)}, "the model has layers 0 to 4"), ({"attn_implementation": "flash"}, "attn_implementation = 'flash'")],
)
def test_a_spec_that_does_not_fit_the_model_is_refused(llama: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_stage(replace(spec_of(llama, 0, 3), **change), lambda *_: None)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"residual": (0, 5)}, r"Captured layers \[5\]: the model has layers 0 to 4"),
        ({"router_logits": (0,)}, "'router_logits': a llama has no such site"),
    ],
)
def test_what_the_model_does_not_have_is_not_begun(llama: Path, sites: dict[str, tuple[int, ...]], message: str) -> None:
    stage = load(spec_of(llama, 0, 3), (1,))
    with pytest.raises(ConfigError, match=message):
        stage.begin(CaptureSpec(sites, "float32"))
    assert [part.layer for part in stage.parts] == [1]


def test_a_loaded_stage_takes_one_job_after_another(llama: Path) -> None:
    """Of layers for the whole model each takes its own."""
    stage, micro_batch = load_stage(spec_of(llama, 0, 4), lambda *_: None), micro_batch_of(LENGTHS, 96)
    assert stage.forward(micro_batch, None).captured == ()
    for sites, store_dtype in (({"residual": (1, 4)}, "float32"), ({"residual": (0, 1, 3)}, "bfloat16"), ({}, "float32")):
        stage.begin(CaptureSpec(sites, store_dtype))
        fresh = load(spec_of(llama, 0, 4), sites.get("residual", ()), store_dtype)
        assert stage.parts == fresh.parts
        expected = fresh.forward(micro_batch, None).captured
        for one, other in zip(stage.forward(micro_batch, None).captured, expected, strict=True):
            assert (one.layer, one.columns[0].tobytes()) == (other.layer, other.columns[0].tobytes())
        assert [part.layer for part in stage.parts] == [layer for layer in sites.get("residual", ()) if layer < 4]


def test_a_spec_crosses_processes(llama: Path) -> None:
    spec = spec_of(llama, 0, 2)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_hidden_states_of_another_shape_or_dtype_are_a_bug(llama: Path) -> None:
    stage = load(spec_of(llama, 1, 3))
    with pytest.raises(AssertionError, match="hidden states"):
        stage.forward(micro_batch_of(LENGTHS, 96), Boundary(torch.zeros(3, 7, 48)))
    with pytest.raises(AssertionError, match="hidden states"):
        stage.forward(micro_batch_of(LENGTHS, 96), Boundary(torch.zeros(3, 8, 48, dtype=torch.bfloat16)))
    with pytest.raises(AssertionError, match="the first span"):
        stage.forward(micro_batch_of(LENGTHS, 96), None)


@pytest.mark.parametrize("batch_tokens", [1, 3, 7, 1500])
def test_any_size_can_be_warmed_up(llama: Path, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, tried = load(spec_of(llama, 0, 1)), []
    monkeypatch.setattr(Stage, "_zeros", lambda self, *shape, was=Stage._zeros: (tried.append(shape), was(self, *shape))[1])
    left: list[int] = []
    stage.warm_up(batch_tokens, on_left=left.append)
    assert 0 <= batch_tokens - np.prod(tried[0]) < tried[0][0], "the first is as full as can be"
    assert left == [3, 2, 1, 0]


def test_a_request_between_two_micro_batches_changes_neither(llama: Path) -> None:
    """What is taken of one micro-batch alone is what a stage takes that takes nothing else; the job's rows and losses know nothing of it."""
    job, request = (
        CaptureSpec({"residual": (1,), "mlp": (0, 2)}, "int8"),
        CaptureSpec({"residual": (4,), "attention": (3,)}, "float32", Selection("last")),
    )
    micro_batches = [micro_batch_of(LENGTHS, 96, seed=seed) for seed in range(3)]

    def stage_for(capture: CaptureSpec) -> Stage:
        stage = load_stage(spec_of(llama, 0, 5), lambda *_: None)
        stage.begin(capture)
        return stage

    alone, asked, mixed = stage_for(job), stage_for(request), stage_for(job)
    taking = mixed.taking(request)
    expected = [alone.forward(micro_batches[0], None), asked.forward(micro_batches[1], None), alone.forward(micro_batches[2], None)]
    found = [mixed.forward(micro_batch, None, wanted) for micro_batch, wanted in zip(micro_batches, (None, taking, None), strict=True)]
    for one, other in zip(found, expected, strict=True):
        assert [(each.site, each.layer) for each in one.captured] == [(each.site, each.layer) for each in other.captured]
        for captured, wanted in zip(one.captured, other.captured, strict=True):
            assert all(np.array_equal(*both) for both in zip(captured.columns, wanted.columns, strict=True))
    assert mixed.losses() == alone.losses()
    with pytest.raises(ConfigError, match="layers 0 to 4"):
        mixed.taking(CaptureSpec({"residual": (9,)}, "float32"))
