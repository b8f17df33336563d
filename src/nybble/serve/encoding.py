"""Prompts to token ids, off the event loop; what cannot fit is refused before it is tokenised."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from nybble.data.text.tokens import count_tokens
from nybble.installed import install_extra
from nybble.serve.engine import ServedModel
from nybble.serve.fields import RequestError
from nybble.serve.grammar import INSTALLED, SchemaError

LONG = 2**16  # characters from which a prompt's tokens are first counted in pieces: 40 ms of SmolLM2's tokenizer
PIECE = 2**15  # characters of a piece; between pieces, other prompts get their turn
SLACK = 16  # how many more tokens a piece may have alone than within its text
Made = TypeVar("Made")


class Encoder:
    """Tokenises in one thread, as a fast tokenizer is not thread-safe.

    The tokenizer, in Rust, lets other threads run meanwhile. A prompt whose client has left is dropped from the queue; a long
    one that is being tokenised, after its current piece.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "nybble-encoder")
        self.long = asyncio.Lock()  # one long prompt at a time, so that a short one waits for one piece only

    async def encode(
        self, field: str, model: ServedModel, texts: Sequence[str], encode: Callable[[], list[int]]
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            field: the request's field that it comes from.
            model: the model that will answer.
            texts: the prompt's texts, without the template's own.
            encode: returns the ids.

        Raises:
            RequestError: it has more characters or tokens than fit into the model's context.
            DataError: the template cannot express it.
        """
        texts = [text.strip() for text in texts]  # as most templates do
        check_characters(field, model, texts)
        if sum(map(len, texts)) <= LONG:
            return await self._in_thread(encode)
        async with self.long:
            await self._check_tokens(field, model, texts)
            return await self._in_thread(encode)

    async def grammar(self, field: str, make: Callable[[], str]) -> str:
        """The grammar that an answer has to follow.

        Args:
            field: the request's field that it comes from.
            make: returns it, or raises a SchemaError.

        Raises:
            RequestError: it cannot be followed, or what that needs is not installed.
        """
        if not INSTALLED:
            raise RequestError(
                "answers by a schema and calls of functions need the package llguidance where the server runs: "
                f"{install_extra('structured')}",
                status=501,
                param=field,
                code="not_installed",
                headers={"x-should-retry": "false"},
            )
        try:
            return await self._in_thread(make)
        except SchemaError as error:
            raise RequestError(f"{field}: {error}", param=field, code="invalid_value") from None

    async def _check_tokens(self, field: str, model: ServedModel, texts: Sequence[str]) -> None:
        least = 0
        for piece in pieces(texts):
            count = functools.partial(count_tokens, model.template.tokenizer, piece)
            least += max(0, await self._in_thread(count) - SLACK)
            if least > model.positions:
                raise too_long(field, model, f"more than {least:,} tokens")

    async def _in_thread(self, work: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)


def check_characters(field: str, model: ServedModel, texts: Sequence[str]) -> None:
    """Refuse a prompt that is too long even if each of its tokens were the longest of the vocabulary.

    Raises:
        RequestError: it is.
    """
    characters = sum(map(len, texts))
    most = model.positions * longest_token(model.template.tokenizer)
    if characters > most:
        raise too_long(field, model, f"{characters:,} characters", f", or at most {most:,} characters")


def too_long(field: str, model: ServedModel, length: str, bound: str = "") -> RequestError:
    """The error for a prompt that does not fit into the model's context."""
    return RequestError(
        f"the prompt has {length}; the context length of {model.name} is {model.positions:,} tokens{bound}",
        param=field,
        code="context_length_exceeded",
    )


@functools.lru_cache(maxsize=16)
def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token. Byte-level vocabularies spell each byte as a character, so it counts their bytes."""
    return max(map(len, tokenizer.get_vocab()))


def pieces(texts: Sequence[str]) -> Iterator[str]:
    """The texts in pieces of at most PIECE characters, cut before white space if possible."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + PIECE
            if end < len(text):
                space = max(text.rfind(" ", start + PIECE // 2, end), text.rfind("\n", start + PIECE // 2, end))
                end = space if space > start else end
            yield text[start:end]
            start = end
