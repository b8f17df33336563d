"""What one rendering of a chat template may take, and how much a method or filter would make, known before it runs.

The estimates are upper bounds, roughly: a template that honest people write stays below the limits by a factor of a thousand.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jinja2.utils import Namespace

from nybble.errors import DataError

SECONDS = 5.0  # of processor time for one rendering; a usual one takes less than 0.001
VALUE = 4_000_000  # characters of one value, and eight for each that the messages have
COPIES = 64  # of such a value, made one after another
NODE = 16  # what an item of a list counts beside its text
DIGITS = 4300  # of a number; Python writes none longer
WIDTH = re.compile(r"%[^%A-Za-z]*|\{[^{}]*")  # where a format says how wide a value becomes
WIDTH_GIVEN = re.compile(r"\*|\{[^{}]*\{")  # where it leaves that to the values


class TemplateLimitError(DataError):
    """A template that runs too long or builds too much, whatever the row: no row can be rendered with it."""


class Meter:
    """What one rendering has used up.

    Args:
        given: characters that its messages have.
    """

    def __init__(self, given: int) -> None:
        self.largest = VALUE + 8 * given
        self.left = COPIES * self.largest
        self._wall = time.monotonic() + SECONDS
        self._processor = time.thread_time() + SECONDS

    def step(self, written: int = 0) -> None:
        """Before each turn of a loop, each call and each operator that walks over values.

        Args:
            written: characters of the template's own that this puts out.

        Raises:
            TemplateLimitError: the time is up, or all that may be written is.
        """
        self.left -= written
        now = time.monotonic()
        if now > self._wall:
            remaining = self._processor - time.thread_time()
            if remaining <= 0:
                raise TemplateLimitError(f"it is still at work after {SECONDS:.0f} seconds")
            self._wall = now + remaining  # a machine that was busy or asleep is no fault of the template
        if self.left < 0:
            raise TemplateLimitError(f"it writes more than {COPIES * self.largest:,} characters")

    def make(self, size: float, new: float | None = None) -> None:
        """Before, or after, a value of so many characters is made.

        Args:
            size: written out.
            new: what it takes beside the values that it holds; None: all of it.

        Raises:
            TemplateLimitError: it is too large, or so are all of them together.
        """
        if size > self.largest:
            raise TemplateLimitError(f"it builds a value of more than {self.largest:,} characters")
        self.left -= int(size if new is None else new)
        if self.left < 0:
            self.step()

    def number(self, bits: int) -> None:
        """Before a whole number of so many bits is made.

        Raises:
            TemplateLimitError: it is too long.
        """
        if bits * 0.30103 > DIGITS:
            raise TemplateLimitError(f"it computes a number of more than {DIGITS:,} digits")

    def size(self, value: Any) -> int:
        """Characters of a value written out, roughly; counted no further than needed to know that it is too large."""
        if type(value) is str:  # nearly always, and this is called for all that a template writes
            return len(value)
        total, waiting = 0, [value]
        while waiting and total <= self.largest:
            item = waiting.pop()
            total += NODE
            if isinstance(item, Namespace):
                item = object.__getattribute__(item, "_Namespace__attrs")
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, Mapping):
                total += 2 * NODE * len(item)
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                total += NODE * len(item)
                waiting += item
            elif isinstance(item, int):
                total += item.bit_length() // 3
        return total


def expected(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Refuse what a method or filter would make too much of; returns its arguments, an iterator among them as a list."""
    args = tuple(list(item) if isinstance(item, Iterator) else item for item in args)
    given = [*args, *kwargs.values()]
    number = max((abs(item) for item in given if isinstance(item, int)), default=0)
    text = max((meter.size(item) for item in given), default=0)
    size = meter.size(value)
    if name in {"format", "format_map"}:
        meter.make(formatted(meter, value, given))
    elif name == "replace":
        pieces = size + 1
        if pieces * text > meter.largest and args and isinstance(value, str) and isinstance(args[0], str):
            pieces = value.count(args[0])
        meter.make(size + pieces * text)
    elif name == "join":  # the method's text is before the dot, the filter's after it
        texts, between = (value, text) if not isinstance(value, str) or not args else (args[0], size)
        meter.make(meter.size(texts) + between * (len(texts) if isinstance(texts, Collection) else 1))
    elif name in {"expandtabs", "indent"} and isinstance(value, str):
        meter.make(size + (value.count("\t" if name == "expandtabs" else "\n") + 1) * max(number, text))
    elif name in {"wordwrap", "urlize", "translate", "xmlattr"}:
        meter.make(size * (1 + text))
    elif name == "tojson":
        meter.make(size + size // NODE * (number * (_depth(value) if number else 0) + text))
    elif name == "sum" and not all(isinstance(item, int | float) for item in (value if number or given else ())):
        raise TemplateLimitError("it adds up what is not numbers")
    elif number > meter.largest:
        raise TemplateLimitError(f"it calls {name} with the number {number if number < 10**20 else 'of many digits'}")
    return args


def formatted(meter: Meter, pattern: str | bytes, values: Any) -> float:
    """Characters that a format makes of values at most: its own, its widths, and every value wherever it may appear."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    places = WIDTH.findall(text)
    widths = sum(int(digits[:12]) for place in places for digits in re.findall(r"\d+", place))
    if WIDTH_GIVEN.search(text):
        widths += _largest_number(values) * len(places)
    return len(text) + widths + len(places) * meter.size(values)


def _largest_number(values: Any) -> int:
    if isinstance(values, int):
        return abs(values)
    inner = values.values() if isinstance(values, Mapping) else values
    return (
        max(map(_largest_number, inner), default=0)
        if isinstance(inner, Collection) and not isinstance(inner, str)
        else 0
    )


def _depth(value: Any) -> int:
    """Levels of lists within lists."""
    levels, level = 0, [value]
    while level:
        levels += 1
        level = [
            inner
            for item in level
            for inner in (
                item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
            )
        ]
    return levels
