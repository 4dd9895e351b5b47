"""Requests to a warm chain: what they may ask, what is computed for them, and in which order the rows come back. Stages are made up."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2ray.batches import CapturedLayer, MicroBatch
from m2ray.chain import requests as module
from m2ray.chain.requests import Desk, Request
from m2ray.config import ExtractConfig
from m2ray.errors import BusyError, ConfigError, M2rayError, PromptsError, TooLargeError
from m2ray.model.attention import resolve_attn_implementation
from m2ray.model.capture import CaptureSpec
from m2ray.model.checkpoint import open_checkpoint
from m2ray.model.tensor_table import tensor_table
from m2ray.options import PromptOptions
from m2ray.planning.resolve import resolve
from m2ray.planning.shape import ModelShape
from m2ray.prompts import PromptTokenizer
from m2ray.sites import parts_of_run
from tests.reference import MINIMAX_TINY, make_minimax


class FakeChain:
    """Rows that name their token: row = position, in every column. `computed` are the micro-batches, with what was asked of them."""

    def __init__(self, desk_options: Any, table: Any) -> None:
        self.options, self.table = desk_options, table
        self.computed: list[tuple[CaptureSpec, int, MicroBatch]] = []

    def __call__(self, capture: CaptureSpec, last: int, micro_batch: MicroBatch) -> Sequence[CapturedLayer]:
        self.computed.append((capture, last, micro_batch))
        tokens = capture.selection.token_rows(micro_batch)
        parts = parts_of_run(
            capture.sites, capture.store_dtype, self.table.hidden_size, self.table.num_experts, self.table.experts_per_token
        )
        return [
            CapturedLayer(
                part.site,
                part.layer,
                tuple(
                    torch.tensor(tokens["position"])[:, None]
                    .expand(-1, column.width)
                    .to(getattr(torch, column.dtype))
                    .contiguous()
                    .view(torch.uint8)
                    .numpy()
                    for column in part.columns
                ),
            )
            for part in reversed(parts)  # whichever order the stages have
        ]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, FakeChain]:
    folder = make_minimax(tmp_path_factory.mktemp("minimax") / "model", "fp8")
    checkpoint = open_checkpoint(str(folder))
    table = tensor_table(checkpoint)
    config = ExtractConfig(
        model=str(folder), prompts="none", output="none", compute_dtype="float32", store_dtype="float32", batch_tokens=8, shard_tokens=24
    )
    prompts = PromptOptions.of(config, 64)
    shape = ModelShape.of(checkpoint.config, resolve_attn_implementation(checkpoint.whole_config, "auto", torch.float32))
    options = resolve(config, prompts, table, shape)
    tokenizer = PromptTokenizer.load(str(folder), prompts, checkpoint.config.vocab_size)
    return Desk(tokenizer, table, options, table.num_layers), FakeChain(options, table)


def nested(depth: int) -> list[Any]:
    """Lists in one another."""
    inner: list[Any] = []
    for _ in range(depth - 1):
        inner = [inner]
    return inner


def ids(*lengths: int) -> dict[str, Any]:
    return {"input_ids": [[5] * length for length in lengths]}


def test_rows_come_by_prompt_and_position_whichever_micro_batch_they_were_in(served: tuple[Desk, FakeChain]) -> None:
    """Lengths unlike each other lie in shards of their own, the longest first."""
    desk, chain = served
    chain.computed.clear()
    answer = desk.answer(Request.of({**ids(2, 7, 1, 3), "sites": "residual:1,4, router_topk:2, embedding"}), chain)
    tensors = answer.tensors()
    assert list(tensors) == [
        "residual.1",
        "residual.4",
        "router_topk.2.expert_ids",
        "router_topk.2.expert_weights",
        "embedding",
        "sequence",
        "position",
        "token_id",
    ]
    assert tensors["sequence"].tolist() == [0] * 2 + [1] * 7 + [2] + [3] * 3
    positions = [*range(2), *range(7), 0, *range(3)]
    assert tensors["position"].tolist() == positions
    assert tensors["residual.4"].shape == (13, MINIMAX_TINY["hidden_size"])
    assert tensors["residual.4"].dtype == torch.float32
    assert tensors["router_topk.2.expert_ids"].dtype == torch.int16
    for name, values in tensors.items():
        if name not in ("sequence", "token_id"):
            assert values.reshape(13, -1)[:, 0].tolist() == positions, name
    assert {last for _, last, _ in chain.computed} == {4}, "no stage behind layer 4 has to compute"
    assert all(micro_batch.padded_tokens <= 8 for _, _, micro_batch in chain.computed)


def test_texts_are_tokenised_as_a_runs_are(served: tuple[Desk, FakeChain]) -> None:
    desk, chain = served
    tensors = desk.answer(Request.of({"prompts": ["sea wind", "stone"], "sites": "residual:0", "tokens": "last"}), chain).tensors()
    assert tensors["sequence"].tolist() == [0, 1]
    assert (tensors["token_id"] >= 0).all()


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"sites": "residual:0"}, PromptsError, "has none"),
        ({**ids(1), "prompts": ["a"], "sites": "residual:0"}, PromptsError, "prompts and input_ids"),
        ({**ids(1)}, ConfigError, "sites has to name"),
        ({**ids(1), "sites": "residual:0", "layers": "0"}, ConfigError, "no 'layers'"),
        ({"prompts": [], "sites": "residual:0"}, PromptsError, "not empty"),
        ({"prompts": "sea", "sites": "residual:0"}, PromptsError, "not str"),
        ({**ids(1), "site": "residual:0"}, M2rayError, "Did you mean 'sites'"),
        ({**ids(1), "sites": 3}, ConfigError, "sites has to name"),
        ({**ids(1), "sites": "residual:0", "tokens": 3}, ConfigError, "tokens = 3"),
        ({**ids(1), "sites": "mlp," * 5_000}, ConfigError, "20,000 characters"),
        ({"input_ids": nested(101), "sites": "residual:0"}, PromptsError, "more than 100 deep"),
        ({"messages": [[{"role": "user", "content": nested(99)}]], "sites": "residual:0"}, PromptsError, "more than 100 deep"),
        ({**ids(1), "sites": "residual:0", **{f"name{number}": 1 for number in range(100)}}, ConfigError, "10 problems"),
    ],
)
def test_what_no_request_may_say(asked: dict[str, Any], kind: type[M2rayError], words: str) -> None:
    with pytest.raises(kind) as raised:
        Request.of(asked)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({**ids(1), "sites": "residual:99"}, "layer 99"),
        ({**ids(1), "sites": f"residual:{'9' * 5_000}"}, "neither a layer nor a range"),
        ({"input_ids": [[1], [-1]], "sites": "residual:0"}, "Prompt 1: "),
        ({**ids(1), "sites": "nonsense:1"}, "nonsense"),
        ({**ids(1), "sites": "residual:0", "tokens": "some"}, "tokens = 'some'"),
        ({**ids(1), "sites": "router_topk:2", "tokens": "mean"}, "no mean"),
        ({**ids(1), "sites": "residual:0", "tokens": "mask"}, "Prompt 0: no loss mask"),
        ({"prompts": ["sea", "", 3], "sites": "residual:0"}, "2 problems"),
        ({"input_ids": [[1], [10**6]], "sites": "residual:0"}, "Prompt 1: token id 1000000"),
        ({**ids(1, 65), "sites": "residual:0"}, "Prompt 1: 65 tokens"),
    ],
)
def test_what_the_model_or_the_prompts_do_not_have(served: tuple[Desk, FakeChain], asked: dict[str, Any], words: str) -> None:
    desk, chain = served
    chain.computed.clear()
    with pytest.raises((ConfigError, PromptsError)) as raised:
        desk.answer(Request.of(asked), chain)
    assert words in str(raised.value)
    assert not chain.computed


def test_more_prompts_than_tokens_may_be_are_not_even_looked_at(served: tuple[Desk, FakeChain]) -> None:
    desk, chain = served
    with pytest.raises(TooLargeError, match="32,769 prompts"):
        desk.answer(Request.of({"prompts": [""] * (module.MAX_TOKENS + 1), "sites": "residual:0"}), chain)


def test_what_is_too_large_is_not_computed(served: tuple[Desk, FakeChain], monkeypatch: pytest.MonkeyPatch) -> None:
    desk, chain = served
    chain.computed.clear()
    monkeypatch.setattr(module, "MAX_TOKENS", 10)
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 11 * MINIMAX_TINY["hidden_size"] * 4 - 1)
    with pytest.raises(TooLargeError, match="2 problems") as raised:
        desk.answer(Request.of({**ids(6, 5), "sites": "residual:0"}), chain)
    assert "11 tokens" in str(raised.value)
    assert not chain.computed
    assert len(desk.answer(Request.of({**ids(5, 5), "sites": "residual:0"}), chain).token_rows) == 10


@pytest.mark.parametrize("bound", ["MAX_REQUESTS", "MAX_HELD_BYTES"])
def test_only_so_much_is_at_work_at_one_time(served: tuple[Desk, FakeChain], monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    desk, chain = served
    request = Request.of({**ids(2), "sites": "residual:0"})
    monkeypatch.setattr(module, bound, 1 if bound == "MAX_REQUESTS" else 3 * MINIMAX_TINY["hidden_size"] * 4)
    entered, go_on, found = threading.Event(), threading.Event(), []

    def slowly(*asked: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        return chain(*asked)

    first = threading.Thread(target=lambda: found.append(desk.answer(request, slowly)))
    first.start()
    assert entered.wait(30)
    with pytest.raises(BusyError):
        desk.answer(request, chain)
    go_on.set()
    first.join(30)
    assert len(found[0].token_rows) == 2
    assert len(desk.answer(request, chain).token_rows) == 2, "there is room again"
    assert desk.at_work == 0


def test_a_failed_request_takes_no_room_with_it(served: tuple[Desk, FakeChain]) -> None:
    desk, _ = served
    request = Request.of({**ids(2), "sites": "residual:0"})

    def fails(*_: Any) -> Any:
        raise OSError

    with pytest.raises(OSError):
        desk.answer(request, fails)
    assert (desk.at_work, desk._held_bytes) == (0, 0)


def test_the_rows_of_a_mean_are_one_a_prompt(served: tuple[Desk, FakeChain]) -> None:
    desk, chain = served
    answer = desk.answer(Request.of({**ids(2, 5), "sites": "residual:0", "tokens": "mean"}), chain)
    assert answer.token_rows["sequence_id"].tolist() == [0, 1]
    assert np.all(answer.token_rows["position"] == -1)


def test_nothing_is_read_from_a_folder_of_the_request(tmp_path: Path) -> None:
    """A prompt that looks like a path is a text."""
    assert Request.of({"prompts": [str(tmp_path)], "sites": "residual:0"}).prompts == [str(tmp_path)]
