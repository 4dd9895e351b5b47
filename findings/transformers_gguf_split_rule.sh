#!/usr/bin/env bash
# transformers: a GGUF's tokenizer gets GPT-2's split rule where transformers does not know the rule that the file names.
#
# Seen 2026-11-29 with transformers 5.24.0, tokenizers 0.23.3, gguf 0.19.0, torch 2.13.0 on Python 3.11.
# Seen: a GGUF whose tokenizer.ggml.pre is "smollm", as all of SmolLM's and SmolLM2's have, means: each digit by itself, then GPT-2's rule.
#   AutoTokenizer takes GPT-2's alone. Of the spaces before a number the last one is cut off: "x =   1" has two tokens of space, not one.
#   No warning, for "smollm" as for a rule that nobody ever named. Of llama.cpp's names transformers 5.24 knows 23.
# One would have guessed: an error, as for a tokenizer.ggml.model that transformers does not know.
# Why it matters: in SmolLM2 some prompts with numbers in columns, tables or code get other ids than the release's tokenizer.json gives, and
#   every later position shifts. Rows of activations then belong to text that the model was never trained on. Take tokenizer.json from
#   the release, or set the rule by hand.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 torch==2.13.0
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import sys
from pathlib import Path

from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TEXT = "x =   1"
tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "ĠĠĠ"]


def tokenized(rule):
    folder = Path(rule)
    folder.mkdir()
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    for add in (writer.add_block_count, writer.add_head_count, writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")


tokenizer = tokenized("smollm")
seen = tokenizer.tokenize(TEXT)
each_digit = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(each_digit)
meant = tokenizer.tokenize(TEXT)
unknown = tokenized("no such rule").tokenize(TEXT)
print(f"smollm, AutoTokenizer: {seen}\nsmollm, its own rule:  {meant}\nno such rule:          {unknown}")
if (seen, meant, unknown) != (["x", "Ġ", "=", "ĠĠ", "Ġ", "1"], ["x", "Ġ", "=", "ĠĠĠ", "1"], seen):
    sys.exit("The behaviour has changed.")
PYTHON
