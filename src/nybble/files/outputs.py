"""Whether a run, a report or an export can be written, before anything is loaded."""

from __future__ import annotations

import os
import pathlib
import shlex

from nybble.errors import ExportError
from nybble.files.atomic import LOCK, UNFINISHED, refuse_busy
from nybble.files.locks import holder, refuse_held
from nybble.files.paths import check_cache, check_writable

PARITY_REPORT = "parity.json"  # in each export


def check_run_and_cache(run: pathlib.Path, cache: pathlib.Path) -> None:
    """Refuse a run folder or a cache that cannot be written, before anything is loaded.

    Raises:
        StorageError: with the reason.
    """
    check_writable(run, "the run", "out=FOLDER, in a writable location")
    check_cache(cache)


def check_report(run: pathlib.Path) -> None:
    """Refuse a run into which `nybble eval` cannot write its report.

    Raises:
        StorageError: with the reason.
        RunError: another process is writing to the run.
    """
    refuse_busy(run)
    fix = f"evaluate a copy: cp -r {shlex.quote(str(run))} FOLDER, then nybble eval FOLDER"
    check_writable(run, "the report, which is kept in the run,", fix)
    if (run / "report").is_dir():
        check_writable(run / "report", "the report's pictures", fix)


def check_export(target: pathlib.Path) -> None:
    """Refuse a path where an export cannot be made: it exists, or it cannot be written.

    Raises:
        ExportError: the path exists, and an export is never overwritten.
        StorageError: the path cannot be written, with the reason.
        RunError: another process is writing an export to it.
    """
    if os.path.lexists(target):
        is_export = (
            target / PARITY_REPORT
        ).is_file()  # the path may also be a run or a base: never suggest removing those
        remove = f", or remove the one that is there: rm -r {shlex.quote(str(target))}" if is_export else ""
        raise ExportError(f"{target} exists already", fix=f"--out ANOTHER{remove}")
    for lock in target.parent.glob(f"{UNFINISHED}*{LOCK}"):
        if (held := holder(lock)) is not None and held.place == os.path.realpath(target):
            refuse_held(lock, target)
    check_writable(target, "the export", "--out FOLDER, in a writable location")
