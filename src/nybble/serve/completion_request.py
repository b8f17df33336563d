"""Plain completions: POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, model_validator

from nybble.serve.fields import FieldError, Neutral, Refused
from nybble.serve.protocol import Counted, ParsedRequest

PROMPTS = "prompt is a text, a list of token ids, or a list of these"


def _are_ids(value: Any) -> bool:
    """Whether this is a list of integers, without a Python loop over what may be two million items."""
    return isinstance(value, list) and set(map(type, value)) == {int}


def _prompts(value: Any) -> Any:
    """Prompts as a list of texts or of lists of token ids."""
    prompts = [value] if isinstance(value, str) or _are_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(PROMPTS)
    if not all(prompt is value or isinstance(prompt, str) or _are_ids(prompt) for prompt in prompts):
        raise ValueError(PROMPTS)
    return prompts


class CompletionRequest(Counted):
    """POST /v1/completions."""

    kind = "text_completion"
    id_prefix = "cmpl-"
    source = "prompt"
    is_chat = False
    neutral: ClassVar[Neutral] = {**ParsedRequest.neutral, "response_format": ({"type": "text"},)}
    refused: ClassVar[Refused] = {**ParsedRequest.refused, "response_format": "only for chats and responses"}
    option_names: ClassVar[Mapping[str, str]] = {"prompt_logprobs": "echo"}
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]  # checked here once, not id by id
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "0 is only allowed with echo=true, which sends the prompt back")
        if self.best_of not in (None, self.n):
            raise FieldError("best_of", "not supported; ask for n answers instead")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have; 16 by default, as in OpenAI's API."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return self.echo

    @property
    def likeliest(self) -> int | None:
        """Top log probabilities per token; None for no log probabilities."""
        return self.logprobs
