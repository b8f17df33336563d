"""The values: functions that a model may call, its calls, and a conversation with both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Function:
    """A function that the client runs if the model calls it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    """The JSON schema of its arguments, an object; None if it has none."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema of its arguments."""
        return NO_ARGUMENTS if self.parameters is None else self.parameters

    def described(self) -> dict[str, Any]:
        """As OpenAI's API and chat templates describe it."""
        about = {"description": self.description} if self.description else {}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": dict(self.schema)}}


@dataclass(frozen=True)
class Call:
    """A call that the model made."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    def described(self) -> dict[str, Any]:
        """As chat templates take it: the arguments are an object, not its JSON text as in OpenAI's API."""
        return {
            "id": self.id, "type": "function",
            "function": {"name": self.name, "arguments": dict(self.arguments)},
        }  # fmt: skip


@dataclass(frozen=True)
class ToolTurn:
    """One message of a conversation with calls."""

    role: Role
    """Of a tool: what a called function returned."""
    content: str
    calls: tuple[Call, ...] = ()
    answers: str = ""
    """The id of the call that a tool's message is the result of."""
    function: str = ""
    """The name of the function that was called."""

    def described(self) -> dict[str, Any]:
        """As chat templates take it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            message["tool_calls"] = [call.described() for call in self.calls]
        if self.role == "tool":
            message |= {"tool_call_id": self.answers, "name": self.function}
        return message


@dataclass(frozen=True)
class CallForm:
    """How a model writes a call: opening, the function's name, between, its arguments as a JSON object, closing."""

    opening: str
    between: str
    closing: str
    separator: str | None
    """Between two calls; None if an answer can have one call only."""

    @property
    def marker(self) -> str:
        """What announces a call wherever it stands in an answer; empty if an answer is a call where it begins with {."""
        return self.opening.partition("{")[0].strip()

    def written(self, calls: Sequence[Call]) -> str:
        """Calls as the model writes them."""
        texts = [
            f"{self.opening}{call.name}{self.between}{json.dumps(call.arguments, ensure_ascii=False)}{self.closing}"
            for call in calls
        ]
        return ("\n" if self.separator is None else self.separator).join(texts)
