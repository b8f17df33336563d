"""summary.json: what a finished run was, how it went, and what it cost."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nybble.run.records import AnyText, ComputeType, FrozenShape, Moment, RunRecord
from nybble.run.start import QuantizedBase


class BaseSummary(FrozenShape):
    """The base model."""

    name: AnyText
    """A folder, or owner/name on the Hub."""
    commit: AnyText | None = None
    """Of the Hub; None of a folder."""
    fingerprint: AnyText
    quantization: AnyText
    quantized: QuantizedBase | None = None
    """Which bits it was quantised to; None where nybble did not quantise it, and before 0.7."""
    parameters: int
    bytes: int = 0
    """Of its weights in memory."""


class DataSummary(FrozenShape):
    """The rows, and what became of them."""

    path: AnyText | list[Any] | dict[str, Any]
    """As in the recipe's data.path."""
    fingerprint: AnyText
    template: AnyText
    rows: int
    forms: dict[AnyText, int] = Field(default_factory=dict)
    """Rows by their form."""
    faulty: int = 0
    """Rows that cannot be trained on, those without an answer among them."""
    empty_answers: int = 0
    duplicates: int = 0
    overlength: int = 0
    """Rows over max_length: dropped, truncated or split."""
    lost_rows: int = 0
    """Rows that truncating or splitting left without an answer."""
    lost_answer_tokens: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    highest_id: int = 0
    missing_columns: list[AnyText] = Field(default_factory=list)
    """What data.map names and no row has."""
    notices: dict[AnyText, int] = Field(default_factory=dict)
    """How rows were read, and how many; 0 where the notice is about a file."""
    system: AnyText = ""
    """The system message of most rows; empty where there is none, and before 0.6."""


class AdapterSummary(FrozenShape):
    """The trained adapter."""

    targets: list[AnyText]
    """Names of the adapted layers."""
    trainable_parameters: int


class LossSummary(FrozenShape):
    """Validation loss in nats per token."""

    before: float
    """Before the first step."""
    kept: float
    """At the step whose adapter was kept."""


class Ended(RunRecord):
    """When a run ended, and how long it took: all that is needed of a summary to know the day on which it began."""

    date: Moment
    seconds: float


class Summary(RunRecord):
    """The whole run in numbers, however often it was resumed."""

    date: Moment
    """When it ended."""
    versions: dict[AnyText, AnyText]
    device: AnyText
    dtype: ComputeType
    """The type in which it computed."""
    base: BaseSummary
    data: DataSummary
    adapter: AdapterSummary
    steps: int
    processes: int = 1
    train_loss: float | None = None
    """Of the last step, in nats per token."""
    validation_loss: LossSummary | None
    """None where no rows were held out."""
    kept_step: int = 0
    """The step whose adapter was kept."""
    tokens: int
    tokens_per_second: float
    """In training steps; evaluations and saving are not counted."""
    seconds_in_steps: float | None = None
    """The steps alone; None before 0.6."""
    peak_memory_gb: float
    """In units of 10^9 bytes."""
    seconds: float
    """In all, evaluations included."""
