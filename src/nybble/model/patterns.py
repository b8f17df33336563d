"""Regular expressions that an adapter or a recipe brings, tried on a model's names before PEFT matches them.

Python cannot interrupt a match, and `(a+)+$` doubles its time with each letter. So they are tried in a process of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from nybble.errors import ModelError
from nybble.trial import answer, attempt

SECONDS = 5.0  # for all names of a model; an honest expression takes 0.01
MEMORY = 1_000_000_000
LONGEST = 10_000  # characters of an expression; one that names every module of 80 layers has 20,000 at most as a list, not as one
PLAIN = re.compile(r"[\w.-]*")
# How PEFT 0.21 puts what it is given into an expression of its own.
FORMS = ("{}", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")


def check_patterns(patterns: Mapping[str, Iterable[str]], names: Iterable[str], where: str, fix: str) -> None:
    """Refuse an expression that is none, or that takes too long on these names.

    Args:
        patterns: by the field that holds them; plain names are passed over.
        names: of the model's modules.
        where: the place of the fields.
        fix: what to do.

    Raises:
        ModelError: naming the field and the expression.
    """
    odd = [(field, text) for field, texts in patterns.items() for text in texts if not PLAIN.fullmatch(text)]
    for field, text in odd:
        if len(text) > LONGEST:
            raise ModelError(
                f"{field} holds an expression of {len(text):,} characters; {LONGEST:,} are allowed", where=where, fix=fix
            )
        if fault := attempt(__name__, [text, sorted(set(names))], seconds=SECONDS, memory=MEMORY):
            shown = text if len(text) <= 80 else f"{text[:77]}..."
            raise ModelError(
                f"{field} holds a regular expression that cannot be used ({shown}): {fault}", where=where, fix=fix
            )


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
