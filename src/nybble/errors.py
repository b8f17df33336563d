"""The error tree. A user's error says what happened, where, why, and the command or edit that fixes it."""

from __future__ import annotations


class NybbleError(Exception):
    """An error that the user can fix; the command line prints it without a traceback and exits with `exit_code`.

    Args:
        what: one sentence: what is wrong and, unless that is obvious, why.
        where: the location, as `file:line` if there is one.
        fix: the command to run or the edit to make.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class RecipeError(NybbleError):
    """Options that are unknown, have the wrong type, or contradict each other."""

    exit_code = 2


class DataError(NybbleError):
    """Rows or files that cannot be trained on."""


class TooFewRowsError(DataError):
    """The rows are sound, but there are too few of them for the options."""


class ModelError(NybbleError):
    """A base model or adapter that is missing, of an unsupported kind, or that does not fit the options."""


class HubError(ModelError):
    """The Hugging Face Hub refused a request or could not be reached; the message says which."""


class DeviceError(NybbleError):
    """The machine cannot do what was asked."""


class RunError(NybbleError):
    """A run folder that already exists, is missing or damaged, or does not match the request."""


class StorageError(NybbleError):
    """A folder that cannot be written to, or a full disk."""


class TrainingError(NybbleError):
    """Training was stopped by a guard."""


class EngineError(NybbleError):
    """A request that the fused engine cannot fulfil."""


class LostProcessError(DeviceError):
    """Another process of this run has ended: a consequence of whatever ended that one."""


class EvaluationError(NybbleError):
    """A benchmark that cannot be run, or whose rows are missing."""


class ExportError(NybbleError):
    """An export that cannot be made, or that does not answer like its run."""


class ServeError(NybbleError):
    """A server that cannot be started: its port, its engine, its address, or a missing package."""


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic in a library's Rust code: a BaseException whose class cannot be imported."""
    return type(error).__name__ == "PanicException"
