"""The last line of defence: an error that nobody foresaw is one message, and its traceback a file."""

from __future__ import annotations

import datetime
import itertools
import os
import pathlib
import platform
import re
import tempfile
import traceback
from collections.abc import Sequence

from nybble.files.paths import default_cache
from nybble.version import __version__

STATUS = 70  # EX_SOFTWARE of sysexits.h: an internal software error


def report(error: BaseException, arguments: Sequence[str]) -> str:
    """Write the traceback into the run that the command line names, else into the cache, and say where it is.

    Args:
        error: what was raised.
        arguments: of the command line, the program's name left out.
    """
    name = type(error).__name__
    text = "".join(traceback.format_exception(error))
    line = f"nybble {__version__}, Python {platform.python_version()}, {platform.platform()}\n{_command_line(arguments)}\n\n"
    file = _write(line + text, arguments)
    what = f"nybble stopped because of an unexpected error ({name}: {_first_line(error)})"
    if file is None:
        return f"{what}\n{text}"
    return (
        f"{what}\n  where: {file} (the traceback)\n  fix:   this is a defect in nybble: please report it with that file"
    )


def _write(text: str, arguments: Sequence[str]) -> pathlib.Path | None:
    for folder in (*_runs(arguments), _cache(arguments) / "tracebacks", pathlib.Path(tempfile.gettempdir())):
        file = folder / f"traceback-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError):  # an argument may hold a zero byte
            continue
        return file
    return None


def _command_line(arguments: Sequence[str]) -> str:
    """The command line without its key: the file is made to be sent to others."""
    hidden = [re.sub(r"^--api-key=.*", "--api-key=...", argument, flags=re.DOTALL) for argument in arguments]
    return " ".join(
        "..." if before == "--api-key" else argument for before, argument in itertools.pairwise(("", *hidden))
    )


def _cache(arguments: Sequence[str]) -> pathlib.Path:
    """The cache that the command line names, whatever else is wrong with it."""
    for argument, following in itertools.pairwise((*arguments, "")):
        if argument == "--cache" and following:
            return pathlib.Path(following)
        if argument.startswith("--cache="):
            return pathlib.Path(argument.removeprefix("--cache="))
    return default_cache()


def _runs(arguments: Sequence[str]) -> list[pathlib.Path]:
    """Run folders among the arguments; an argument may be anything, so one that is no path is passed over."""
    found = []
    for argument in arguments:
        try:
            if (pathlib.Path(argument) / "recipe.yaml").is_file():
                found.append(pathlib.Path(argument))
        except (OSError, ValueError):  # too long for a name, or with a zero byte
            continue
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
