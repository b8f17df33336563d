"""Regular expressions that an adapter or a recipe brings, tried on a model's names before PEFT matches them.

Python cannot interrupt a match, and `(a+)+$` doubles its time with each letter. So they are tried in a process of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from nybble.errors import ModelError
from nybble.trial import answer, attempt

SECONDS = 5.0  # for all names of a model; an honest expression takes 0.01
MEMORY = 1_000_000_000
LONGEST = 10_000  # characters of an expression
PLAIN = re.compile(r"[\w.-]*")  # a name, in which only dots are special
FIELDS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
# How PEFT 0.21 puts what it is given into an expression of its own.
FORMS = ("{}", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")


def check_patterns(config: Any, names: Iterable[str], where: str) -> None:
    """Refuse an adapter with an expression that is none, or that takes too long on these names.

    Args:
        config: PEFT's configuration of the adapter.
        names: of the model's modules.
        where: the place of the adapter.

    Raises:
        ModelError: naming the field and the expression.
    """
    job = None
    for field in FIELDS:
        for text in _texts(getattr(config, field, None)):
            if PLAIN.fullmatch(text):
                continue
            job = job or sorted(set(names))
            if fault := _fault(text, job):
                shown = text if len(text) <= 80 else f"{text[:77]}..."
                raise ModelError(
                    f"{field} holds a regular expression that cannot be used ({shown}): {fault}",
                    where=where,
                    fix="copy the adapter again, or name the modules there as a list",
                )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a field: PEFT takes names in lists and keys of patterns for expressions too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Iterable):
        yield from (item for item in value if isinstance(item, str))


def _fault(text: str, names: list[str]) -> str | None:
    if len(text) > LONGEST:
        return f"it has {len(text):,} characters, and {LONGEST:,} are allowed"
    return attempt(__name__, [text, names], seconds=SECONDS, memory=MEMORY)


def _examine(job: tuple[str, list[str]]) -> str | None:
    text, names = job
    try:
        for form in FORMS:
            compiled = re.compile(form.format(text) if form != "{}" else text)
            for name in names:
                compiled.match(name)
                compiled.fullmatch(name)
    except (re.error, OverflowError, RecursionError) as error:
        return f"it is no expression: {error}"
    return None


if __name__ == "__main__":
    answer(_examine)
