"""Chats: POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from nybble.data.rows.formats import Conversation
from nybble.serve.fields import MISSING, FieldError, Neutral, Refused, note
from nybble.serve.output_format import ChatFormat, Schema
from nybble.serve.protocol import CONTINUES, MOST_MESSAGES, Counted, ParsedRequest, Turn, check_last, joined_text
from nybble.serve.tools.calls import Function, ToolTurn
from nybble.serve.tools.fields import MOST_TOOLS, CallField, ChoiceField, Tool, ToolChoice, check_tools

ROLES = Literal["system", "developer", "user", "assistant", "tool"]
NO_FUNCTIONS = "name functions in tools, and choose among them with tool_choice"
WITH_CALLS = "not together with a last message from the assistant, or with response_format"
TOOL_FIELDS = {"tools", "tool_choice", "parallel_tool_calls"}


class ChatTurn(Turn):
    """One message, which may call functions or be what one returned."""

    neutral: ClassVar[Neutral] = {"annotations": ([],), "refusal": ("",)}
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
    def _calls_are_consistent(self, info: ValidationInfo) -> ChatRequest:
        check_tools(self.tools, self.tool_choice)
        known: set[str] = set()
        for n, turn in enumerate(self.messages):
            if turn.role == "tool" and turn.tool_call_id not in known:
                raise FieldError(f"messages.{n}.tool_call_id", "no message before it makes a call with this id")
            known |= {call.id for call in turn.tool_calls}
        if self.messages[-1].tool_calls:
            raise FieldError(f"messages.{len(self.messages) - 1}.tool_calls", "what they returned must follow")
        if self.knows_calls and (self.messages[-1].role == "assistant" or self.schema_wanted is not None):
            raise FieldError("tools" if self.functions else "messages", WITH_CALLS)
        if self.tools and not self.functions:
            note(info, "tools")
        return self

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
        """The conversation with its calls."""
        called: dict[str, str] = {}
        turns = []
        for turn in self.messages:
            calls = tuple(call.call() for call in turn.tool_calls)
            called |= {call.id: call.name for call in calls}
            role = "system" if turn.role == "developer" else turn.role
            function = called.get(turn.tool_call_id, "")
            turns.append(ToolTurn(role, turn.content, calls, turn.tool_call_id, function))
        return turns

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
