"""What is read of the files that a run keeps, by name and type."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from nybble.files.reading import Shape


def _text(value: object) -> str:
    """Any text: pydantic's own takes no name that is not UTF-8, which Python reads as half of a surrogate pair."""
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return value


Text = Annotated[str, PlainValidator(_text)]


class _Base(Shape):
    name: Text
    fingerprint: Text
    quantization: Text
    parameters: int


class _Data(Shape):
    path: Text | list[Any] | dict[str, Any]
    fingerprint: Text
    template: Text
    rows: int
    system: Text = ""


class _Adapter(Shape):
    targets: list[Text]
    trainable_parameters: int


class _Loss(Shape):
    before: float
    kept: float


class _Entry(Shape):
    size: int
    digest: Text


class Mark(Shape):
    """What is read of COMPLETE."""

    seconds: float = 0.0
    """That the run had taken until then."""
    peak_memory: int = 0
    """In bytes."""
    files: dict[Text, _Entry] | None = None


class Ended(Shape):
    """What is read of a summary.json of 0.5.1 to know the day of its run."""

    date: Annotated[str, AfterValidator(datetime.datetime.fromisoformat)]
    seconds: float


class Summary(Ended):
    """What is read of summary.json."""

    versions: dict[Text, Text]
    device: Text
    dtype: Literal["bfloat16", "float16", "float32"]
    base: _Base
    data: _Data
    adapter: _Adapter
    steps: int
    validation_loss: _Loss | None
    tokens: int
    tokens_per_second: float
    peak_memory_gb: float


class KeptTemplate(Shape):
    """What is read of template.json."""

    name: Text
    source: Text
    verbatim: bool
    bos: bool = True
    day: Annotated[str, AfterValidator(datetime.date.fromisoformat)] | None = None
    rules: Literal[6, 7] = 6


class _Recipe(Shape):
    """By its sections; the options in them are compared, not used."""

    model: dict[str, Any]
    data: dict[str, Any]
    adapter: Text | None = None
    lora: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    tracker: dict[str, Any] = Field(default_factory=dict)
    export: dict[str, Any] = Field(default_factory=dict)


class Start(Shape):
    """What is read of start.json."""

    recipe: _Recipe
    data: Text
    base: Text
    versions: dict[Text, Text]
    files: dict[Text, _Entry] | None = None
    """Tokenizer and template; versions before 0.7 recorded none."""


class Line(Shape):
    """What is read of a line of metrics.jsonl or samples.jsonl."""

    step: int
    loss: float | Text | None = None
    """Text where it is not finite."""
    eval_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None


class _Score(Shape):
    mean: float | None


class _Change(Shape):
    mean: float | None = None
    interval: list[float] | None = None


class _Compared(Shape):
    name: Text
    metric: Text | None = None
    base: _Score
    tuned: _Score
    difference: _Change | None = None
    verdict: Text | None = None


class _HeldOutLoss(Shape):
    loss: float


class _HeldOut(Shape):
    base: _HeldOutLoss
    tuned: _HeldOutLoss
    difference: _Change | None = None
    verdict: Text | None = None


class _Generation(Shape):
    metrics: list[_Compared]


class Evaluation(Shape):
    """What is read of evaluation.json."""

    date: Text
    tasks: list[_Compared]
    held_out: _HeldOut | None = None
    generation: _Generation | None = None
