"""Checks of the installed libraries: a command stops with the version to install, not with an AttributeError."""

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
class Incompatibility:
    """An installed library that lacks something that nybble relies on."""

    what: str
    requirement: str
    """What to install, as an argument of pip."""


def first_incompatibility(*packages: str) -> Incompatibility | None:
    """The first coupling of these packages that an installed library does not fulfil; None if all are fulfilled.

    Only couplings that nothing else notices in time are checked (`Coupling.guard`). Optional libraries that are not installed and
    attributes that only instances have are skipped.
    """
    for coupling in COUPLINGS:
        if coupling.guard == AT_START and any(file.split("/")[0] in packages for file in coupling.files):
            for symbol in missing_symbols(coupling):
                return incompatibility(coupling, symbol)
    return None


def incompatibility(coupling: Coupling, missing: str) -> Incompatibility:
    """The message and the versions to install for a missing symbol."""
    low, high = coupling.seen
    installed = version(coupling.library)
    what = f"{coupling.library} {installed} has no {missing}, which nybble uses (tested with {low} to {high}): {coupling.breaks}"
    return Incompatibility(what, f"'{coupling.library}>={low},<={high}'")


def missing_symbols(coupling: Coupling) -> Iterator[str]:
    """The symbols of a coupling that the installed library does not have, or whose parameters differ."""
    if not _is_installed(coupling.library):
        return
    for number, symbol in enumerate(coupling.symbols):
        if "#" in symbol:
            continue
        try:
            value = resolve(symbol)
        except (ImportError, AttributeError):
            yield symbol.replace(":", ".")
            continue
        if number == 0 and (missing := _missing_parameters(value, coupling.parameters)):
            yield f"{symbol.replace(':', '.')} with {missing}"


def resolve(symbol: str) -> Any:
    """The object that `module:name.attribute` names.

    Raises:
        ImportError, AttributeError: it does not exist.
    """
    module, _, path = symbol.partition(":")
    if module == "torch.ops.aten":  # a namespace that creates its names on access
        return getattr(importlib.import_module("torch").ops.aten, path)
    return functools.reduce(getattr, filter(None, path.split(".")), importlib.import_module(module))


@functools.cache
def is_tested(library: str) -> bool:
    """Whether the installed version is in the tested window, including patch releases of its upper end; False if the library
    is not installed under this name."""
    low, high = map(Version, TESTED[library])
    try:
        installed = Version(version(library))
    except PackageNotFoundError:  # or installed under another name: a nightly build, a port
        return False
    return low <= installed and installed.release[:2] <= high.release[:2]


@functools.cache
def _is_installed(library: str) -> bool:
    try:
        version(library)
    except PackageNotFoundError:
        return False
    return True


def _missing_parameters(function: Any, parameters: tuple[str, ...]) -> str:
    """The parameters that a function does not have, or not in this order."""
    remaining = iter(inspect.signature(function).parameters) if parameters else iter(())
    return ", ".join(name for name in parameters if name not in remaining)
