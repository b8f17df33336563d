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

TASK = "task/"  # before the name of a benchmark, as a key of a line


class MetricsLine(FrozenShape):
    """What was measured at a step, or by the evaluation after it; what was not measured is None.

    Further keys are what the objective measures besides the loss.
    """

    model_config = ConfigDict(extra="allow")

    step: int
    loss: float | AnyText | None = None
    """Nats per token; text where it is not finite."""
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    """Of all processes, padding not counted."""
    seconds: float | None = None
    """The step took."""
    eval_loss: float | None = None
    """On the validation rows, in nats per token."""
    scores: dict[AnyText, float] = Field(default_factory=dict)
    """By benchmark; in the file each has a key of its own."""

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
    """Every line of metrics.jsonl, but the last one where a crash cut it off.

    Raises:
        RunError: naming the first line that is damaged.
    """
    lines = list(read_lines(run.metrics, MetricsLine, RunError))
    if lines and isinstance(lines[-1], NybbleError):
        lines.pop()
    return _whole(lines)


def check_logs(run: Run, step: int) -> None:
    """Read what was logged up to a step, from which a resumed run goes on; -1 for nothing.

    Raises:
        RunError: naming the first line that is damaged; later ones do not matter.
    """
    _read_until(run.metrics, MetricsLine, step)
    _read_until(run.samples, SampleLine, step)


def cut_logs(run: Run, step: int) -> list[MetricsLine]:
    """Remove what was logged after a step; the lines before stay as they are.

    Returns:
        Those of metrics.jsonl.

    Raises:
        RunError: naming the first line up to the step that is damaged.
    """
    metrics, samples = _read_until(run.metrics, MetricsLine, step), _read_until(run.samples, SampleLine, step)
    for file, kept in ((run.metrics, metrics), (run.samples, samples)):
        if file.exists():
            contents = [content for content in file.read_bytes().split(b"\n") if content.strip()]
            write_text(file, "".join(f"{contents[index].decode('utf-8')}\n" for index in kept))
    return list(metrics.values())


def append_line(file: pathlib.Path, line: MetricsLine | SampleLine) -> None:
    """Add a line; one that a crash cut off is dropped when the run is resumed."""
    append_json(file, line.as_json())


def _read_until(file: pathlib.Path, shape: type[L], step: int) -> dict[int, L]:
    """The lines up to a step, by their index among those that are not blank."""
    lines = list(read_lines(file, shape, RunError))
    early = [index for index, line in enumerate(lines) if not isinstance(line, NybbleError) and line.step <= step]
    before = _whole(lines[: max(early, default=-1) + 1])
    return {index: before[index] for index in early}


def _whole(lines: Sequence[L | NybbleError]) -> list[L]:
    """The lines, all of them whole.

    Raises:
        NybbleError: of the first that is not.
    """
    if damaged := next((line for line in lines if isinstance(line, NybbleError)), None):
        raise damaged
    return [line for line in lines if not isinstance(line, NybbleError)]
