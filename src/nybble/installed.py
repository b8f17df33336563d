"""How nybble is installed here, and so the commands that add an optional part to it, or start another process of it."""

from __future__ import annotations

import pathlib
import shlex
import shutil
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]


def install_extra(extra: str) -> str:
    """The command that installs an optional part, such as 'serve', beside this very nybble.

    A checkout is not on the package index under its name, and a `pip` found by name may belong to another Python.
    """
    if (CHECKOUT / "install.py").exists():
        target = f"{_shown(CHECKOUT)}[{extra}]"
        return f"{pip()} install -e {shlex.quote(target)}"
    return f"{pip()} install 'nybble[{extra}]'"


def module_command(name: str, *words: str) -> list[str]:
    """The command of another process of this very nybble: `python -m NAME WORDS`, with no module from the current folder.

    Python puts that folder first where a module is named, so a typer.py or json.py that lies there would be run. Only where it is
    the folder that nybble itself is imported from does it stay.

    Args:
        name: a module of nybble that can be run.
        words: its arguments.
    """
    own = pathlib.Path(__file__).resolve().parents[1]
    return [sys.executable, *([] if pathlib.Path.cwd() == own else ["-P"]), "-m", name, *words]


def pip() -> str:
    """This Python's pip as it can be typed: by name if that finds it, else by its path."""
    own = pathlib.Path(sys.prefix) / "bin" / "pip"
    if not own.exists():
        return f"{shlex.quote(sys.executable)} -m pip"
    found = shutil.which("pip")
    if found and pathlib.Path(found) == own:
        return "pip"
    return shlex.quote(_shown(own))


def _shown(path: pathlib.Path) -> str:
    """A path from here, where it is below this folder; else the whole."""
    here = pathlib.Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
