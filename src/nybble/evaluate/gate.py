"""What an evaluation must show, for a pipeline that publishes a run only then: `nybble eval RUN --require 'arc_easy>=base-0.02'`.

A requirement is judged by the bound of the 95% interval, not by the mean: it is met where the whole interval meets it, missed
where the whole interval misses it, and otherwise not shown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

from nybble.errors import RecipeError
from nybble.run.evaluation import ANSWER_METRICS, PREFERENCE_METRICS, Evaluation, MetricEntry, ScoreEntry, TaskEntry
from nybble.terminal import tell

HELD_OUT = "held_out_loss"
FORM = re.compile(
    r"(?P<measure>[\w-]+)\s*(?P<sign>[<>]=)\s*(?:(?P<base>base)\s*(?P<margin>[+-]\s*[\d.]+)?|(?P<number>-?[\d.]+))"
)
Outcome = Literal["met", "missed", "not shown"]
COLOURS: dict[Outcome, str] = {"met": "green", "missed": "red", "not shown": "yellow"}
MISSED, NOT_SHOWN = 1, 3  # exit statuses; 2 is that of a wrong command line


@dataclass(frozen=True)
class Requirement:
    """A bound on a measure."""

    text: str
    measure: str
    """As `key_of` gives it."""
    at_most: bool
    """Whether the measure may be no larger; else no smaller."""
    relative: bool
    """Whether the limit is a difference from the base; else it is a score of the tuned model."""
    limit: float


@dataclass(frozen=True)
class Judgement:
    """What an evaluation says of a requirement."""

    requirement: Requirement
    outcome: Outcome
    why: str


def parse_requirements(
    texts: Sequence[str], tasks: Collection[str], answers: int, *, pairs: bool = False
) -> list[Requirement]:
    """Requirements as they are written: MEASURE, <= or >=, then base, base-0.02, base+0.02 or a number.

    Args:
        texts: the requirements.
        tasks: the benchmarks that will be run.
        answers: the number of held-out prompts that will be answered.
        pairs: whether the run has held-out pairs.

    Raises:
        RecipeError: one of them cannot be read, or nothing that is measured has this name.
    """
    return [_parsed(text, _names(tasks, answers, pairs)) for text in texts]


def key_of(name: str) -> str:
    """A measure's name as it is written in a requirement: "exact match" is exact_match."""
    return re.sub(r"[ -]", "_", name.lower())


def judge(requirement: Requirement, evaluation: Evaluation) -> Judgement:
    """Hold an evaluation to a requirement."""
    found = _scores(requirement, evaluation)
    if found is None:
        return Judgement(requirement, "not shown", "it was not measured")
    what = "difference" if requirement.relative else "tuned model"
    if found.mean is None or not found.interval:
        return Judgement(
            requirement, "not shown", f"{what} without an interval: too few items, or one number for all of them"
        )
    low, high = found.interval
    sign = "+" if requirement.relative else ""
    numbers = f"{what} {found.mean:{sign}.3f} ({low:{sign}.3f}, {high:{sign}.3f})"
    worst, best = (high, low) if requirement.at_most else (-low, -high)
    limit = requirement.limit if requirement.at_most else -requirement.limit
    outcome: Outcome = "met" if worst <= limit else "missed" if best > limit else "not shown"
    return Judgement(requirement, outcome, numbers)


def tell_judgements(judgements: Sequence[Judgement], console: Console) -> int:
    """Print each requirement with its outcome; returns the exit status: 0 if all are met, 1 if one is missed, else 3."""
    for number, each in enumerate(judgements):
        label = "require   " if number == 0 else " " * 10
        words = (each.outcome, COLOURS[each.outcome]), f": {each.why}"
        tell(console, Text.assemble(label, f"{each.requirement.text}  ", *words), hang=10)
    outcomes = {each.outcome for each in judgements}
    if "not shown" in outcomes and "missed" not in outcomes:
        tell(
            console,
            Text("more items may show it: a larger --limit, more --answers, more validation rows", "dim"),
            hang=10,
        )
    return MISSED if "missed" in outcomes else NOT_SHOWN if "not shown" in outcomes else 0


def _parsed(text: str, known: Collection[str]) -> Requirement:
    where = f"--require {text!r}"
    form = FORM.fullmatch(text.strip())
    if form is None:
        fix = "for example --require 'held_out_loss<=base' or --require 'arc_easy>=base-0.02' or --require 'exact_match>=0.9'"
        raise RecipeError("a requirement is MEASURE, <= or >=, and base, base-NUMBER or NUMBER", where=where, fix=fix)
    measure, relative = key_of(form["measure"]), form["base"] is not None
    if measure not in known:
        raise RecipeError(
            f"nothing named {form['measure']} will be measured", where=where, fix=f"one of {', '.join(known)}"
        )
    if measure == HELD_OUT and not relative:
        raise RecipeError("the held-out loss is compared with the base's only", where=where, fix=f"'{HELD_OUT}<=base'")
    try:
        limit = float((form["margin"] or "0").replace(" ", "") if relative else form["number"])
    except ValueError:
        raise RecipeError("the number cannot be read", where=where, fix="a number such as 0.02") from None
    return Requirement(text.strip(), measure, form["sign"] == "<=", relative, limit)


def _names(tasks: Collection[str], answers: int, pairs: bool) -> list[str]:
    metrics = [*(PREFERENCE_METRICS if pairs else ()), *(ANSWER_METRICS if answers else ())]
    return [HELD_OUT, *map(key_of, tasks), *map(key_of, metrics)]


def _scores(requirement: Requirement, evaluation: Evaluation) -> ScoreEntry | None:
    """The difference from the base, or the tuned model's score; None where it was not measured."""
    if requirement.measure == HELD_OUT:
        return evaluation.held_out.difference if evaluation.held_out is not None else None
    entries: list[TaskEntry | MetricEntry] = [*evaluation.tasks, *evaluation.compared_answers]
    entry = next((entry for entry in entries if key_of(entry.name) == requirement.measure), None)
    if entry is None:
        return None
    return entry.difference if requirement.relative else entry.tuned
