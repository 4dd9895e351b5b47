"""Waves inside a stage: several micro-batches through a layer before the next give what they give one at a time, bit by bit."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m2ray.batches import LayerSpan, MicroBatch, Residency
from m2ray.model.boundary import CONTRACTS, Boundary
from m2ray.model.capture import CaptureSpec
from m2ray.model.stage import Stage, StageSpec, layer_runs, load_stage
from m2ray.model.stage_output import StageOutput
from m2ray.selection import Selection
from tests.reference import make_family, micro_batch_of, same_bits

VOCABULARY = 96
FAMILIES = [*sorted(CONTRACTS.keys() - {"glm5_next_text", "hy_v4_vl_text", "falcon_mamba", "mamba2"}), "gpt2", "llama", "qwen3_moe"]
"""Those whose layers need more than hidden states, and one with something of its own before the layers; each proof tries waves too."""

CUTS: tuple[Mapping[int, Residency], ...] = (dict.fromkeys(range(5), "host"), {1: "host", 4: "host"})


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("experts"), "qwen3_moe")


def stage_of(folder: Path, span: tuple[int, int], residency: Mapping[int, Residency], capture: CaptureSpec, **changed: Any) -> Stage:
    spec = StageSpec(str(folder), LayerSpan(*span), "bfloat16", "auto", "cpu", 1, residency=residency, wave_tokens=1 << 20)
    stage = load_stage(replace(spec, **changed), lambda *_: None)
    stage.begin(capture)
    return stage


def batches() -> list[MicroBatch]:
    shapes = ((9, 23, 1, 17, 4), (6, 6), (30,))
    return [replace(micro_batch_of(lengths, VOCABULARY, seed), index=seed) for seed, lengths in enumerate(shapes)]


def one_at_a_time(stages: Sequence[Stage]) -> list[StageOutput]:
    found = []
    for micro_batch in batches():
        boundary: Boundary | None = None
        for stage in stages:
            found.append(stage.forward(micro_batch, boundary))
            boundary = found[-1].boundary
    return found


def in_a_wave(stages: Sequence[Stage]) -> list[StageOutput]:
    found: list[StageOutput] = []
    entering: deque[tuple[MicroBatch, Boundary | None]] = deque((micro_batch, None) for micro_batch in batches())
    for stage in stages:
        outputs = list(stage.forward_wave(entering))
        assert not entering
        entering = deque((output.micro_batch, output.boundary) for output in outputs if output.leaves)
        found += outputs
    return found


def values(outputs: Sequence[StageOutput]) -> dict[tuple[int, str, int | None, str], bytes]:
    """Everything that was captured, by micro-batch, site, layer and column or kind."""
    found = {}
    for output in outputs:
        for each in output.captured:
            named = {**{str(number): bits for number, bits in enumerate(each.columns)}, **each.statistics}
            for name, array in named.items():
                place = output.micro_batch.index, each.site, each.layer, name
                assert place not in found
                found[place] = array.tobytes()
    return found


def test_runs_begin_where_a_layer_is_not_ready() -> None:
    assert layer_runs(LayerSpan(2, 7), {}) == (LayerSpan(2, 7),)
    assert layer_runs(LayerSpan(2, 7), {6: "host"}) == (LayerSpan(2, 7),), "one layer stays where it runs"
    assert layer_runs(LayerSpan(2, 7), {1: "host", 3: "host", 4: "gpu", 5: "host", 6: "host", 7: "host"}) == tuple(
        LayerSpan(*ends) for ends in ((2, 5), (5, 6), (6, 7))
    )


def test_a_wave_gives_what_micro_batches_give_one_at_a_time(folder: Path) -> None:
    """Of one stage, layer by layer, and of two, the second of which gets what the families hand on."""
    for spans, residency in zip((((0, 5),), ((0, 2), (2, 5))), CUTS, strict=True):
        stages = [stage_of(folder, span, residency, CaptureSpec({}, "bfloat16"), with_final_norm=True) for span in spans]
        ends = {"embedding", "final_norm"} & stages[0]._decoder.site_layers.keys()
        for stage in stages:
            stage.begin(CaptureSpec({"residual": (0, 1, 2, 3, 4), **dict.fromkeys(sorted(ends), ())}, "bfloat16"))
        expected, found = one_at_a_time(stages), in_a_wave(stages)
        assert values(found) == values(expected)
        assert len(values(found)) == 3 * (5 + len(ends))
        for ours, theirs in zip((each for each in found if each.boundary), (each for each in expected if each.boundary), strict=True):
            assert ours.boundary is not None
            assert theirs.boundary is not None
            tensors = ours.boundary.tensors, theirs.boundary.tensors
            assert tensors[0].keys() == tensors[1].keys()
            assert all(same_bits(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("capture", [
    CaptureSpec({"mlp": (0, 3), "router_topk": (2,), "residual": (4,)}, "int8", Selection("last")),
    CaptureSpec({"attention": (1,)}, "float32", Selection("mean"), {"moments": {"residual": (0, 4)}, "covariance": {"residual": (4,)}}),
])  # fmt: skip
def test_chosen_tokens_statistics_and_rows_in_8_bits_are_the_same(experts: Path, capture: CaptureSpec) -> None:
    stage = stage_of(experts, (0, 5), CUTS[0], capture)
    expected = values(one_at_a_time([stage]))
    losses = stage.losses()
    stage.begin(capture)
    assert values(in_a_wave([stage])) == expected
    assert stage.losses() == losses


def test_a_wave_gives_layer_by_layer_what_it_captures(experts: Path) -> None:
    """So host memory never holds the rows of a wave times all layers; and layers wait for nobody who asks for nothing more."""
    stage = stage_of(experts, (0, 5), CUTS[0], CaptureSpec({"residual": (0, 1, 2, 3, 4)}, "float32"))
    entering: deque[tuple[MicroBatch, Boundary | None]] = deque((micro_batch, None) for micro_batch in batches())
    came = []
    for output in stage.forward_wave(entering):
        came.append((output.micro_batch.index, [each.layer for each in output.captured], output.leaves))
        assert len(entering) == max(0, 3 - len(came)), "computed as it is asked for"
    assert came == [(index, [layer], layer == 4) for layer in range(5) for index in range(3)]


def test_a_wave_that_is_given_up_leaves_the_next_one_right(experts: Path) -> None:
    stage = stage_of(experts, (0, 5), CUTS[0], CaptureSpec({"residual": (0, 4)}, "float32"))
    expected = values(one_at_a_time([stage]))
    given_up = stage.forward_wave(deque((micro_batch, None) for micro_batch in batches()))
    for _ in range(7):
        next(given_up)
    del given_up
    assert values(in_a_wave([stage])) == expected
    assert values(one_at_a_time([stage])) == expected


def test_a_layer_is_brought_once_a_wave(experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of(experts, (0, 5), {1: "host", 3: "host", 4: "host"}, CaptureSpec({}, "float32"))
    entered: list[int] = []
    for layer in range(5):
        stage._decoder.skeleton.layers[layer].register_forward_pre_hook(lambda *_, layer=layer: entered.append(layer))
    in_a_wave([stage])
    assert entered == [0, 1, 2] * 3 + [3] * 3 + [4] * 3
