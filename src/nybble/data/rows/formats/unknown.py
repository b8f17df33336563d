"""Rows of no known form, with suggestions how to make them readable."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from nybble.data.rows.formats.preferences import Target
from nybble.data.rows.formats.turns import turn_list
from nybble.data.rows.readers import JSON_KINDS, Row, kind_of, listing
from nybble.data.rows.readers.wrapped import jq_command, rows_inside
from nybble.errors import DataError

PREFERENCES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
)
USUAL_NAMES = {
    # field: names that data sets often give it
    "system": ("system_prompt", "system_message"),
    "prompt": ("question", "query", "prompt", "instruction", "problem", "input"),
    "input": ("context",),
    "completion": ("response", "answer", "output", "completion", "reply", "solution", "target", "summary"),
}
ID_COLUMNS = frozenset({"", "id", "_id", "uid", "uuid", "idx", "index", "row_idx"})
BARE = re.compile(r"[A-Za-z_]\w*")
# YAML does not read these as text.
YAML_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def unknown_form(row: Row, expected: Sequence[Sequence[str]], missing: Sequence[str]) -> DataError:
    """The fault of a row that has no form's columns.

    Args:
        row: the row.
        expected: the columns that each form needs.
        missing: the columns that this row lacks if it has some of those of a form that other rows have.
    """
    if (two := two_answers(row)) is not None:
        return two
    return DataError(
        f"unknown fields: found {listing(map(repr, row.values)) or 'none'}; "
        f"expected {'; or '.join(', '.join(form) for form in expected)}",
        where=row.origin,
        fix=f"add {' and '.join(map(repr, missing))}, or delete the row" if missing else _suggestion(row),
    )


def two_answers(row: Row) -> DataError | None:
    """The fault of a row with a preferred and a rejected answer; None for any other row."""
    names = next((pair for pair in PREFERENCES if row.values.keys() >= {*pair}), None)
    if names is None:
        return None
    chosen = row.values[names[0]]
    if isinstance(chosen, list) and len(chosen) > 1:
        fix = f"{_mapped({'messages': names[0]})} trains on the preferred answer"
    elif "prompt" in row.values and (isinstance(chosen, str) or turn_list(chosen)):
        fix = f"{_mapped({'completion': names[0]})} trains on the preferred answer"
    else:
        fix = "put the preferred answer where other rows have theirs: after the last message, or in output"
    return preference(row, f"two answers, {names[0]!r} and {names[1]!r}", "dpo", fix)


def preference(row: Row, why: str, objective: str, fix: str) -> DataError:
    """The fault of a row that judges answers, in a run that imitates them.

    Args:
        row: the row.
        why: how it judges.
        objective: the value of train.objective that learns from such rows.
        fix: how the row could be imitated.
    """
    return DataError(
        f"a preference row ({why}), but train.objective=supervised trains on one answer per row", where=row.origin,
        fix=f"train.objective={objective} learns from the preference; or {fix}",
    )  # fmt: skip


def one_answer(row: Row, target: Target, expected: Sequence[Sequence[str]], missing: Sequence[str]) -> DataError:
    """The fault of a row that has none of the forms of preferences, in a run that learns from them.

    Args:
        row: the row.
        target: what the run reads rows for.
        expected, missing: as for `unknown_form`.
    """
    wanted = {"pairs": "a chosen and a rejected answer", "labels": "a label or two answers"}[target]
    names = {name.strip().lower() for name in row.values}
    if target == "pairs" and {"completion", "label"} <= names:
        fix = "train.objective=kto learns from labelled answers"
    elif names & {"messages", "conversations", "output", "completion", "text"} and not names & {"chosen", "rejected"}:
        fix = "train.objective=supervised trains on rows with one answer"
    elif missing:
        fix = f"add {' and '.join(map(repr, missing))}, or delete the row"
    else:
        fix = "name the columns: data.map={prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}"
    shown = "; or ".join(dict.fromkeys(", ".join(form) for form in expected))
    return DataError(
        f"no preference: found {listing(map(repr, row.values)) or 'none'}; a row needs {wanted}: {shown}",
        where=row.origin,
        fix=fix,
    )


def _suggestion(row: Row) -> str:
    """What would make the row readable; data.map is suggested only for columns of turns or text."""
    turns = next((name for name, value in row.values.items() if turn_list(value)), None)
    if turns is not None:
        return f"name the column, e.g. {_mapped({'messages': turns})}"
    found, rest = _by_usual_names(row)
    needed = [field for field in ("prompt", "completion") if field not in found]
    if len(rest) == len(needed) and all(_is_text(row.values[name]) for name in rest):
        found.update(zip(needed, rest, strict=True))
        needed = []
    if not needed:
        renamed = {"prompt": "instruction", "completion": "output"} if "input" in found else {}
        in_order = {renamed.get(field, field): found[field] for field in USUAL_NAMES if field in found}
        return f"name the columns, e.g. {_mapped(in_order)}"
    if (inside := rows_inside(row.values)) is not None:
        file = pathlib.Path(row.origin.rpartition(":")[0])
        command = jq_command(file, f"{inside}[]") if kind_of(file) in JSON_KINDS else "write them out, one per line"
        return f"if the rows are in {inside}: {command}"
    if len(rest) == 1 and _is_text(row.values[rest[0]]) and "prompt" not in found:
        return f"if {rest[0]!r} holds whole documents: {_mapped({'text': rest[0]})}"
    return f"name the columns of question and answer: {_mapped({**found, **dict.fromkeys(needed, 'COLUMN')})}"


def _by_usual_names(row: Row) -> tuple[dict[str, str], list[str]]:
    """The columns of fields, found by their usual names, and the columns that are left."""
    texts = {name.lower(): name for name, value in row.values.items() if _is_text(value)}
    found = {
        field: texts[name]
        for field, names in USUAL_NAMES.items()
        for name in [next((name for name in names if name in texts), "")]
        if name
    }
    used = {*found.values()}
    return found, [name for name in row.values if name not in used and name.strip().lower() not in ID_COLUMNS]


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _mapped(fields: dict[str, str]) -> str:
    """data.map as one quoted argument for a shell."""
    names = ", ".join(f"{field}: {_in_yaml(column)}" for field, column in fields.items())
    return shlex.quote(f"data.map={{{names}}}")


def _in_yaml(name: str) -> str:
    is_bare = BARE.fullmatch(name) and name.isascii() and name.lower() not in YAML_WORDS
    return name if is_bare else json.dumps(name, ensure_ascii=not name.isprintable())
