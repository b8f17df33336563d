"""The error for an exported model that does not answer like the run."""

from __future__ import annotations

import pathlib

from nybble.errors import ExportError
from nybble.export.records import Parity


def refuse_failed(parity: Parity, what: str, report: pathlib.Path) -> None:
    """Raise if an artefact does not answer like the run.

    Args:
        parity: what was measured.
        what: the artefact.
        report: the path of its record.

    Raises:
        ExportError: with every reason.
    """
    reasons = [f"  - {check.kind} in {check.by}: {failure}" for check in parity.failed for failure in check.failures]
    if not reasons:
        return
    raise ExportError(
        f"{what} does not answer like the run and was not kept:\n" + "\n".join(reasons),
        where=str(report),
        fix="the report shows prompts and answers side by side; or try --quant Q8_0, --dtype bfloat16 or --to merged",
    )
