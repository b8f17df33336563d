"""OpenAI's Responses API for plain text: a conversation in, one message out; nothing is stored and no tool is called."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from nybble.data.rows.formats import Conversation, Message
from nybble.generate.request import Token
from nybble.serve.answers import Job, Piece
from nybble.serve.bodies import chat_logprobs, event
from nybble.serve.fields import FieldError, Neutral, Refused, RequestError, Strict, note
from nybble.serve.output_format import Schema, TextFormat
from nybble.serve.protocol import CONTINUES, MOST_MESSAGES, NO_TOOLS, ParsedRequest, Turn, check_last

LOGPROBS = "message.output_text.logprobs"  # the supported value of include; the others are for tools and reasoning
NOT_STORED = "this server stores nothing; send the whole conversation as input"


def _items(value: Any) -> Any:
    """Input as a list of messages."""
    if not isinstance(value, (str, list)):
        raise ValueError("must be a string or a list of messages")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _include(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, list) and any(item != LOGPROBS for item in value):
        note(info, "include")
    return value


class Item(Turn):
    """One message of the input, in the short form or as in an earlier response."""

    path = "input[]."
    refused: ClassVar[Refused] = {
        **Turn.refused,
        "type": "only messages are supported: this server stores nothing and calls no tools",
    }
    neutral: ClassVar[Neutral] = {
        **Turn.neutral, "type": ("message",), "status": ("completed", "incomplete", "in_progress"),
        "phase": ("final_answer", "commentary"),
    }  # fmt: skip
    id: str | None = None


class TextOptions(Strict):
    """The request's options for the text."""

    path = "text."
    ignored = frozenset({"verbosity"})
    format: TextFormat | None = None


class ResponseRequest(ParsedRequest):
    """POST /v1/responses."""

    kind = "response"
    id_prefix = "resp_"
    source = "input"
    limit_field = "max_output_tokens"
    option_names: ClassVar[Mapping[str, str]] = {"logprobs": "include", "grammar": "text.format"}
    neutral: ClassVar[Neutral] = {
        "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "store": (False,),
        "background": (False,), "context_management": ([],), "truncation": ("disabled",),
    }  # fmt: skip
    ignored = frozenset({
        "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "reasoning", "truncation", "max_tool_calls", "image", "access_programs", "background_options",
    })  # fmt: skip
    refused: ClassVar[Refused] = {
        "tools": NO_TOOLS, "tool_choice": NO_TOOLS, "parallel_tool_calls": "it must be true or false",
        "previous_response_id": NOT_STORED, "conversation": NOT_STORED, "prompt": "this server stores no prompts; send input",
        "background": "not supported; use stream", "moderation": "this server has no moderation",
        "context_management": "this server does not shorten conversations",
    }  # fmt: skip
    input: Annotated[list[Item], BeforeValidator(_items), Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Annotated[dict[str, str], Field(default_factory=dict)]
    text: TextOptions | None = None
    include: Annotated[list[str], BeforeValidator(_include), Field(default_factory=list)]
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseRequest:
        if self.top_logprobs and LOGPROBS not in self.include:
            raise FieldError("top_logprobs", f"only allowed with include=[{LOGPROBS!r}]")
        check_last(self.source, self.input)
        if self.schema_wanted is not None and self.input[-1].role == "assistant":
            raise FieldError("text.format", CONTINUES)
        return self

    @property
    def schema_wanted(self) -> Schema | None:
        """The JSON schema that the answer must fit; None for any text."""
        return None if self.text is None or self.text.format is None else self.text.format.schema

    @property
    def turns(self) -> Sequence[Turn]:
        """The messages of the input."""
        return self.input

    def conversation(self) -> Conversation:
        """In the form that chat templates take; the instructions precede the system message."""
        messages = [item.message() for item in self.input]
        if self.instructions:
            system = [messages.pop(0).content] if messages[0].role == "system" else []
            messages.insert(0, Message("system", "\n\n".join([self.instructions, *system])))
        return tuple(messages)

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_output_tokens

    @property
    def likeliest(self) -> int | None:
        """Top log probabilities per token; None for no log probabilities."""
        return (self.top_logprobs or 0) if LOGPROBS in self.include else None

    @property
    def answer_prefix(self) -> str:
        """The content of a last message from the assistant, which the answer continues."""
        return self.turns[-1].content if self.turns[-1].role == "assistant" else ""


class TextResponse:
    """Formats a job as a response, or as the events of a stream."""

    def __init__(self, job: Job, parsed: ResponseRequest) -> None:
        self.job, self.parsed = job, parsed
        (self.choice,) = job.choices
        self.message = f"msg_{secrets.token_hex(12)}"
        self.sent = 0

    def full_body(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        return self._response(self._status(), [self._item(self._status(), [self._part()])])

    def opening(self) -> list[bytes]:
        """The events of a response in progress, with an empty message."""
        created = self._response("in_progress", [])
        return [
            self._event("response.created", response=created),
            self._event("response.in_progress", response=created),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
            self._event("response.content_part.added", **self._where(), part=self._part(empty=True)),
        ]

    def piece(self, piece: Piece) -> list[bytes]:
        """The event of a piece of text."""
        if not piece.text and not piece.tokens:
            return []
        logprobs = self._logprobs(piece.tokens)
        return [self._event("response.output_text.delta", **self._where(), delta=piece.text, logprobs=logprobs)]

    def closing(self) -> list[bytes]:
        """The events with the complete text, message and response."""
        part, status = self._part(), self._status()
        item = self._item(status, [part])
        return [
            self._event("response.output_text.done", **self._where(), text=part["text"], logprobs=part["logprobs"]),
            self._event("response.content_part.done", **self._where(), part=part),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{status}", response=self._response(status, [item])),
        ]

    def failure(self, error: RequestError) -> list[bytes]:
        """The event of a failed response, with the text so far."""
        item = self._item("incomplete", [self._part()])
        failed = self._response("failed", [item], error={"code": "server_error", "message": error.message})
        return [self._event("response.failed", response=failed)]

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self.sent, **fields}
        self.sent += 1
        return event(body, kind)

    def _where(self) -> dict[str, Any]:
        return {"item_id": self.message, "output_index": 0, "content_index": 0}

    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self.choice.finish == "length" else "completed"

    def _part(self, *, empty: bool = False) -> dict[str, Any]:
        text = "" if empty else self.choice.text
        logprobs = self._logprobs([] if empty else self.choice.shown)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        return list(chat_logprobs(self.job, tokens)["content"])

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.message, "type": "message", "role": "assistant", "status": status, "content": content}

    def _format(self) -> Mapping[str, Any]:
        text = self.parsed.text
        return {"type": "text"} if text is None or text.format is None else text.format.given

    def _response(self, status: str, output: list[dict[str, Any]], error: Any = None) -> dict[str, Any]:
        parsed, completion_tokens, ended = self.parsed, self.job.completion_tokens, status != "in_progress"
        usage = {
            "input_tokens": self.job.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.job.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.job.prompt_tokens + completion_tokens,
        }  # fmt: skip
        return {
            "id": self.job.id, "object": "response", "created_at": self.job.created, "status": status,
            "completed_at": int(time.time()) if status == "completed" else None, "background": False, "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": parsed.instructions, "max_output_tokens": parsed.max_output_tokens, "metadata": parsed.metadata,
            "model": self.job.model.name, "output": output, "parallel_tool_calls": False, "previous_response_id": None,
            "store": False, "temperature": parsed.temperature, "text": {"format": self._format()}, "tool_choice": "none",
            "tools": [], "top_logprobs": parsed.top_logprobs or 0, "top_p": parsed.top_p, "truncation": "disabled",
            "usage": usage if ended else None,
        }  # fmt: skip
