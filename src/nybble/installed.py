"""How nybble is installed, and so which commands add an optional part to it or start another process of it."""

from __future__ import annotations

import pathlib
import shlex
import shutil
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]


def install_extra(extra: str) -> str:
    """The command that installs an optional part, such as 'serve', to this installation of nybble.

    A checkout is not on the package index under its name, and a `pip` found by name may belong to another Python.
    """
    if (CHECKOUT / "install.py").exists():
        target = f"{_shown(CHECKOUT)}[{extra}]"
        return f"{pip()} install -e {shlex.quote(target)}"
    return f"{pip()} install 'nybble[{extra}]'"


def module_command(name: str, *arguments: str) -> list[str]:
    """The command that starts another process of this nybble: `python -m NAME ARGUMENTS`, ignoring modules in the current folder.

    With `-m` Python searches that folder first, so a typer.py or json.py in it would run. It stays only if nybble itself is
    imported from it.

    Args:
        name: a module of nybble that can be run.
        arguments: its arguments.
    """
    source = pathlib.Path(__file__).resolve().parents[1]
    return [sys.executable, *([] if pathlib.Path.cwd() == source else ["-P"]), "-m", name, *arguments]


def pip() -> str:
    """This Python's pip as one can type it: by name if the shell finds that one, else by path."""
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
