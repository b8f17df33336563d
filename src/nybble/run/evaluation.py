"""evaluation.json: what `nybble eval` measured for the base and the tuned model, and how they compare.

Files of older versions, and files written by hand, need only the date and the tasks; what is missing is left out of the
report. Scores of benchmarks and answers are means over items; losses are in nats per token.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from nybble.run.records import AnyText, FrozenShape, RunRecord

ANSWER_METRICS = ("exact match", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ends by itself")
"""What each answer to a held-out prompt is scored by."""
PREFERENCE_METRICS = ("preference accuracy", "longer answer preferred")
"""How often a model prefers the chosen one of two held-out answers, and how often the longer one."""


class ScoreEntry(FrozenShape):
    """A mean, its standard error and its 95% interval; None where too few items leave them unknown."""

    mean: float | None
    stderr: float | None = None
    interval: list[float] | None = None


class SubjectsEntry(FrozenShape):
    """A benchmark's mean over its subjects: the mean of their means."""

    subjects: int
    base: ScoreEntry
    tuned: ScoreEntry
    difference: ScoreEntry | None = None
    """Tuned - base."""
    p: float | None = None
    p_adjusted: float | None = None
    verdict: AnyText | None = None
    detectable: float | None = None


class ContaminationEntry(FrozenShape):
    """Items that the training rows contain, and the mean scores without them."""

    flagged: int
    base: float | None = None
    tuned: float | None = None


class TaskEntry(FrozenShape):
    """A benchmark."""

    name: AnyText
    metric: AnyText | None = None
    higher_is_better: bool = True
    version: AnyText | None = None
    """The task's version in lm-eval."""
    fewshot: int | None = None
    """Examples before each question."""
    rows: int | None = None
    """Number of items used."""
    of: int | None = None
    """Number of items of the benchmark."""
    data: AnyText | None = None
    """The file that they came from, or the Hub."""
    template: bool | None = None
    """Whether the chat template was applied."""
    base: ScoreEntry
    tuned: ScoreEntry
    difference: ScoreEntry | None = None
    """Tuned - base."""
    p: float | None = None
    p_adjusted: float | None = None
    """Adjusted over all benchmarks (Holm 1979)."""
    verdict: AnyText | None = None
    detectable: float | None = None
    """The smallest true difference that this many items show in 4 of 5 evaluations."""
    over_subjects: SubjectsEntry | None = None
    contamination: ContaminationEntry | None = None

    @property
    def measure(self) -> str:
        """What the scores measure."""
        return self.metric or self.name


class MetricEntry(FrozenShape):
    """A metric of the answers."""

    name: AnyText
    base: ScoreEntry
    tuned: ScoreEntry
    difference: ScoreEntry | None = None
    """None for a metric that is one number for all answers, without an interval."""
    p: float | None = None
    p_adjusted: float | None = None
    verdict: AnyText | None = None
    detectable: float | None = None

    @property
    def measure(self) -> str:
        """What the scores measure."""
        return self.name


class LossEntry(FrozenShape):
    """The loss of a model on a text."""

    loss: float
    perplexity: float | None = None


class HeldOutEntry(FrozenShape):
    """The run's validation rows."""

    what: AnyText | None = None
    rows: int | None = None
    tokens: int | None = None
    base: LossEntry
    tuned: LossEntry
    difference: ScoreEntry | None = None
    p: float | None = None
    p_adjusted: float | None = None
    verdict: AnyText | None = None
    detectable: float | None = None


class TextEntry(FrozenShape):
    """A text whose perplexity was requested."""

    name: AnyText
    tokens: int
    base: LossEntry
    tuned: LossEntry


class GenerationEntry(FrozenShape):
    """Answers to held-out prompts."""

    rows: int | None = None
    """Prompts."""
    metrics: list[MetricEntry]


class PreferenceEntry(FrozenShape):
    """Which of two held-out answers the models prefer."""

    rows: int
    """Pairs."""
    by: AnyText
    """What a model prefers by: the answers' log-likelihood, or its mean per token."""
    metrics: list[MetricEntry]
    longer_chosen: ScoreEntry
    """How often the chosen answer is the longer one."""
    reward_accuracy: ScoreEntry | None = None
    """For DPO, how often training has raised the chosen answer's log-likelihood more than the rejected one's."""


class MissingEntry(FrozenShape):
    """A task that was requested but not measured."""

    task: AnyText
    why: AnyText


class SampleEntry(FrozenShape):
    """Answers to one prompt."""

    prompt: AnyText | None = None
    expected: AnyText | None = None
    base: AnyText | None = None
    tuned: AnyText | None = None


class SkillEntry(FrozenShape):
    """Scores measured elsewhere; in the file, `what` and the score of each way to ask are keys of one object."""

    what: AnyText
    ways: dict[AnyText, AnyText]
    """A score, such as `93 of 100`, by the way to ask."""

    @model_validator(mode="before")
    @classmethod
    def _gather_ways(cls, skill: Any) -> Any:
        if not isinstance(skill, dict) or isinstance(skill.get("ways"), dict):
            return skill
        ways = {name: score for name, score in skill.items() if name != "what"}
        return {"ways": ways, **({"what": skill["what"]} if "what" in skill else {})}

    @model_serializer(mode="wrap")
    def _spread_ways(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        skill: dict[str, Any] = plain(self)
        return {"what": skill["what"], **skill["ways"]}


class EvaluatedBase(FrozenShape):
    """The base model, which base and tuned model share."""

    name: AnyText | None = None
    fingerprint: AnyText | None = None
    quantization: AnyText | None = None


class TrainingCost(FrozenShape):
    """What the training cost, from summary.json."""

    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    peak_memory_gb: float | None = None
    device: AnyText | None = None
    trainable_parameters: int | None = None
    template: AnyText | None = None


class Evaluation(RunRecord):
    """The comparison of base and tuned model."""

    run: AnyText = ""
    """Name of the run's folder."""
    date: AnyText
    versions: dict[AnyText, AnyText] | None = None
    base: EvaluatedBase | None = None
    adapter: AnyText | None = None
    """SHA-256 of the adapter's weights."""
    dtype: AnyText | None = None
    """The type in which both models were computed."""
    device: AnyText | None = None
    limit: int | None = None
    """The largest number of rows per benchmark; None for all."""
    seconds: float | None = None
    tasks: list[TaskEntry]
    missing: list[MissingEntry] = Field(default_factory=list)
    texts: list[TextEntry] = Field(default_factory=list)
    held_out: HeldOutEntry | None = None
    samples: list[SampleEntry] = Field(default_factory=list)
    generation: GenerationEntry | None = None
    preferences: PreferenceEntry | None = None
    lengths: dict[AnyText, int] = Field(default_factory=dict)
    """Number of training rows by their number of tokens."""
    max_length: int | None = None
    training: TrainingCost | None = None
    recipe: AnyText | None = None
    skill: SkillEntry | None = None

    @property
    def compared_answers(self) -> list[MetricEntry]:
        """The metrics of preferences and of answers; none if there are none."""
        return [*(self.preferences.metrics if self.preferences is not None else []), *self.answers]

    @property
    def answers(self) -> list[MetricEntry]:
        """The metrics of the answers; none if no prompts were answered."""
        return self.generation.metrics if self.generation is not None else []
