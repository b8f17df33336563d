"""The version: of the package, of what a run records, and of the newest entry in CHANGELOG.md."""

__version__ = "0.8.0"
