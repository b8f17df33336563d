"""What a process tells the launcher that `nybble train --processes` is: its error, of which the launcher shows one for all.

When one process fails, the others fail too, because they wait for it: each would print an error of its own.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
import traceback
from dataclasses import asdict, dataclass

from nybble.distributed.launcher import rank
from nybble.errors import LostProcessError, NybbleError

# Set by the launcher for its processes: its id and a folder, with a colon between. It is no option.
VARIABLE = "NYBBLE_LAUNCHER"


class ProcessError(Exception):
    """An unexpected error of another process, whose traceback is its note."""


@dataclass(frozen=True)
class LeftError:
    """How a process failed."""

    what: str
    where: str | None
    fix: str | None
    status: int
    traceback: str
    """Empty for an error that the user can fix."""
    is_consequence: bool
    """Whether it failed because another process had ended."""
    moment: float
    """Seconds since the epoch."""

    def error(self, rank: int) -> Exception:
        """The error, to be raised in another process."""
        if not self.traceback:
            kind = LostProcessError if self.is_consequence else NybbleError
            fixable = kind(_of(rank, self.what), where=self.where, fix=self.fix)
            fixable.exit_code = self.status
            return fixable
        defect = ProcessError(_of(rank, self.what))
        defect.add_note(self.traceback)
        return defect


def launcher_folder() -> pathlib.Path | None:
    """The folder for the launcher that started this process; None without one, or if it was killed."""
    number, _, folder = os.environ.get(VARIABLE, "").partition(":")
    return pathlib.Path(folder) if folder and number == str(os.getppid()) else None


def leave_error(error: BaseException) -> bool:
    """Leave an error for the launcher, once the process is about to end with it; False if this process has to show it."""
    folder = launcher_folder()
    if folder is None:
        return False
    moment = time.time()
    if isinstance(error, NybbleError):
        report = LeftError(
            error.what, error.where, error.fix, error.exit_code, "", isinstance(error, LostProcessError), moment
        )
    else:
        what = f"{type(error).__name__}: {error}"
        report = LeftError(what, None, None, 1, "".join(traceback.format_exception(error)), False, moment)
    try:
        _file(folder, rank()).write_text(json.dumps(asdict(report)), encoding="utf-8")
    except OSError:  # a full disk
        return False
    return True


def read_report(folder: pathlib.Path, rank: int) -> LeftError | None:
    """What a process left; None if it left nothing, or was killed while it wrote."""
    try:
        return LeftError(**json.loads(_file(folder, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _file(folder: pathlib.Path, rank: int) -> pathlib.Path:
    return folder / f"{rank}.error"


def _of(rank: int, what: str) -> str:
    return f"in process {rank}: {what}" if rank else what
