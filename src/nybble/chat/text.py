"""Tokens to text, piece by piece: no character is split, no stop string is shown, and text that was returned never changes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nybble.generate.request import Token

LONGEST_CHARACTER = 8  # tokens; four bytes, and some that belong to no character
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece spells a byte that is not a character


class TextStream:
    """The text of one answer.

    Args:
        stops: strings that end the text; they are not part of it.
        before: the last tokens of a prompt that the text continues, as SentencePiece drops the space before a first word.
        strip: remove white space around the whole answer.
        continues: the text continues other text, so white space at its beginning belongs to it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
        *,
        strip: bool,
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops, self._strip = [stop for stop in stops if stop], strip
        self._ids = list(before)
        self._decoded = len(before)
        """How many of `_ids` have been decoded."""
        self._pending = ""
        """Text that may turn out to be a stop string, or white space at the end."""
        self._started = continues
        """Whether there is text before the next piece."""
        self.stopped = False
        """Whether a stop string ended the text."""

    def push(self, token: Token) -> str:
        """The text that is certain after one more token."""
        self._ids.append(token.id)
        return self._release(self._decode(last=False), last=False)

    def end(self) -> str:
        """The rest of the text, after the last token."""
        return self._release(self._decode(last=True), last=True)

    def _decode(self, *, last: bool) -> str:
        """The text of the tokens since the last complete character, once they form one.

        They are decoded together with the tokens before them, as their spaces depend on these. (tokenizers' DecodeStream also
        does this, but raises on byte sequences that are not text, as a model may generate: 3 of 3,000 random ones of Llama 2's.)
        """
        backend = self._tokenizer.backend_tokenizer
        text = backend.decode(self._ids, skip_special_tokens=True)
        before = backend.decode(self._ids[: self._decoded], skip_special_tokens=True)
        unfinished = text.endswith("\ufffd") and len(self._ids) - self._decoded < LONGEST_CHARACTER
        if (unfinished or len(text) <= len(before)) and not last:
            return ""
        self._ids = self._ids[self._decoded :]
        self._decoded = len(self._ids)
        return str(text[len(before) :])

    def _release(self, piece: str, *, last: bool) -> str:
        """The part that is certain of the pending text and one more piece."""
        if self.stopped:
            return ""
        text = self._pending + piece
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:  # the stop string that is complete first, wherever tokens end
            text, self.stopped = text[: min(matches)[1]], True
        certain = len(text) if last or self.stopped else len(text) - suffix_that_begins(text, self._stops)
        if self._strip:
            certain = len(text[:certain].rstrip())
        self._pending = "" if last or self.stopped else text[certain:]
        released = text[:certain] if self._started or not self._strip else text[:certain].lstrip()
        self._started = self._started or bool(released)
        return released


def suffix_that_begins(text: str, sought: Sequence[str]) -> int:
    """Length of the longest suffix of a text with which one of the sought strings begins, without being complete."""
    longest = max(map(len, sought), default=1) - 1
    return next(
        (size for size in range(min(longest, len(text)), 0, -1)
         if any(each.startswith(text[-size:]) for each in sought)),
        0,
    )  # fmt: skip


@functools.lru_cache(maxsize=100_000)
def spelling(tokenizer: PreTrainedTokenizerBase, token_id: int) -> tuple[str, tuple[int, ...]]:
    """A token as text and as UTF-8 bytes, for log probabilities; half a character is shown as U+FFFD, but its bytes are right."""
    # Some models have more embedding rows than their tokenizer has tokens.
    written = tokenizer.convert_ids_to_tokens(token_id) or ""
    table = _byte_of() if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else {}
    if byte := BYTE.fullmatch(written):
        raw = bytes([int(byte[1], 16)])
    elif token_id not in tokenizer.added_tokens_decoder and table.keys() >= set(written):
        raw = bytes(table[character] for character in written)
    else:
        raw = written.replace("▁", " ").encode()
    return raw.decode(errors="replace"), tuple(raw)


@functools.cache
def _byte_of() -> dict[str, int]:
    """Byte-level BPE's alphabet (Radford et al. 2019): printable bytes stand for themselves, others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
