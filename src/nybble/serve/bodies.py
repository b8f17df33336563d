"""Answers in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nybble.serve.answers import Choice, Job, Piece
from nybble.serve.engine import Model, Token
from nybble.serve.protocol import ChatRequest
from nybble.serve.text import spelling

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def model_entry(model: Model, created: int) -> dict[str, Any]:
    """One of /v1/models."""
    return {
        "id": model.name, "object": "model", "created": created, "owned_by": "nybble", "parent": model.parent,
        "max_model_len": model.positions, "system": model.system,
    }  # fmt: skip


def usage(job: Job) -> dict[str, int]:
    """Tokens read and made."""
    made = job.completion_tokens
    return {"prompt_tokens": job.prompt_tokens, "completion_tokens": made, "total_tokens": job.prompt_tokens + made}


def whole(job: Job) -> dict[str, Any]:
    """The answer to a request that is not streamed."""
    choices = [_whole_choice(job, choice) for choice in job.choices]
    return {**_head(job, job.asked.kind), "choices": choices, "usage": usage(job)}


def opening(job: Job) -> list[dict[str, Any]]:
    """What a stream begins with: in a chat, who speaks."""
    if not isinstance(job.asked, ChatRequest):
        return []
    said = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return [_chunk(job, [{"index": choice.index, **said}]) for choice in job.choices]


def chunks(job: Job, piece: Piece) -> list[dict[str, Any]]:
    """A piece of an answer, and its end."""
    choice = piece.choice
    end = choice.finish
    if isinstance(job.asked, ChatRequest):
        logprobs = _chat_logprobs(job, piece.tokens) if piece.tokens else None
        parts: list[dict[str, Any]] = [{"delta": {"content": piece.text}, "logprobs": logprobs, "finish_reason": None}]
        parts = parts if piece.text or piece.tokens else []
        parts += [{"delta": {}, "logprobs": None, "finish_reason": end}] if end else []
    else:
        offset = len(choice.text) - len(piece.text)
        logprobs = _plain_logprobs(job, piece.tokens, offset) if piece.tokens else None
        parts = [{"text": piece.text, "logprobs": logprobs, "finish_reason": end}]
    return [_chunk(job, [{"index": choice.index, **part}]) for part in parts]


def closing(job: Job) -> list[dict[str, Any]]:
    """What a stream ends with: the count of tokens, where it was asked for."""
    return [{**_chunk(job, []), "usage": usage(job)}] if _counts(job) else []


def _counts(job: Job) -> bool:
    return job.asked.stream_options is not None and job.asked.stream_options.include_usage


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model.name}


def _chunk(job: Job, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if isinstance(job.asked, ChatRequest) else "text_completion"
    return {**_head(job, kind), "choices": choices, **({"usage": None} if _counts(job) else {})}


def _whole_choice(job: Job, choice: Choice) -> dict[str, Any]:
    asked = job.asked.likeliest is not None
    if isinstance(job.asked, ChatRequest):
        said: dict[str, Any] = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        logprobs = _chat_logprobs(job, choice.shown) if asked else None
    else:
        said = {"text": choice.text}
        logprobs = _plain_logprobs(job, choice.shown, 0) if asked else None
    return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.finish}


def _chat_logprobs(job: Job, tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text, raw = spelling(job.tokenizer, token_id)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _plain_logprobs(job: Job, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    texts = [spelling(job.tokenizer, token.id)[0] for token in tokens]
    offsets = [offset + sum(map(len, texts[:n])) for n in range(len(texts))]
    top = [{spelling(job.tokenizer, likely)[0]: value for likely, value in token.top} for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": top if job.asked.likeliest else None,
        "text_offset": offsets,
    }
