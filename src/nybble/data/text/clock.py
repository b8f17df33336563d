"""Templates that read the clock, as Llama 3's do: the day is written into them, so that it is the same ever after.

Training, chat, server and every artefact then write one date, and a prompt is still what was trained when the day has passed.
"""

from __future__ import annotations

import datetime
import json
import re

CLOCK = re.compile(r"\bstrftime_now\b")  # what Transformers lets a template call
DEFINED = re.compile(r"\bmacro\s+strftime_now\b")
DIRECTIVE = re.compile(r"(?<!\{)%-?[A-Za-z]")  # of strftime; {% begins a block


def reads_clock(source: str) -> bool:
    """Whether a Jinja text asks for the time, and nothing in it answers instead."""
    return bool(CLOCK.search(source)) and not DEFINED.search(source)


def stopped(source: str, day: datetime.date) -> str:
    """The Jinja text with a clock of its own, stopped at the beginning of that day; unchanged if it reads none."""
    if not reads_clock(source):
        return source
    midnight = datetime.datetime.combine(day, datetime.time())
    steps = [
        f" | replace({json.dumps(directive)}, {json.dumps(midnight.strftime(directive))})"
        for directive in sorted(set(DIRECTIVE.findall(source)))
    ]
    clock = f"{{%- macro strftime_now(format) %}}{{{{ format{''.join(steps)} }}}}{{%- endmacro %}}"
    return clock + "\n" * source.startswith("\n") + source  # Transformers drops one line break after a block
