"""Renders a conversation with a chat template as Transformers' apply_chat_template does, within the sandbox's limits."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateSyntaxError
from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from nybble.data.text.meter import TemplateLimitError
from nybble.data.text.sandbox import MAX_SOURCE, Sandbox
from nybble.errors import DataError

ROLES_SHOWN = 8  # in a message
# What a faulty template can raise; deep nesting ends in the compiler's RecursionError, SyntaxError or MemoryError.
FAULTS = (
    JinjaError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, AssertionError, SyntaxError,
    MemoryError,
)  # fmt: skip


def render(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    source: str,
    messages: Sequence[Mapping[str, Any]],
    generation: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: the template may use its control tokens.
        name: the template's name, for error messages.
        source: its Jinja text.
        messages: with role, content and perhaps input or calls of functions.
        generation: whether to end where an answer begins.
        tools: functions that the model may call, as OpenAI's API describes them.

    Raises:
        TemplateLimitError: the template runs too long or builds too much.
        DataError: it fails on these turns, or is not a valid template.
    """
    message_size = _size([*messages, *(tools or ())])
    special = {
        key: value if isinstance(value, list) else str(value) for key, value in tokenizer.special_tokens_map.items()
    }
    variables = {
        "messages": list(messages),
        "tools": None if tools is None else list(tools),
        "documents": None,
        "add_generation_prompt": generation,
        **special,
    }
    try:
        return _sandbox().rendered(_compiled(source), message_size, variables)
    except TemplateLimitError as limit:
        raise TemplateLimitError(
            f"the template {name} is refused: {limit.what}",
            fix="data.template=alpaca, llama2, plain or a Jinja file of your own",
        ) from limit
    except TemplateSyntaxError as error:
        raise DataError(f"the template {name} is not valid Jinja: line {error.lineno}: {error.message}") from error
    except FAULTS as error:
        roles = ", ".join(message["role"] for message in messages[:ROLES_SHOWN])
        more = f" and {len(messages) - ROLES_SHOWN:,} more" if len(messages) > ROLES_SHOWN else ""
        raise DataError(f"the template {name} fails on turns of {roles}{more}: {_reason(error)}") from error


def _size(value: Any) -> int:
    """Characters of all texts in lists and objects; a number or a switch counts as ten."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(each) for key, each in value.items())
    return sum(map(_size, value)) if isinstance(value, Sequence) else 10


def check_length(file: pathlib.Path) -> None:
    """Refuse a file that is too long for a template, before it is read.

    Raises:
        TemplateLimitError: it is too long.
    """
    if (size := file.stat().st_size) > 4 * MAX_SOURCE:  # a character has at most 4 bytes
        raise TemplateLimitError(
            f"the template has {size:,} bytes, and {MAX_SOURCE:,} characters are allowed",
            where=str(file),
            fix="shorten it, or name another: data.template=FILE",
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself endlessly"
    plain = isinstance(error, JinjaError | TypeError | ValueError | RuntimeError)
    return str(error) if plain and str(error) else f"{type(error).__name__}: {error}"


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox()


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    return _sandbox().compiled(source)
