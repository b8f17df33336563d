"""What a value that pydantic refuses should be, in plain English."""

from __future__ import annotations

from pydantic_core import ErrorDetails

KINDS = {
    "int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false", "string": "text",
    "list": "a list", "dict": "a mapping", "model": "a mapping",
}  # fmt: skip
"""The first words of pydantic's types of errors, such as int_parsing, int_type and int_from_float."""
BOUNDS = {"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most"),
          "greater_than": ("gt", "above"), "less_than": ("lt", "below")}  # fmt: skip


def expectation(fault: ErrorDetails) -> str:
    """What the value should be: "should be a whole number". Pydantic's own words where there are none here."""
    kind, context = fault["type"], fault.get("ctx", {})
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        bound = context[name]
        return f"should be {words} {int(bound) if bound == int(bound) else bound}"  # 0, where a float's bound is 0.0
    word, _, rest = kind.partition("_")
    if word in KINDS and rest in ("type", "parsing", "parsing_size", "from_float", "number"):
        return f"should be {KINDS[word]}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message if message[1:2].isupper() else message[:1].lower() + message[1:]  # not jSON
