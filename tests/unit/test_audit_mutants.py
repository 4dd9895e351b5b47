"""What a defect of an extraction could do to a run, planted with right digests: the audit names it, and nothing else does."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from m2ray.audit import differences
from m2ray.audit import reference as audit_reference
from m2ray.audit.differences import Differences, Doubt
from m2ray.audit.judging import Judge
from m2ray.audit.reference import Reference
from m2ray.batches import MicroBatch, PartSpec
from m2ray.chain import checking
from m2ray.cli import main
from m2ray.prompts import PromptRow, PromptTokenizer
from m2ray.prompts.masks import Marked
from m2ray.prompts.window import Window
from scripts.make_checkpoint import train_tokenizer
from tests.reference import alone, chain_rows, edited, load_chain, load_reference, reference_rows
from tests.unit.audited_runs import RowsOf, audited, extracted, make_model, verify, write_prompts

BOS = 0
NUM_SEQUENCES = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name) for name in ("llama", "minimax_m2")}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


# -- rows that were mixed up after they were computed ------------------------------------------------------------------------


def two_rows_swapped(model: Path) -> RowsOf:
    stages = load_chain(model, (0, 5), "float32")

    def rows_of(micro_batch: MicroBatch) -> list[torch.Tensor]:
        rows = chain_rows(stages, micro_batch)
        if micro_batch.shard == 0 and micro_batch.index == 0:
            rows[3][[1, 2]] = rows[3][[2, 1]]
        return rows

    return rows_of


def layers_shifted_by_one(model: Path) -> RowsOf:
    stages = load_chain(model, (0, 5), "float32")

    def rows_of(micro_batch: MicroBatch) -> list[torch.Tensor]:
        rows = chain_rows(stages, micro_batch)
        return [rows[0], *rows[:-1]]

    return rows_of


def layers_of_two_attempts(model: Path) -> RowsOf:
    """The other attempt took each sequence alone, as one does after memory ran out."""
    stages = load_chain(model, (0, 4), "float32")

    def rows_of(micro_batch: MicroBatch) -> list[torch.Tensor]:
        each = [chain_rows(stages, alone(micro_batch, row)) for row in range(len(micro_batch.sequence_ids))]
        other = [torch.cat(rows) for rows in zip(*each, strict=True)]
        return [*chain_rows(stages, micro_batch)[:2], *other[2:]]

    return rows_of


# -- rows that were computed otherwise ---------------------------------------------------------------------------------------


def one_layer_of_another_checkpoint(model: Path) -> RowsOf:
    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].flip(0)

    mixed = edited(model, model.parent / "mixed", other)
    reference = load_reference(mixed, torch.float32)
    shutil.rmtree(mixed)
    return lambda micro_batch: reference_rows(reference, micro_batch)


def padding_leaking_in(model: Path) -> RowsOf:
    """Padded on the left, without a mask: what is real looks at what stands before it."""
    reference = load_reference(model, torch.float32)

    def rows_of(micro_batch: MicroBatch) -> list[torch.Tensor]:
        turned, counts = micro_batch.token_ids_BT.copy(), micro_batch.token_counts.tolist()
        num_places = turned.shape[1]
        for row, count in enumerate(counts):
            turned[row] = [*[0] * (num_places - count), *micro_batch.token_ids_BT[row, :count]]
        whole = MicroBatch(0, 0, True, micro_batch.sequence_ids, micro_batch.token_counts * 0 + num_places, turned)
        starts = torch.tensor([row * num_places + num_places - count for row, count in enumerate(counts)])
        places = torch.cat([torch.arange(count) + start for start, count in zip(starts, counts, strict=True)])
        return [rows[places] for rows in reference_rows(reference, whole)]

    return rows_of


def with_layers(model: Path, forward: Callable[..., torch.Tensor]) -> RowsOf:
    reference = load_reference(model, torch.float32)
    for layer in reference.model.layers:
        layer.forward = forward.__get__(layer)
    return lambda micro_batch: reference_rows(reference, micro_batch)


def post_norm_for_pre_norm(model: Path) -> RowsOf:
    def forward(layer: Any, hidden: torch.Tensor, **more: Any) -> torch.Tensor:
        hidden = layer.input_layernorm(hidden + layer.self_attn(hidden_states=hidden, **more)[0])
        return layer.post_attention_layernorm(hidden + layer.mlp(hidden))

    return with_layers(model, forward)


def attention_and_mlp_exchanged(model: Path) -> RowsOf:
    def forward(layer: Any, hidden: torch.Tensor, **more: Any) -> torch.Tensor:
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **more)[0]

    return with_layers(model, forward)


def as_it_is(model: Path) -> RowsOf:
    """No mutant: that transformers' layers written out here pass shows that what is caught is the mutation."""

    def forward(layer: Any, hidden: torch.Tensor, **more: Any) -> torch.Tensor:
        hidden = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **more)[0]
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    return with_layers(model, forward)


def router_in_bfloat16(model: Path) -> RowsOf:
    reference = load_reference(model, torch.float32)
    for layer in reference.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.bfloat16().float()
    return lambda micro_batch: reference_rows(reference, micro_batch)


def rotary_over_all_dimensions(model: Path) -> RowsOf:
    turned = Path(shutil.copytree(model, model.parent / "turned"))
    config = json.loads((turned / "config.json").read_text())
    (turned / "config.json").write_text(json.dumps({**config, "rotary_dim": config["head_dim"]}))
    reference = load_reference(turned, torch.float32)
    shutil.rmtree(turned)
    return lambda micro_batch: reference_rows(reference, micro_batch)


OF_LLAMA = [
    two_rows_swapped,
    layers_shifted_by_one,
    one_layer_of_another_checkpoint,
    padding_leaking_in,
    post_norm_for_pre_norm,
    attention_and_mlp_exchanged,
]
OF_MINIMAX = [layers_of_two_attempts, router_in_bfloat16, rotary_over_all_dimensions]


@pytest.mark.parametrize("mutant", [*OF_LLAMA, *OF_MINIMAX], ids=lambda mutant: mutant.__name__)
def test_rows_of_a_mutant_are_caught(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, mutant: Callable[[Path], RowsOf]
) -> None:
    model = models["llama" if mutant in OF_LLAMA else "minimax_m2"]
    dtypes = {"compute-dtype": "float32", "store-dtype": "float32"}
    audit = audited(extracted(monkeypatch, model, prompts, tmp_path / "run", mutant(model), **dtypes))
    assert (audit["passed"], audit["exact"]) == (False, True), audit["remarks"]
    assert audit["num_wrong"] == len(audit["wrong"]) > 0
    failed = {(each["by"], each["batch"]) for each in audit["compared"] if each["beyond"]}
    assert {("transformers", "recorded"), ("m2ray", "recorded")} <= failed
    if mutant is two_rows_swapped:
        assert audit["num_wrong"] <= 2
        assert {each["layer"] for each in audit["compared"] if each["beyond"]} == {3}


@pytest.mark.parametrize(
    "mutant", [two_rows_swapped, one_layer_of_another_checkpoint, padding_leaking_in], ids=lambda mutant: mutant.__name__
)
def test_rows_of_a_mutant_on_another_machine_differ_by_more_than_rounding(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, mutant: Callable[[Path], RowsOf]
) -> None:
    model, options = models["llama"], {"compute-dtype": "float32", "store-dtype": "float32", "computed_on": "NVIDIA H200"}
    audit = audited(extracted(monkeypatch, model, prompts, tmp_path / "run", mutant(model), **options))
    assert (audit["passed"], audit["exact"]) == (False, False)
    assert audit["num_wrong"] > 0


@pytest.mark.parametrize("made", [None, as_it_is], ids=["m2ray", "transformers"])
def test_rows_of_no_mutant_pass(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path, made: Callable[[Path], RowsOf] | None
) -> None:
    model = models["llama"]
    rows_of = made(model) if made else None
    audit = audited(
        extracted(monkeypatch, model, prompts, tmp_path / "run", rows_of, **{"compute-dtype": "float32", "store-dtype": "float32"})
    )
    assert (audit["passed"], audit["num_wrong"], audit["exact"]) == (True, 0, True), audit
    recorded = [each for each in audit["compared"] if each["batch"] == "recorded"]
    assert [each["same_bits"] for each in recorded] == [each["rows"] for each in recorded]


# -- a model in which rounding is multiplied, as trained ones have rows of massive activations -----------------------------------

BFLOAT16 = {"compute-dtype": "bfloat16", "store-dtype": "bfloat16"}


@pytest.fixture(scope="module")
def sharp(models: dict[str, Path]) -> Path:
    """A llama whose attention in layers 1 and 2 hangs on the last bits: bfloat16 is up to 0.4 of a row's norm off float32 there."""

    def sharpen(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (1, 2):
            tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] *= 100

    return edited(models["llama"], models["llama"].parent / "sharp", sharpen)


def test_what_bfloat16_rounds_in_a_sound_run_is_told_and_passes(
    monkeypatch: pytest.MonkeyPatch, sharp: Path, prompts: Path, tmp_path: Path
) -> None:
    run = extracted(monkeypatch, sharp, prompts, tmp_path / "run", **BFLOAT16, **{"shard-tokens": 200, "batch-tokens": 200})
    audit = audited(run)
    beyond = {(each["by"], each["batch"]) for each in audit["compared"] if each["beyond"]}
    assert beyond == {("transformers", "alone")}
    assert (audit["passed"], audit["exact"], audit["wrong"]) == (True, True, {}), audit["wrong"]
    assert "shows: " + str(len(audit["cleared"])) in " ".join(audit["remarks"])
    assert all("in float32 its micro-batch changes it by" in why for why in audit["cleared"].values())
    assert next(iter(audit["cleared"].values())) in verify(run, "--sample", "1").stdout

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "_rows", lambda *_: {})
        assert all(why.endswith("alone; and transformers' own layers do not show it") for why in audited(run)["wrong"].values())

    def no_room(_: Reference) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Reference, "in_float32", no_room)
    assert all(why.endswith("; float32 could not tell: CUDA out of memory") for why in audited(run)["wrong"].values())


def test_what_another_machine_rounds_in_a_sound_run_is_told_and_passes(
    monkeypatch: pytest.MonkeyPatch, sharp: Path, prompts: Path, tmp_path: Path
) -> None:
    """Its attention adds up in another order: here that is transformers' other one."""
    there = load_reference(sharp, torch.bfloat16, "eager")
    rows_of = partial(reference_rows, there)
    audit = audited(extracted(monkeypatch, sharp, prompts, tmp_path / "run", rows_of, computed_on="NVIDIA H200", **BFLOAT16))
    assert {(each["by"], each["batch"]) for each in audit["compared"] if each["beyond"]} == {("transformers", "alone"), ("m2ray", "alone")}
    assert (audit["passed"], audit["exact"], audit["wrong"]) == (True, False, {}), audit["wrong"]
    by_itself = ["bfloat16 is" in why for why in audit["cleared"].values()]
    assert set(by_itself) == {True, False}, "some are near to float32, and some as far as bfloat16 is"


def one_sequence_padded_before(model: Path) -> RowsOf:
    """Sequence 4 looks at two tokens of padding."""
    reference = load_reference(model, torch.bfloat16)

    def rows_of(micro_batch: MicroBatch) -> list[torch.Tensor]:
        rows = reference_rows(reference, micro_batch)
        for row in np.flatnonzero(micro_batch.sequence_ids == 4):
            its_own, start = alone(micro_batch, row), int(micro_batch.token_counts[:row].sum())
            longer = replace(its_own, token_counts=its_own.token_counts + 2, token_ids_BT=np.pad(its_own.token_ids_BT, ((0, 0), (2, 0))))
            for layer, leaked in zip(rows, reference_rows(reference, longer), strict=True):
                layer[start : start + len(leaked) - 2] = leaked[2:]
        return rows

    return rows_of


@pytest.mark.parametrize(
    ("mutant", "disturbs"), [(one_sequence_padded_before, 1.0), (one_sequence_padded_before, torch.inf), (padding_leaking_in, 1.0)]
)
def test_leaks_are_told_from_what_bfloat16_rounds(
    monkeypatch: pytest.MonkeyPatch, sharp: Path, prompts: Path, tmp_path: Path, mutant: Callable[[Path], RowsOf], disturbs: float
) -> None:
    """Also where transformers itself has no numbers once it is disturbed: rounding is no excuse then, and not for any row."""
    rows_of, disturbed = mutant(sharp), audit_reference._disturbed
    monkeypatch.setattr(audit_reference, "_disturbed", lambda values, generator: disturbed(values, generator) * disturbs)
    audit = audited(
        extracted(
            monkeypatch,
            sharp,
            prompts,
            tmp_path / "run",
            lambda batch: [rows.bfloat16() for rows in rows_of(batch)],
            computed_on="NVIDIA H200",
            **BFLOAT16,
        )
    )
    assert (audit["passed"], audit["exact"]) == (False, False)
    if mutant is one_sequence_padded_before:
        assert "4" in audit["wrong"]
        assert len(audit["wrong"]) == 1 or disturbs == torch.inf
        assert "off transformers' in float32" in audit["wrong"]["4"]


def test_a_micro_batch_whose_mask_leaks_fails_though_transformers_has_its_bits(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    """Attention looks ahead, in the run and in the audit: at padding, where there is any."""
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *given, **more: attention(*given, **{**more, "is_causal": False})
    )
    monkeypatch.setattr(checking, "prove", lambda *_: None)
    audit = audited(extracted(monkeypatch, models["llama"], prompts, tmp_path / "run", **BFLOAT16))
    recorded = [each for each in audit["compared"] if each["batch"] == "recorded"]
    assert all(each["same_bits"] == each["rows"] for each in recorded)
    assert (audit["passed"], audit["exact"], audit["num_wrong"] > 0, audit["cleared"]) == (False, True, True, {})
    assert any("in float32 its micro-batch changes it by 0." in why for why in audit["wrong"].values())


@pytest.mark.parametrize(("beside_others", "is_rounding"), [(1.001, True), (1.01, False)])
def test_a_row_that_overflows_alone_is_not_cleared_for_that(
    monkeypatch: pytest.MonkeyPatch,
    beside_others: float,
    is_rounding: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """However far from what is no number: in float32 other sequences change it, or not."""
    batches: Any = (SimpleNamespace(sequence_ids=[4], rows=share * torch.ones(1, 8)) for share in (1.0, beside_others))
    alone, recorded = batches
    monkeypatch.setattr(Judge, "_rows", lambda _, batch, *__: {("residual", 1): batch.rows})
    job: Any = SimpleNamespace(model=SimpleNamespace(num_layers=4))
    nothing, reference = cast("Any", None), cast("Any", SimpleNamespace(in_float32=nullcontext))
    judge = Judge(job, nothing, reference, 0)
    doubt = Doubt(PartSpec.of("residual", 1, "float16", 8), np.array([0]), np.array([1e300]), "transformers")
    assert [verdict for verdict, _ in judge._of_micro_batch(alone, recorded, [doubt])] == [is_rounding]


def test_rows_in_doubt_are_kept_up_to_a_bound_and_those_beyond_it_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "_MOST_IN_DOUBT", 10)
    found, part = Differences(by_row=True), PartSpec.of("residual", 0, "float32", 4)
    rows_NB = torch.ones(6, 4).view(torch.uint8)
    for number in range(3):
        found.add("transformers", "alone", part, 0.1, (2 * torch.ones(6, 4)).view(torch.uint8), rows_NB, np.full(6, number))
    assert {number: [len(doubt.rows) for doubt in doubts] for number, doubts in found.doubts.items()} == {0: [6]}
    assert found.wrong.keys() == {"1", "2"}
    assert "more than 10 rows do so" in found.wrong["1"]
    found.clear(0, "rounding")
    assert not found.all_within


# -- tokens ------------------------------------------------------------------------------------------------------------------

Encode = Callable[[PromptTokenizer, Sequence[PromptRow]], list[Any]]


def unchanged() -> Encode:
    marked = PromptTokenizer.marked
    return lambda self, rows: [found.token_ids for found in marked(self, rows)]


def a_token_dropped(encode: Encode, _: Path) -> Encode:
    def dropping(self: PromptTokenizer, rows: Sequence[PromptRow]) -> list[Any]:
        return [np.delete(ids, 2) if row.sequence_id == 4 else ids for row, ids in zip(rows, encode(self, rows), strict=True)]

    return dropping


def bos_missing(encode: Encode, _: Path) -> Encode:
    def without(self: PromptTokenizer, rows: Sequence[PromptRow]) -> list[Any]:
        found = encode(self, rows)
        assert all(ids[0] == BOS for ids in found)
        return [ids[1:] for ids in found]

    return without


def another_tokenizer(encode: Encode, folder: Path) -> Encode:
    train_tokenizer(384, 256).save_pretrained(folder)

    def by_other(self: PromptTokenizer, rows: Sequence[PromptRow]) -> list[Any]:
        return encode(PromptTokenizer.load(str(folder), self._options, 384), rows)

    return by_other


@pytest.mark.parametrize("mutant", [a_token_dropped, bos_missing, another_tokenizer], ids=lambda mutant: mutant.__name__)
def test_tokens_of_a_mutant_are_caught(
    monkeypatch: pytest.MonkeyPatch,
    models: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    mutant: Callable[[Encode, Path], Encode],
) -> None:
    with monkeypatch.context() as patch:
        mutated = mutant(unchanged(), tmp_path / "other")
        patch.setattr(PromptTokenizer, "marked", lambda self, rows: list(map(Marked, mutated(self, rows))))
        run = extracted(monkeypatch, models["llama"], prompts, tmp_path / "run")
    audit = audited(run)
    assert not audit["passed"]
    assert audit["tokens_from"] == "prompts"
    caught = ["4"] if mutant is a_token_dropped else [str(number) for number in range(NUM_SEQUENCES)]
    assert sorted(audit["wrong"], key=int) == caught
    assert set(audit["wrong"].values()) == {"its prompt gives other tokens than the run says"}


def test_marks_and_kept_values_of_another_row_are_caught(monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], tmp_path: Path) -> None:
    """What `sequences/` says of a prompt besides its tokens: exports and probes go by it."""
    rng = np.random.default_rng(5)
    rows = [
        {"input_ids": rng.integers(1, 256, size).tolist(), "loss_mask": [0] * (size - 1) + [1], "label": float(size) if size % 4 else None}
        for size in range(2, 2 + NUM_SEQUENCES)
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mark = Window.mark

    def mixed(window: Window, marked: Sequence[Marked | str], kept: Sequence[tuple[Any, ...]] = ()) -> None:
        marked, kept = list(marked), list(kept)
        assert isinstance(marked[4], Marked)
        marked[4] = marked[4]._replace(loss_mask=bytes(reversed(marked[4].loss_mask or b"")))
        kept[7], kept[8] = kept[8], kept[7]
        mark(window, marked, kept)

    for name, mutant in {"mixed": mixed, "as it is": mark}.items():
        with monkeypatch.context() as patch:
            patch.setattr(Window, "mark", mutant)
            run = extracted(monkeypatch, models["llama"], prompts, tmp_path / name, **{"keep-columns": "label"})
        audit = audited(run)
        other = {"4": "loss_mask", "7": "label", "8": "label"} if mutant is mixed else {}
        assert audit["wrong"] == {number: f"its prompt has another {what} than `sequences/` says" for number, what in other.items()}
        assert audit["passed"] == (not other)
    assert "\nkept       label\n" in CliRunner().invoke(main, ["inspect", str(run)]).output
