"""How nybble is installed: the commands that add an optional part to it or start another process of it."""

from __future__ import annotations

import pathlib
import shlex
import shutil
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]


def install_extra(extra: str) -> str:
    """The command that installs an optional part, such as 'serve', to this installation of nybble.

    A checkout cannot be installed from the package index by its name, and the `pip` on PATH may belong to another Python.
    """
    if (CHECKOUT / "install.py").exists():
        target = f"{_relative(CHECKOUT)}[{extra}]"
        return f"{pip()} install -e {shlex.quote(target)}"
    return f"{pip()} install 'nybble[{extra}]'"


def module_command(name: str, *arguments: str) -> list[str]:
    """The command that starts another process of this nybble: `python -m NAME ARGUMENTS`, ignoring modules in the current folder.

    With `-m`, Python searches that folder first, so a typer.py or json.py in it would be imported. The folder is searched only if
    nybble itself is imported from it.

    Args:
        name: a module of nybble that can be run.
        arguments: its arguments.
    """
    source = pathlib.Path(__file__).resolve().parents[1]
    return [sys.executable, *([] if pathlib.Path.cwd() == source else ["-P"]), "-m", name, *arguments]


def pip() -> str:
    """This Python's pip as it can be typed: `pip` if the shell finds this one by that name, else its path."""
    path = pathlib.Path(sys.prefix) / "bin" / "pip"
    if not path.exists():
        return f"{shlex.quote(sys.executable)} -m pip"
    on_path = shutil.which("pip")
    if on_path and pathlib.Path(on_path) == path:
        return "pip"
    return shlex.quote(_relative(path))


def _relative(path: pathlib.Path) -> str:
    """A path relative to the current folder if it is inside it, else unchanged."""
    current = pathlib.Path.cwd()
    return str(path.relative_to(current)) if path.is_relative_to(current) else str(path)
