"""The command line: one function per command; each imports what it needs, calls it, and prints the result.

Torch is imported only when a command needs it, so that `nybble --help` answers at once.
"""

from __future__ import annotations

import io
import sys

from rich.console import Console

from nybble.cli import planning, sweeping, training, using
from nybble.cli.app import app
from nybble.cli.defects import STATUS, report
from nybble.distributed.launcher import process_label, wait_without_spinning
from nybble.distributed.reports import leave_error
from nybble.errors import NybbleError, is_panic
from nybble.files.disk_errors import explained_disk_errors
from nybble.files.paths import check_current_folder
from nybble.terminal import tell_error

__all__ = ["main", "planning", "sweeping", "training", "using"]


def main() -> None:
    """Run the command line: an error gives one message and an exit status; a defect also leaves its traceback in a file."""
    wait_without_spinning()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # rows may contain characters that a terminal cannot show
    try:
        with explained_disk_errors():
            check_current_folder()
            app()
    except NybbleError as error:
        if not leave_error(error):
            _print_error(str(error))
        sys.exit(error.exit_code)
    except BaseException as error:  # the last line of defence: any other error is one message too
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if not leave_error(error):
            _print_error(report(error, sys.argv[1:]))
        sys.exit(STATUS)


def _print_error(text: str) -> None:
    tell_error(Console(stderr=True), process_label(), text)
