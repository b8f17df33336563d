"""Python and the packages, against the versions that nybble was tested with."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nybble.preflight.doctor.finding import Finding


def python() -> Finding:
    """Its version, against the one that nybble declares."""
    version = platform.python_version()
    window = metadata.metadata("nybble").json.get("requires_python") if installed_version("nybble") else None
    if window and not SpecifierSet(str(window)).contains(version, prereleases=True):
        return Finding("python", "fail", f"{version}, outside {window}", "create an environment with Python 3.12")
    return Finding("python", "ok", version)


def packages(requirements: list[str], installed: Callable[[str], str | None]) -> list[Finding]:
    """Compare what is installed with what nybble declares.

    Args:
        requirements: as package metadata states them; those of extras are left out.
        installed: the version of a package, None where it is missing.
    """
    if not requirements:
        fix = "install nybble with pip, not through PYTHONPATH alone"
        return [Finding("packages", "warn", "nybble's metadata is missing: the tested versions are unknown", fix)]
    wanted = [Requirement(text) for text in requirements]
    core = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    return [_package(need, installed(need.name)) for need in core]


def _package(need: Requirement, version: str | None) -> Finding:
    fix = f"pip install {_quoted(need)}"
    if version is None:
        return Finding(need.name, "fail", "not installed", fix)
    if not need.specifier.contains(version, prereleases=True):
        return Finding(need.name, "fail", f"{version} is outside the tested versions", fix)
    return Finding(need.name, "ok", version)


def _quoted(need: Requirement) -> str:
    """The requirement as pip takes it in a shell, lower bound first."""
    return f'"{need.name}{",".join(sorted(map(str, need.specifier), reverse=True))}"'


def pin(name: str) -> str:
    """A package with its tested versions, as pip takes it; the name alone where nybble is not installed."""
    return next((_quoted(need) for need in map(Requirement, declared()) if need.name == name), name)


def declared() -> list[str]:
    """What nybble declares; nothing where it is not installed."""
    return (metadata.requires("nybble") or []) if installed_version("nybble") else []


def installed_version(name: str) -> str | None:
    """A package's version, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
