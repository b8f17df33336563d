"""The fields of a chat request that name functions, choose among them, and carry earlier calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from nybble.serve.fields import FieldError, Strict
from nybble.serve.output_format import NAME
from nybble.serve.tools.calls import Call, Function

MOST_TOOLS = 128  # as OpenAI allows
KINDS = "none, auto, required, or {type: function, function: {name: ...}}"


def _parameters(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if not value:
        return {"type": "object"}
    if value.get("type") != "object":
        raise ValueError('must be a JSON schema with type: "object", as arguments have names')
    return value


def _name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ValueError("must be 1 to 64 letters, digits, _ or -")
    return value


FunctionName = Annotated[str, AfterValidator(_name)]


class FunctionField(Strict):
    """A function that the model may call."""

    name: FunctionName
    description: str = ""
    parameters: Annotated[dict[str, Any], AfterValidator(_parameters)] | None = None
    strict: bool | None = None
    """The schema is kept to in either case."""

    def function(self) -> Function:
        """Its value."""
        return Function(self.name, self.description, self.parameters)


class Tool(Strict):
    """One of `tools`."""

    type: Literal["function"]
    function: FunctionField


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model may call a function, and which."""

    may_call: bool = True
    must_call: bool = False
    only: str = ""
    """The name of the only function that it may call; empty for any."""


def _choice(value: Any) -> ToolChoice:
    if value in ("none", "auto", "required"):
        return ToolChoice(value != "none", value == "required")
    named = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(named, dict) or not isinstance(named.get("name"), str) or {*value} != {"type", "function"}:
        raise ValueError(f"must be {KINDS}")
    return ToolChoice(must_call=True, only=named["name"])


ChoiceField = Annotated[ToolChoice, PlainValidator(_choice)]


class CalledFunction(Strict):
    """The function of an earlier call."""

    path = "messages[].tool_calls[].function."
    ignored = frozenset({"parsed_arguments"})  # what OpenAI's client adds when it parses
    name: FunctionName
    arguments: str


class CallField(Strict):
    """A call that the assistant made earlier."""

    path = "messages[].tool_calls[]."
    ignored = frozenset({"index"})  # of a call that was added up from a stream
    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> CallField:
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise FieldError("function.arguments", "must be the text of a JSON object")
        return self

    def call(self) -> Call:
        """Its value."""
        return Call(self.id, self.function.name, json.loads(self.function.arguments or "{}"))


def check_tools(tools: list[Tool] | None, choice: ToolChoice | None) -> None:
    """Check that each function has a name of its own, and that there is what the choice asks for.

    Raises:
        FieldError: they do not, or there is not.
    """
    names = [tool.function.name for tool in tools or ()]
    twice = next((n for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise FieldError(f"tools.{twice}.function.name", "another function has the same name")
    if choice is not None and choice.must_call and not names:
        raise FieldError("tool_choice", "it asks for a call, but tools names no function")
    if choice is not None and choice.only and choice.only not in names:
        raise FieldError("tool_choice", f"tools has no function with this name; it has {', '.join(names)[:200]}")
