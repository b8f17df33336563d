"""The findings on a terminal, and as an exit status."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from nybble.preflight.doctor.finding import Finding, Outcome
from nybble.terminal import tell

COLOURS: dict[Outcome, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def exit_status(findings: Iterable[Finding]) -> int:
    """0 where the machine is ready; 1 where anything failed."""
    return int(any(finding.verdict == "fail" for finding in findings))


def render(findings: list[Finding], console: Console) -> None:
    """One aligned line per finding, its fix below it, the verdict last."""
    label = max(len(finding.name) for finding in findings) + 8
    for finding in findings:
        begins = Text.assemble(
            (f"{finding.verdict:<4}", COLOURS[finding.verdict]), f"  {finding.name}".ljust(label - 4)
        )
        tell(console, begins + Text(finding.detail), hang=label)
        if finding.fix:
            tell(console, Text(f"{'':{label}}fix: {finding.fix}", style="cyan"), hang=label + len("fix: "))
    failed, warned = (sum(f.verdict == verdict for f in findings) for verdict in ("fail", "warn"))
    verdict = "ready: this machine can train"
    if failed:
        verdict = f"not ready: fix the {failed} problem{'s' * (failed > 1)} above"
    noted = f", {warned} warning{'s' * (warned > 1)}" if warned else ""
    console.print()
    tell(console, Text(f"{verdict}{noted}", style="bold red" if failed else "bold green"), hang=2)
