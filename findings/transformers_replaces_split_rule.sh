#!/usr/bin/env bash
# transformers: for model type qwen2 AutoTokenizer throws away the split rule that stands in tokenizer.json.
#
# Seen 2026-11-29 with transformers 5.24.0, tokenizers 0.23.3 on Python 3.11.
# Seen: a byte-level tokenizer.json whose rule keeps a number whole gives "In 2024 we" 7 ids with the library tokenizers:
#   2024 is one token. AutoTokenizer gives a Qwen2Tokenizer with Qwen2's own rule, one digit at a time: 10 ids. The
#   class PreTrainedTokenizerFast in tokenizer_config.json does not change that; another model type does. No warning.
# One would have guessed: tokenizer.json says all, and two libraries that read the same file give the same ids.
# Why it matters: fine-tunes and small research models often take Qwen2's architecture with a tokenizer of their own. Ids
#   from a server or a data set made with tokenizers then are not those of the model's own library: rows of activations
#   belong to other tokens, positions shift, a draft model trains on text that its target never sees so.
#   Compare AutoTokenizer with Tokenizer.from_file on a few prompts before you extract.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

TEXT = "In 2024 we"
vocabulary = {sign: number for number, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
merges = [("2", "0"), ("20", "2"), ("202", "4")]
for left, right in merges:
    vocabulary[left + right] = len(vocabulary)
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
tokenizer.decoder = decoders.ByteLevel()

lengths = {}
for model_type in ("qwen2", "llama"):
    folder = Path(model_type)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    direct = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT)
    auto = AutoTokenizer.from_pretrained(folder)
    ids = auto(TEXT)["input_ids"]
    print(f"{model_type}: tokenizers    {direct.tokens}")
    print(f"{model_type}: AutoTokenizer {auto.convert_ids_to_tokens(ids)} ({type(auto).__name__})")
    lengths[model_type] = (len(direct.ids), len(ids))
if lengths != {"qwen2": (7, 10), "llama": (7, 7)}:
    sys.exit("The behaviour has changed.")
PYTHON
