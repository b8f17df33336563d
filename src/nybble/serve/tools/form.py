"""How a model's chat template writes calls, found by rendering one; the server's own form where a template cannot write any."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from nybble.data.text.rendering import render
from nybble.data.text.template import Template
from nybble.errors import DataError
from nybble.serve.tools.calls import Call, CallForm, Function, ToolTurn

# The form that most models which were trained to call functions know (Nous Research's Hermes 2 Pro, later Qwen).
OWN_FORM = CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n")
# Words that no template writes by itself. Some templates demand ids of nine letters and digits.
NAME, KEY, VALUE, RESULT, IDS = "zqfunction", "zqkey", "zqvalue", "zqresult", ("zqcall001", "zqcall002")
MARKER = re.compile(r"^(?!```).*[^\W\d_]{2}")
ARGUMENTS = re.compile(rf'\{{\s*"{KEY}"\s*:\s*"{VALUE}"\s*\}}')


@functools.lru_cache(maxsize=16)
def template_form(template: Template) -> CallForm | None:
    """How a template writes calls; None if it does not: it ignores the functions, the calls or their results, writes calls with
    control tokens, which an answer's text does not show, or not as the function's name followed by a JSON object."""
    one, two = (_answer(template, count) for count in (1, 2))
    if one is None or not _shows_results(template):
        return None
    name, arguments = one.find(NAME), ARGUMENTS.search(one)
    if name < 0 or arguments is None or arguments.start() < name:
        return None
    opening, between = one[:name], one[name + len(NAME) : arguments.start()]
    closing = _before_control_token(template, one[arguments.end() :]).rstrip()
    form = CallForm(opening, between, closing, _separator(two, one, opening, closing))
    usable = opening and between and closing and not _has_control_token(template, opening + between) and _is_fixed(form)
    return form if usable else None


def _is_fixed(form: CallForm) -> bool:
    """Whether a form is the same for every call, and its marker stands in no ordinary text: [ and ``` do."""
    probed = any(word in part for word in (*IDS, KEY, VALUE) for part in (form.opening, form.between, form.closing))
    return not probed and (not form.marker or MARKER.search(form.marker) is not None)


def call_form(template: Template) -> CallForm:
    """How the model of a template writes calls.

    Raises:
        DataError: not at all, as the tokenizer's control tokens are in the way.
    """
    form = template_form(template) or OWN_FORM
    if _has_control_token(template, form.written([Call(IDS[0], NAME, {})])):
        raise DataError(
            f"the template {template.name} does not write calls as text, and for its tokenizer {form.marker} is a control token"
        )
    return form


def rendered(template: Template, turns: Sequence[ToolTurn], functions: Sequence[Function], *, prompt: bool) -> str:
    """A conversation as the template writes it.

    Raises:
        DataError: it fails.
    """
    messages = [turn.described() for turn in turns]
    described = [function.described() for function in functions] or None
    return render(template.tokenizer, template.name, template.source, messages, prompt, described)


def _answer(template: Template, calls: int) -> str | None:
    """What a template writes for an answer of some calls; None if it fails, or does not name the functions before."""
    function = Function(NAME, VALUE, {"type": "object", "properties": {KEY: {"type": "string"}}, "required": [KEY]})
    asked = [ToolTurn("user", VALUE)]
    answer = ToolTurn("assistant", "", tuple(Call(IDS[n], NAME, {KEY: VALUE}) for n in range(calls)))
    try:
        prompt = rendered(template, asked, [function], prompt=True)
        whole = rendered(template, [*asked, answer], [function], prompt=False)
    except DataError:
        return None
    return whole.removeprefix(prompt) if NAME in prompt and whole.startswith(prompt) else None


def _shows_results(template: Template) -> bool:
    asked = [ToolTurn("user", VALUE), ToolTurn("assistant", "", (Call(IDS[0], NAME, {KEY: VALUE}),))]
    try:
        return RESULT in rendered(template, [*asked, ToolTurn("tool", RESULT, (), IDS[0], NAME)], [], prompt=True)
    except DataError:
        return False


def _separator(two: str | None, one: str, opening: str, closing: str) -> str | None:
    """What stands between two calls, given what is written for one and for two."""
    if two is None or two.count(NAME) != 2 or not two.startswith(opening):
        return None
    between = two[two.find(NAME) + len(NAME) : two.rfind(NAME)]
    match = ARGUMENTS.search(between)
    rest = between[match.end() :] if match else ""
    fits = rest.startswith(closing) and rest.endswith(opening) and len(rest) >= len(closing) + len(opening)
    return rest[len(closing) : len(rest) - len(opening)] if fits else None


def _before_control_token(template: Template, text: str) -> str:
    return min((text.partition(token)[0] for token in template.control_tokens), key=len)


def _has_control_token(template: Template, text: str) -> bool:
    return any(token in text for token in template.control_tokens)


def described(functions: Sequence[Function]) -> str:
    """The server's own words to a model whose template has none for functions."""
    lines = "\n".join(json.dumps(function.described()["function"], ensure_ascii=False) for function in functions)
    call: dict[str, Any] = {"name": "name of the function", "arguments": {"name of an argument": "value"}}
    return (
        f"You can call these functions, one JSON object for each:\n{lines}\n\nTo call one, write nothing but\n"
        f"{OWN_FORM.marker}\n{json.dumps(call)}\n</tool_call>\nYou are then told what it returned. Otherwise answer in words."
    )
