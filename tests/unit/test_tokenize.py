"""The tokenizer: token for token what transformers gives, and a reason for every row that has none."""

import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from m2ray.errors import CheckpointError, PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts import PromptRow, PromptTokenizer, own_tokenizer, tokenizer_files
from m2ray.prompts.own_tokenizer import PROBES
from m2ray.prompts.rows import Columns

TINY = Path(__file__).parents[1] / "data" / "prompts" / "tokenizer"
VOCAB_SIZE = 320
BOS = 0
CHAT = [{"role": "system", "content": "河水"}, {"role": "user", "content": "The river?"}]


def load(folder=TINY, *, max_length=1000, vocab_size=VOCAB_SIZE, **options):
    return PromptTokenizer.load(str(folder), PromptOptions("unused", max_length, **options), vocab_size)


def text_rows(*texts):
    return [PromptRow(place, f"row-{place}", text=text) for place, text in enumerate(texts)]


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_texts_and_messages_of_one_batch_equal_transformers_own():
    reference = AutoTokenizer.from_pretrained(str(TINY))
    texts = ["The river is low.", "河水", " <|start|> kept as a special token"]
    rows = [*text_rows(*texts), PromptRow(3, "3", messages=CHAT), PromptRow(4, "4", reason="empty"), PromptRow(5, "5", text="last")]
    encoded = load().encode(rows)
    for text, ids in zip([*texts, "last"], [*encoded[:3], encoded[5]], strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == reference(text)["input_ids"]
    assert encoded[3].tolist() == reference.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=False, return_dict=False)
    assert encoded[4] == "empty"


def test_the_beginning_of_sequence_is_never_doubled():
    encoded = load().encode([PromptRow(0, "0", text="The river"), PromptRow(1, "1", messages=CHAT)])
    assert [ids.tolist().count(BOS) for ids in encoded] == [1, 1]
    assert [ids[0] for ids in encoded] == [BOS, BOS]


RENDERED = "<s><|start|>user\nhi<|end|>"


def around(copied, prefix, suffix):
    """The tokenizer with a post-processor that puts these around a text."""
    names = {"<s>": 0, "<|start|>": 1, "<|end|>": 2}
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in prefix]
    pieces += [{"Sequence": {"id": "A", "type_id": 0}}, *({"SpecialToken": {"id": name, "type_id": 0}} for name in suffix)]
    special = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in names.items()}
    processor = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    edit_json(copied / "tokenizer.json", post_processor=processor)
    return copied


@pytest.mark.parametrize(("prefix", "suffix"), [(["<s>"], []), ([], ["<|end|>"]), (["<s>", "<|start|>"], ["<|end|>"]), ([], [])])
def test_special_tokens_that_a_text_has_are_not_doubled(copied, prefix, suffix):
    folder = around(copied, prefix, suffix)
    reference = AutoTokenizer.from_pretrained(str(folder))
    plain = ["The river is low.", "河水", "<s>", "low<|end|> and on", "<|end|>"]
    texts = [*plain, RENDERED, "<s><|start|>low", "low<|end|>"]
    bare = [reference(text, add_special_tokens=False)["input_ids"] for text in texts]
    put = {name: reference.convert_tokens_to_ids(name) for name in {*prefix, *suffix}}
    before, after = ([put[name] for name in names] for names in (prefix, suffix))
    expected = [
        ([] if before and ids[: len(before)] == before else before) + ids + ([] if after and ids[-len(after) :] == after else after)
        for ids in bare
    ]
    tokenizer = load(folder)
    assert [ids.tolist() for ids in tokenizer.encode(text_rows(*texts))] == expected
    assert expected[0] == reference(texts[0])["input_ids"]
    assert [ids.tolist() for ids in load(folder, special_tokens="none").encode(text_rows(*texts))] == bare
    always = load(folder, special_tokens="add").encode(text_rows(*texts))
    assert [ids.tolist() for ids in always] == [reference(text)["input_ids"] for text in texts]


TEXT, CHATS = Columns("text"), Columns("messages", "messages")


def test_what_was_done_about_special_tokens_is_told_in_words(copied):
    tokenizer = load()
    encoded = tokenizer.encode(text_rows(RENDERED, "The river\u202e\x1b is low today, " * 3))
    assert tokenizer.resolved_special_tokens(TEXT) == "add_where_absent"
    lines = tokenizer.told(TEXT, encoded[0])
    assert lines[0] == "special tokens: '<s>' before each text (1 of 2 had it already)"
    assert lines[1].startswith("the first prompt's 9 tokens: '<s>' '<|start|>' 'u'")
    assert lines[1].endswith("'\\n' 'h' 'i' '<|end|>'")
    long = tokenizer.told(TEXT, encoded[1])[1]
    assert " ... " in long
    assert long.isprintable()
    assert load(around(copied, [], [])).resolved_special_tokens(TEXT) == "none"
    assert load(special_tokens="add").resolved_special_tokens(TEXT) == "add"
    assert load(special_tokens="add").told(TEXT, encoded[0])[0] == "special tokens: all that the tokenizer adds"
    assert tokenizer.resolved_special_tokens(CHATS) == "none"
    assert tokenizer.told(CHATS, encoded[0])[0] == "special tokens: those of the chat template, and no others"
    with pytest.raises(PromptsError, match='special_tokens = "add", but the prompts are chat messages of'):
        load(special_tokens="add").resolved_special_tokens(CHATS)


def test_a_chat_may_end_where_an_answer_would_begin():
    reference = AutoTokenizer.from_pretrained(str(TINY))
    (ids,) = load(add_generation_prompt=True).encode([PromptRow(0, "0", messages=CHAT)])
    assert ids.tolist() == reference.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert reference.decode(ids.tolist()).endswith("<|start|>assistant\n")


def test_over_long_prompts_are_refused_or_cut():
    rows = text_rows("The river is low.", "low")
    whole = load().encode(rows)
    length = len(whole[0])
    refused = load(max_length=length - 1).encode(rows)
    assert refused[0] == f"{length} tokens, more than max_length {length - 1}"
    assert refused[1].tolist() == whole[1].tolist()
    assert load(max_length=length).encode(rows)[0].tolist() == whole[0].tolist()
    cut = load(max_length=3, truncation="cut").encode([*rows, PromptRow(2, "2", messages=CHAT)])
    assert cut[0].tolist() == whole[0][:3].tolist()
    assert len(cut[2]) == 3
    assert load(max_length=3, truncation="cut_left").encode(rows)[0].tolist() == whole[0][-3:].tolist()


def test_long_prompts_make_transformers_say_nothing(copied, caplog):
    edit_json(copied / "tokenizer_config.json", model_max_length=4)
    with caplog.at_level(logging.WARNING):
        load(copied).encode(text_rows("The river is low."))
    assert not caplog.records


def test_a_text_of_no_tokens_is_quarantined(copied):
    edit_json(copied / "tokenizer.json", post_processor=None, normalizer={"type": "Strip", "strip_left": True, "strip_right": True})
    encoded = load(copied).encode(text_rows("The river", "\u2003"))
    assert encoded[0].tolist()
    assert encoded[1] == "no tokens"


def test_messages_that_the_template_refuses_are_quarantined_with_its_words(copied):
    bob = [{"role": "bob", "content": "hi"}]
    rows = [PromptRow(0, "0", messages=bob), PromptRow(1, "1", messages=CHAT)]
    encoded = load().encode(rows)
    assert encoded[0] == "the chat template refuses it: no such role: bob"
    assert encoded[1][0] == BOS
    broken = ["{{ messages[0].name + 'x' }}", "{{ 1 // (messages | length - 1) }}", "{{ messages[0].content + 1 }}", "{{ '{}'.format() }}"]
    for template in broken:
        (copied / "chat_template.jinja").write_text(template)
        assert load(copied).encode(rows[:1])[0].startswith("the chat template refuses it: "), template


def test_messages_without_a_chat_template_stop_the_run(copied):
    (copied / "chat_template.jinja").unlink()
    tokenizer = load(copied)
    assert tokenizer.template_digest == ""
    with pytest.raises(PromptsError, match="no chat template"):
        tokenizer.encode([PromptRow(0, "0", messages=CHAT)])
    assert tokenizer.encode(text_rows("low"))[0][0] == BOS


def test_a_token_beyond_the_models_vocabulary_costs_only_its_row():
    whole = [ids.tolist() for ids in load().encode(text_rows("The river is low.", "x"))]
    largest = max(whole[0])
    assert largest > max(whole[1])
    bad, good = load(vocab_size=largest).encode(text_rows("The river is low.", "x"))
    assert bad == f"token id {largest} is beyond the model's vocabulary of {largest} tokens"
    assert good.tolist() == whole[1]
    assert load(vocab_size=largest + 1).encode(text_rows("The river is low."))[0].tolist() == whole[0]


def test_digests_follow_the_files_and_the_template(copied):
    first, second = load(), load(copied)
    assert (first.tokenizer_digest, first.template_digest) == (second.tokenizer_digest, second.template_digest)
    assert len(first.tokenizer_digest) == len(first.template_digest) == 32
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}")
    changed = load(copied)
    assert changed.tokenizer_digest == first.tokenizer_digest
    assert changed.template_digest != first.template_digest
    edit_json(copied / "tokenizer.json", normalizer={"type": "NFC"})
    assert load(copied).tokenizer_digest != first.tokenizer_digest


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [
        ("qwen2", None),
        ("qwen2", "Qwen2Tokenizer"),
        ("llama", "LlamaTokenizerFast"),
        ("gpt2", "GPT2Tokenizer"),
        ("gpt_neox", "GPTNeoXTokenizerFast"),
        ("codegen", "CodeGenTokenizer"),
        ("cohere2", "CohereTokenizerFast"),
        ("gemma2", "GemmaTokenizerFast"),
        ("minimax_m2", "GPT2Tokenizer"),
    ],
)
def test_tokens_are_those_of_tokenizer_json_whatever_class_transformers_chooses(copied, model_type, tokenizer_class):
    choose_class(copied, model_type, tokenizer_class)
    split = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|[^\\r\\n]"}, "behavior": "Isolated", "invert": False}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    edit_json(copied / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, whole]})
    own = Tokenizer.from_file(str(copied / "tokenizer.json"))
    encoded = load(copied).encode([*text_rows(*PROBES), PromptRow(90, "90", messages=CHAT)])
    assert [ids.tolist() for ids in encoded[:-1]] == [own.encode(text).ids for text in PROBES]
    rendered = AutoTokenizer.from_pretrained(str(TINY)).apply_chat_template(CHAT, tokenize=False)
    assert encoded[-1].tolist() == own.encode(rendered, add_special_tokens=False).ids


def choose_class(folder, model_type, tokenizer_class):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in {"backend", "tokenizer_class"}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": tokenizer_class} if tokenizer_class else settings)
    )


def test_a_class_that_loses_spaces_is_not_used_but_its_special_tokens_are_known(copied, monkeypatch):
    # transformers 5.17 to 5.21 hand this class out for a byte-level tokenizer.json under LlamaTokenizerFast.
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    handed = LlamaTokenizer.from_pretrained(str(copied))
    expected = Tokenizer.from_file(str(copied / "tokenizer.json")).encode("The river is low.").ids
    assert handed("The river is low.")["input_ids"] != expected
    monkeypatch.setattr(own_tokenizer, "_handed", lambda _: handed)
    (copied / "chat_template.jinja").write_text("{{ bos_token }}low")
    fixed = load(copied)
    assert [ids.tolist() for ids in fixed.encode(text_rows("The river is low."))] == [expected]
    assert fixed.encode([PromptRow(0, "0", messages=CHAT)])[0][0] == BOS
    monkeypatch.setattr(own_tokenizer, "_differences", lambda *_, **__: [])
    assert load(copied).tokenizer_digest != fixed.tokenizer_digest


def test_a_tokenizer_json_that_transformers_never_loads_as_it_is_is_refused(copied, monkeypatch):
    choose_class(copied, "qwen2", None)
    monkeypatch.setattr(own_tokenizer, "PreTrainedTokenizerFast", Qwen2Tokenizer)
    with pytest.raises(CheckpointError, match=r"not the one of tokenizer\.json: its normalizer is NFC\(\), not None; its pre_tokenizer is"):
        load(copied)


def test_a_tokenizer_json_of_a_newer_format_is_refused_in_a_sentence(copied):
    edit_json(copied / "tokenizer.json", pre_tokenizer={"type": "SplitByMeaning"})
    with pytest.raises(CheckpointError, match=rf"tokenizers {version('tokenizers')} does not read tokenizer\.json: .*newer tokenizers"):
        load(copied)


def test_a_word_that_the_vocabulary_has_no_token_for_costs_only_its_row(copied):
    words = {"type": "WordLevel", "vocab": {"low": 0, "river": 1, "a": 2}, "unk_token": "<absent>"}
    edit_json(copied / "tokenizer.json", model=words, added_tokens=[], post_processor=None, pre_tokenizer={"type": "Whitespace"})
    choose_class(copied, "llama", "PreTrainedTokenizerFast")
    reasons = load(copied).encode(text_rows("low river", "high river", "low"))
    assert [reasons[0].tolist(), reasons[2].tolist()] == [[0, 1], [0]]
    assert reasons[1].startswith("the tokenizer refuses it: WordLevel error: Missing")
    del words["vocab"]["a"]
    edit_json(copied / "tokenizer.json", model=words)
    with pytest.raises(PromptsError, match=r"text 'a' the token ids \[\] without special tokens"):
        load(copied).encode(text_rows("low"))


def test_a_class_that_cannot_take_the_vocabulary_is_not_used(copied):
    """T5Tokenizer takes the third token for the one of unknown words, and this vocabulary has two."""
    choose_class(copied, "llama", "T5Tokenizer")
    model = {"type": "Unigram", "vocab": [["l", -1.0], ["o", -1.0]], "unk_id": None}
    edit_json(copied / "tokenizer.json", model=model, added_tokens=[], post_processor=None, pre_tokenizer=None, normalizer=None)
    assert own_tokenizer._handed(copied) is None
    (found,) = load(copied, special_tokens="none").encode(text_rows("loo"))
    assert found.tolist() == [0, 1, 1]


def test_absent_and_damaged_tokenizers_are_named(copied, tmp_path):
    with pytest.raises(CheckpointError, match="absent-model is absent"):
        load(tmp_path / "absent-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no tokenizer: none of .*tokenizer.json"):
        load(tmp_path / "empty")
    data = (copied / "tokenizer.json").read_bytes()
    (copied / "tokenizer.json").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        load(copied)


@pytest.mark.parametrize(
    ("content", "installed", "needed"),
    [
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", [], "sentencepiece protobuf"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", ["protobuf"], "sentencepiece"),
        (b"IQ== 0\nIg== 1\n", ["sentencepiece", "protobuf"], "tiktoken"),
    ],
)
def test_a_tokenizer_model_alone_says_what_to_install(copied, monkeypatch, content, installed, needed):
    """Tried with a model of sentencepiece 0.2.3, which is no package of this project's: it is read once that is installed."""
    monkeypatch.setattr(tokenizer_files, "_is_installed", installed.__contains__)
    for file in copied.iterdir():
        file.unlink()
    (copied / "config.json").write_text('{"model_type": "llama"}')
    (copied / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (copied / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load(copied)
    listed = " and ".join(needed.split())
    assert f"has tokenizer.model and no tokenizer.json, and {listed}, which it takes to read that, is not installed" in str(caught.value)
    assert f"pip install {needed}; or put the same model's tokenizer.json there" in str(caught.value)
    monkeypatch.setattr(tokenizer_files, "_is_installed", lambda _: True)
    with pytest.raises(CheckpointError, match="transformers cannot load .*There is tokenizer.model, but no tokenizer.json"):
        load(copied)


def test_prompts_beyond_the_steady_positions_are_quarantined_whatever_max_length_says():
    tokens = [PromptRow(place, str(place), token_ids=[5] * length) for place, length in enumerate((7, 8, 9))]
    for truncation in ("refuse", "cut"):
        *kept, reason = load(max_length=100, steady_positions=8, truncation=truncation).encode(tokens)
        assert [len(ids) for ids in kept] == [7, 8]
        assert (
            reason
            == "9 tokens, more than 8: beyond them the model computes a whole batch otherwise (longrope, dynamic, Doge, few index heads)"
        )
    assert [len(ids) for ids in load(max_length=8, steady_positions=8, truncation="cut").encode(tokens)] == [7, 8, 8]


def test_code_from_the_checkpoint_is_never_run(copied):
    trap = copied / "ran"
    (copied / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    edit_json(copied / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(CheckpointError, match="code from the checkpoint"):
        load(copied)
    assert not trap.exists()
