"""OpenAI's requests, every field typed; what cannot be honoured is refused by name, never passed over in silence."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nybble.data.formats import Message

MOST_ANSWERS = 16  # n, and prompts of one request
MOST_STOPS = 4
COLDEST = 1e-5  # a temperature below it is greedy: logits divided by 1e-40 are infinite in float32
MOST_MESSAGES = 512  # a template is rendered once for each answer among them
# Fields that this server has no use for, with the values that mean nothing: clients send them along.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "suffix": ("",), "echo": (False,), "min_p": (0,),
    "tool_calls": ([],), "annotations": ([],), "refusal": ("",),
}  # fmt: skip
NOTES = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "name"}


class RequestError(Exception):
    """A request that cannot be answered: its HTTP status and OpenAI's four fields."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error as OpenAI shapes it."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """An object of a request: no unknown fields, no numbers in quotes; null is the same as nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            known = name in cls.model_fields
            if value is None or (not known and (name in NOTES or value in NEUTRAL.get(name, ()))):
                continue
            if not known and name in NEUTRAL:
                raise ValueError(f"{name} is not supported by this server")
            kept[name] = value
        return kept


def _text(value: Any) -> Any:
    """Content as one string: OpenAI also takes a list of parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("content is a string or a list of {type: text, text: ...}; this model reads text only")
    return "".join(part["text"] for part in value)


def _greedy_if_cold(temperature: float) -> float:
    return temperature if temperature >= COLDEST else 0.0


def _stops(value: Any) -> Any:
    """Stop strings as a list."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop is a string or a list of up to {MOST_STOPS} strings, none of them empty")
    return stops


def _prompts(value: Any) -> Any:
    """Prompts as a list of texts or of lists of token ids."""
    prompts = value
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        prompts = [value]
    good = isinstance(prompts, list) and 0 < len(prompts) <= MOST_ANSWERS
    if not good or not all(
        isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt))
        for prompt in prompts
    ):
        raise ValueError(f"prompt is a text, a list of token ids, or a list of up to {MOST_ANSWERS} of these")
    return prompts


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]

    def message(self) -> Message:
        """As templates take it."""
        return Message("system" if self.role == "developer" else self.role, self.content)


class StreamOptions(Strict):
    """What a stream brings beside the answer."""

    include_usage: bool = False


class Sampled(Strict):
    """What chat and plain completions have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_greedy_if_cold)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _usage_belongs_to_streams(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self


Kind = TypeVar("Kind", bound=Sampled)


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    kind: ClassVar[str] = "chat.completion"
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.messages[-1].role != "user":
            raise ValueError(f"the last message is of the {self.messages[-1].role}; an answer follows the user")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are named; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    kind: ClassVar[str] = "text_completion"
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported by this server; ask for n answers")
        if self.n * len(self.prompt) > MOST_ANSWERS:
            raise ValueError(f"n times the number of prompts is at most {MOST_ANSWERS}")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have: 16 unless asked otherwise, as OpenAI has it."""
        return self.max_tokens or 16

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are named; None: no log probabilities."""
        return self.logprobs


def parse(kind: type[Kind], body: bytes) -> Kind:
    """A request from its JSON.

    Raises:
        RequestError: naming the field that is wrong, and what it should be.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(kind, error) from None  # the cause would carry the prompt into a log


def _explain(kind: type[Sampled], error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RequestError(f"the body is no valid JSON: {message.removeprefix('Invalid JSON: ')}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), kind.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near and len(first["loc"]) == 1 else ""
        return RequestError(f"there is no field {place}{hint}", param=place, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"{place} is missing", param=place, code="missing_required_parameter")
    return RequestError(f"{place}: {message}" if place else message, param=place or None, code="invalid_value")
