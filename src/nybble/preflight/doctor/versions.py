"""The versions of Python and of the packages, compared with those that nybble was tested with."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nybble.preflight.doctor.finding import Finding


def python() -> Finding:
    """Python's version, compared with those that nybble declares."""
    version = platform.python_version()
    supported = metadata.metadata("nybble").json.get("requires_python") if installed_version("nybble") else None
    if supported and not SpecifierSet(str(supported)).contains(version, prereleases=True):
        return Finding("python", "fail", f"{version}, outside {supported}", "create an environment with Python 3.12")
    return Finding("python", "ok", version)


def packages(requirements: list[str], installed: Callable[[str], str | None]) -> list[Finding]:
    """Compare the installed packages with those that nybble declares.

    Args:
        requirements: in the syntax of package metadata; those of extras are left out.
        installed: gives the version of a package, None if it is missing.
    """
    if not requirements:
        fix = "install nybble with pip, not through PYTHONPATH alone"
        return [Finding("packages", "warn", "nybble's metadata is missing: the tested versions are unknown", fix)]
    parsed = [Requirement(text) for text in requirements]
    core = [package for package in parsed if package.marker is None or package.marker.evaluate({"extra": ""})]
    return [_package(package, installed(package.name)) for package in core]


def _package(package: Requirement, version: str | None) -> Finding:
    fix = f"pip install {_quoted(package)}"
    if version is None:
        return Finding(package.name, "fail", "not installed", fix)
    if not package.specifier.contains(version, prereleases=True):
        return Finding(package.name, "fail", f"{version} is outside the tested versions", fix)
    return Finding(package.name, "ok", version)


def _quoted(package: Requirement) -> str:
    """The requirement as an argument of pip in a shell, lower bound first."""
    return f'"{package.name}{",".join(sorted(map(str, package.specifier), reverse=True))}"'


def pin(name: str) -> str:
    """A package with its tested versions, as an argument of pip; the name alone if nybble is not installed."""
    return next((_quoted(package) for package in map(Requirement, declared()) if package.name == name), name)


def declared() -> list[str]:
    """The requirements that nybble declares; none if it is not installed."""
    return (metadata.requires("nybble") or []) if installed_version("nybble") else []


def installed_version(name: str) -> str | None:
    """A package's version, None if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
