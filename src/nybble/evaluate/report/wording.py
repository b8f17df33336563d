"""Numbers as text, and the first sentences of a report: what got worse comes first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard, TypeVar

from nybble.run.evaluation import Evaluation, HeldOutEntry, MetricEntry, ScoreEntry, TaskEntry

NONE = "–"
NAMED = 4  # benchmarks that a sentence gives with numbers; the others are only named
SHARES = (
    "acc",
    "exact",
    "em",
    "f1",
    "mc",
    "pass",
    "ends by itself",
    "distinct",
    "preference",
    "longer",
)  # metrics between 0 and 1
MINOR = ("ROUGE-1", "ROUGE-2")  # not in a sentence, which has ROUGE-L
UNDECIDED = "no difference shown"

Entry = TaskEntry | MetricEntry
E = TypeVar("E", TaskEntry, MetricEntry)
Kind = Literal["worse", "better", "plain"]


@dataclass(frozen=True)
class Sentence:
    """A sentence at the top of the page; it starts with the label."""

    kind: Kind
    label: str
    text: str


@dataclass(frozen=True)
class Scale:
    """How a metric's values are written: as percent and points, or unchanged."""

    percent: bool
    unit: str = ""

    def value(self, number: float | None) -> str:
        """A score."""
        return self._plain(number) + ("%" if self.percent and _finite(number) else "")

    def change(self, number: float | None) -> str:
        """A difference with its sign."""
        return self._plain(number, sign=True)

    def size(self, number: float) -> str:
        """A difference without its sign, with its unit."""
        return self._plain(abs(number)) + self.unit

    def span(self, ends: Sequence[float] | None) -> str:
        """The interval of a score, in brackets."""
        return f"[{self._plain(ends[0])}, {self._plain(ends[1])}]" if ends else ""

    def change_span(self, ends: Sequence[float] | None) -> str:
        """The interval of a difference, in brackets."""
        return f"[{self.change(ends[0])}, {self.change(ends[1])}]" if ends else ""

    def _plain(self, number: float | None, sign: bool = False) -> str:
        return number_text(number, 1, 100, sign) if self.percent else number_text(number, 3, 1, sign)


LOSS = Scale(percent=False, unit=" nats per token")


def scale(entry: Entry) -> Scale:
    """How an entry's scores are written."""
    return scale_of(entry.measure, entry.base, entry.tuned)


def scale_of(measure: str, base: ScoreEntry, tuned: ScoreEntry) -> Scale:
    """Percent for shares, which are recognised by the metric's name and by scores of at most 1."""
    small = all(abs(score.mean or 0) <= 1 for score in (base, tuned))
    return Scale(percent=True, unit=" points") if small and measure.lower().startswith(SHARES) else Scale(percent=False)


def number_text(number: float | None, digits: int, factor: float = 1, sign: bool = False) -> str:
    """A number with a minus sign and groups of thousands; a dash for None and NaN."""
    if number is None or math.isnan(number):
        return NONE
    if math.isinf(number):
        return "−∞" if number < 0 else "∞"
    text = f"{number * factor:{'+' if sign else ''},.{digits}f}"
    rounded_away = not any(digit in text for digit in "123456789")
    return text.lstrip("+-") if rounded_away else text.replace("-", "−")


def p_text(p: float | None) -> str:
    """A p-value to three digits."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float | None) -> str:
    """Seconds as text, in a suitable unit."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def by_verdict(entries: Sequence[E]) -> list[E]:
    """Worse first, then better, then the rest."""
    order = {"worse": 0, "better": 1}
    return sorted(entries, key=lambda entry: order.get(entry.verdict or "", 2))


def headline(results: Evaluation) -> list[Sentence]:
    """The sentences at the top of a report: worse first, then better; if these are fewer than two, also what was not shown."""
    worse, better, measured = _decided(results, "worse"), _decided(results, "better"), _untested(results)
    dropped = any(task.verdict == "worse" for task in results.tasks)
    lines = []
    if worse:
        lines.append(Sentence("worse", "Worse (forgetting)" if dropped else "Worse", worse))
    if measured:
        lines.append(Sentence("plain", "Measured", measured))
    if better:
        lines.append(Sentence("better", "Better", better))
    if len(lines) < 2 and (undecided := undecided_text(results)):
        lines.append(Sentence("plain", "No difference shown", undecided))
    return lines or [Sentence("plain", "Nothing compared", ": this evaluation has no scores of base and tuned model.")]


def undecided_text(results: Evaluation) -> str:
    """Where no difference was shown, and the smallest that could have been detected."""
    tasks = [task for task in results.tasks if task.verdict == UNDECIDED]
    where = [f"on {_of(len(tasks), len(results.tasks))}"] if tasks else []
    undecided = [(task.name, task.detectable, scale(task)) for task in tasks]
    others = []
    if results.held_out is not None and results.held_out.verdict == UNDECIDED:
        others.append(("held-out loss", results.held_out.detectable, LOSS))
    others += [(metric.name, metric.detectable, scale(metric)) for metric in _answers(results, UNDECIDED)]
    where += [f"in {_join([name for name, _, _ in others])}"] if others else []
    return f" {', nor '.join(where)}. {_detectable([*undecided, *others])}" if where else ""


def _detectable(undecided: Sequence[tuple[str, float | None, Scale]]) -> str:
    """The smallest detectable differences: the range of those in points, and each of the others."""
    finite = [(name, size, how) for name, size, how in undecided if _finite(size)]
    if not finite:
        return "With this few items no difference could have been detected."
    points = sorted((size, name) for name, size, how in finite if how.percent)
    shown = [(f"{number_text(size, 1, 100)} points", name) for size, name in points]
    differ = shown and shown[0][0] != shown[-1][0]
    ends = [f"{size} ({name})" for size, name in (shown[0], shown[-1])] if differ else [size for size, _ in shown[:1]]
    rest = [f"{how.size(size)} ({name})" for name, size, how in finite if not how.percent]
    return f"Smallest detectable difference: {_join([*filter(None, [' to '.join(ends)]), *rest])}."


def _decided(results: Evaluation, verdict: str) -> str:
    """Everything with this verdict: benchmarks with the largest difference first, then loss and answers."""
    tasks = [task for task in results.tasks if task.verdict == verdict]
    tasks.sort(key=_size, reverse=True)
    named = [_moved(task) for task in tasks[:NAMED]] + [task.name for task in tasks[NAMED:]]
    held_out = results.held_out
    others = [_loss(held_out)] if held_out is not None and held_out.verdict == verdict else []
    others += [_moved(metric) for metric in _answers(results, verdict) if metric.name not in MINOR]
    text = f" on {_of(len(tasks), len(results.tasks))}: {'; '.join(named)}" if named else ""
    if others:
        text += f"{'. Also' if text else ''}: {'; '.join(others)}"
    return f"{text}." if text else ""


def _size(task: TaskEntry) -> float:
    """The size of its difference, for sorting; 1 in a metric that is not a share counts as one point."""
    change = task.difference.mean if task.difference is not None else None
    return abs(change or 0.0) / (1 if scale(task).percent else 100)


def _untested(results: Evaluation) -> str:
    """Counts and losses that come without a test."""
    parts = []
    if skill := results.skill:
        parts.append(f"{skill.what}: {'; '.join(f'{way} {score}' for way, score in skill.ways.items())}")
    if results.held_out is not None and not results.held_out.verdict:
        parts.append(_loss(results.held_out))
    return f": {'. '.join(parts)}." if parts else ""


def _loss(held_out: HeldOutEntry) -> str:
    base, tuned = held_out.base, held_out.tuned
    change = _change(held_out.difference, LOSS) or LOSS.unit
    text = f"held-out loss {LOSS.value(base.loss)} to {LOSS.value(tuned.loss)}{change}"
    perplexities = [number_text(one.perplexity, 1) for one in (base, tuned)]
    return text if NONE in perplexities else f"{text}, perplexity {perplexities[0]} to {perplexities[1]}"


def _moved(entry: Entry) -> str:
    how = scale(entry)
    base, tuned = how.value(entry.base.mean), how.value(entry.tuned.mean)
    return f"{entry.name} {base} to {tuned}{_change(entry.difference, how)}"


def _change(difference: ScoreEntry | None, how: Scale) -> str:
    if difference is None:
        return ""
    interval = how.change_span(difference.interval)
    return f" ({how.change(difference.mean)}{how.unit}{', 95% ' if interval else ''}{interval})"


def _answers(results: Evaluation, verdict: str) -> list[MetricEntry]:
    return [metric for metric in results.compared_answers if metric.verdict == verdict]


def _of(count: int, total: int) -> str:
    if total == 1:
        return "the one benchmark"
    return f"all {total} benchmarks" if count == total else f"{count} of {total} benchmarks"


def _join(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def _finite(number: float | None) -> TypeGuard[float]:
    return number is not None and math.isfinite(number)
