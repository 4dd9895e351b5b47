"""The tokenizer that tokenizer.json describes, where transformers makes another one.

Some of transformers' classes (LlamaTokenizerFast, Qwen2Tokenizer, GPT2Tokenizer, CohereTokenizer ...) take the vocabulary of tokenizer.json
and put a normalizer and a pre-tokenizer of their own before it; which classes do, changes with its version.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from m2ray.errors import CheckpointError

PROBES = (
    "The quick  brown fox, 2024! It's I'LL don't (see [1]).",
    " leading,   three   spaces and trailing  ",
    "def f(x_1):\n    if x == 12345678:\n\t\treturn 'a\\b'\r\n\n\n",
    "河水很低。「東京」は、大きい！안녕하세요 สวัสดี नमस्ते",
    "cafe\u0301 café ﬁne Ａ１ ½ ² naïve Straße",
    "🙂👩\u200d👩\u200d👧 \u00a0\u2003\u200b\u0000 €100,000.00 https://a.b/c?d=e&f=%20",
    "UPPER lower camelCase snake_case 3.14e-10 #tag @name ... --- ~~~",
)
"""What tokenizers split differently: spaces, digits, contractions, line ends, scripts without spaces, accents, joined signs."""

_COMPONENTS = ("normalizer", "pre_tokenizer")
_MODEL_SETTINGS = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizersRefusalError(Exception):
    """What `tokenizers` says of a text or a vocabulary: that there is no token for a word, and none for unknown words, for example."""


@contextmanager
def refusals_named() -> Iterator[None]:
    """Raise TokenizersRefusalError where `tokenizers` raises Exception itself.

    Its Rust code has nothing narrower for a text (0.23.3), and whether a text has a word without a token shows only when it is encoded.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise TokenizersRefusalError(str(error)) from error


def own_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers makes of a model's folder, or tokenizer.json as it is where the two give different tokens.

    Chat template and special tokens are those of the folder's other files and of the class that transformers chose, either way.

    Raises:
        CheckpointError: tokenizer.json cannot be read, or they differ and transformers' plain class does not load it as it is either.
        OSError, ValueError, KeyError, TypeError, AttributeError, ImportError: transformers' words for a folder that it cannot load.
    """
    path = folder / "tokenizer.json"
    own = _read(path) if path.is_file() else None
    handed = _handed(folder)
    # A folder may ask for transformers' correction of Mistral's faulty pre-tokenizer.
    if handed is not None and (own is None or _settings(folder).get("fix_mistral_regex")):
        return handed
    if own is None:
        raise ValueError("its vocabulary is not what its class needs")
    if handed is not None and not _differences(handed, own):
        return handed
    plain = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if differences := _differences(plain, own):
        raise CheckpointError(
            f"transformers' tokenizer is not the one of tokenizer.json: {'; '.join(differences)}.",
            "tokenizer.json and tokenizer_config.json do not belong together: take both from the same release.",
        )
    for name in _NAMED_TOKENS if handed is not None else ():  # a template may write what only the class knows
        if getattr(plain, name) is None and getattr(handed, name) in plain.get_vocab():
            setattr(plain, name, getattr(handed, name))
    return plain


def probed_digest(tokenizer: Any, files_digest: str) -> str:
    """xxh3-128 of a tokenizer's files and of the tokens that it makes of the probes: other code on the same files is another tokenizer."""
    token_ids = [ids_of_probe(tokenizer, probe) for probe in PROBES]
    return xxhash.xxh3_128(f"{files_digest} {json.dumps(token_ids)}".encode()).hexdigest()


def ids_of_probe(tokenizer: Any, probe: str, **asked: bool) -> list[int]:
    """What transformers' tokenizer makes of a text, special tokens included unless `asked` otherwise; none if it has no token for a word."""
    with suppress(TokenizersRefusalError), refusals_named():
        return list(tokenizer(probe, padding=False, truncation=False, verbose=False, **asked)["input_ids"])
    return []


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(path.read_bytes())  # from_file has no error of its own
    except ValueError as error:
        raise CheckpointError(
            f"tokenizers {version('tokenizers')} does not read tokenizer.json: {error}.",
            "Install a newer tokenizers, or copy the file again.",
        ) from error


def _handed(folder: Path) -> Any | None:
    """What transformers makes of the folder; None where its class lacks a token that it needs."""
    with suppress(TokenizersRefusalError), refusals_named():
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _differences(tokenizer: Any, own: Tokenizer) -> list[str]:
    """What transformers' tokenizer does otherwise than tokenizer.json; tokens that tokenizer_config.json adds are no difference."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return [f"{type(tokenizer).__name__} does not read it"]
    differences = [
        f"its {name} is {getattr(backend, name)}, not {getattr(own, name)}"
        for name in _COMPONENTS
        if _state(getattr(backend, name)) != _state(getattr(own, name))
    ]
    differences += [
        f"its model's {name} is {_setting(backend, name)!r}, not {_setting(own, name)!r}"
        for name in _MODEL_SETTINGS
        if _setting(backend, name) != _setting(own, name)
    ]
    if not own.get_vocab().items() <= backend.get_vocab().items():
        differences.append("its vocabulary is another")
    for probe in PROBES if not differences else ():
        found, expected = ids_of_probe(tokenizer, probe), _own_ids(own, probe)
        if found != expected:
            differences.append(f"it makes {len(found)} tokens of {probe!r}, not {len(expected)}")
            break
    return differences


def _own_ids(own: Tokenizer, text: str) -> list[int]:
    own.no_truncation()
    own.no_padding()
    with suppress(TokenizersRefusalError), refusals_named():
        return list(own.encode(text).ids)
    return []


def _state(component: Any) -> Any:
    """A component as tokenizer.json writes it."""
    return None if component is None else json.loads(component.__getstate__())


def _setting(tokenizer: Tokenizer, name: str) -> Any:
    """A model's setting; none and an empty string say the same."""
    return getattr(tokenizer.model, name, None) or None
