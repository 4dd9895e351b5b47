"""PromptTokenizer: rows to token ids, by the model's own tokenizer and chat template."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, Self

import numpy as np

from m2ray.batches import Int32Array
from m2ray.errors import PromptsError
from m2ray.options import PromptOptions
from m2ray.prompts.chat_template import ChatTemplate
from m2ray.prompts.masks import Marked, loss_mask, roles
from m2ray.prompts.own_tokenizer import own_tokenizer, probed_digest
from m2ray.prompts.packing import Packer
from m2ray.prompts.rendering import RefusedError, Rendered
from m2ray.prompts.rows import MAX_PROMPT_BYTES, Columns, PromptRow
from m2ray.prompts.special_tokens import SpecialTokens, SpecialTokensRule, special_ids
from m2ray.prompts.template_file import read_template
from m2ray.prompts.text_tokens import TextTokens
from m2ray.prompts.tokenizer_files import digest_files, not_loaded, tokenizer_folder
from m2ray.selection import Selection

_SHOWN_FIRST, _SHOWN_LAST = 8, 4
_NO_MASK = "no loss mask, by which its tokens are to be chosen"


class PromptTokenizer:
    """The model's tokenizer, offline and without code from the checkpoint.

    Attributes:
        tokenizer_digest: xxh3-128 of the tokenizer's files and of its tokens of some probes, 32 hex digits.
        template: the chat template.
        template_digest: xxh3-128 of its text, or "" if the model has none.
        selection: which tokens become rows, the tokenizer's special ids resolved.
    """

    def __init__(
        self, tokenizer: Any, tokenizer_digest: str, options: PromptOptions, vocab_size: int, no_text: Mapping[int, str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._text_tokens = TextTokens(tokenizer)
        self._options = options
        self._vocab_size = vocab_size
        self._no_text = no_text or {}
        self.tokenizer_digest = tokenizer_digest
        self.template = ChatTemplate(tokenizer, options)
        self.template_digest = self.template.digest
        self.selection = Selection(options.tokens, special_ids(tokenizer) if options.skip_special_tokens else ())

    @classmethod
    def load(cls, model_url: str, options: PromptOptions, vocab_size: int, no_text: Mapping[int, str] | None = None) -> Self:
        """Load the tokenizer in the model's folder.

        Args:
            model_url: the checkpoint's folder, as a path or a URL.
            options: all but those of the source are used.
            vocab_size: rows of the model's embedding; no token id may reach it.
            no_text: token ids that no prompt may have, because they stand for an image or a sound, and what config.json calls them.

        Raises:
            CheckpointError: the folder has no tokenizer, a damaged one, or one that transformers makes another of.
            PromptsError: the template file that the options name cannot be read.
            StoreError: the folder is in an object store that cannot be read.
        """
        with tokenizer_folder(model_url) as folder:
            digest = digest_files(folder, model_url)
            try:
                tokenizer = own_tokenizer(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError, RuntimeError) as error:
                raise not_loaded(folder, model_url, error) from error
        if options.chat_template is not None:
            tokenizer.chat_template = read_template(options.chat_template)
        return cls(tokenizer, probed_digest(tokenizer, digest), options, vocab_size, no_text)

    @cached_property
    def _special_tokens(self) -> SpecialTokens:
        return SpecialTokens.of(self._tokenizer)

    def resolved_special_tokens(self, columns: Columns) -> SpecialTokensRule:
        """What is done about special tokens, without "auto": a chat gets none beside the template's, token ids get none.

        Raises:
            PromptsError: they are to be added to a chat or to token ids, or what the tokenizer adds cannot be told.
        """
        rule = self._options.special_tokens
        if columns.kind != "text":
            if rule == "add":
                raise PromptsError(f'special_tokens = "add", but the prompts are {columns}: nothing is added to those.', "Leave it out.")
            return "none"
        if rule != "auto":
            return rule
        return "add_where_absent" if self._special_tokens.prefix or self._special_tokens.suffix else "none"

    def packer(self) -> Packer | None:
        """What joins these prompts to contexts; None where each is a sequence of its own. Raises PromptsError if nothing can lie between them."""
        size = self._options.pack
        if size is None:
            return None
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is None and eos is None:
            raise PromptsError(
                f"pack = {size} joins prompts with the beginning-of-sequence token between them, and the tokenizer has neither that nor an end.",
                "Leave pack out, or give a model whose tokenizer names one (bos_token).",
            )
        return Packer(size, eos if bos is None else bos)

    def settled(self, columns: Columns) -> PromptOptions:
        """The options as the prompts settle them: which column counts, and what is put around its texts. A text sees no date.

        The column of tools stays as it was asked for: a named one has to be in every file, the one that is looked for in none.

        Raises:
            PromptsError: as `resolved_special_tokens` and `packer`; or tokens are chosen by a mask, and these prompts bring none.
        """
        self._require_choice(columns)
        return replace(
            self._options,
            text_column=columns.prompt if columns.kind == "text" else None,
            messages_column=columns.prompt if columns.kind == "messages" else None,
            input_ids_column=columns.prompt if columns.kind == "input_ids" else None,
            special_tokens=self.resolved_special_tokens(columns),
            skip_ids=self.selection.skip_ids,
            template_date=self._options.template_date if columns.is_messages else None,
            template_timeout_s=self._options.template_timeout_s if columns.is_messages else None,
        )

    def _require_choice(self, columns: Columns) -> None:
        options, steady = self._options, self._options.steady_positions
        self.packer()
        if options.pack is not None and steady is not None and options.pack > steady:
            raise PromptsError(
                f"pack = {options.pack}, and beyond {steady} tokens the model computes a whole batch otherwise (longrope, dynamic, Doge, few index heads).",
                f"Give at most {steady}.",
            )
        if self.selection.needs_mask and columns.loss_mask is None and not (columns.is_messages and options.mask is not None):
            raise PromptsError(
                f"tokens = {options.tokens!r} goes by a loss mask, and the prompts, {columns}, bring none.",
                'Give chats and mask = "assistant", or token ids with a loss_mask column.',
            )

    def require(self, columns: Columns) -> None:
        """Raise PromptsError if there is no chat template for messages, or no way to the mask that is asked for."""
        if not columns.is_messages:
            return
        self.template.require()
        if self._options.mask is not None and not self._text_tokens.has_offsets:
            raise PromptsError(
                f"mask = {self._options.mask!r}, but the model's tokenizer does not say which characters a token is of.",
                "Give a model with a tokenizer.json, or token ids with a loss_mask.",
            )
        self.template.require_mask()

    def told(self, columns: Columns, first_prompt: Int32Array) -> list[str]:
        """Lines for a person: what was done about special tokens until now, and the first prompt's token ids in words."""
        rule = self.resolved_special_tokens(columns)
        if columns.is_messages:
            done = "those of the chat template, and no others"
            if self.template.reads_date:
                done += f"; its date is {self._options.template_date}"
        elif rule == "add_where_absent":
            found = self._special_tokens
            pieces = [("before", found.prefix, found.num_begun), ("after", found.suffix, found.num_ended)]
            done = ", ".join(
                f"{self._in_words(token_ids)} {where} each text ({had:,} of {found.num_texts:,} had it already)"
                for where, token_ids, had in pieces
                if token_ids
            )
        else:
            done = "all that the tokenizer adds" if rule == "add" else "none added"
        lines = []
        if (packer := self.packer()) is not None:
            lines.append(
                f"prompts are joined, each after {self._in_words([packer.bos])}, and cut into contexts of {self._options.pack:,} tokens"
            )
        if not self.selection.is_all:
            skipped = f", but never {self._in_words(list(self.selection.skip_ids))}" if self.selection.skip_ids else ""
            lines.append(f"rows of the tokens: {self.selection.tokens}{skipped}")
        return [
            *lines,
            f"special tokens: {done}",
            f"the first prompt's {len(first_prompt):,} tokens: {self._in_words(first_prompt.tolist())}",
        ]

    def words(self, token_ids: Sequence[int]) -> list[str]:
        """What each token stands for by itself."""
        return [self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False) for token_id in token_ids]

    def text(self, token_ids: Sequence[int]) -> str:
        """What they stand for together."""
        return str(self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    def encode(self, rows: Sequence[PromptRow]) -> list[Int32Array | str]:
        """The same as `marked`, token ids alone."""
        return [found if isinstance(found, str) else found.token_ids for found in self.marked(rows)]

    def marked(self, rows: Sequence[PromptRow]) -> list[Marked | str]:
        """Each row's token ids and what is known of them, or the reason why the row is quarantined.

        Texts get the tokenizer's own special tokens as `special_tokens` says; messages those that the chat template writes, and no others.
        Token ids are taken as they are.

        Raises:
            PromptsError: there is no chat template for messages.
        """
        if any(row.messages is not None for row in rows):
            self.template.require()
        results: list[Marked | str] = [row.reason or "" for row in rows]
        texts = {place: row.text for place, row in enumerate(rows) if row.text is not None}
        for place, found in zip(texts, self._check_all(self._tokenize_texts(list(texts.values()))), strict=True):
            results[place] = found
        for place, row in enumerate(rows):
            if row.token_ids is not None:
                lacks_mask = self.selection.needs_mask and row.loss_mask is None
                results[place] = _NO_MASK if lacks_mask else self._check(row.token_ids, row.loss_mask)
        for place, chat in self._encode_chats({place: row for place, row in enumerate(rows) if row.messages is not None}):
            results[place] = chat
        return results

    def close(self) -> None:
        """End the process in which chats are rendered, if there is one; the next chat starts another."""
        self.template.close()

    def _encode_chats(self, rows: Mapping[int, PromptRow]) -> Iterator[tuple[int, Marked | str]]:
        """What chats come to by their places. A small chat may become a long text: only so much is held at a time."""
        chats: dict[int, Rendered] = {}
        num_characters = 0
        for place, chat in zip(rows, self.template.rendered(list(rows.values())), strict=True):
            if isinstance(chat, RefusedError):
                yield place, str(chat)
                continue
            if num_characters + len(chat.text) > MAX_PROMPT_BYTES:
                yield from zip(chats, self._marked_chats(list(chats.values())), strict=True)
                chats.clear()
                num_characters = 0
            chats[place] = chat
            num_characters += len(chat.text)
        yield from zip(chats, self._marked_chats(list(chats.values())), strict=True)

    def _marked_chats(self, chats: Sequence[Rendered]) -> Iterator[Marked | str]:
        texts = [chat.text for chat in chats]
        if self._options.mask is None:
            yield from self._check_all(self._text_tokens.ids(texts))
            return
        for chat, found in zip(chats, self._text_tokens.located(texts), strict=True):
            yield found if isinstance(found, str) else self._marked_chat(chat, *found)

    def _marked_chat(self, chat: Rendered, token_ids: list[int], offsets_T2: Int32Array) -> Marked | str:
        checked = self._check(token_ids)
        if isinstance(checked, str):
            return checked
        mask, num_tokens = loss_mask(chat, offsets_T2), len(checked.token_ids)
        if isinstance(mask, str):
            return mask
        first = len(mask) - num_tokens if self._options.truncation == "cut_left" else 0
        kept = range(first, first + num_tokens)
        return Marked(checked.token_ids, mask[kept.start : kept.stop], roles(chat, offsets_T2, kept))

    def _tokenize_texts(self, texts: list[str]) -> list[list[int] | str]:
        rule = self._options.special_tokens
        tokenized = self._text_tokens.ids(texts, adds_special_tokens=rule == "add")
        if rule != "auto":
            return tokenized
        return [found if isinstance(found, str) else self._special_tokens.around(found) for found in tokenized]

    def _check_all(self, found: list[list[int] | str]) -> list[Marked | str]:
        """`_check` of each text; all at once where nothing is wrong with any, which takes a third of the time."""
        lists = [token_ids for token_ids in found if not isinstance(token_ids, str)]
        bounds = list(accumulate(map(len, lists), initial=0))
        token_ids_N: Int32Array = np.fromiter(chain.from_iterable(lists), np.int32, bounds[-1])
        longest = self._longest
        is_plain = len(lists) == len(found) and all(0 < stop - start <= longest for start, stop in pairwise(bounds))
        if is_plain and token_ids_N.max(initial=0) < self._vocab_size and not np.isin(token_ids_N, list(self._no_text)).any():
            return [Marked(token_ids_N[start:stop]) for start, stop in pairwise(bounds)]
        return [self._check(token_ids) for token_ids in found]

    def _check(self, token_ids: list[int] | str, mask: bytes | None = None) -> Marked | str:
        if isinstance(token_ids, str):
            return token_ids
        options, max_length = self._options, self._options.max_length
        if not token_ids:
            return "no tokens"
        if len(token_ids) > max_length and options.pack is None:
            if options.truncation == "refuse":
                return f"{len(token_ids)} tokens, more than max_length {max_length}"
            kept = slice(max_length) if options.truncation == "cut" else slice(-max_length, None)
            token_ids, mask = token_ids[kept], mask and mask[kept]
        return self._why_not_run(token_ids) or Marked(np.array(token_ids, dtype=np.int32), mask)

    def _why_not_run(self, token_ids: list[int]) -> str | None:
        if found := self._no_text.keys() & token_ids:
            token_id = min(found)
            return f"it has {self._in_words([token_id])}, token {token_id}, config.json's {self._no_text[token_id]}: m2ray runs text alone"
        steady = self._options.steady_positions
        if steady is not None and len(token_ids) > steady and self._options.pack is None:
            return f"{len(token_ids)} tokens, more than {steady}: beyond them the model computes a whole batch otherwise (longrope, dynamic, Doge, few index heads)"
        if max(token_ids) >= self._vocab_size:
            return f"token id {max(token_ids)} is beyond the model's vocabulary of {self._vocab_size} tokens"
        return None

    @property
    def _longest(self) -> int:
        """Tokens of a prompt that is taken as it is."""
        options = self._options
        if options.pack is not None:
            return MAX_PROMPT_BYTES  # that it may be of: no token is of less than one
        return min(options.max_length, options.steady_positions or options.max_length)

    def _in_words(self, token_ids: list[int]) -> str:
        """The first and the last tokens as Python strings, which show control characters escaped."""
        words = [repr(word) for word in self.words(token_ids)]
        if len(words) > _SHOWN_FIRST + _SHOWN_LAST:
            words[_SHOWN_FIRST:-_SHOWN_LAST] = ["..."]
        return " ".join(words)
