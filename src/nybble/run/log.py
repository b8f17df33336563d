"""metrics.jsonl and samples.jsonl: one line per step, per evaluation and per answer to a validation prompt."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from nybble.errors import NybbleError, RunError
from nybble.files.reading import read_lines
from nybble.files.writing import append_json, write_text
from nybble.run.folder import Run
from nybble.run.records import AnyText, FrozenShape

TASK = "task/"  # prefix of a benchmark's name in the keys of a line


class MetricsLine(FrozenShape):
    """What was measured at a step, or by the evaluation after it; None for what was not.

    Other keys are what the objective measures besides the loss.
    """

    model_config = ConfigDict(extra="allow")

    step: int
    loss: float | AnyText | None = None
    """Nats per token, without a unit for preferences; text where it is not finite."""
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    """In all processes, without padding."""
    seconds: float | None = None
    """How long the step took."""
    eval_loss: float | None = None
    """Loss on the validation rows, in the unit of `loss`."""
    scores: dict[AnyText, float] = Field(default_factory=dict)
    """Scores by benchmark; in the file each is a key of the line."""

    @property
    def is_of_preferences(self) -> bool:
        """Whether the loss is that of preferences, which has no unit."""
        return any("reward_chosen" in name for name in self.model_extra or ())

    @model_validator(mode="before")
    @classmethod
    def _gather_scores(cls, line: Any) -> Any:
        if not isinstance(line, dict):
            return line
        scores = {key.removeprefix(TASK): value for key, value in line.items() if key.startswith(TASK)}
        others = {key: value for key, value in line.items() if not key.startswith(TASK)}
        return {**others, "scores": scores} if scores else others

    @model_serializer(mode="wrap")
    def _spread_scores(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        line: dict[str, Any] = plain(self)
        scores: dict[str, float] = line.pop("scores", {})
        return {**line, **{f"{TASK}{name}": score for name, score in scores.items()}}


class SampleLine(FrozenShape):
    """A greedy answer to a validation prompt after a step."""

    step: int
    prompt: AnyText = ""
    answer: AnyText = ""
    expected: AnyText = ""
    error: AnyText | None = None
    """Why there is no answer."""


L = TypeVar("L", MetricsLine, SampleLine)


def read_metrics(run: Run) -> list[MetricsLine]:
    """Every line of metrics.jsonl, except a last line that a crash cut off.

    Raises:
        RunError: naming the first line that is damaged.
    """
    lines = list(read_lines(run.metrics, MetricsLine, RunError))
    if lines and isinstance(lines[-1], NybbleError):
        lines.pop()
    return _undamaged(lines)


def check_logs(run: Run, step: int) -> None:
    """Check the lines up to the step from which a run resumes; -1 for none.

    Raises:
        RunError: naming the first damaged line; lines of later steps do not matter.
    """
    _read_until(run.metrics, MetricsLine, step)
    _read_until(run.samples, SampleLine, step)


def cut_logs(run: Run, step: int) -> list[MetricsLine]:
    """Remove the lines after a step; the earlier lines stay as they are.

    Returns:
        The remaining lines of metrics.jsonl.

    Raises:
        RunError: naming the first damaged line up to the step.
    """
    metrics, samples = _read_until(run.metrics, MetricsLine, step), _read_until(run.samples, SampleLine, step)
    for file, lines in ((run.metrics, metrics), (run.samples, samples)):
        if file.exists():
            contents = [content for content in file.read_bytes().split(b"\n") if content.strip()]
            write_text(file, "".join(f"{contents[index].decode('utf-8')}\n" for index in lines))
    return list(metrics.values())


def append_line(file: pathlib.Path, line: MetricsLine | SampleLine) -> None:
    """Append a line; a line that a crash cuts off is dropped when the run is resumed."""
    append_json(file, line.as_json())


def _read_until(file: pathlib.Path, shape: type[L], step: int) -> dict[int, L]:
    """The lines up to a step, by their index among those that are not blank."""
    lines = list(read_lines(file, shape, RunError))
    early = [index for index, line in enumerate(lines) if not isinstance(line, NybbleError) and line.step <= step]
    before = _undamaged(lines[: max(early, default=-1) + 1])
    return {index: before[index] for index in early}


def _undamaged(lines: Sequence[L | NybbleError]) -> list[L]:
    """The lines, if none is damaged.

    Raises:
        NybbleError: the fault of the first damaged one.
    """
    if damaged := next((line for line in lines if isinstance(line, NybbleError)), None):
        raise damaged
    return [line for line in lines if not isinstance(line, NybbleError)]
