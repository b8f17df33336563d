"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: the name of the check, its verdict, the details, and the command that fixes the problem."""

    name: str
    verdict: Verdict
    detail: str
    fix: str | None = None
