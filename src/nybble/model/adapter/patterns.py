"""Regular expressions that an adapter brings, tried on a model's names before PEFT matches them.

`(a+)+$` doubles its time with each letter, and only a signal to the main thread interrupts a match. So they are tried in a
process of their own.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from nybble.errors import ModelError
from nybble.isolated import attempt, run_job

SECONDS = 5.0  # for all expressions of an adapter on all names of a model; an honest one takes 0.01
MEMORY = 1_000_000_000
LONGEST = 10_000  # characters of an expression
PLAIN = re.compile(r"[\w.-]*")  # a name, in which only dots are special
# How PEFT 0.21 builds an expression from a field. Names in a list of target_modules or exclude_modules are not expressions.
FORMS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}


def check_patterns(config: Any, names: Iterable[str], where: str) -> None:
    """Refuse an adapter with an expression that is none, or whose expressions take too long on these names.

    Args:
        config: PEFT's configuration of the adapter.
        names: of the model's modules.
        where: the adapter's folder.

    Raises:
        ModelError: naming the field and the expression.
    """
    found = [(field, text) for field in FORMS for text in _texts(field, getattr(config, field, None))]
    for field, text in found:
        if len(text) > LONGEST:
            raise _refused(field, text, f"it has {len(text):,} characters, and {LONGEST:,} are allowed", where)
    if not found:
        return
    job = [[FORMS[field].format(text) for field, text in found], sorted(set(names)), SECONDS]
    if (fault := attempt(__name__, job, seconds=2 * SECONDS, memory=MEMORY)) is not None:
        number, _, why = fault.partition(":")  # there is none of a process that was ended
        position, why = (int(number), why) if number.isdecimal() else (0, fault)
        raise _refused(*found[position], why, where)


def _refused(field: str, text: str, why: str, where: str) -> ModelError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return ModelError(
        f"{field} contains a regular expression that cannot be used ({shown}): {why}",
        where=where,
        fix="copy the adapter again, or name the modules there as a list",
    )


def _texts(field: str, value: Any) -> Iterator[str]:
    """Every text in a field that is more than a name."""
    is_list = not isinstance(value, str | None)
    if is_list and FORMS[field] == "{}":
        return
    for text in value if is_list else [value]:
        if isinstance(text, str) and not PLAIN.fullmatch(text):
            yield text


def _examine(job: tuple[list[str], list[str], float]) -> str | None:
    """The first expression that is none, or at which the time for all of them is up: its number, and what is wrong with it."""
    expressions, names, seconds = job
    if sys.platform != "win32":  # there the whole process is ended, at twice the time, and no expression is named
        signal.signal(signal.SIGALRM, _late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    for number, expression in enumerate(expressions):
        try:
            compiled = re.compile(expression)
            for name in names:
                compiled.match(name)
                compiled.fullmatch(name)
        except (re.error, OverflowError, RecursionError) as error:
            return f"{number}:it is no expression: {error}"
        except TimeoutError:
            return f"{number}:it is still running after {seconds:g} seconds"
    return None


def _late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


if __name__ == "__main__":
    run_job(_examine)
