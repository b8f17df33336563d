"""What a request's objects may hold: every field is typed, ignored and said so, or refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

Neutral = Mapping[str, tuple[Any, ...]]
Refused = Mapping[str, str]
UNKNOWN = "unknown_parameter"
SHOWN = 200  # characters of a field's name
# Tools are ignored where their switch says that none is called.
SWITCHES = {"tools": "tool_choice", "functions": "function_call"}


class RequestError(Exception):
    """A request that cannot be answered: its HTTP status and OpenAI's four fields."""

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
        """The error as OpenAI shapes it."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class FieldError(ValueError):
    """What is wrong with a field, found where several fields are looked at together.

    Args:
        field: its path below the object that is looked at, with dots.
    """

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field, self.code = field, code


class Strict(BaseModel):
    """An object of a request: no unknown fields, no numbers in quotes; null is the same as nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    neutral: ClassVar[Neutral] = {}
    """Fields that this server has no use for, with the values that ask for what it does anyway."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that would change nothing in an answer, whatever they say; the response names them."""
    refused: ClassVar[Refused] = {}
    """Fields that would change the answer, with what this server does instead."""
    path: ClassVar[str] = ""
    """Where the object is in the request, before the names of fields that are ignored."""

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, fields: Any, info: ValidationInfo) -> Any:
        """Only what this server has a use for; what is ignored is written into the list of the context."""
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            if value is None or (name not in cls.model_fields and value in cls.neutral.get(name, ())):
                continue
            if name in cls.ignored or (name in cls.refused and fields.get(SWITCHES.get(name, "")) == "none"):
                note(info, f"{cls.path}{name}")
            elif name in cls.refused:
                raise FieldError(name, cls.refused[name], "unsupported_parameter")
            elif name not in cls.model_fields:  # at once: there may be 300,000 of them
                raise FieldError(name, "", UNKNOWN)
            else:
                kept[name] = value
        return kept


def note(info: ValidationInfo, field: str) -> None:
    """Write down that a field changes nothing."""
    assert info.context is not None, "requests are read by parse"
    info.context.append(field)


def explain(kind: type[Strict], error: ValidationError) -> RequestError:
    """The first fault of a request: which field it is, and what it should be."""
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    found = cause if isinstance(cause, FieldError) else None
    path = ".".join([*map(str, first["loc"]), *([found.field] if found else [])])[:SHOWN]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RequestError(
            f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if found is not None and found.code == UNKNOWN:
        near = [] if first["loc"] else difflib.get_close_matches(path, kind.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return RequestError(f"there is no field {path or repr(path)}{hint}", param=path, code=UNKNOWN)
    if first["type"] == "missing":
        return RequestError(f"{path} is missing", param=path, code="missing_required_parameter")
    code = found.code if found else "invalid_value"
    return RequestError(f"{path}: {message}" if path else message, param=path or None, code=code)
