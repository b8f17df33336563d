"""Rows of no known form, and what would make them one."""

from __future__ import annotations

from nybble.data.readers import Row
from nybble.errors import DataError

PREFERENCES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
USUAL = {
    # field: names under which data sets often have it
    "system": ("system_prompt", "system_message"),
    "prompt": ("question", "query", "prompt", "instruction", "problem", "input"),
    "input": ("context",),
    "completion": ("response", "answer", "output", "completion", "reply", "solution", "target", "summary"),
}


def likely_map(row: Row) -> str:
    """What data.map should say, by the names that columns usually have, else by their order."""
    turns = [
        name for name, value in row.values.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if turns:
        return f"messages: {turns[0]}"
    texts = {name.lower(): name for name, value in row.values.items() if isinstance(value, str)}
    found = {field: next((texts[name] for name in names if name in texts), "") for field, names in USUAL.items()}
    others = [name for name in texts.values() if name not in found.values() and name.lower() != "id"]
    others += ["question", "answer"][len(others) :]
    for field in ("prompt", "completion"):
        found[field] = found[field] or others.pop(0)
    renamed = {"prompt": "instruction", "completion": "output"} if found["input"] else {}
    return ", ".join(f"{renamed.get(field, field)}: {column}" for field, column in found.items() if column)


def two_answers(row: Row) -> DataError | None:
    names = next((pair for pair in PREFERENCES if row.values.keys() >= {*pair}), None)
    if names is None:
        return None
    chosen = row.values[names[0]]
    if isinstance(chosen, list) and len(chosen) > 1:
        fix = f"data.map={{messages: {names[0]}}} trains on the wanted answer"
    elif isinstance(chosen, str) and "prompt" in row.values:
        fix = f"data.map={{completion: {names[0]}}} trains on the wanted answer"
    else:
        fix = "write the wanted answer where the other forms have theirs: behind the last message, or as output"
    return preference(row, f"two answers, {names[0]!r} and {names[1]!r}", fix)


def preference(row: Row, why: str, fix: str) -> DataError:
    return DataError(
        f"a preference row ({why}): nybble trains on one answer a row, not on preferences", where=row.origin, fix=fix
    )
