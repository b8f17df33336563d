"""Results as tables of text, the same for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nybble.evaluate.report.wording import LOSS, NONE, Entry, Scale, by_verdict, number_text, p_text, scale, scale_of
from nybble.run.evaluation import (
    HeldOutEntry,
    MetricEntry,
    MissingEntry,
    PreferenceEntry,
    ScoreEntry,
    SubjectsEntry,
    TaskEntry,
    TextEntry,
)


@dataclass(frozen=True)
class Cell:
    """A cell: text, smaller text beneath it, and the verdict that colours it."""

    text: str
    small: str = ""
    kind: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row: one cell per column; a sub-row gives details of the row before it."""

    cells: Sequence[Cell]
    sub: bool = False


@dataclass(frozen=True)
class ReportTable:
    """A table; its first column names the row."""

    columns: Sequence[str]
    rows: Sequence[TableRow]


COMPARED = ("Base", "Tuned", "Difference, 95%", "Verdict", "p", "Detectable")


def benchmarks(tasks: Sequence[TaskEntry]) -> ReportTable:
    """One row per benchmark, worse first, with the mean over subjects beneath it if there are any."""
    rows = []
    for task in by_verdict(tasks):
        how = scale(task)
        rows.append(TableRow([_task(task), *_compared(task, task.p_adjusted, how), *_items(task)]))
        if over := task.over_subjects:
            by_subject = scale_of(task.measure, over.base, over.tuned)
            cells = _compared(over, over.p if over.p_adjusted is None else over.p_adjusted, by_subject)
            name = Cell(f"mean over {over.subjects} subjects", "p not adjusted" if over.p is not None else "")
            rows.append(TableRow([name, *cells, *[Cell(NONE)] * 3], sub=True))
    return ReportTable(["Benchmark", *COMPARED, "Rows", "Template applied", "Contaminated"], rows)


def held_out(entry: HeldOutEntry | None, texts: Sequence[TextEntry]) -> ReportTable:
    """Loss and perplexity of the validation rows, then of texts."""
    columns = ["Text", "Base loss", "Tuned loss", *COMPARED[2:], "Base perplexity", "Tuned perplexity"]
    rows = []
    if entry is not None:
        size = [f"{entry.rows:,} rows"] if entry.rows is not None else []
        size += [f"{entry.tokens:,} tokens"] if entry.tokens is not None else []
        tested = _tested(entry.difference, entry.verdict, entry.detectable, entry.p_adjusted, LOSS)
        rows.append(_losses(Cell(entry.what or NONE, ", ".join(size)), entry, tested))
    untested = _tested(None, None, None, None, LOSS)
    rows += [_losses(Cell(text.name, f"{text.tokens:,} tokens"), text, untested) for text in texts]
    return ReportTable(columns, rows)


def _losses(name: Cell, entry: HeldOutEntry | TextEntry, tested: Sequence[Cell]) -> TableRow:
    models = (entry.base, entry.tuned)
    losses = [Cell(number_text(model.loss, 3)) for model in models]
    return TableRow([name, *losses, *tested, *(Cell(number_text(model.perplexity, 2)) for model in models)])


def generation(metrics: Sequence[MetricEntry]) -> ReportTable:
    """One row per metric of the answers."""
    rows = [
        TableRow([
            Cell(metric.name),
            *_compared(metric, metric.p if metric.p_adjusted is None else metric.p_adjusted, scale(metric)),
        ])
        for metric in metrics
    ]  # fmt: skip
    return ReportTable(["Metric", *COMPARED], rows)


def preferences(entry: PreferenceEntry) -> ReportTable:
    """Preference accuracy, and how often the longer answer is preferred, by the models and in the data."""
    found = generation(entry.metrics)
    share = Scale(percent=True)
    more = [("longer answer chosen in the data", entry.longer_chosen), ("reward accuracy", entry.reward_accuracy)]
    rows = [
        TableRow([Cell(name), Cell(NONE), Cell(share.value(score.mean), share.span(score.interval)), *[Cell(NONE)] * 4])
        for name, score in more
        if score is not None and score.mean is not None
    ]
    return ReportTable(found.columns, [*found.rows, *rows])


def missing(lines: Sequence[MissingEntry]) -> ReportTable:
    """Tasks that were requested but not measured."""
    return ReportTable(["Task", "Why"], [TableRow([Cell(line.task), Cell(line.why)]) for line in lines])


def _task(task: TaskEntry) -> Cell:
    facts = [task.measure]
    if task.fewshot is not None:
        facts.append(f"{task.fewshot}-shot")
    if task.version is not None:
        facts.append(f"version {task.version}")
    if task.data:
        facts.append(task.data)
    if not task.higher_is_better:
        facts.append("lower is better")
    return Cell(task.name, ", ".join(facts))


def _compared(entry: Entry | SubjectsEntry, p: float | None, how: Scale) -> list[Cell]:
    scores = [Cell(how.value(score.mean), how.span(score.interval)) for score in (entry.base, entry.tuned)]
    return [*scores, *_tested(entry.difference, entry.verdict, entry.detectable, p, how)]


def _tested(
    difference: ScoreEntry | None, verdict: str | None, detectable: float | None, p: float | None, how: Scale
) -> list[Cell]:
    """Difference, verdict, p and the smallest detectable difference."""
    smallest = "none" if verdict else NONE
    if detectable is not None:
        smallest = how.size(detectable).removesuffix(" per token")
    change, interval = (None, None) if difference is None else (difference.mean, difference.interval)
    return [
        Cell(how.change(change), how.change_span(interval), verdict or ""),
        Cell(verdict or NONE, kind=verdict or ""),
        Cell(p_text(p)),
        Cell(smallest),
    ]


def _items(task: TaskEntry) -> list[Cell]:
    """The number of rows used, whether the template was applied, and how many rows the training data contain."""
    rows = Cell(NONE)
    if task.rows is not None:
        rows = Cell(f"{task.rows:,}", f"of {task.of:,}" if task.of is not None else "")
    template = NONE if task.template is None else "yes" if task.template else "no"
    if task.contamination is None:
        return [rows, Cell(template), Cell("not checked")]
    if not task.contamination.flagged:
        return [rows, Cell(template), Cell("0")]
    base, tuned = (scale(task).value(mean) for mean in (task.contamination.base, task.contamination.tuned))
    return [rows, Cell(template), Cell(f"{task.contamination.flagged:,}", f"without: {base} to {tuned}")]
