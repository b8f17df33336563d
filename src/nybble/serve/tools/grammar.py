"""The grammar of answers that may call functions: text, calls, or both, each call's arguments by the schema of its function."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from nybble.serve.grammar import KEPT, MOST_CHARACTERS, OPTIONS, SchemaError, checked, json_grammar
from nybble.serve.tools.calls import CallForm, Function

ANYTHING = "(?s:.*)"


def tool_grammar(form: CallForm, functions: Sequence[Function], *, must_call: bool, several: bool) -> str:
    """A grammar in llguidance's dialect of Lark.

    Args:
        form: how the model writes calls.
        functions: that it may call.
        must_call: whether the answer has to be a call; otherwise it may be any text, and may go on to a call.
        several: whether it may call more than once, if the form has a way to write that.

    Raises:
        SchemaError: llguidance cannot follow the schema of a function, or they are too long together.
    """
    schemas = [json.dumps({**function.schema, "x-guidance": OPTIONS}) for function in functions]
    if (characters := sum(map(len, schemas))) > MOST_CHARACTERS:
        raise SchemaError(f"the schemas have {characters:,} characters together, more than {MOST_CHARACTERS:,}")
    names = [function.name for function in functions]
    return _tool_grammar(form, tuple(zip(names, schemas, strict=True)), must_call, several)


@functools.lru_cache(maxsize=KEPT)  # an agent's requests all have the same functions; 20 of them take 80 ms
def _tool_grammar(form: CallForm, functions: tuple[tuple[str, str], ...], must_call: bool, several: bool) -> str:
    marker = form.marker
    rest = form.opening.partition(marker)[2] if marker else form.opening
    white = form.opening.partition(marker)[0] if marker else ""
    more = f" ({_quoted(form.separator + white + marker)} call)*" if several and form.separator is not None else ""
    rules = [f"call: {' | '.join(f'call{n}' for n in range(len(functions)))}"]
    for n, (name, schema) in enumerate(functions):
        written = _quoted(rest + name + form.between)
        rules.append(f"call{n}: {written} args{n} {_quoted(form.closing)}\nargs{n}: %json {schema}")
    if must_call:
        before = f"{_quoted(white)}? " if white else ""  # a prompt may end in it, or an answer begin with it
        start = [f"start: {before}{_quoted(marker)} call{more}" if marker else f"start: call{more}"]
    elif marker:
        # A text must not contain the marker, or a wrong call could be taken for text; `suffix` ends it there.
        start = [
            f'start: "" | TEXT | head call{more}',
            f"TEXT: /(?s:.+)/ & ~/{ANYTHING}{_escaped(marker)}{ANYTHING}/",
            f"head[suffix={_quoted(marker)}]: /{ANYTHING}/",
        ]
    else:
        start = [f'start: "" | TEXT | call{more}', rf"TEXT: /\s*[^{{\s]{ANYTHING}/"]
    for name, schema in functions:  # behind the beginning of an answer, only use would find a schema to be too large
        _check_alone(name, schema)
    return checked("\n".join([*start, *rules]))


def _check_alone(name: str, schema: str) -> None:
    """Have the error name the function whose schema is at fault."""
    try:
        json_grammar(json.loads(schema))
    except SchemaError as error:
        raise SchemaError(f"the function {name}: {error}") from None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)
