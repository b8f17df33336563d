"""OpenAI's Responses API in its plain text form: a conversation in, one message out; nothing is stored and no tool is called."""

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
from nybble.serve.protocol import MOST_MESSAGES, NO_TOOLS, ParsedRequest, Turn, check_last

LOGPROBS = "message.output_text.logprobs"  # of include; its other values belong to tools and to reasoning
STORED = "nothing is stored here; send the whole conversation as input"


def _items(value: Any) -> Any:
    """Input as a list of messages."""
    if not isinstance(value, (str, list)):
        raise ValueError("it is a text or a list of messages")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _include(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, list) and any(item != LOGPROBS for item in value):
        note(info, "include")
    return value


class Item(Turn):
    """One message of the input, as a person wrote it or as an earlier response had it."""

    path = "input[]."
    refused: ClassVar[Refused] = {
        **Turn.refused,
        "type": "only messages are read here: nothing is stored, and no tools are called",
    }
    neutral: ClassVar[Neutral] = {
        **Turn.neutral, "type": ("message",), "status": ("completed", "incomplete", "in_progress"),
        "phase": ("final_answer", "commentary"),
    }  # fmt: skip
    id: str | None = None


class TextOptions(Strict):
    """How the text should be."""

    path = "text."
    neutral: ClassVar[Neutral] = {"format": ({"type": "text"},)}
    ignored = frozenset({"verbosity"})
    refused: ClassVar[Refused] = {"format": "answers are plain text; JSON mode and schemas are not supported"}


class ResponseRequest(ParsedRequest):
    """POST /v1/responses."""

    kind = "response"
    id_prefix = "resp_"
    source = "input"
    limit_field = "max_output_tokens"
    spelt: ClassVar[Mapping[str, str]] = {"logprobs": "include"}
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
        "previous_response_id": STORED, "conversation": STORED, "prompt": "no prompts are stored here; send input",
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
        return self

    @property
    def turns(self) -> Sequence[Turn]:
        """The messages of the input."""
        return self.input

    def conversation(self) -> Conversation:
        """As templates take it: the instructions stand before what else the system says."""
        turns = [item.message() for item in self.input]
        if self.instructions:
            also = [turns.pop(0).content] if turns[0].role == "system" else []
            turns.insert(0, Message("system", "\n\n".join([self.instructions, *also])))
        return tuple(turns)

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_output_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are named; None: no log probabilities."""
        return (self.top_logprobs or 0) if LOGPROBS in self.include else None

    @property
    def begun(self) -> str:
        """What the assistant said last, if nobody answered it."""
        return self.turns[-1].content if self.turns[-1].role == "assistant" else ""


class TextResponse:
    """A job as a response, and as the events in which it comes about."""

    def __init__(self, job: Job, asked: ResponseRequest) -> None:
        self.job, self.asked = job, asked
        (self.choice,) = job.choices
        self.message = f"msg_{secrets.token_hex(12)}"
        self.sent = 0

    def whole(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        return self._response(self._status(), [self._item(self._status(), [self._part()])])

    def opening(self) -> list[bytes]:
        """A response that is under way, with an empty message."""
        begun = self._response("in_progress", [])
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
            self._event("response.content_part.added", **self._where(), part=self._part(empty=True)),
        ]

    def piece(self, piece: Piece) -> list[bytes]:
        """More of the text."""
        if not piece.text and not piece.tokens:
            return []
        logprobs = self._logprobs(piece.tokens)
        return [self._event("response.output_text.delta", **self._where(), delta=piece.text, logprobs=logprobs)]

    def closing(self) -> list[bytes]:
        """The text, the message and the response, each once more as a whole."""
        part, status = self._part(), self._status()
        item = self._item(status, [part])
        return [
            self._event("response.output_text.done", **self._where(), text=part["text"], logprobs=part["logprobs"]),
            self._event("response.content_part.done", **self._where(), part=part),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{status}", response=self._response(status, [item])),
        ]

    def failure(self, error: RequestError) -> list[bytes]:
        """A response that failed, with what it had so far."""
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

    def _response(self, status: str, output: list[dict[str, Any]], error: Any = None) -> dict[str, Any]:
        asked, made, ended = self.asked, self.job.completion_tokens, status != "in_progress"
        used = {
            "input_tokens": self.job.prompt_tokens, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": made, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.job.prompt_tokens + made,
        }  # fmt: skip
        return {
            "id": self.job.id, "object": "response", "created_at": self.job.created, "status": status,
            "completed_at": int(time.time()) if status == "completed" else None, "background": False, "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens, "metadata": asked.metadata,
            "model": self.job.model.name, "output": output, "parallel_tool_calls": False, "previous_response_id": None,
            "store": False, "temperature": asked.temperature, "text": {"format": {"type": "text"}}, "tool_choice": "none",
            "tools": [], "top_logprobs": asked.top_logprobs or 0, "top_p": asked.top_p, "truncation": "disabled",
            "usage": used if ended else None,
        }  # fmt: skip
