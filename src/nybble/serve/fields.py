"""The objects of a request: each field is typed, ignored (and the response says so), or refused with its name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from nybble.files.expectations import expectation

Neutral = Mapping[str, tuple[Any, ...]]
Refused = Mapping[str, str]
UNKNOWN, MISSING = "unknown_parameter", "missing_required_parameter"
SHOWN = 200  # characters of a field's name
# Tools are ignored where their switch says that none is called.
SWITCHES = {"tools": "tool_choice", "functions": "function_call"}


class RequestError(Exception):
    """A request that cannot be answered: its HTTP status and the four fields of an OpenAI error."""

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
        """The error in OpenAI's format."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class FieldError(ValueError):
    """What is wrong with a field, when it takes several fields to see it.

    Args:
        field: its dotted path below the object being validated.
    """

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field, self.code = field, code


class Strict(BaseModel):
    """An object of a request: no unknown fields, no numbers in quotes; null counts as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    neutral: ClassVar[Neutral] = {}
    """Unsupported fields, with the values that ask for what this server does anyway."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields whose value never changes an answer; the response names them."""
    refused: ClassVar[Refused] = {}
    """Unsupported fields that would change the answer, with what this server does instead."""
    path: ClassVar[str] = ""
    """The object's path in the request, put before the names of ignored fields."""

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, fields: Any, info: ValidationInfo) -> Any:
        """The supported fields; the names of ignored ones are appended to the validation context."""
        if not isinstance(fields, dict):
            return fields
        supported = {}
        for name, value in fields.items():
            if value is None or (name not in cls.model_fields and value in cls.neutral.get(name, ())):
                continue
            if name in cls.ignored or (name in SWITCHES and fields.get(SWITCHES[name]) == "none"):
                note(info, f"{cls.path}{name}")
            elif name in cls.refused:
                raise FieldError(name, cls.refused[name], "unsupported_parameter")
            elif name not in cls.model_fields:  # at once: there may be 300,000 of them
                raise FieldError(name, "", UNKNOWN)
            else:
                supported[name] = value
        return supported


def note(info: ValidationInfo, field: str) -> None:
    """Record that a field is ignored."""
    assert info.context is not None, "requests are read by parse"
    info.context.append(field)


def explain(kind: type[Strict], error: ValidationError) -> RequestError:
    """The first error of a request: the field, and what it should be."""
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    fault = cause if isinstance(cause, FieldError) else None
    path = ".".join([*map(str, first["loc"]), *([fault.field] if fault else [])])[:SHOWN]
    if first["type"] == "json_invalid":
        reason = first["msg"].removeprefix("Invalid JSON: ")
        return RequestError(f"the body is not valid JSON: {reason}", code="invalid_json")
    if fault is not None and fault.code == UNKNOWN:
        near = [] if first["loc"] else difflib.get_close_matches(path, kind.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return RequestError(f"there is no field {path or repr(path)}{hint}", param=path, code=UNKNOWN)
    if first["type"] == "missing" or (fault is not None and fault.code == MISSING):
        return RequestError(f"{path} is missing", param=path, code=MISSING)
    code = fault.code if fault else "invalid_value"
    message = expectation(first)
    return RequestError(f"{path or 'the body'}: {message}", param=path or None, code=code)
