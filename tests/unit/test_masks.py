"""Loss masks and roles: from token ids and from chats into `sequences/`, equal to transformers' where its templates mark answers."""

import itertools
import json
import multiprocessing
import shutil
from datetime import date
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from m2ray.config import ExtractConfig
from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptSource, PromptTokenizer, load_shards, survey, window
from m2ray.sequences import SEQUENCES_SCHEMA, read_sequences
from m2ray.storage import LocalStore

TINY = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"

MESSAGE = "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
ASKING = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
PREAMBLE = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
)
PLAIN = PREAMBLE + "{% for message in messages %}" + MESSAGE + "{% endfor %}" + ASKING
TAGGED = (
    PREAMBLE
    + (
        "{% for message in messages %}<|start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}<|end|>{% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    )
    + ASKING
)
# As Qwen3 does: an answer's thinking is written only after the last question, and there even where it is empty.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > ns.last %}<think>{{ message.thinking }}</think>{% endif %}{{ message.content }}<|end|>\n{% endfor %}"
) + ASKING
HEADERLESS = "{% for message in messages %}{{ message.content }}{% endfor %}"

LONG = [
    {"role": "system", "content": "The river is low."},
    {"role": "user", "content": "When?\n"},
    {"role": "assistant", "content": "Today, 河 👩‍👧."},
    {"role": "user", "content": "assistant\nwhy"},
    {"role": "assistant", "content": " The children walk \n"},
]
SHORT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def tokenizer_of(tmp_path: Path, template: str | None = None, **options: Any) -> PromptTokenizer:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(TINY, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return PromptTokenizer.load(str(folder), PromptOptions("p", 10_000, **options), 320)


def marked(tokenizer: PromptTokenizer, *chats: list[dict[str, str]], tools: Any = None) -> list[Any]:
    found = tokenizer.marked([PromptRow(number, str(number), messages=chat, tools=tools) for number, chat in enumerate(chats)])
    tokenizer.close()
    return found


def words(tokenizer: PromptTokenizer, token_ids: Any) -> str:
    return str(tokenizer._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


def said(tokenizer: PromptTokenizer, row: Any) -> str:
    """The tokens under the mask, in words, with a bar where some were left out between them."""
    runs = itertools.groupby(zip(row.token_ids.tolist(), row.loss_mask, strict=True), key=itemgetter(1))
    return "|".join(words(tokenizer, [token_id for token_id, _ in run]) for is_said, run in runs if is_said)


def surveyed(path: Path, tokenizer: Any, **options: Any) -> tuple[Any, pa.Table]:
    store = LocalStore(path.parent / "run")
    found = survey(PromptSource.open(PromptOptions(str(path), 10_000, **options)), tokenizer, store, "a", 1000)
    found.tokens.close()
    return found, pa.concat_tables(read_sequences(store, file) for file in found.sequence_files)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- token ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["loss_mask", "assistant_masks"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_mask_goes_with_its_token_ids(tmp_path: Path, kind: str, column: str) -> None:
    rows = [
        {"input_ids": [3, 5, 9], "attention_mask": None, column: [0, 1, 1]},
        {"input_ids": [7, 8, 9, 2], "attention_mask": [1, 1, 1, 0], column: [0, 1, 0, 0]},
        {"input_ids": [2, 7], "attention_mask": [0, 1], column: [0, 1]},
        {"input_ids": [4, 4, 4, 4, 4], "attention_mask": None, column: [1, 0, 0, 1, 1]},
        {"input_ids": [4], "attention_mask": None, column: None},
        {"input_ids": [4], "attention_mask": None, column: [1, 1]},
    ]
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    options = PromptOptions(str(path), 4, truncation="cut")
    _, table = surveyed(path, PromptTokenizer.load(str(TINY), options, 320))
    assert table.schema.equals(SEQUENCES_SCHEMA)
    assert table["loss_mask"].to_pylist() == [[0, 1, 1], [0, 1, 0], [1], [1, 0, 0, 1], None, None]
    assert table["token_count"].to_pylist() == [3, 3, 1, 4, 1, 0]
    assert table["roles"].null_count == len(rows)


def test_masks_without_a_one_are_counted_and_refused_if_there_are_no_others(tmp_path: Path) -> None:
    empty = {"input_ids": [3, 5], "loss_mask": [0, 0]}
    path = write_jsonl(tmp_path / "p.jsonl", [empty, {"input_ids": [3], "loss_mask": [1]}, empty, {"input_ids": [3]}])
    tokenizer = PromptTokenizer.load(str(TINY), PromptOptions("p", 10), 320)
    assert surveyed(path, tokenizer)[0].num_empty_masks == 2
    write_jsonl(path, [empty, {"input_ids": [3]}, empty])
    with pytest.raises(PromptsError, match="The loss masks of all 2 rows of .* that have one are 0 at every token"):
        surveyed(path, tokenizer)


def test_two_columns_of_masks_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"input_ids": [3], "loss_mask": [1], "assistant_masks": [1]}])
    with pytest.raises(PromptsError, match="two columns of loss masks: 'loss_mask' and 'assistant_masks'"):
        PromptSource.open(PromptOptions(str(path), 10))


def test_a_mask_of_another_name_than_the_first_rows_have_costs_its_row(tmp_path: Path) -> None:
    """It comes behind the rows by which the columns were chosen; unread, it would have been null without a word."""
    rows = [{"input_ids": [3]}] * 1000
    later = [{"input_ids": [3], "assistant_masks": None}, {"input_ids": [3], "assistant_masks": [1]}, {"input_ids": [3], "loss_mask": [1]}]
    path = write_jsonl(tmp_path / "p.jsonl", [*rows, *later])
    found = list(PromptSource.open(PromptOptions(str(path), 10)).rows())
    assert found[-2].reason == "its loss mask is in 'assistant_masks', and those of the rows before, if they have any, are in 'loss_mask'"
    assert [row.loss_mask for row in found[-3:]] == [None, None, b"\x01"]
    assert sum(row.reason is not None for row in found) == 1


def test_a_window_of_many_masks_is_written_in_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_ROW_GROUP_BYTES", 1000)
    monkeypatch.setattr("m2ray.prompts.surveying._BATCH_ROWS", 8)
    masks = [None if number % 7 == 3 else [number % 2, 1] * (number % 30 + 1) for number in range(100)]
    rows = [{"input_ids": [5] * len(mask or [0]), **({"loss_mask": mask} if mask else {})} for mask in masks]
    masked_late = [{"input_ids": [5]}] * 20
    path = write_jsonl(tmp_path / "p.jsonl", [*masked_late, *rows])
    found, table = surveyed(path, PromptTokenizer.load(str(TINY), PromptOptions("p", 100), 320))
    assert table["loss_mask"].to_pylist() == [None] * 20 + masks
    assert table["sequence_id"].to_pylist() == list(range(120))
    assert pq.ParquetFile(tmp_path / "run" / found.sequence_files[0].key).num_row_groups > 3
    shards = load_shards(LocalStore(tmp_path / "run"), found.sequence_files)
    assert [shard.sequence_ids.tolist() for shard in shards] == [shard.sequence_ids.tolist() for shard in found.shards]


def test_files_of_many_masks_end_early_and_with_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_ROW_GROUP_BYTES", 1000)
    monkeypatch.setattr("m2ray.sequences.BYTES_PER_FILE", 6000)
    monkeypatch.setattr("m2ray.prompts.surveying.WINDOW_ROWS", 32)
    monkeypatch.setattr("m2ray.prompts.surveying._BATCH_ROWS", 8)
    rows = [{"input_ids": [5] * 60, "loss_mask": [1] * 60}] * 100
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    found, table = surveyed(path, PromptTokenizer.load(str(TINY), PromptOptions("p", 100), 320))
    assert [file.rows for file in found.sequence_files] == [64, 36]
    assert table["sequence_id"].to_pylist() == list(range(100))
    shards = load_shards(LocalStore(tmp_path / "run"), found.sequence_files)
    assert [shard.sequence_ids.tolist() for shard in shards] == [shard.sequence_ids.tolist() for shard in found.shards]


def test_an_older_file_has_them_null(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    path = write_jsonl(tmp_path / "p.jsonl", [{"input_ids": [3]}])
    found, table = surveyed(path, PromptTokenizer.load(str(TINY), PromptOptions("p", 100), 320))
    older = tmp_path / "run" / found.sequence_files[0].key
    pq.write_table(table.drop_columns(["loss_mask", "roles"]), older)
    store = LocalStore(tmp_path / "run")
    file = type(found.sequence_files[0])(found.sequence_files[0].key, 1, older.stat().st_size, _xxh3(older))
    assert read_sequences(store, file).equals(table)
    assert read_sequences(store, file, ["loss_mask"]).to_pylist() == [{"loss_mask": None}]


def _xxh3(path: Path) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(path.read_bytes())


# -- chats ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_tags_give_the_mask_of_transformers(tmp_path: Path, tools: Any, *, asks: bool) -> None:
    tokenizer = tokenizer_of(tmp_path, TAGGED, mask="assistant", add_generation_prompt=asks)
    reference = AutoTokenizer.from_pretrained(str(tmp_path / "model"))
    for chat, found in zip([LONG, SHORT], marked(tokenizer, LONG, SHORT, tools=tools), strict=True):
        options = {"return_assistant_tokens_mask": True, "return_dict": True, "add_generation_prompt": asks}
        expected = reference.apply_chat_template(chat, tools=tools, **options)
        assert found.token_ids.tolist() == expected["input_ids"]
        assert list(found.loss_mask) == expected["assistant_masks"]
        assert sum(found.loss_mask) >= 2


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_beginnings_give_the_same_mask_as_tags(tmp_path: Path, tools: Any, *, asks: bool) -> None:
    options = {"mask": "assistant", "add_generation_prompt": asks, "template_date": date(2024, 2, 29)}
    dated = "{{ strftime_now('%d %b %Y') }}"
    by_template = [marked(tokenizer_of(tmp_path, dated + template, **options), LONG, SHORT, tools=tools) for template in (PLAIN, TAGGED)]
    for plain, tagged in zip(*by_template, strict=True):
        assert plain.token_ids.tolist() == tagged.token_ids.tolist()
        assert plain.loss_mask == tagged.loss_mask
        assert plain.roles == tagged.roles


def test_roles_are_the_messages_without_what_belongs_to_none(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, PLAIN, mask="assistant", add_generation_prompt=True)
    long, short = marked(tokenizer, LONG, SHORT, tools=TOOLS)
    told = [[(role, words(tokenizer, row.token_ids[start:stop])) for role, start, stop in row.roles] for row in (long, short)]
    assert told[0] == [("system", "The river is low.")] + [
        (message["role"], f"<|start|>{message['role']}\n{message['content']}<|end|>\n") for message in LONG[1:]
    ]
    assert told[1] == [("user", "a"), ("assistant", "<|start|>assistant\nb<|end|>\n")]
    assert said(tokenizer, long) == "Today, 河 👩‍👧.<|end|>| The children walk \n<|end|>"
    assert said(tokenizer, short) == "b<|end|>"


def test_thinking_that_is_left_out_later_does_not_shift_the_mask(tmp_path: Path) -> None:
    thought = [{**message, "thinking": "hm"} if message["role"] == "assistant" else message for message in LONG]
    tokenizer = tokenizer_of(tmp_path, THINKING, mask="assistant")
    (row,) = marked(tokenizer, thought)
    assert said(tokenizer, row) == "Today, 河 👩‍👧.<|end|>|<think>hm</think> The children walk \n<|end|>"
    assert [role for role, _, _ in row.roles] == [message["role"] for message in LONG]


def test_the_mask_is_cut_with_the_tokens(tmp_path: Path) -> None:
    whole = marked(tokenizer_of(tmp_path, PLAIN, mask="assistant"), LONG)[0]
    cut_tokens = whole.roles[2][1] + 20
    folder = str(tmp_path / "model")
    options = PromptOptions("p", cut_tokens, mask="assistant", truncation="cut")
    cut = marked(PromptTokenizer.load(folder, options, 320), LONG)[0]
    assert cut.token_ids.tolist() == whole.token_ids[:cut_tokens].tolist()
    assert cut.loss_mask == whole.loss_mask[:cut_tokens]
    assert 1 in cut.loss_mask
    assert cut.roles == [*whole.roles[:2], ("assistant", whole.roles[2][1], cut_tokens)]


def test_a_mask_is_cut_at_its_beginning_with_the_tokens(tmp_path: Path) -> None:
    whole = marked(tokenizer_of(tmp_path, PLAIN, mask="assistant"), LONG)[0]
    first = whole.roles[2][1] + 3
    options = PromptOptions("p", len(whole.token_ids) - first, mask="assistant", truncation="cut_left")
    cut = marked(PromptTokenizer.load(str(tmp_path / "model"), options, 320), LONG)[0]
    assert cut.token_ids.tolist() == whole.token_ids[first:].tolist()
    assert cut.loss_mask == whole.loss_mask[first:]
    assert cut.roles == [
        ("assistant", 0, whole.roles[2][2] - first),
        *((role, start - first, stop - first) for role, start, stop in whole.roles[3:]),
    ]


def test_a_row_without_a_mask_is_quarantined_where_tokens_are_chosen_by_it() -> None:
    tokenizer = PromptTokenizer.load(str(TINY), PromptOptions("p", 3, tokens="mask", truncation="cut_left"), 320)
    with_mask, without = tokenizer.marked(
        [PromptRow(0, "0", token_ids=[5, 6, 7, 8], loss_mask=b"\1\0\0\1"), PromptRow(1, "1", token_ids=[5])]
    )
    assert (with_mask.token_ids.tolist(), with_mask.loss_mask) == ([6, 7, 8], b"\0\0\1")
    assert without == "no loss mask, by which its tokens are to be chosen"


def test_what_gives_no_mask_is_a_reason(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, PLAIN, mask="assistant")
    first, alone, fine = marked(tokenizer, SHORT[1:], SHORT[:1], SHORT)
    assert first == "no loss mask: its first message is the assistant's, and the template does not say where that begins"
    assert set(alone.loss_mask) == {0}
    assert said(tokenizer, fine) == "b<|end|>"
    joined = [{"role": "user", "content": "Th"}, {"role": "assistant", "content": "e river is low"}]
    (across,) = marked(tokenizer_of(tmp_path, HEADERLESS, mask="assistant"), joined)
    assert across == "no loss mask: a token lies across the beginning or the end of an answer"
    last_first = "{% for message in messages | reverse %}" + MESSAGE + "{% endfor %}" + ASKING
    (reversed_chat,) = marked(tokenizer_of(tmp_path, last_first, mask="assistant"), SHORT)
    assert reversed_chat.startswith("no loss mask: the template writes the messages up to number 1 otherwise than within the whole chat")


def test_a_template_or_prompts_without_a_way_to_a_mask_are_refused_before_a_row_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": SHORT}])
    last_first = "{% for message in messages | reverse %}" + MESSAGE + "{% endfor %}"
    tokenizer = tokenizer_of(tmp_path, last_first, mask="assistant")
    before = set(multiprocessing.active_children())
    with pytest.raises(PromptsError, match=r"does not say what the assistant says: no loss mask: .*\{% generation %\}"):
        surveyed(path, tokenizer, mask="assistant")
    assert set(multiprocessing.active_children()) <= before, "the process that rendered the probe"
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.parquet"))
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(PromptsError, match='mask = "assistant" is given, but the prompts are no chat messages'):
        PromptSource.open(PromptOptions(str(text), 10, mask="assistant"))


def test_a_survey_keeps_masks_and_roles_of_chats(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": LONG}, {"messages": []}, {"messages": SHORT}])
    tokenizer = tokenizer_of(tmp_path, PLAIN, mask="assistant")
    long, short = marked(tokenizer, LONG, SHORT)
    _, table = surveyed(path, tokenizer, mask="assistant")
    assert table["loss_mask"].to_pylist() == [list(long.loss_mask), None, list(short.loss_mask)]
    roles = [None if row is None else [tuple(one.values()) for one in row] for row in table["roles"].to_pylist()]
    assert roles == [long.roles, None, short.roles]
    questions = write_jsonl(tmp_path / "q.jsonl", [{"messages": SHORT[:1]}])
    with pytest.raises(PromptsError, match="The loss masks of all 1 rows"):
        surveyed(questions, tokenizer, mask="assistant")


def test_the_option_decides_rows() -> None:
    assert "mask" in ExtractConfig.row_options()
