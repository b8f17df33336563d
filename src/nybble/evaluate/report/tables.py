"""Results as tables of text, the same for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.evaluate.report.wording import LOSS, NONE, Entry, Scale, by_verdict, number_text, p_text, scale


@dataclass(frozen=True)
class Cell:
    """What a cell says, what stands small beneath it, and the verdict that colours it."""

    text: str
    small: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """Cells under a table's columns; a sub row says more about the row before it."""

    cells: Sequence[Cell]
    sub: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, the first of which names a row."""

    columns: Sequence[str]
    rows: Sequence[Row]


COMPARED = ("Base", "Tuned", "Difference, 95%", "Verdict", "p", "Detectable")


def benchmarks(tasks: Sequence[Entry]) -> Table:
    """A row a benchmark, worse first; beneath it the mean over subjects where there is one."""
    rows = []
    for task in by_verdict(tasks):
        rows.append(Row([_task(task), *_compared(task, task.get("p_adjusted")), *_sample(task)]))
        if over := task.get("over_subjects"):
            entry = {"metric": task["metric"], "name": task["name"], **over}
            cells = _compared(entry, over.get("p_adjusted", over.get("p")))
            name = Cell(f"mean over {over['subjects']} subjects", "p not adjusted" if "p" in over else "")
            rows.append(Row([name, *cells, *[Cell(NONE)] * 3], sub=True))
    return Table(["Benchmark", *COMPARED, "Rows", "Template applied", "Contaminated"], rows)


def held_out(entry: Entry | None, texts: Sequence[Entry]) -> Table:
    """Loss and perplexity of the validation rows, then of texts."""
    columns = ["Text", "Base loss", "Tuned loss", *COMPARED[2:], "Base perplexity", "Tuned perplexity"]
    rows = []
    for one in [entry, *texts] if entry else texts:
        rows_of = [f"{one['rows']:,} rows"] if one.get("rows") is not None else []
        name = Cell(one.get("what") or one.get("name") or NONE, ", ".join([*rows_of, f"{one['tokens']:,} tokens"]))
        losses = [Cell(number_text(one[who]["loss"], 3)) for who in ("base", "tuned")]
        perplexities = [Cell(number_text(one[who].get("perplexity"), 2)) for who in ("base", "tuned")]
        rows.append(Row([name, *losses, *_tested(one, one.get("p_adjusted"), LOSS), *perplexities]))
    return Table(columns, rows)


def generation(metrics: Sequence[Entry]) -> Table:
    """A row a metric of answers."""
    rows = [Row([Cell(one["name"]), *_compared(one, one.get("p_adjusted", one.get("p")))]) for one in metrics]
    return Table(["Metric", *COMPARED], rows)


def missing(lines: Sequence[Mapping[str, Any]]) -> Table:
    """What was asked for and not measured."""
    return Table(["Task", "Why"], [Row([Cell(line["task"]), Cell(line["why"])]) for line in lines])


def _task(task: Entry) -> Cell:
    facts = [task["metric"]]
    if task.get("fewshot") is not None:
        facts.append(f"{task['fewshot']}-shot")
    if task.get("version") is not None:
        facts.append(f"version {task['version']}")
    if task.get("data"):
        facts.append(str(task["data"]))
    if task.get("higher_is_better") is False:
        facts.append("lower is better")
    return Cell(task["name"], ", ".join(facts))


def _compared(entry: Entry, p: float | None) -> list[Cell]:
    how = scale(entry)
    scores = [Cell(how.value(entry[who]["mean"]), how.span(entry[who].get("interval"))) for who in ("base", "tuned")]
    return [*scores, *_tested(entry, p, how)]


def _tested(entry: Entry, p: float | None, how: Scale) -> list[Cell]:
    """Difference, verdict, p and the smallest detectable difference."""
    difference, verdict = entry.get("difference") or {}, entry.get("verdict")
    detectable = entry.get("detectable")
    smallest = (
        how.size(detectable).removesuffix(" per token") if detectable is not None else "none" if verdict else NONE
    )
    return [
        Cell(how.change(difference.get("mean")), how.change_span(difference.get("interval")), verdict or ""),
        Cell(verdict or NONE, kind=verdict or ""),
        Cell(p_text(p)),
        Cell(smallest),
    ]


def _sample(task: Entry) -> list[Cell]:
    """Rows used of how many, whether the template was applied, and what of it the training rows hold."""
    rows = Cell(NONE)
    if task.get("rows") is not None:
        rows = Cell(f"{task['rows']:,}", f"of {task['of']:,}" if task.get("of") is not None else "")
    template = NONE if task.get("template") is None else "yes" if task["template"] else "no"
    found = task.get("contamination")
    if found is None:
        return [rows, Cell(template), Cell("not checked")]
    if not found["flagged"]:
        return [rows, Cell(template), Cell("0")]
    base, tuned = (scale(task).value(found.get(who)) for who in ("base", "tuned"))
    return [rows, Cell(template), Cell(f"{found['flagged']:,}", f"without: {base} to {tuned}")]
