"""OpenAI's requests, every field typed. What cannot be honoured is refused with its name, never silently ignored."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from nybble.data.rows.formats import Message
from nybble.serve.fields import FieldError, Neutral, Refused, RequestError, Strict, explain
from nybble.serve.logit_fields import LogitBias, MinP, Penalty, RepetitionPenalty
from nybble.serve.output_format import Schema
from nybble.serve.tools.calls import Function

MOST_ANSWERS = 128  # n, the same limit as OpenAI's; the queue may be shorter
MOST_STOPS, LONGEST_STOP = 64, 1000  # every token is compared with them
COLDEST = 1e-5  # a temperature below it is greedy: logits divided by 1e-40 are infinite in float32
MOST_MESSAGES = 512
MOST_BRACKETS = 200_000  # in a body, strings included: a million empty lists would block all requests for 2 s
LOGIT_CHANGES = {"min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"}
PARTS = ("text", "input_text", "output_text")  # of a message's content
CONTINUES = "not together with a last message from the assistant: the answer is a whole JSON text"
NO_TOOLS = "only /v1/chat/completions calls functions; leave it out, or send tool_choice: none"
NO_FUNCTIONS = "only /v1/chat/completions calls functions, named in tools; leave it out, or send function_call: none"


def joined_text(value: Any) -> Any:
    """Content as one string; OpenAI also accepts a list of parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
            raise ValueError("content is a string or a list of {type: text, text: ...}; this model reads text only")
    return "".join(part["text"] for part in value)


def _greedy_if_cold(temperature: float) -> float:
    return temperature if temperature >= COLDEST else 0.0


def _stops(value: Any) -> Any:
    """Stop strings as a list."""
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    ):
        raise ValueError(
            f"stop is a string or a list of up to {MOST_STOPS} strings, each of 1 to {LONGEST_STOP:,} characters"
        )
    return stops


class Turn(Strict):
    """One message of a conversation."""

    path = "messages[]."
    neutral: ClassVar[Neutral] = {"tool_calls": ([],), "annotations": ([],), "refusal": ("",)}
    ignored = frozenset({"name", "annotations"})
    refused: ClassVar[Refused] = {
        "tool_calls": "this server does not call tools",
        "function_call": "this server does not call functions",
        "tool_call_id": "this server does not call tools",
        "refusal": "write a refusal as content",
        "audio": "this model reads text only",
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined_text)]

    def message(self) -> Message:
        """In the form that chat templates take."""
        return Message("system" if self.role == "developer" else self.role, self.content)


class StreamOptions(Strict):
    """What a stream sends besides the answer."""

    path = "stream_options."
    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,)}
    ignored = frozenset({"include_obfuscation"})  # padding that hides the length of each chunk from an eavesdropper
    include_usage: bool = False


class ParsedRequest(Strict):
    """The fields that all requests for answers share."""

    kind: ClassVar[str]
    """The type of the response object in OpenAI's API."""
    id_prefix: ClassVar[str]
    source: ClassVar[str]
    """The field that the prompt comes from."""
    limit_field: ClassVar[str] = "max_tokens"
    option_names: ClassVar[Mapping[str, str]] = {}
    """Names of the engine's options in this API, where they differ."""
    is_chat: ClassVar[bool] = True
    neutral: ClassVar[Neutral] = {
        "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
        "parallel_tool_calls": (True, False), "modalities": (["text"],),
        "store": (False,), "suffix": ("",),
    }  # fmt: skip
    ignored = frozenset({
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "prediction", "reasoning_effort", "verbosity",
    })  # fmt: skip
    refused: ClassVar[Refused] = {
        "tools": NO_TOOLS, "tool_choice": NO_TOOLS, "functions": NO_FUNCTIONS, "function_call": NO_FUNCTIONS,
        "parallel_tool_calls": "it must be true or false",
        "modalities": "answers are text only", "audio": "answers are text only",
        "web_search_options": "this server does not search the web", "moderation": "this server has no moderation",
        "suffix": "this server does not fill in the middle of a text",
    }  # fmt: skip
    _unused: tuple[str, ...] = PrivateAttr(())

    model: str
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_greedy_if_cold)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stops), Field(default_factory=list)]
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> ParsedRequest:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "only allowed with stream=true")
        return self

    @property
    def unused(self) -> tuple[str, ...]:
        """Fields of the request that are ignored."""
        return self._unused

    @property
    def answers(self) -> int:
        """Answers per prompt."""
        return 1

    @property
    @abc.abstractmethod
    def limit(self) -> int | None:
        """Tokens that an answer may have; None for as many as the context allows."""

    @property
    @abc.abstractmethod
    def likeliest(self) -> int | None:
        """Top log probabilities per token; None for no log probabilities."""

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def answer_prefix(self) -> str:
        """The beginning of the answer, if the request contains it."""
        return ""

    @property
    def schema_wanted(self) -> Schema | None:
        """The JSON schema that the answer must fit; None for any text."""
        return None

    @property
    def functions(self) -> tuple[Function, ...]:
        """The functions that the model may call."""
        return ()

    def field_of(self, option: str) -> str:
        """The field that an option of the engine comes from."""
        return self.option_names.get(option, option)

    @property
    def logit_changes(self) -> dict[str, Any]:
        """What changes the logits, by the names of `nybble.generate.request.Request`."""
        return {}


class Counted(ParsedRequest):
    """The fields that chat and plain completions share."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = ()

    @property
    def answers(self) -> int:
        """Answers per prompt."""
        return self.n

    @property
    def logit_changes(self) -> dict[str, Any]:
        """What changes the logits, by the names of `nybble.generate.request.Request`."""
        return self.model_dump(include=LOGIT_CHANGES)


Kind = TypeVar("Kind", bound=ParsedRequest)


def check_last(field: str, turns: Sequence[Turn]) -> None:
    """Check that the assistant can answer, or continue its last message.

    Raises:
        FieldError: the last message is the system's, or the assistant's without a user's message before it.
    """
    last = len(turns) - 1
    if turns[last].role in ("system", "developer"):
        raise FieldError(
            f"{field}.{last}.role",
            f"the last message is from the {turns[last].role}; it must be from the user, or from the assistant",
        )
    if turns[last].role == "assistant" and (last == 0 or turns[last - 1].role != "user"):
        raise FieldError(
            f"{field}.{last}.role",
            "a last message from the assistant is continued, so the one before it must be from the user",
        )


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Parse a request from JSON.

    Raises:
        RequestError: names the wrong field and what it should be.
    """
    unused: list[str] = []
    if body.count(b"[") + body.count(b"{") > MOST_BRACKETS:
        raise RequestError(f"the body has more than {MOST_BRACKETS:,} opening brackets", code="invalid_value")
    try:
        request = kind.model_validate_json(body, context=unused)
    except ValidationError as error:
        raise explain(kind, error) from None  # the cause would put the prompt into a log
    request._unused = tuple(dict.fromkeys(unused))
    return request
