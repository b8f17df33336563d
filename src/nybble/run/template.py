"""template.json: the chat template of a run."""

from __future__ import annotations

from typing import Literal

from nybble.run.records import AnyText, Day, FrozenShape


class RecordedTemplate(FrozenShape):
    """A template by name and text; versions before 0.6 wrote only the first three fields."""

    name: AnyText
    source: AnyText
    """Jinja."""
    verbatim: bool
    bos: bool | None = None
    """Whether a document begins with the tokenizer's BOS; None before 0.6."""
    day: Day | None = None
    """The date that a template which reads the clock gets."""
    rules: Literal[6, 7] = 6
    """The rules by which rows are read: those of 0.6 or of 0.7."""
