"""What becomes of the verdicts: a report beside the artefact, or an error."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Sequence
from dataclasses import asdict

from nybble.errors import ExportError
from nybble.export.parity.compare import Comparison
from nybble.export.parity.verdict import Verdict
from nybble.run.folder import versions, write_json


def write_report(
    file: pathlib.Path, base: str | None, comparison: Comparison | None, verdicts: Sequence[Verdict | str]
) -> None:
    """All that was measured, as JSON."""
    write_json(
        file,
        {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "merge_base": base,
            "comparison": None if comparison is None else asdict(comparison),
            "checks": [verdict if isinstance(verdict, str) else verdict.as_dict() for verdict in verdicts],
        },
    )


def refuse_failed(verdicts: Sequence[Verdict | str], what: str, report: pathlib.Path) -> None:
    """Raise where an artefact does not answer like the run.

    Raises:
        ExportError: with every reason.
    """
    failed = [verdict for verdict in verdicts if isinstance(verdict, Verdict) and not verdict.passed]
    if not failed:
        return
    reasons = [f"  - {verdict.kind} in {verdict.by}: {failure}" for verdict in failed for failure in verdict.failures]
    raise ExportError(
        f"{what} does not answer like the run and was not kept:\n" + "\n".join(reasons),
        where=str(report),
        fix="the report shows prompts and answers side by side; or try --quant Q8_0, --dtype bfloat16 or --to merged",
    )
