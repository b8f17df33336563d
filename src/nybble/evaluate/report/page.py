"""RUN/report.html and RUN/report.md: what improved, and what got worse. Each is one file that loads nothing from the network."""

from __future__ import annotations

import datetime
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from nybble.evaluate.report import plots, tables
from nybble.evaluate.report.wording import NONE, UNDECIDED, duration, headline, number_text, undecided_text
from nybble.files.writing import write_text
from nybble.markdown import code, escaped, fence, storable
from nybble.run.evaluation import Evaluation, SampleEntry, SkillEntry, TrainingCost
from nybble.run.log import MetricsLine

LONG, LONG_LINES = 700, 12  # characters and lines from which a text of a sample is collapsed
TEASER = 240  # characters of a collapsed text that are shown


@dataclass(frozen=True)
class Plot:
    """A plot of the report."""

    name: str
    title: str
    draw: plots.Draw

    @property
    def wide(self) -> Markup:
        """The SVG for a wide window."""
        return Markup(plots.svg(self.draw, plots.WIDE, f"{self.name}-wide"))  # escaped by matplotlib

    @property
    def narrow(self) -> Markup:
        """The SVG for a phone: narrower, with text of the same size."""
        return Markup(plots.svg(self.draw, plots.NARROW, f"{self.name}-narrow"))


@dataclass(frozen=True)
class Passage:
    """A prompt or an answer."""

    who: str
    text: str

    @property
    def teaser(self) -> str:
        """The beginning of a long text; empty for others."""
        if len(self.text) <= LONG and self.text.count("\n") < LONG_LINES:
            return ""
        return "\n".join(self.text[:TEASER].split("\n")[:4]) + " …"


@dataclass(frozen=True)
class Way:
    """One way to ask for the skill, with its score as text, and as a share if it is one."""

    name: str
    score: str

    @property
    def share(self) -> float | None:
        """0.93 for `93 of 100`; None for other scores."""
        counts = re.fullmatch(r"(\d+) of (\d+)", self.score)
        return int(counts[1]) / max(int(counts[2]), 1) if counts else None


def write_report(folder: pathlib.Path, results: Evaluation, metrics: Sequence[MetricsLine]) -> pathlib.Path:
    """Write report.html, report.md and its plots; sections without results are left out.

    Args:
        folder: the run folder.
        results: what was measured.
        metrics: the lines of metrics.jsonl.

    Returns:
        report.html.
    """
    pictures = _plots(results, metrics)
    view = _view(results, pictures)
    if pictures:
        (folder / "report").mkdir(exist_ok=True)
    for picture in pictures:
        plots.png(picture.draw, folder / "report" / f"{picture.name}.png")
    for name in ("report.md", "report.html"):
        text = _environment(name).get_template(f"{name}.jinja").render(view)
        write_text(folder / name, storable(text))
    return folder / "report.html"


def _environment(name: str) -> Environment:
    """Jinja environment that escapes everything from data, in HTML and in Markdown, unless a template says otherwise."""
    markdown = name.endswith(".md")
    environment = Environment(
        loader=FunctionLoader(lambda file: (resources.files(__package__) / file).read_text(encoding="utf-8")),
        autoescape=select_autoescape(("html.jinja",), default=False),
        finalize=_markdown if markdown else lambda value: value,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"fence": _fence, "code": _code}
    return environment


def _view(results: Evaluation, pictures: Sequence[Plot]) -> dict[str, Any]:
    """All values for the templates, as text."""
    held_out, texts = results.held_out, results.texts
    undecided = undecided_text(results)
    head = headline(results)
    return {
        "run": results.run,
        "date": _date(results.date),
        "headline": head,
        "facts": _facts(results),
        "skill": _skill(results.skill),
        "benchmarks": tables.benchmarks(results.tasks) if results.tasks else None,
        "undecided": undecided if undecided and head[-1].text != undecided else "",
        "no_difference": UNDECIDED.capitalize(),
        "subjects": any(task.over_subjects for task in results.tasks),
        "plots": pictures,
        "held_out": tables.held_out(held_out, texts) if held_out or texts else None,
        "held_out_tested": bool(held_out and held_out.verdict),
        "generation": tables.generation(results.answers) if results.answers else None,
        "preferences": tables.preferences(results.preferences) if results.preferences else None,
        "pairs": results.preferences.rows if results.preferences else None,
        "preferred_by": results.preferences.by if results.preferences else "",
        "answers": results.generation.rows if results.generation else None,
        "samples": [_sample(sample) for sample in results.samples],
        "training": _training(results.training),
        "missing": tables.missing(results.missing) if results.missing else None,
        "recipe": results.recipe,
        "versions": results.versions,
        "fingerprints": _fingerprints(results),
    }


def _facts(results: Evaluation) -> list[tuple[str, str]]:
    """What was evaluated, and how."""
    facts = [
        ("base", results.base.name if results.base else None),
        ("quantisation", results.base.quantization if results.base else None),
        ("computed in", results.dtype),
        ("evaluated on", results.device),
        ("rows per benchmark", f"at most {results.limit:,}" if results.limit is not None else None),
        ("evaluation took", duration(results.seconds) if results.seconds is not None else None),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _training(cost: TrainingCost | None) -> list[tuple[str, str]]:
    """What the training cost."""
    if cost is None:
        return []
    facts = [
        ("time", duration(cost.seconds)),
        ("steps", number_text(cost.steps, 0)),
        ("tokens", number_text(cost.tokens, 0)),
        ("tokens per second in training", number_text(cost.tokens_per_second, 0)),
        ("peak memory", f"{number_text(cost.peak_memory_gb, 2)} GB"),
        ("trained parameters", number_text(cost.trainable_parameters, 0)),
        ("device", cost.device or NONE),
        ("template", cost.template or NONE),
    ]
    return [(name, value) for name, value in facts if not value.startswith(NONE)]


def _fingerprints(results: Evaluation) -> list[tuple[str, str]]:
    base = results.base.fingerprint if results.base else None
    return [(name, value) for name, value in (("base", base), ("adapter", results.adapter)) if value]


def _skill(skill: SkillEntry | None) -> dict[str, Any] | None:
    if skill is None:
        return None
    return {"what": skill.what, "ways": [Way(name, score) for name, score in skill.ways.items()]}


def _sample(sample: SampleEntry) -> dict[str, Any]:
    """The prompt, the expected answer if known, and the answer of each model."""
    expected = [Passage("expected", sample.expected)] if sample.expected else []
    said = [*expected, Passage("base", sample.base or ""), Passage("tuned", sample.tuned or "")]
    return {"prompt": Passage("prompt", sample.prompt or ""), "said": said}


def _plots(results: Evaluation, metrics: Sequence[MetricsLine]) -> list[Plot]:
    lengths = {int(length): rows for length, rows in results.lengths.items()}
    drawn = [
        ("benchmarks", "Benchmarks", plots.benchmark_plot(results.tasks)),
        ("loss", "Loss", plots.loss_plot(metrics)),
        ("scores", "Scores while training", plots.score_plot(metrics)),
        ("lengths", "Lengths of the training rows", plots.length_plot(lengths, results.max_length)),
    ]
    return [Plot(name, title, draw) for name, title, draw in drawn if draw]


def _date(text: str) -> str:
    moment = datetime.datetime.fromisoformat(text)
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def _markdown(value: Any) -> Any:
    """Escaped text on one line, since it may be in a table."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return escaped(value)


def _fence(text: str, language: str = "text") -> Markup:
    return Markup(fence(text, language))  # the fence makes it safe


def _code(text: str) -> Markup:
    return Markup(code(text))
