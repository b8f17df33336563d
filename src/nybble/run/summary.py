"""summary.json: a finished run: what was trained on what, its results, and its cost."""

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
    """The Hub commit; None for a folder."""
    fingerprint: AnyText
    quantization: AnyText
    quantized: QuantizedBase | None = None
    """The quantised bits; None where nybble did not quantise it, and before 0.7."""
    parameters: int
    bytes: int = 0
    """Size of its weights in memory."""


class DataSummary(FrozenShape):
    """The rows, and what was done with them."""

    path: AnyText | list[Any] | dict[str, Any]
    """As in the recipe's data.path."""
    fingerprint: AnyText
    template: AnyText
    rows: int
    forms: dict[AnyText, int] = Field(default_factory=dict)
    """Rows by their form."""
    faulty: int = 0
    """Rows that cannot be trained on, including those without an answer."""
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
    """Columns that data.map names and no row has."""
    notices: dict[AnyText, int] = Field(default_factory=dict)
    """Notices about how rows were read, and the number of rows; 0 if a notice is about a file."""
    system: AnyText = ""
    """The system message of most rows; empty where there is none, and before 0.6."""


class AdapterSummary(FrozenShape):
    """The trained adapter."""

    targets: list[AnyText]
    """Names of the adapted layers."""
    trainable_parameters: int


class LossSummary(FrozenShape):
    """Validation loss in nats per token, without a unit for preferences."""

    before: float
    """Before the first step."""
    kept: float
    """At the step whose adapter was kept."""


class MemorySummary(FrozenShape):
    """The memory that was planned and that was reserved on the GPU, in units of 10^9 bytes."""

    predicted_gb: float
    measured_gb: float
    moment: AnyText
    """When the plan expected most."""
    exceeded_by: AnyText = ""
    """The item that most likely took more, where over 5% more was reserved; else empty."""


class Ended(RunRecord):
    """When a run ended, and how long it took: the part of a summary that tells on which day it was started."""

    date: Moment
    seconds: float


class Summary(RunRecord):
    """The whole run in numbers, however often it was resumed."""

    date: Moment
    """When it ended."""
    versions: dict[AnyText, AnyText]
    device: AnyText
    dtype: ComputeType
    """The compute type."""
    products: AnyText | None = None
    """The number format in which training multiplied by frozen weights: dtype, or fp8 with its options; None before 0.9."""
    base: BaseSummary
    data: DataSummary
    adapter: AdapterSummary
    steps: int
    processes: int = 1
    micro_batch: int | None = None
    """Rows per forward and backward pass at the end; None before 0.9."""
    halved_from: int | None = None
    """The micro batch that the run was started with, if it did not fit in memory."""
    learning_rate: float | None = None
    """The peak; None before 0.9."""
    learning_rate_reason: AnyText | None = None
    """Why that one, if it was found (RUN/learning_rate.json has the curve); None if the recipe names it."""
    train_loss: float | None = None
    """Loss of the last step, in the unit of the validation loss."""
    validation_loss: LossSummary | None
    """None where no rows were held out."""
    kept_step: int = 0
    """The step whose adapter was kept."""
    tokens: int
    tokens_per_second: float
    """In training steps, without evaluations and saving."""
    seconds_in_steps: float | None = None
    """Time of the steps alone; None before 0.6."""
    peak_memory_gb: float
    """In units of 10^9 bytes."""
    memory: MemorySummary | None = None
    """None on a CPU, where Transformers computed the layers, and before 0.8."""
    seconds: float
    """Total time, including evaluations."""
