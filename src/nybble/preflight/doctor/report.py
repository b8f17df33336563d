"""Prints the findings on a terminal, and turns them into an exit status."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from nybble.preflight.doctor.finding import Finding, Verdict
from nybble.terminal import tell

COLOURS: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def exit_status(findings: Iterable[Finding]) -> int:
    """0 if the machine is ready, 1 if any check failed."""
    return int(any(finding.verdict == "fail" for finding in findings))


def render(findings: list[Finding], console: Console) -> None:
    """Print one aligned line per finding, its fix below it, and the verdict at the end."""
    label = max(len(finding.name) for finding in findings) + 8
    for finding in findings:
        start = Text.assemble((f"{finding.verdict:<4}", COLOURS[finding.verdict]), f"  {finding.name}".ljust(label - 4))
        tell(console, start + Text(finding.detail), hang=label)
        if finding.fix:
            tell(console, Text(f"{'':{label}}fix: {finding.fix}", style="cyan"), hang=label + len("fix: "))
    failed, warned = (sum(f.verdict == verdict for f in findings) for verdict in ("fail", "warn"))
    verdict = "ready: this machine can train"
    if failed:
        verdict = f"not ready: fix the {failed} problem{'s' * (failed > 1)} above"
    warnings = f", {warned} warning{'s' * (warned > 1)}" if warned else ""
    console.print()
    tell(console, Text(f"{verdict}{warnings}", style="bold red" if failed else "bold green"), hang=2)
