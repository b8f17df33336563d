"""Chats: POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from nybble.data.rows.formats import Conversation
from nybble.serve.fields import MISSING, FieldError, Neutral, Refused
from nybble.serve.output_format import ChatFormat, Schema
from nybble.serve.protocol import CONTINUES, MOST_MESSAGES, Counted, ParsedRequest, Turn, check_last, joined_text
from nybble.serve.tools.calls import Function, ToolTurn
from nybble.serve.tools.fields import MOST_TOOLS, CallField, ChoiceField, Tool, ToolChoice, check_tools

ROLES = Literal["system", "developer", "user", "assistant", "tool"]
NO_FUNCTIONS = "name functions in tools, and choose among them with tool_choice"
CONTINUES_CALLS = "a last message from the assistant cannot be continued where functions may be called, or were"
CALLS_OR_FORMAT = "not together with response_format: an answer is either a call or JSON of that schema"
TOOL_FIELDS = {"tools", "tool_choice", "parallel_tool_calls"}


class ChatTurn(Turn):
    """One message, which may call functions or be what one returned."""

    neutral: ClassVar[Neutral] = {"annotations": ([],), "refusal": ("",)}
    ignored = Turn.ignored | {"parsed"}
    refused: ClassVar[Refused] = {
        **{name: why for name, why in Turn.refused.items() if name not in ("tool_calls", "tool_call_id")},
        "function_call": "send tool_calls",
    }
    role: ROLES  # type: ignore[assignment]
    content: Annotated[str, BeforeValidator(joined_text)] = ""
    tool_calls: Annotated[list[CallField], Field(max_length=MOST_TOOLS, default_factory=list)]
    tool_call_id: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> ChatTurn:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise FieldError("content", "", MISSING)
        if self.tool_calls and self.role != "assistant":
            raise FieldError("tool_calls", "only a message from the assistant calls functions")
        if bool(self.tool_call_id) != (self.role == "tool"):
            raise FieldError(
                "tool_call_id", "the id of the call that a message with the role tool answers, and only there"
            )
        return self


def _json(switch: bool) -> str:
    return "true" if switch else "false"


class ChatRequest(Counted):
    """POST /v1/chat/completions."""

    kind = "chat.completion"
    id_prefix = "chatcmpl-"
    source = "messages"
    option_names: ClassVar[Mapping[str, str]] = {"grammar": "response_format"}
    neutral: ClassVar[Neutral] = {**ParsedRequest.neutral, "echo": (False,)}
    refused: ClassVar[Refused] = {
        **{name: why for name, why in ParsedRequest.refused.items() if name not in TOOL_FIELDS},
        "functions": NO_FUNCTIONS, "function_call": NO_FUNCTIONS, "echo": "only for /v1/completions",
    }  # fmt: skip
    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ChatFormat | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, default_factory=list)]
    tool_choice: ChoiceField = ToolChoice()
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _calls_are_consistent(self) -> ChatRequest:
        check_tools(self.tools, self.tool_choice)
        self._check_results()
        if self.functions and self.schema_wanted is not None:
            raise FieldError("tools", CALLS_OR_FORMAT)
        if self.knows_calls and self.messages[-1].role == "assistant":
            raise FieldError(f"messages.{len(self.messages) - 1}.role", CONTINUES_CALLS)
        return self

    def _check_results(self) -> None:
        """Check that the messages after one with calls are their results, one for each.

        Raises:
            FieldError: one is missing, or answers no call.
        """
        open_calls: list[str] = []
        for n, turn in enumerate(self.messages):
            if turn.role == "tool":
                if turn.tool_call_id not in open_calls:
                    raise FieldError(
                        f"messages.{n}.tool_call_id", "the message with calls before it has no open call of this id"
                    )
                open_calls.remove(turn.tool_call_id)
            elif open_calls:
                raise FieldError(
                    f"messages.{n}.role",
                    f"the result of the call {open_calls[0]!r:.60} must come first, with the role tool",
                )
            open_calls += [call.id for call in turn.tool_calls]
        if open_calls:
            raise FieldError(
                f"messages.{len(self.messages) - 1}", f"the result of the call {open_calls[0]!r:.60} must follow"
            )

    @property
    def functions(self) -> tuple[Function, ...]:
        """The functions that the model may call."""
        choice = self.tool_choice
        allowed = [tool for tool in self.tools if choice.may_call and choice.only in ("", tool.function.name)]
        return tuple(tool.function.function() for tool in allowed)

    @property
    def knows_calls(self) -> bool:
        """Whether functions may be called, or were called before."""
        return bool(self.functions) or any(turn.tool_calls for turn in self.messages)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "only allowed with logprobs=true")
        check_last(self.source, self.messages)
        if self.schema_wanted is not None and self.messages[-1].role == "assistant":
            raise FieldError("response_format", CONTINUES)
        continues = self.messages[-1].role == "assistant"
        if self.continue_final_message not in (None, continues):
            raise FieldError(
                "continue_final_message",
                f"the last message is from the {self.messages[-1].role}, so this can only be {_json(continues)}",
            )
        if self.add_generation_prompt not in (None, not continues):
            raise FieldError(
                "add_generation_prompt",
                f"the last message is from the {self.messages[-1].role}, so this can only be {_json(not continues)}",
            )
        return self

    @property
    def turns(self) -> Sequence[Turn]:
        """The messages."""
        return self.messages

    def conversation(self) -> Conversation:
        """In the form that chat templates take."""
        return tuple(turn.message() for turn in self.messages)

    def tool_turns(self) -> list[ToolTurn]:
        """The conversation with its calls. Results stand in the order of their calls: templates write no ids."""
        placed: list[tuple[tuple[int, int], ToolTurn]] = []
        caller, order = 0, {}
        for n, turn in enumerate(self.messages):
            calls = tuple(call.call() for call in turn.tool_calls)
            if calls:
                caller, order = n, {call.id: (place, call.name) for place, call in enumerate(calls)}
            role = "system" if turn.role == "developer" else turn.role
            if role == "tool":
                place, function = order[turn.tool_call_id]
                placed.append(((caller, 1 + place), ToolTurn(role, turn.content, (), turn.tool_call_id, function)))
            else:
                placed.append(((n, 0), ToolTurn(role, turn.content, calls)))
        return [turn for _, turn in sorted(placed, key=lambda each: each[0])]

    def field_of(self, option: str) -> str:
        """The field that an option of the engine comes from."""
        return "tools" if option == "grammar" and self.functions else super().field_of(option)

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def schema_wanted(self) -> Schema | None:
        """The JSON schema that the answer must fit; None for any text."""
        return None if self.response_format is None else self.response_format.schema

    @property
    def likeliest(self) -> int | None:
        """Top log probabilities per token; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_prefix(self) -> str:
        """The content of a last message from the assistant, which the answer continues."""
        return self.turns[-1].content if self.turns[-1].role == "assistant" else ""
