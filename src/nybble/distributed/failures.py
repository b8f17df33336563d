"""Which of several failed processes is to blame, and the one error that says so."""

from __future__ import annotations

import pathlib
import platform
import shlex
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from nybble.distributed.reports import LeftError, read_report
from nybble.errors import TrainingError

STOPPED = 128
"""An exit status above it is that of a process which a signal stopped in order, and which has said so."""


def blamed(failures: Mapping[int, ProcessFailure], reports: Mapping[int, LeftError | None]) -> int:
    """The rank of the process that failed first.

    The launcher looks a few times a second, so it may find the others failed as well: those lose their connection to the first.
    An error that the user can fix is never a consequence, unless it says so; a signal is none, unless it is one with which the
    launcher ends the others: SIGTERM, and SIGKILL half a minute later.
    """

    def moment(rank: int) -> float:
        report, code = reports[rank], failures[rank].exitcode
        if report is not None and report.is_consequence:
            return report.moment + 60
        if report is not None:
            return report.moment - (0 if report.traceback else 20)
        if failures[rank].signal_name() == "SIGTERM":
            return failures[rank].timestamp + 10
        return failures[rank].timestamp - (10 if code < 0 else 0)

    return min(failures, key=moment)


def error_of(
    failures: Mapping[int, ProcessFailure], folder: pathlib.Path, run: pathlib.Path, arguments: Sequence[str]
) -> Exception | int:
    """The error of the process that failed first; its exit status if it has said itself why it ended.

    Args:
        failures: by rank.
        folder: where processes leave their errors.
        run: the run folder.
        arguments: of the command.
    """
    reports = {rank: read_report(folder, rank) for rank in failures}
    rank = blamed(failures, reports)
    report, failure = reports[rank], failures[rank]
    if report is not None:
        return report.error(rank)
    if failure.exitcode > STOPPED:
        return failure.exitcode
    where, again = f"pid {failure.pid} on {platform.node()}", how_to_continue(run, arguments)
    if failure.exitcode > 0:
        return TrainingError(f"process {rank} ended with exit status {failure.exitcode}", where=where, fix=again)
    if failure.signal_name() == "SIGKILL":
        hint = "; if nobody killed it, the machine ran out of memory (dmesg tells)"
        return TrainingError(f"process {rank} was killed (SIGKILL)", where=where, fix=again + hint)
    return TrainingError(f"process {rank} was ended by signal {failure.signal_name()}", where=where, fix=again)


def stuck_error(
    stuck: Mapping[int, str], seconds: float, count: int, run: pathlib.Path, arguments: Sequence[str]
) -> TrainingError:
    """The error of processes that made no progress for so many seconds; `count`: how many there are."""
    ranks = sorted(stuck)
    names = f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(map(str, ranks))}"
    waited = "" if len(ranks) == count else ", while the others waited for it"
    time = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    state = next((f": {state}" for state in stuck.values() if state), "")
    return TrainingError(
        f"{names} made no progress for {time}{waited}{state}",
        where=f"{platform.node()}; all processes were ended",
        fix=how_to_continue(run, arguments),
    )


def how_to_continue(run: pathlib.Path, arguments: Sequence[str]) -> str:
    """The command that continues a run whose processes have all ended."""
    if (run / "adapter").exists():
        return f"training had ended, and its adapter is complete: nybble chat {run}"
    if (run / "recipe.yaml").exists():
        return f"nybble train --resume {run}"
    return f"nothing of the run was kept; start it again: {shlex.join(['nybble', *arguments])}"
