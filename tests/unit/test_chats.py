"""Chats with tools, options and a date: the same tokens from every format, and the ones that transformers gives."""

import csv
import json
import shutil
from contextlib import closing
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils.logging import disable_progress_bar
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptSource, PromptTokenizer, chat_template
from m2ray.prompts.surveying import prompt_digest

TINY = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% if thinking %}<think {{ thinking }}>{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }} {{ message.keys() | sort | join(' ') }}\n"
    "{% if message.content is defined %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|end|>{% endfor %}"
)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Oslo")]},
            {"role": "tool", "content": "rain", "name": "weather"},
        ],
        "tools": [tool("weather", city={"type": "string"})],
    },
    {
        "messages": [{"role": "assistant", "tool_calls": [call("add", a=1, b=[2, None]), call("now")]}],
        "tools": [tool("add", a={"type": "integer"}, b={"type": "integer", "minimum": 0})],
        "chat_template_kwargs": {"thinking": "hard"},
    },
    {"messages": [{"role": "user", "content": "No tools here."}], "chat_template_kwargs": {"unused": True}},
]
COLUMNS = ("messages", "tools", "chat_template_kwargs")


@pytest.fixture(autouse=True)
def _quiet_datasets() -> None:
    disable_progress_bar()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as the name says: with structs, as JSON values of Arrow's own type, or as strings of JSON."""
    json_lists = datasets.Features({"messages": datasets.List(datasets.Json()), "tools": datasets.Json(), COLUMNS[2]: datasets.Json()})
    by_column = {name: [row.get(name) for row in rows] for name in COLUMNS}
    as_strings = {name: [None if value is None else json.dumps(value) for value in values] for name, values in by_column.items()}
    if path.name == "structs.parquet":
        pq.write_table(pa.table(by_column), path)
    elif path.name == "structs":
        datasets.Dataset.from_dict(by_column).save_to_disk(path)
    elif path.name == "json":
        datasets.Dataset.from_dict(by_column, features=json_lists).save_to_disk(path)
    elif path.name == "json.parquet":
        datasets.Dataset.from_dict(by_column, features=json_lists).to_parquet(path)
    elif path.name == "strings.parquet":
        pq.write_table(pa.table(as_strings), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *zip(*as_strings.values(), strict=True)])
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    return path


def tokens_of(path: Path, model: Path, **options: Any) -> list[Any]:
    chosen = PromptOptions(str(path), 10_000, **options)
    return [ids if isinstance(ids, str) else ids.tolist() for ids in encoded(model, chosen)]


def encoded(model: Path, chosen: PromptOptions) -> list[Any]:
    with closing(PromptTokenizer.load(str(model), chosen, 320)) as tokenizer:
        return tokenizer.encode(list(PromptSource.open(chosen).rows()))


def of_transformers(model: Path, row: dict[str, Any]) -> Any:
    options = {"tokenize": True, "return_dict": False, **(row.get("chat_template_kwargs") or {})}
    return AutoTokenizer.from_pretrained(str(model)).apply_chat_template(row["messages"], tools=row.get("tools"), **options)


@pytest.mark.parametrize("name", ["a.jsonl", "structs.parquet", "structs", "json", "json.parquet", "strings.parquet", "a.csv"])
def test_every_format_gives_the_tokens_of_transformers(model: Path, tmp_path: Path, name: str) -> None:
    assert tokens_of(write(tmp_path / name, ROWS), model) == [of_transformers(model, row) for row in ROWS]


def test_a_data_set_with_tool_calls_has_the_same_digests_in_every_format(model: Path, tmp_path: Path) -> None:
    digests = {}
    for name in ("a.jsonl", "a.json", "structs.parquet", "structs", "json"):
        chosen = PromptOptions(str(write(tmp_path / name, ROWS)), 10_000)
        digests[name] = [ids if isinstance(ids, str) else prompt_digest(ids) for ids in encoded(model, chosen)]
    assert len(set(digests["a.jsonl"])) == len(ROWS)
    assert all(found == digests["a.jsonl"] for found in digests.values()), digests


@pytest.mark.parametrize("name", ["a.jsonl", "json", "json.parquet", "strings.parquet"])
def test_a_null_that_is_the_rows_own_stays(model: Path, tmp_path: Path, name: str) -> None:
    rows = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call("add", a=None)]}]}]
    (tokens,) = tokens_of(write(tmp_path / name, rows), model)
    assert tokens == of_transformers(model, rows[0])
    assert '"a": null' in AutoTokenizer.from_pretrained(str(model)).decode(tokens)


def test_maps_are_objects(model: Path, tmp_path: Path) -> None:
    arguments = pa.map_(pa.string(), pa.string())
    calls = pa.list_(pa.struct({"function": pa.struct({"name": pa.string(), "arguments": arguments})}))
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": calls}))
    chat = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"z": "1", "a": None}}}]}]
    pairs = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [("z", "1"), ("a", None)]}}]}]
    pq.write_table(pa.table({"messages": pa.array([pairs], kind)}), tmp_path / "a.parquet")
    assert tokens_of(tmp_path / "a.parquet", model) == [of_transformers(model, {"messages": chat})]


def test_text_that_is_no_json_in_a_json_column_costs_only_its_row(model: Path, tmp_path: Path) -> None:
    texts = pa.array(['[{"role": "user", "content": "hi"}]', "[{"], pa.string())
    pq.write_table(pa.table({"messages": pa.ExtensionArray.from_storage(pa.json_(), texts)}), tmp_path / "a.parquet")
    good, bad = tokens_of(tmp_path / "a.parquet", model)
    assert good == of_transformers(model, {"messages": [{"role": "user", "content": "hi"}]})
    assert bad.startswith("malformed JSON: ")


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"tools": "not json"}, "tools are neither a list nor a list in JSON"),
        ({"tools": {"type": "function"}}, "tools are not a list but dict"),
        ({"tools": ["weather"]}, "tools: tool 0 is not an object but str"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object but list"),
        (
            {"chat_template_kwargs": {"tokenize": True, "chat_template": "x"}},
            "chat_template_kwargs: 'chat_template', 'tokenize' cannot be set",
        ),
    ],
)
def test_what_no_template_could_take_is_quarantined(model: Path, tmp_path: Path, others: dict[str, Any], reason: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    good, bad = tokens_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": messages, **others}]), model)
    assert good == of_transformers(model, {"messages": messages})
    assert bad.startswith(reason)


def test_another_tools_column_is_used_when_named(model: Path, tmp_path: Path) -> None:
    row = {"messages": ROWS[0]["messages"], "functions": ROWS[0]["tools"]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert tokens_of(path, model, tools_column="functions") == [of_transformers(model, ROWS[0])]
    with pytest.raises(PromptsError, match="has no column 'absent'. Set tools_column to one of its columns: 'functions', 'messages'"):
        tokens_of(path, model, tools_column="absent")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_conversations_of_sharegpt(model: Path, tmp_path: Path, name: str) -> None:
    said = [("system", "Be brief."), ("human", "hi"), ("gpt", "Hello."), ("tool", "42")]
    chat: list[dict[str, Any]] = [{"from": speaker, "value": value} for speaker, value in said]
    bad: list[list[dict[str, Any]]] = [[{"from": "human"}], [{"from": "", "value": "x"}]]
    rows = [{"conversations": one} for one in (chat, *bad)]
    path = tmp_path / name
    if name == "a.jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    roles = ["system", "user", "assistant", "tool"]
    expected = [{"role": role, "content": value} for role, (_, value) in zip(roles, said, strict=True)]
    tokens, *reasons = tokens_of(path, model)
    assert tokens == of_transformers(model, {"messages": expected})
    assert reasons == ["message 0: 'content' is not a string but NoneType", "message 0: 'role' is empty"]


def test_options_of_the_template_for_all_rows(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    expected = [of_transformers(model, {**row, "chat_template_kwargs": {"thinking": "a bit", **row.get(COLUMNS[2], {})}}) for row in ROWS]
    assert tokens_of(path, model, template_options={"thinking": "a bit"}) == expected
    assert expected[1] == of_transformers(model, ROWS[1]), "the row's own wins"
    with pytest.raises(PromptsError, match="template_options sets 'tokenize', which m2ray or transformers sets itself"):
        tokens_of(path, model, template_options={"tokenize": True})


# -- content parts ----------------------------------------------------------------------------------------------------


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", ["a.jsonl", "structs.parquet", "structs", "json"])
def test_text_parts_are_one_text(model: Path, tmp_path: Path, name: str) -> None:
    rows = [
        {"messages": [{"role": "user", "content": parts("Weather ", "in Oslo?")}, {"role": "assistant", "content": parts("rain")}]},
        {"messages": [{"role": "user", "content": parts("x")}, {"role": "assistant", "content": [], "tool_calls": [call("now", a=1)]}]},
    ]
    joined = [
        {"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", "content": "rain"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call("now", a=1)]}]},
    ]
    assert tokens_of(write(tmp_path / name, rows), model) == [of_transformers(model, row) for row in joined]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [*parts("look"), {"type": "image_url", "image_url": {"url": "x"}}],
            "content part 1 is of type 'image_url', and m2ray runs text alone",
        ),
        (["text"], "content part 0 is of type 'str', and m2ray"),
        ([{"text": "x"}], "content part 0 is of type None, and m2ray"),
        ([{"type": "text"}], "the text of content part 0 is not a string but NoneType"),
        ([], "empty"),
        (parts(" "), "empty"),
    ],
)
def test_other_parts_are_quarantined_by_name(model: Path, tmp_path: Path, content: Any, reason: str) -> None:
    (bad,) = tokens_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": content}]}]), model)
    assert bad.removeprefix("message 0: ").startswith(reason)


# -- arguments of calls -----------------------------------------------------------------------------------------------

AS_JSON = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
"""As in Llama 3.1 and gpt-oss."""
AS_PAIRS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
"""As in MiniMax-M2 and Qwen3-Coder."""
AS_TEXT = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '<' + c.function.arguments + '>' }}{% endfor %}{% endfor %}"
"""As in DeepSeek-V3."""
AS_EITHER = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}"
"""As in Qwen3."""


def in_words(model: Path, template: str, arguments: Any, folder: Path) -> str:
    (model / "chat_template.jinja").write_text(template)
    one = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    (tokens,) = tokens_of(write_jsonl(folder / "a.jsonl", [{"messages": [{"role": "assistant", "tool_calls": [one]}]}]), model)
    return tokens if isinstance(tokens, str) else str(AutoTokenizer.from_pretrained(str(model)).decode(tokens))


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        *((template, given, '{"city": "Oslo"}') for template in (AS_JSON, AS_EITHER) for given in ({"city": "Oslo"}, '{"city":"Oslo"}')),
        *((AS_PAIRS, given, "city=Oslo") for given in ({"city": "Oslo"}, '{"city":"Oslo"}')),
        (AS_TEXT, {"city": "河"}, '<{"city": "河"}>'),
        (AS_TEXT, '{"city":"Oslo"}', '<{"city":"Oslo"}>'),
        (AS_JSON, "", "{}"),
        (AS_JSON, "Oslo", "the arguments of a call of 'f' are text, and no object in JSON"),
        (AS_JSON, "[1]", "the arguments of a call of 'f' are text, and no object in JSON"),
        (AS_JSON.replace("m.tool_calls", "'a' + 1"), {"a": 1}, 'the chat template refuses it: can only concatenate str (not "int") to str'),
    ],
)
def test_arguments_reach_a_template_as_it_takes_them(model: Path, tmp_path: Path, template: str, arguments: Any, expected: str) -> None:
    assert in_words(model, template, arguments, tmp_path) == expected


TAGGED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
    + AS_JSON.replace("m in messages", "m in [m]")
    + ("{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}")
)


@pytest.mark.parametrize("template", [TAGGED, TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")])
def test_masks_are_the_same_for_arguments_in_json(model: Path, tmp_path: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    given = ({"city": "Oslo"}, '{"city":"Oslo"}')
    rows = [
        {"messages": [{"role": "user", "content": parts("hi")}, {"role": "assistant", "tool_calls": [{"function": {"arguments": one}}]}]}
        for one in given
    ]
    chosen = PromptOptions(str(write_jsonl(tmp_path / "a.jsonl", rows)), 100, mask="assistant")
    with closing(PromptTokenizer.load(str(model), chosen, 320)) as tokenizer:
        as_object, as_text = tokenizer.marked(list(PromptSource.open(chosen).rows()))
    assert not isinstance(as_object, str)
    assert not isinstance(as_text, str)
    assert as_object.loss_mask is not None
    assert 1 in as_object.loss_mask
    assert 0 in as_object.loss_mask
    assert (as_object.token_ids.tolist(), as_object.loss_mask, as_object.roles) == (
        as_text.token_ids.tolist(),
        as_text.loss_mask,
        as_text.roles,
    )


# -- a template of the user's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_template_file_takes_the_place_of_the_models(model: Path, tmp_path: Path, scheme: str) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}", encoding="utf-8-sig")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    chosen = PromptOptions(str(path), 100, chat_template=f"{scheme}{own}")
    with closing(PromptTokenizer.load(str(model), chosen, 320)) as tokenizer:
        (ids,) = tokenizer.encode(list(PromptSource.open(chosen).rows()))
    assert not isinstance(ids, str)
    assert AutoTokenizer.from_pretrained(str(model)).decode(ids.tolist()) == "[hi]"
    assert tokenizer.template_digest not in ("", PromptTokenizer.load(str(model), PromptOptions("p", 100), 320).template_digest)
    (model / "chat_template.jinja").write_text(own.read_text(encoding="utf-8-sig"))
    of_model = PromptTokenizer.load(str(model), PromptOptions("p", 100), 320)
    assert tokenizer.template_digest == of_model.template_digest, "the text counts, wherever it is"


def test_a_model_without_a_template_may_be_given_one(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(PromptsError, match="has no chat template. Give the prompts as text, .* or set chat_template"):
        tokens_of(path, model)
    assert isinstance(tokens_of(path, model, chat_template=str(tmp_path / "own.jinja"))[0], list)


def test_a_template_file_that_cannot_be_used_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jinja").write_bytes(b"x" * ((1 << 20) + 1))
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    cases = {
        "absent.jinja": "Cannot read the chat template .*absent.jinja: No such file",
        "long.jinja": "long.jinja has more than 1,048,576 bytes",
        "latin.jinja": "latin.jinja is no UTF-8: its byte 3 is wrong",
        ".": "Cannot read the chat template .*: Is a directory",
    }
    for name, words in cases.items():
        with pytest.raises(PromptsError, match=words):
            PromptTokenizer.load(str(model), PromptOptions("p", 100, chat_template=str(tmp_path / name)), 320)
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    with pytest.raises(PromptsError, match='chat_template = "x.jinja" is given, but the prompts are no chat messages'):
        PromptSource.open(PromptOptions(str(path), 100, chat_template="x.jinja"))


# -- the date ---------------------------------------------------------------------------------------------------------

DATED = "{%- macro today() %}{{ strftime_now('%d %b %Y %H:%M') }}{% endmacro %}{{ today() }}: {{ messages[0].content }}"
CHAT = [{"role": "user", "content": "hi"}]


def test_a_template_is_told_the_day_of_the_run(model: Path) -> None:
    (model / "chat_template.jinja").write_text(DATED)
    tokenizer = PromptTokenizer.load(str(model), PromptOptions("unused", 100, template_date=date(2025, 2, 3)), 320)
    (ids,) = tokenizer.encode([PromptRow(0, "0", messages=CHAT)])
    reference = AutoTokenizer.from_pretrained(str(model))
    assert not isinstance(ids, str)
    assert reference.decode(ids.tolist()) == "03 Feb 2025 00:00: hi"
    assert "03 Feb 2025" not in reference.apply_chat_template(CHAT, tokenize=False), "others are told the time as before"


def test_a_transformers_that_cannot_be_told_the_day_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "chat_template.jinja").write_text(DATED)
    tokenizer = PromptTokenizer.load(str(model), PromptOptions("unused", 100, template_date=date(2025, 2, 3)), 320)
    monkeypatch.setattr(chat_template, "chat_template_utils", SimpleNamespace(datetime=chat_template_utils.datetime))
    with pytest.raises(PromptsError, match="tells it 2.*, not 2025-02-03"):
        tokenizer.encode([PromptRow(0, "0", messages=CHAT)])
