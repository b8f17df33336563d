"""Templates that read the clock, as Llama 3's do: the day is written into them, so that it never changes.

Training, chat, server and every artefact then write the same date, and prompts stay as they were trained when the day has passed.
"""

from __future__ import annotations

import datetime
import json
import re

CLOCK = re.compile(r"\bstrftime_now\b")  # the function that Transformers offers to templates
DEFINED = re.compile(r"\bmacro\s+strftime_now\b")
DIRECTIVE = re.compile(r"(?<!\{)%-?[A-Za-z]")  # of strftime; {% begins a block


def reads_clock(source: str) -> bool:
    """Whether a Jinja text calls `strftime_now` without defining it itself."""
    return bool(CLOCK.search(source)) and not DEFINED.search(source)


def with_fixed_date(source: str, day: datetime.date) -> str:
    """The Jinja text with its own `strftime_now`, which gives the start of that day; unchanged if it does not read the clock."""
    if not reads_clock(source):
        return source
    midnight = datetime.datetime.combine(day, datetime.time())
    steps = [
        f" | replace({json.dumps(directive)}, {json.dumps(midnight.strftime(directive))})"
        for directive in sorted(set(DIRECTIVE.findall(source)))
    ]
    clock = f"{{%- macro strftime_now(format) %}}{{{{ format{''.join(steps)} }}}}{{%- endmacro %}}"
    return clock + "\n" * source.startswith("\n") + source  # Transformers drops one line break after a block
