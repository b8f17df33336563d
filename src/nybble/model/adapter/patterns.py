"""An adapter's regular expressions, tried on a model's names before PEFT matches them.

The time of `(a+)+$` doubles with each letter, and only a signal to the main thread interrupts a match. So they are tried in a
separate process.
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

SECONDS = 5.0  # for all expressions of an adapter on all names of a model; ordinary ones take 0.01
MEMORY = 1_000_000_000
LONGEST = 10_000  # characters of an expression
PLAIN = re.compile(r"[\w.-]*")  # a name, in which only the dots are special
# How PEFT 0.21 builds an expression from each field. Names in a list of target_modules or exclude_modules are not expressions.
FORMS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}


def check_patterns(config: Any, names: Iterable[str], where: str) -> None:
    """Refuse an adapter with an invalid expression, or with expressions that take too long on these names.

    Args:
        config: PEFT's configuration of the adapter.
        names: the names of the model's modules.
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
        number, _, why = fault.partition(":")  # there is no number if the process was ended
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
    """Every text in a field that is not just a name."""
    is_list = not isinstance(value, str | None)
    if is_list and FORMS[field] == "{}":
        return
    for text in value if is_list else [value]:
        if isinstance(text, str) and not PLAIN.fullmatch(text):
            yield text


def _examine(job: tuple[list[str], list[str], float]) -> str | None:
    """The number of the first expression that is invalid, or at which the time for all is up, and what is wrong with it."""
    expressions, names, seconds = job
    if (
        sys.platform != "win32"
    ):  # on Windows the whole process is ended, after twice the time, and no expression is named
        signal.signal(signal.SIGALRM, _time_out)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    for number, expression in enumerate(expressions):
        try:
            compiled = re.compile(expression)
            for name in names:
                compiled.match(name)
                compiled.fullmatch(name)
        except (re.error, OverflowError, RecursionError) as error:
            return f"{number}:it is not a valid expression: {error}"
        except TimeoutError:
            return f"{number}:it is still running after {seconds:g} seconds"
    return None


def _time_out(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


if __name__ == "__main__":
    run_job(_examine)
