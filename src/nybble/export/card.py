"""The model card of an artefact: what it is, its licence, its results, and how to load it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from nybble.data.rows.licences import licences
from nybble.data.rows.sources import find_sources
from nybble.errors import DataError
from nybble.evaluate.report.wording import LOSS, NONE, Scale, by_verdict, duration, scale
from nybble.export.licence import HUB_ID, LLAMA2_POLICY, Licence
from nybble.export.parity.compare import Comparison
from nybble.export.records import Check
from nybble.markdown import code, escaped, fence, front_matter, storable
from nybble.recipe import dump_recipe
from nybble.run.evaluation import Evaluation, MetricEntry, ScoreEntry, TaskEntry
from nybble.run.folder import Run
from nybble.run.summary import Summary
from nybble.version import __version__

COLUMNS = ("", "base", "tuned", "difference, 95%", "verdict")
STORED = {"nf4": "4-bit", "fp4": "4-bit", "int8": "8-bit", "none": "unquantised"}


@dataclass(frozen=True)
class Subject:
    """The subject of a card.

    Attributes:
        run: the run.
        to: adapter, merged or gguf.
        kind: what the artefact is, in a few words.
        loading: the Python code that loads it.
        usage: further sentences on its use.
        base: which base was merged; None for an adapter.
        base_id: the base's Hub id, if it is known.
        licence: the base's licence.
        comparison: the comparison of the bases, if there are any.
        checks: the checks of the parity gate; text says what was not checked.
    """

    run: Run
    to: str
    kind: str
    loading: str
    usage: Sequence[str]
    base: str | None
    base_id: str | None
    licence: Licence
    comparison: Comparison | None
    checks: Sequence[Check | str]


def write_card(subject: Subject) -> str:
    """The card's text, Markdown with the Hub's front matter."""
    template = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    ).from_string((resources.files(__package__) / "card.md.jinja").read_text(encoding="utf-8"))
    run = subject.run
    summary, evaluation = run.summary(), run.evaluation()
    text = template.render(
        front=front_matter(_front(subject)).rstrip(),
        title=escaped(run.folder.resolve().name),
        opening=f"{subject.kind}, made by nybble {__version__} from {_origin(run)} {code(run.recipe.model.path)}.",
        bare=run.is_bare_adapter,
        stored=STORED[run.recipe.model.quantization],
        loading=fence(subject.loading, "python"),
        usage=subject.usage,
        facts=_facts(run, summary, evaluation),
        results=_results(summary, evaluation),
        merge=subject.comparison,
        base=subject.base,
        checks=[_check_line(check) for check in subject.checks],
        licence=_licence_lines(subject),
        recipe=fence(dump_recipe(run.recipe, documented=False).rstrip(), "yaml"),
    )
    return storable(text)


def _origin(run: Run) -> str:
    if run.is_bare_adapter:
        return "a LoRA adapter for"
    return f"a {'LoRA' if run.recipe.model.quantization == 'none' else 'QLoRA'} run on"


def _front(subject: Subject) -> dict[str, Any]:
    """The Hub's metadata. The Hub refuses a base_model that is not of the form owner/name."""
    library = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}[subject.to]
    front: dict[str, Any] = {}
    if subject.licence.name is not None:
        front["license"] = subject.licence.name
    if subject.base_id is not None:
        front["base_model"] = subject.base_id
        front["base_model_relation"] = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}[subject.to]
    data = [
        name for name in subject.run.recipe.data.names if HUB_ID.fullmatch(name) and not pathlib.Path(name).exists()
    ]
    if data:
        front["datasets"] = data
    tags = ["nybble", *(["qlora"] if subject.run.recipe.model.quantization != "none" else []), "lora"]
    return {**front, "library_name": library, "pipeline_tag": "text-generation", "tags": tags}


def _facts(run: Run, summary: Summary | None, evaluation: Evaluation | None) -> list[tuple[str, str]]:
    model, lora, training = run.recipe.model, run.recipe.lora, run.recipe.train
    if summary is None:
        return [("base", code(model.path))]
    base, data, adapter = summary.base, summary.data, summary.adapter
    targets = escaped(", ".join(adapter.targets))
    scaled = f"RoPE scaling {code(json.dumps(model.rope_scaling))}; " if model.rope_scaling else ""
    return [
        ("base", f"{code(base.name)}, fingerprint {code(base.fingerprint)}, {scaled}{base.parameters:,} parameters"),
        ("stored in training as", escaped(base.quantization)),
        ("data", f"{code(json.dumps(data.path))}, {data.rows:,} rows, fingerprint {code(data.fingerprint)}"),
        ("chat template", escaped(data.template)),
        ("adapter", f"r {lora.r}, alpha {lora.alpha:g}{', rsLoRA' if lora.rslora else ''}{', DoRA' if lora.dora else ''}, "
                    f"on {targets}, {adapter.trainable_parameters:,} parameters"),
        ("training", f"{summary.steps:,} steps, {summary.tokens:,} tokens, peak learning rate {training.peak_rate:g}"),
        ("memory", f"{summary.peak_memory_gb:.2f} GB at the peak, on {escaped(summary.device)}"),
        ("time", f"{duration(summary.seconds)}, {summary.tokens_per_second:,.0f} tokens/s in training"),
        ("evaluated", escaped(evaluation.date) if evaluation is not None else "not yet"),
        ("versions", escaped(", ".join(f"{name} {version}" for name, version in summary.versions.items()))),
    ]  # fmt: skip


def _results(summary: Summary | None, evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Base against tuned: the results of nybble eval, or else the validation losses in training."""
    if evaluation is not None:
        return {
            "what": "Base and tuned model, the base stored as in training; measured by `nybble eval`.",
            "columns": COLUMNS,
            "rows": _measured(evaluation),
        }
    losses = summary.validation_loss if summary is not None else None
    if losses is None:
        return None
    row = ["validation loss, nats per token", f"{losses.before:.4f}", f"{losses.kept:.4f}", NONE, "not tested"]
    return {"what": "Measured in training; `nybble eval` adds intervals.", "columns": COLUMNS, "rows": [row]}


def _measured(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    if held_out := evaluation.held_out:
        losses = (held_out.base.loss, held_out.tuned.loss)
        rows.append(_compared("held-out loss, nats per token", losses, held_out.difference, held_out.verdict, LOSS))
    entries: list[TaskEntry | MetricEntry] = [*by_verdict(evaluation.tasks), *evaluation.answers]
    for entry in entries:
        means = (entry.base.mean, entry.tuned.mean)
        rows.append(_compared(entry.name, means, entry.difference, entry.verdict, scale(entry)))
    return rows


def _compared(
    name: str, means: Sequence[float | None], difference: ScoreEntry | None, verdict: str | None, how: Scale
) -> list[str]:
    change, interval = (None, None) if difference is None else (difference.mean, difference.interval)
    shown = f"{how.change(change)} {how.change_span(interval)}".strip()
    return [escaped(name), *map(how.value, means), shown, escaped(verdict or NONE)]


def _check_line(check: Check | str) -> str:
    if isinstance(check, str):
        return check
    numbers = check.numbers
    return (
        f"{check.kind}, loaded by {check.by}: the prompts' token ids are equal, {numbers.equal_answers} of "
        f"{numbers.questions} greedy answers are equal token by token, KL {numbers.kl:.5f} nats per token (limit "
        f"{numbers.kl_limit:.4f}), likeliest token the same in {100 * numbers.equal_likeliest:.1f}%, "
        f"{numbers.artefact_ended} answers end by themselves (the run's: {numbers.run_ended})"
    )


def _licence_lines(subject: Subject) -> list[str]:
    licence = subject.licence
    named = code(licence.name) if licence.name is not None else "not stated with its weights: see its page"
    link = f", {licence.link}" if licence.link is not None else ""
    lines = [
        f"This is a derivative of {code(subject.run.recipe.model.path)}, whose licence applies to it: {named}{link}."
    ]
    if licence.notice is not None:
        lines.append(licence.notice)
    if licence.policy is not None:
        lines.append(f"Its use must follow the Acceptable Use Policy: {LLAMA2_POLICY}.")
    known = [escaped(line) for line in data_licences(subject.run)]
    lines.append("Data it was trained on: " + ("; ".join(known) if known else "licence unknown, see its page") + ".")
    return lines


def data_licences(run: Run) -> list[str]:
    """The known licences of the run's data."""
    data = run.recipe.data
    if run.is_bare_adapter:
        return []
    try:
        return licences(find_sources(data.path, subset=data.subset, split=data.split, revision=data.revision))
    except DataError:  # the files no longer exist
        return []
