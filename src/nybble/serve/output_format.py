"""Fields that ask for an answer in JSON: `response_format`, and `text.format` of the Responses API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainValidator

from nybble.serve.fields import FieldError

Schema = Mapping[str, Any] | bool
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
KINDS = "text, json_object or json_schema"


@dataclass(frozen=True)
class OutputFormat:
    """What an answer must be."""

    schema: Schema | None
    """The JSON schema that it must fit; None for any text."""
    given: Mapping[str, Any]
    """The field as it was sent."""


def _chat_format(value: Any) -> OutputFormat:
    kind = _kind(value)
    if kind != "json_schema":
        return _without_schema(value, kind, {"type"})
    described = value.get("json_schema")
    if not isinstance(described, dict):
        raise FieldError("json_schema", "must be an object with name and schema")
    _refuse_others(value, {"type", "json_schema"}, "")
    return OutputFormat(_schema(described, "json_schema.", {"name", "schema", "strict", "description"}), value)


def _text_format(value: Any) -> OutputFormat:
    kind = _kind(value)
    if kind != "json_schema":
        return _without_schema(value, kind, {"type"})
    return OutputFormat(_schema(value, "", {"type", "name", "schema", "strict", "description"}), value)


ChatFormat = Annotated[OutputFormat, PlainValidator(_chat_format)]
TextFormat = Annotated[OutputFormat, PlainValidator(_text_format)]


def _kind(value: Any) -> str:
    if not isinstance(value, dict):
        raise ValueError(f"must be an object whose type is {KINDS}")
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise FieldError("type", f"must be {KINDS}")
    return str(kind)


def _without_schema(value: dict[str, Any], kind: str, known: set[str]) -> OutputFormat:
    _refuse_others(value, known, "")
    return OutputFormat({"type": "object"} if kind == "json_object" else None, value)


def _schema(described: dict[str, Any], path: str, known: set[str]) -> Schema:
    """The schema of an object with name, schema, strict and description."""
    _refuse_others(described, known, path)
    name = described.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise FieldError(f"{path}name", "must be 1 to 64 letters, digits, _ or -")
    if described.get("strict") not in (None, True, False):
        raise FieldError(f"{path}strict", "must be true or false; the schema is kept to in either case")
    if not isinstance(described.get("description"), (str, type(None))):
        raise FieldError(f"{path}description", "must be a string")
    schema = described.get("schema")
    if not isinstance(schema, (dict, bool)):
        raise FieldError(f"{path}schema", "must be a JSON schema")
    return schema


def _refuse_others(value: dict[str, Any], known: set[str], path: str) -> None:
    unknown = next((name for name in value if name not in known), None)
    if unknown is not None:
        raise FieldError(f"{path}{unknown}", f"unknown; the fields are {', '.join(sorted(known))}")
