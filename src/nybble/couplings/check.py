"""What an installed library lacks of the register: a command stops with the version to install, not with an AttributeError."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from nybble.couplings.coupling import AT_START, TESTED, Coupling
from nybble.couplings.table import COUPLINGS


@dataclass(frozen=True)
class Misfit:
    """An installed library that is not built as nybble relies upon."""

    what: str
    requirement: str
    """What to install, as pip takes it."""


def unmet(*rooms: str) -> Misfit | None:
    """The first coupling of these rooms that an installed library does not meet; None where all are met.

    Those that something else notices in time (`Coupling.guard`) are left to it. What is optional and not installed is passed
    over; so is what only instances have.
    """
    for coupling in COUPLINGS:
        if coupling.guard == AT_START and any(file.split("/")[0] in rooms for file in coupling.files):
            for lack in lacking(coupling):
                return misfit(coupling, lack)
    return None


def misfit(coupling: Coupling, lack: str) -> Misfit:
    """The sentence and the versions to install for what a library lacks."""
    low, high = coupling.seen
    installed = version(coupling.library)
    what = f"{coupling.library} {installed} has no {lack}, which nybble uses (tested with {low} to {high}): {coupling.breaks}"
    return Misfit(what, f"'{coupling.library}>={low},<={high}'")


def lacking(coupling: Coupling) -> Iterator[str]:
    """The symbols of a coupling that the installed library does not have, or that take other parameters."""
    if not _is_installed(coupling.library):
        return
    for number, symbol in enumerate(coupling.symbols):
        if "#" in symbol:
            continue
        try:
            found = resolve(symbol)
        except (ImportError, AttributeError):
            yield symbol.replace(":", ".")
            continue
        if number == 0 and (absent := _absent(found, coupling.parameters)):
            yield f"{symbol.replace(':', '.')} with {absent}"


def resolve(symbol: str) -> Any:
    """What `module:name.attribute` stands for.

    Raises:
        ImportError, AttributeError: it is not there.
    """
    module, _, path = symbol.partition(":")
    if module == "torch.ops.aten":  # a namespace that makes its names when asked
        return getattr(importlib.import_module("torch").ops.aten, path)
    return functools.reduce(getattr, filter(None, path.split(".")), importlib.import_module(module))


@functools.cache
def is_tested(library: str) -> bool:
    """Whether the installed version lies in the tested window, patch releases of its upper end included; not if it was
    not installed under this name."""
    low, high = map(Version, TESTED[library])
    try:
        installed = Version(version(library))
    except PackageNotFoundError:  # or under another name: a nightly build, a port
        return False
    return low <= installed and installed.release[:2] <= high.release[:2]


@functools.cache
def _is_installed(library: str) -> bool:
    try:
        version(library)
    except PackageNotFoundError:
        return False
    return True


def _absent(found: Any, parameters: tuple[str, ...]) -> str:
    """The parameters that a function does not take, in this order."""
    taken = iter(inspect.signature(found).parameters) if parameters else iter(())
    return ", ".join(name for name in parameters if name not in taken)
