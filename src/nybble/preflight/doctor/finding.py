"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, the verdict, what was found, and the command that fixes it."""

    name: str
    verdict: Outcome
    detail: str
    fix: str | None = None
