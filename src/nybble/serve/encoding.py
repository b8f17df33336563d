"""From what was said to token ids, off the event loop; what cannot fit is refused before it is tokenised."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from nybble.data.text.tokens import count_tokens
from nybble.serve.engine import ServedModel
from nybble.serve.fields import RequestError

LONG = 2**16  # characters of a prompt that is counted piece by piece first: 40 ms of SmolLM2's tokenizer
PIECE = 2**15  # characters after which others have their turn
SLACK = 16  # tokens by which a piece may have more alone than in its text
Made = TypeVar("Made")


class Encoder:
    """One thread that tokenises: a fast tokenizer is not safe in several.

    Rust lets other threads work meanwhile. A prompt that is waited for no longer is dropped where it stands in the queue, and
    a long one after the piece that is at work.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "nybble-encoder")
        self.long = asyncio.Lock()  # one long prompt at a time, so that a short one waits for one piece only

    async def encode(
        self, field: str, model: ServedModel, texts: Sequence[str], encode: Callable[[], list[int]]
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            field: the field that it came in.
            texts: what it consists of, beside the template's own words.
            encode: makes the ids.

        Raises:
            RequestError: it has more characters than the model's positions can hold, or more tokens.
            DataError: the template cannot say it.
        """
        texts = [text.strip() for text in texts]  # as most templates do
        check_characters(field, model, texts)
        if sum(map(len, texts)) <= LONG:
            return await self._in_thread(encode)
        async with self.long:
            await self._check_tokens(field, model, texts)
            return await self._in_thread(encode)

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
    """Whether so many characters can be a prompt at all.

    Raises:
        RequestError: they cannot, even if each token were the longest that there is.
    """
    characters = sum(map(len, texts))
    most = model.positions * longest_token(model.template.tokenizer)
    if characters > most:
        raise too_long(field, model, f"{characters:,} characters", f", which hold {most:,} characters at most")


def too_long(field: str, model: ServedModel, length: str, bound: str = "") -> RequestError:
    """A prompt that has no room."""
    return RequestError(
        f"the prompt has {length}; {model.name} knows {model.positions:,} positions{bound}",
        param=field,
        code="context_length_exceeded",
    )


@functools.lru_cache(maxsize=16)
def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token. Byte-level vocabularies spell each byte as a character, so there it is bytes, or more."""
    return max(map(len, tokenizer.get_vocab()))


def pieces(texts: Sequence[str]) -> Iterator[str]:
    """The texts in stretches of no more than PIECE characters, cut before white space where there is some."""
    for text in texts:
        begin = 0
        while begin < len(text):
            end = begin + PIECE
            if end < len(text):
                space = max(text.rfind(" ", begin + PIECE // 2, end), text.rfind("\n", begin + PIECE // 2, end))
                end = space if space > begin else end
            yield text[begin:end]
            begin = end
