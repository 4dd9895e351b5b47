"""PromptTokenizer: rows to token ids, by the model's own tokenizer and chat template."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import numpy as np
import xxhash
from jinja2 import TemplateError

from m2ray.batches import Int32Array
from m2ray.errors import CheckpointError, PromptsError
from m2ray.prompts.own_tokenizer import own_tokenizer, probed_digest
from m2ray.prompts.rows import Message, PromptRow
from m2ray.prompts.sources import PromptOptions
from m2ray.storage import SCHEMES, open_store

_VOCABULARY_FILES = (
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_OTHER_FILES = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
_FILES_BESIDE = ("chat_template.jinja", "chat_template.json", "config.json")
_TEMPLATES_FOLDER = "additional_chat_templates"

# What a template written for other messages raises: its own raise_exception(), or Python's errors on their values.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


class PromptTokenizer:
    """The model's tokenizer, offline and without code from the checkpoint.

    Attributes:
        tokenizer_digest: xxh3-128 of the tokenizer's files and of its tokens of some probes, 32 hex digits.
        template_digest: xxh3-128 of the chat template's text, or "" if the model has none.
    """

    def __init__(self, tokenizer: Any, tokenizer_digest: str, options: PromptOptions, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._vocab_size = vocab_size
        self.tokenizer_digest = tokenizer_digest
        template = _chat_template(tokenizer)
        self.template_digest = xxhash.xxh3_128(template.encode()).hexdigest() if template is not None else ""

    @classmethod
    def load(cls, model_url: str, options: PromptOptions, vocab_size: int) -> Self:
        """Load the tokenizer in the model's folder.

        Args:
            model_url: the checkpoint's folder, as a path or a URL.
            options: `max_length` and `truncation` are used.
            vocab_size: rows of the model's embedding; no token id may reach it.

        Raises:
            CheckpointError: the folder has no tokenizer, a damaged one, or one that transformers makes another of.
            StoreError: the folder is in an object store that cannot be read.
        """
        with _local_folder(model_url) as folder:
            digest = _digest_files(folder, model_url)
            try:
                tokenizer = own_tokenizer(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
                raise CheckpointError(
                    f"transformers cannot load the tokenizer of {model_url}: {error}.",
                    "Copy the tokenizer's files again. Tokenizers that need code from the checkpoint are refused.",
                ) from error
        return cls(tokenizer, probed_digest(tokenizer, digest), options, vocab_size)

    def require_template(self) -> None:
        """Raise PromptsError if the model has no chat template."""
        if not self.template_digest:
            raise PromptsError(
                "The prompts are chat messages, but the model's tokenizer has no chat template.",
                "Give the prompts as text, or a model with a chat template.",
            )

    def encode(self, rows: Sequence[PromptRow]) -> list[Int32Array | str]:
        """Each row's token ids as int32 [T], or the reason why the row is quarantined.

        Texts get the tokenizer's own special tokens; messages those that the chat template writes, and no others.

        Raises:
            PromptsError: a token id is beyond the model's vocabulary, or there is no chat template for messages.
        """
        if any(row.messages is not None for row in rows):
            self.require_template()
        results: list[Int32Array | str] = [row.reason or "" for row in rows]
        rendered: dict[int, str] = {}
        for place, row in enumerate(rows):
            if row.messages is not None:
                try:
                    rendered[place] = self._render(row.messages)
                except _TEMPLATE_ERRORS as error:
                    results[place] = f"the chat template refuses it: {str(error) or type(error).__name__}"
        texts = {place: row.text for place, row in enumerate(rows) if row.text is not None}
        for group, adds_special_tokens in ((texts, True), (rendered, False)):
            for place, token_ids in zip(group, self._tokenize(list(group.values()), adds_special_tokens=adds_special_tokens), strict=True):
                results[place] = self._check(token_ids, rows[place])
        return results

    def _render(self, messages: list[Message]) -> str:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        return str(text)

    def _tokenize(self, texts: list[str], *, adds_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        encoding = self._tokenizer(
            texts,
            add_special_tokens=adds_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        token_ids: list[list[int]] = encoding["input_ids"]
        return token_ids

    def _check(self, token_ids: list[int], row: PromptRow) -> Int32Array | str:
        max_length = self._options.max_length
        if not token_ids:
            return "no tokens"
        if len(token_ids) > max_length:
            if self._options.truncation == "refuse":
                return f"{len(token_ids)} tokens, more than max_length {max_length}"
            token_ids = token_ids[:max_length]
        array = np.array(token_ids, dtype=np.int32)
        if array.max() >= self._vocab_size:
            raise PromptsError(
                f"The tokenizer gives row {row.row_id} the token id {array.max()}, but the model's vocabulary has {self._vocab_size} tokens.",
                "The tokenizer belongs to another model: copy the right tokenizer's files into the model's folder.",
            )
        return array


def _chat_template(tokenizer: Any) -> str | None:
    """The template that apply_chat_template uses, or None."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # transformers' word for: none, or several without a default
        return None


@contextmanager
def _local_folder(model_url: str) -> Iterator[Path]:
    """The model's folder, or for one in an object store a temporary one with the files that a tokenizer may be made of."""
    if urlsplit(model_url).scheme in SCHEMES:
        store = open_store(model_url)
        with TemporaryDirectory(prefix="m2ray-tokenizer-") as temporary:
            for name in (*_VOCABULARY_FILES, *_OTHER_FILES, *_FILES_BESIDE):
                if store.size(name) is not None:
                    Path(temporary, name).write_bytes(store.read(name))
            for key, _ in store.list(_TEMPLATES_FOLDER):
                Path(temporary, _TEMPLATES_FOLDER).mkdir(exist_ok=True)
                Path(temporary, _TEMPLATES_FOLDER, Path(key).name).write_bytes(store.read(key))
            yield Path(temporary)
        return
    folder = Path(unquote(urlsplit(model_url).path)) if model_url.startswith("file://") else Path(model_url).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"The model folder {model_url} is absent.", "Check the path.")
    yield folder


def _digest_files(folder: Path, model_url: str) -> str:
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise CheckpointError(f"{model_url} has no tokenizer: none of {', '.join(_VOCABULARY_FILES)}.", "Copy the tokenizer's files there.")
    digest = xxhash.xxh3_128()
    for name in sorted(_VOCABULARY_FILES + _OTHER_FILES):
        if not (folder / name).is_file():
            continue
        try:
            data = (folder / name).read_bytes()
            if name.endswith(".json"):
                json.loads(data)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"The tokenizer's file {model_url}/{name} is damaged: {error}.", "Copy it again.") from error
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
