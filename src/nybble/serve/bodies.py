"""Answers of chat and plain completions in OpenAI's formats, whole and in chunks."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from transformers import PreTrainedTokenizerBase

from nybble.chat.text import spelling
from nybble.generate.request import Token
from nybble.serve.answers import Choice, Job, Piece
from nybble.serve.engine import ServedModel
from nybble.serve.fields import RequestError

DONE = b"data: [DONE]\n\n"
JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each event, in 4 us
TEXT = "\ue000"  # a character for private use, where the text goes in a chunk that is encoded once


class ReplyFormat(Protocol):
    """How an API formats the answers of a job."""

    def full_body(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""

    def opening(self) -> list[bytes]:
        """The events that a stream begins with."""

    def piece(self, piece: Piece) -> list[bytes]:
        """The events of a piece of an answer, and of its end."""

    def closing(self) -> list[bytes]:
        """The events that a stream ends with."""

    def failure(self, error: RequestError) -> list[bytes]:
        """The events that a stream ends with if the answer failed."""


class CompletionReply:
    """Chat and plain completions."""

    content_at_first: ClassVar[str | None] = ""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._around_text: dict[int, tuple[bytes, bytes]] = {}

    def full_body(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = [self._whole_choice(choice) for choice in self.job.choices]
        return {**_head(self.job, self.job.parsed.kind), "choices": choices, "usage": usage(self.job)}

    def opening(self) -> list[bytes]:
        """The first chunk of each answer: in a chat, the role."""
        if not self.job.parsed.is_chat:
            return []
        delta = {"role": "assistant", "content": self.content_at_first}
        role = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [event(_chunk(self.job, [{"index": choice.index, **role}])) for choice in self.job.choices]

    def piece(self, piece: Piece) -> list[bytes]:
        """The chunks of a piece of an answer, and of its end."""
        if piece.text and not piece.tokens and piece.choice.finish is None:
            before, after = self._around(piece.choice)
            return [before + JSON.encode(piece.text).encode() + after]
        return [event(chunk) for chunk in self._chunks(piece)]

    def _around(self, choice: Choice) -> tuple[bytes, bytes]:
        """What stands before and after the text in an answer's chunks: encoded once, since there is one for each token."""
        if choice.index not in self._around_text:
            (chunk,) = self._chunks(Piece(choice, TEXT, ()))
            before, _, after = event(chunk).rpartition(JSON.encode(TEXT).encode())
            self._around_text[choice.index] = (before, after)
        return self._around_text[choice.index]

    def closing(self) -> list[bytes]:
        """The end of the stream, after the token counts if they were requested."""
        return [*([event({**_chunk(self.job, []), "usage": usage(self.job)})] if _wants_usage(self.job) else []), DONE]

    def failure(self, error: RequestError) -> list[bytes]:
        """An error instead of a chunk."""
        return [event(error.body())]

    def _message(self, choice: Choice) -> dict[str, Any]:
        """The assistant's message, whole."""
        return {"role": "assistant", "content": choice.text, "refusal": None}

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds to the assistant's message."""
        return [{"content": piece.text}] if piece.text or piece.tokens else []

    def _finish(self, choice: Choice) -> str | None:
        """Why an answer ended, in the API's words."""
        return choice.finish

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        job, choice = self.job, piece.choice
        if job.parsed.is_chat:
            logprobs = chat_logprobs(job, piece.tokens) if piece.tokens else None
            parts: list[dict[str, Any]] = [
                {"delta": delta, "logprobs": None if n else logprobs, "finish_reason": None}
                for n, delta in enumerate(self._deltas(piece))
            ]
            end = self._finish(choice)  # after the deltas, from which it may follow
            parts += [{"delta": {}, "logprobs": None, "finish_reason": end}] if end else []
        else:
            begin = len(choice.text) - len(piece.text)
            offsets = _offsets(job, piece.tokens, begin, len(choice.text) if piece.is_prompt else None)
            plain_logprobs = _plain_logprobs(job, piece.tokens, offsets) if piece.tokens else None
            parts = [{"text": piece.text, "logprobs": plain_logprobs, "finish_reason": choice.finish}]
        return [_chunk(job, [{"index": choice.index, **part}]) for part in parts]

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        job = self.job
        wants_logprobs = job.parsed.likeliest is not None
        if job.parsed.is_chat:
            answer: dict[str, Any] = {"message": self._message(choice)}
            logprobs = chat_logprobs(job, choice.shown) if wants_logprobs else None
        else:
            answer = {"text": choice.text}
            logprobs = _plain_logprobs(job, choice.shown, _all_offsets(job, choice)) if wants_logprobs else None
        return {"index": choice.index, **answer, "logprobs": logprobs, "finish_reason": self._finish(choice)}


def event(body: dict[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {JSON.encode(body)}\n\n".encode()


def model_entry(model: ServedModel, created: int) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {
        "id": model.name, "object": "model", "created": created, "owned_by": "nybble", "parent": model.parent,
        "max_model_len": model.positions, "system": model.system,
    }  # fmt: skip


def usage(job: Job) -> dict[str, Any]:
    """Tokens of the prompts and of the answers."""
    prompt, completion = job.prompt_tokens, job.completion_tokens
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
    }  # fmt: skip


def _wants_usage(job: Job) -> bool:
    return job.parsed.stream_options is not None and job.parsed.stream_options.include_usage


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model.name}


def _chunk(job: Job, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if job.parsed.is_chat else "text_completion"
    return {**_head(job, kind), "choices": choices, **({"usage": None} if _wants_usage(job) else {})}


def chat_logprobs(job: Job, tokens: Sequence[Token]) -> dict[str, Any]:
    """Tokens with their log probabilities, each with those of the likeliest tokens."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text, raw = spelling(job.tokenizer, token_id)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _all_offsets(job: Job, choice: Choice) -> list[int]:
    """Where each token of an answer begins, those of the prompt included if it is sent back."""
    of_prompt, begin = (len(choice.answer.prompt), len(choice.echo)) if choice.echo is not None else (0, 0)
    prompt, answer = choice.shown[:of_prompt], choice.shown[of_prompt:]
    return _offsets(job, prompt, 0, begin) + _offsets(job, answer, begin)


def _offsets(job: Job, tokens: Sequence[Token], begin: int, end: int | None = None) -> list[int]:
    """Where each token begins in the text.

    Args:
        job: whose tokens these are.
        tokens: one after another.
        begin: where the text of the first begins.
        end: where the text of the last ends, if it is known: a text may lack the space that its first token begins with.
    """
    if not tokens:
        return []
    lengths = [_length(job, token.id) for token in tokens]
    surplus = begin + sum(lengths) - end if end is not None else 0
    return [max(begin, offset - surplus) for offset in itertools.accumulate(lengths[:-1], initial=begin)]


def _length(job: Job, token_id: int) -> int:
    """Characters that a token adds to a text: its bytes without those that continue a character."""
    if token_id in _special_ids(job.tokenizer):
        return 0
    return sum(byte & 0xC0 != 0x80 for byte in spelling(job.tokenizer, token_id)[1])


@functools.lru_cache(maxsize=16)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that a text does not show."""
    return frozenset(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)


def _plain_logprobs(job: Job, tokens: Sequence[Token], offsets: list[int]) -> dict[str, Any]:
    top = [{spelling(job.tokenizer, likely)[0]: value for likely, value in token.top} or None for token in tokens]
    return {
        "tokens": [spelling(job.tokenizer, token.id)[0] for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": top if job.parsed.likeliest else None,
        "text_offset": offsets,
    }
