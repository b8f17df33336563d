"""The error tree. A user's error says what happened, where, why, and the command or edit that fixes it."""

from __future__ import annotations


class NybbleError(Exception):
    """A fault the user can mend; the command line prints it without a traceback and exits with `exit_code`.

    Args:
        what: one sentence: what is wrong and, where it is not plain, why.
        where: the place, as `file:line` where there is one.
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
    """Options that are unknown, of the wrong type, or that contradict each other."""

    exit_code = 2


class DataError(NybbleError):
    """Rows or files that cannot be trained on."""


class TooFewRowsError(DataError):
    """Nothing is wrong with the rows, but there are not enough to train on as the options say."""


class ModelError(NybbleError):
    """A base model or adapter that is missing, of another kind, or does not fit its options."""


class HubError(ModelError):
    """The Hugging Face Hub refused or could not be reached; the message says which of these."""


class DeviceError(NybbleError):
    """The machine cannot do what was asked of it."""


class RunError(NybbleError):
    """A run folder that exists already, is missing, damaged, or does not match what is asked of it."""


class PlaceError(NybbleError):
    """A folder that cannot be written to, or a disk without room."""


class TrainingError(NybbleError):
    """Training was stopped by a guard."""


class EngineError(NybbleError):
    """What the fused engine was asked for and cannot do."""


class EvaluationError(NybbleError):
    """A benchmark that cannot be run, or whose rows are missing."""


class ExportError(NybbleError):
    """An artefact that cannot be made, or that does not answer like the run it was made from."""


class ServeError(NybbleError):
    """A server that cannot be started: its port, its engine, what it is reached by, or a package that is missing."""


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic in a library's Rust: a BaseException, of a class that cannot be imported."""
    return type(error).__name__ == "PanicException"
