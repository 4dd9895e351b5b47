"""The Rust tokenizer by itself gives what transformers' tokenizer around it gives, and one bad text costs only itself."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from m2ray.prompts.own_tokenizer import PROBES
from m2ray.prompts.text_tokens import TextTokens

TEXTS = [*PROBES, "<s>", "a<s>b", "", " ", "<|end|> <|end|>x", "The river " * 200]
SPECIAL = ["<s>", "<|end|>", "<unk>"]


def trained(kind: str) -> Tokenizer:
    if kind == "bytes":
        made, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
    elif kind == "split":
        made, trainer = (
            Tokenizer(models.BPE(unk_token="<unk>")),
            trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
        )
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Whitespace()])
    elif kind == "pieces":
        made, trainer = (
            Tokenizer(models.WordPiece(unk_token="<unk>")),
            trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
        )
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        made, trainer = (
            Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
        )
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(PROBES * 3, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", 1)])
    return made


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "split", "pieces", "words"])
def test_ids_and_offsets_are_those_of_transformers(kind: str, *, splits: bool) -> None:
    made = trained(kind)
    made.enable_padding(length=64)
    made.enable_truncation(5)
    names = {"bos_token": "<s>", "eos_token": "<|end|>", "split_special_tokens": splits}
    # Each of its own: transformers sets the Rust tokenizer at each call.
    tokenizer, other = (PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made.to_str()), **names) for _ in range(2))
    texts = TextTokens(other)
    for adds in (False, True):
        expected = tokenizer(TEXTS, add_special_tokens=adds, padding=False, truncation=False)["input_ids"]
        assert texts.ids(TEXTS, adds_special_tokens=adds) == expected
    plain = tokenizer(TEXTS, add_special_tokens=False, return_offsets_mapping=True)
    located = texts.located(TEXTS)
    assert [one[0] for one in located] == plain["input_ids"]
    assert [[tuple(pair) for pair in one[1].tolist()] for one in located] == plain["offset_mapping"]


def test_a_tokenizer_with_a_way_of_its_own_is_asked_itself() -> None:
    class Doubling(PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
            return super().__call__([one + one for one in text], *args, **options)

    texts = TextTokens(Doubling(tokenizer_object=trained("bytes")))
    assert not texts.has_offsets
    assert texts.ids(["ab"]) == TextTokens(PreTrainedTokenizerFast(tokenizer_object=trained("bytes"))).ids(["abab"])


def test_texts_that_are_refused_cost_only_themselves() -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<absent>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_tokens([AddedToken("c")])
    texts = ["a b", "x", "b", "c a", "a y", *["a"] * 100, "z"]
    found = TextTokens(PreTrainedTokenizerFast(tokenizer_object=made)).ids(texts)
    assert [place for place, ids in enumerate(found) if isinstance(ids, str)] == [1, 4, 105]
    assert str(found[1]).startswith("the tokenizer refuses it: ")
    assert [found[0], found[2], found[3], found[50]] == [[0, 1], [1], [2, 0], [0]]
