"""An export's progress and results on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nybble.export.parity.compare import Comparison
from nybble.export.records import Check
from nybble.terminal import tell


def tell_notices(notices: Sequence[str], console: Console) -> None:
    """Print one line per notice."""
    for notice in notices:
        tell(console, f"          {notice}", "yellow")


def tell_comparison(comparison: Comparison, chosen: str, console: Console) -> None:
    """Print one row per base, with a mark at the chosen one; it fits 80 columns."""
    tell(console, f"bases     against the run on {comparison.rows} {comparison.what}, {comparison.tokens:,} tokens")
    table = Table(
        "          base", "KL, nats per token", "perplexity", "same token", "", box=None, padding=(0, 2, 0, 0)
    )
    for column in table.columns[1:4]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    table.add_row("          (the run)", "0", f"{comparison.perplexity:.4f}", "100.0%", "")
    for name, one in comparison.bases.items():
        mark = "[green]taken[/]" if name == chosen else ""
        kl = f"{max(one.kl, 0):.5f} ± {one.error:.5f}"
        table.add_row(f"          {name}", kl, f"{one.perplexity:.4f}", f"{100 * one.agreement:.1f}%", mark)
    console.print(table)
    better = min(comparison.bases, key=lambda name: comparison.bases[name].perplexity)
    if better != chosen:
        tell(console, f"          the {better} base has lower perplexity; --merge-base {better} takes it")


def tell_checks(checks: Sequence[Check | str], console: Console) -> None:
    """Print one line per check."""
    for check in checks:
        if isinstance(check, str):
            tell(console, f"parity    {check}", "yellow")
            continue
        numbers = check.numbers
        outcome = ("passed", "green") if check.passed else ("failed", "red")
        rest = (
            f": KL {max(numbers.kl, 0):.4f} (limit {numbers.kl_limit:.3f}), "
            f"{numbers.equal_answers} of {numbers.questions} answers equal, {numbers.artefact_ended} end "
            f"(run {numbers.run_ended}); {check.by}"
        )
        tell(console, Text.assemble(f"parity    {check.kind} ", outcome, rest))
