"""The prompt of a conversation with functions: by the model's chat template where it has words for them, else in the server's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from nybble.data.rows.formats import Conversation, Message, Role
from nybble.data.text.template import Template
from nybble.data.text.tokens import encode_prompt, encode_rendered
from nybble.serve.tools.calls import Function, ToolTurn
from nybble.serve.tools.form import OWN_FORM, call_form, described, rendered, template_form


def encode_tool_prompt(template: Template, turns: Sequence[ToolTurn], functions: Sequence[Function]) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins.

    Args:
        template: the model's.
        turns: the last is the user's, or what a function returned.
        functions: that the model may call now; none if it may call none.

    Raises:
        DataError: the template cannot express it, or a text contains one of its control tokens.
    """
    call_form(template)
    if template_form(template) is None:
        return encode_prompt(template, as_messages(turns, functions))
    if not template.verbatim:  # as in training
        turns = [replace(turn, content=turn.content.strip()) for turn in turns]
    text = rendered(template, turns, functions, prompt=True)
    return encode_rendered(template, text, texts_of(turns, functions))


def texts_of(turns: Sequence[ToolTurn], functions: Sequence[Function]) -> list[str]:
    """The texts that a prompt is made of, without the template's own."""
    objects = [function.described() for function in functions]
    objects += [call.described() for turn in turns for call in turn.calls]
    return [*(turn.content for turn in turns), *(json.dumps(each, ensure_ascii=False) for each in objects)]


def as_messages(turns: Sequence[ToolTurn], functions: Sequence[Function]) -> Conversation:
    """The conversation for templates that know no functions: these are named in the system message, and what they returned is
    said by the user, as many templates demand that user and assistant take turns."""
    messages: list[Message] = []
    for turn in turns:
        role: Role = "user" if turn.role == "tool" else turn.role
        text = _text(turn)
        before = messages[-1] if messages else None
        if before is not None and before.role == role == "user":
            messages[-1] = Message("user", f"{before.content}\n{text}")
        else:
            messages.append(Message(role, text))
    if functions:
        system = [messages.pop(0).content] if messages[0].role == "system" else []
        messages.insert(0, Message("system", "\n\n".join([*system, described(functions)])))
    return tuple(messages)


def _text(turn: ToolTurn) -> str:
    if turn.role == "tool":
        return f"<tool_response>\n{turn.content}\n</tool_response>"
    return "\n".join(text for text in (turn.content, OWN_FORM.written(turn.calls)) if text)
