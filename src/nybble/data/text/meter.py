"""Limits on one rendering of a chat template, and estimates, before it runs, of how much a method or filter would build.

The estimates are rough upper bounds: an ordinary template stays below the limits by a factor of a thousand.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jinja2.utils import Namespace

from nybble.errors import DataError

SECONDS = 5.0  # of processor time for one rendering; an ordinary one takes less than 0.001
VALUE_SIZE = 4_000_000  # characters that a value may have, plus eight for each character of the messages
COPIES = 64  # values of that size that may be built one after another
ITEM_SIZE = 16  # characters that an item of a list counts for, besides its text
MAX_DIGITS = 4300  # digits of a number; Python writes no longer ones
WIDTH = re.compile(r"%[^%A-Za-z]*|\{[^{}]*")  # a part of a format that may set a value's width
WIDTH_FROM_VALUES = re.compile(r"\*|\{[^{}]*\{")  # a format whose width comes from the values


class TemplateLimitError(DataError):
    """A template that runs too long or builds too much; it is not the row's fault, so no row can be rendered with it."""


class Meter:
    """Counts what one rendering uses, and stops it at the limits.

    Args:
        message_size: characters of its messages.
    """

    def __init__(self, message_size: int) -> None:
        self.largest = VALUE_SIZE + 8 * message_size
        self.left = COPIES * self.largest
        self._wall = time.monotonic() + SECONDS
        self._processor = time.thread_time() + SECONDS

    def step(self, written: int = 0) -> None:
        """Call this before each iteration of a loop, each call and each operator that iterates over values.

        Args:
            written: characters of the template's own text that the step writes.

        Raises:
            TemplateLimitError: the time or the number of characters is used up.
        """
        self.left -= written
        now = time.monotonic()
        if now > self._wall:
            remaining = self._processor - time.thread_time()
            if remaining <= 0:
                raise TemplateLimitError(f"it is still running after {SECONDS:.0f} seconds")
            self._wall = now + remaining  # it is not the template's fault that the machine was busy or asleep
        if self.left < 0:
            raise TemplateLimitError(f"it writes more than {COPIES * self.largest:,} characters")

    def make(self, size: float, new: float | None = None) -> None:
        """Call this before or after a value of this many characters is built.

        Args:
            size: characters of the value written out.
            new: characters that it takes besides the values that it contains; None if all are new.

        Raises:
            TemplateLimitError: the value is too large, or all values together are.
        """
        if size > self.largest:
            raise TemplateLimitError(f"it builds a value of more than {self.largest:,} characters")
        self.left -= int(size if new is None else new)
        if self.left < 0:
            self.step()

    def number(self, bits: int) -> None:
        """Call this before an integer of this many bits is computed.

        Raises:
            TemplateLimitError: it has too many digits.
        """
        if bits * 0.30103 > MAX_DIGITS:
            raise TemplateLimitError(f"it computes a number of more than {MAX_DIGITS:,} digits")

    def size(self, value: Any) -> int:
        """Approximate characters of a value written out; counting stops once it is known to be too large."""
        if type(value) is str:  # nearly always the case, and this is called for everything that a template writes
            return len(value)
        total, waiting = 0, [value]
        while waiting and total <= self.largest:
            item = waiting.pop()
            total += ITEM_SIZE
            if isinstance(item, Namespace):
                item = object.__getattribute__(item, "_Namespace__attrs")
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, Mapping):
                total += 2 * ITEM_SIZE * len(item)
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                total += ITEM_SIZE * len(item)
                waiting += item
            elif isinstance(item, int):
                total += item.bit_length() // 3
        return total


def check_call(
    meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Refuse a call of a method or filter that would build too much; returns its arguments, with iterators as lists."""
    args = tuple(list(item) if isinstance(item, Iterator) else item for item in args)
    arguments = [*args, *kwargs.values()]
    number = max((abs(item) for item in arguments if isinstance(item, int)), default=0)
    text = max((meter.size(item) for item in arguments), default=0)
    size = meter.size(value)
    if name in {"format", "format_map"}:
        meter.make(formatted_size(meter, value, arguments))
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
        meter.make(size + size // ITEM_SIZE * (number * (_depth(value) if number else 0) + text))
    elif name == "sum" and not all(isinstance(item, int | float) for item in (value if number or arguments else ())):
        raise TemplateLimitError("it adds up values that are not numbers")
    elif number > meter.largest:
        raise TemplateLimitError(f"it calls {name} with the number {number if number < 10**20 else 'of many digits'}")
    return args


def formatted_size(meter: Meter, pattern: str | bytes, values: Any) -> float:
    """The most characters that a format can produce: its own, its widths, and all values in each of its fields."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    fields = WIDTH.findall(text)
    widths = sum(int(digits[:12]) for field in fields for digits in re.findall(r"\d+", field))
    if WIDTH_FROM_VALUES.search(text):
        widths += _largest_number(values) * len(fields)
    return len(text) + widths + len(fields) * meter.size(values)


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
    """The number of levels of nested lists and mappings."""
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
