"""The measurements of an evaluation, one method each, and the record of their results."""

from __future__ import annotations

import datetime
import functools
import hashlib
import pathlib
from collections import Counter
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from nybble.chat.answerer import Answerer
from nybble.data.batches import PackedRows
from nybble.data.judged_batches import good_rows
from nybble.data.order import lengths_of
from nybble.data.rows.formats import TARGETS
from nybble.errors import EvaluationError
from nybble.evaluate.console import HANG, preference_lines, progress_bar
from nybble.evaluate.contamination import flag
from nybble.evaluate.generation import answer, distinct, fixed_prompts, held_out_prompts, item_scores, side_by_side
from nybble.evaluate.perplexity import Losses, row_losses, text_windows
from nybble.evaluate.preferences import pair_likelihoods, preference_entry
from nybble.evaluate.results import held_out_entry, loss_entry, metric_entry, task_entries
from nybble.evaluate.rows import rows_of
from nybble.evaluate.scores import Benchmark, Benchmarks, MissingRowsError, Scored, Store
from nybble.evaluate.texts import TextFile
from nybble.model.adapter.config import CONFIG
from nybble.model.adapter.tensors import weights_file
from nybble.recipe import dump_recipe
from nybble.run.evaluation import (
    EvaluatedBase,
    Evaluation,
    GenerationEntry,
    HeldOutEntry,
    MissingEntry,
    PreferenceEntry,
    SampleEntry,
    SkillEntry,
    TextEntry,
    TrainingCost,
)
from nybble.run.folder import Run
from nybble.run.summary import Summary
from nybble.run.versions import versions
from nybble.terminal import tell

MODELS = ("base", "tuned")
TEXT_WINDOW = 2048  # tokens of a text that are read at once, if the model has as many positions
SAMPLES = 4  # held-out prompts shown in the report, besides the fixed ones


class Findings:
    """What has been measured so far."""

    def __init__(self, run: Run, answerer: Answerer, console: Console, cache: pathlib.Path) -> None:
        self.run = run
        self.answerer = answerer
        self.console = console
        self.store = Store(cache / "evaluations")
        self.cache = cache
        self.adapter = _digest(weights_file(run.adapter))
        self.adapter_config = _digest(run.adapter / CONFIG)
        self.scored: dict[str, list[Scored]] = {model: [] for model in MODELS}
        self.missing: list[MissingEntry] = []
        self.held_out: HeldOutEntry | None = None
        self.texts: list[TextEntry] = []
        self.samples: list[SampleEntry] = []
        self.generation: GenerationEntry | None = None
        self.preferences: PreferenceEntry | None = None
        self.trained, self.validation = self._rows()

    def _rows(self) -> tuple[Dataset | None, Dataset | None]:
        """Training and validation rows, as the run tokenised them."""
        if self.run.is_bare_adapter:
            return None, None
        with self.console.status("reading the run's data"):
            prepared, why = rows_of(self.run, self.answerer.tokenizer, self.cache)
        if prepared is None:
            why = f"{why}; give their new location: nybble eval {self.run.folder} --data FILE"
            self.missing.append(MissingEntry(task="held-out loss", why=why))
            self.console.print(f"{'held-out loss':<16} {why}", style="yellow", markup=False)
            return None, None
        rows = prepared.sample
        return rows.samples if isinstance(rows, PackedRows) else rows, prepared.validation

    @functools.cached_property
    def _imitated(self) -> Dataset | None:
        """The validation rows whose answer should be imitated: not those that a label calls bad."""
        return good_rows(self.validation) if self.validation is not None else None

    def measure_benchmark(self, benchmarks: Benchmarks, name: str) -> None:
        """Score base and tuned model on one benchmark; cached scores are not computed again."""
        try:
            with benchmarks.benchmark(name) as benchmark:
                for model in MODELS:
                    self.scored[model].append(self._score(benchmarks, benchmark, model))
        except MissingRowsError as error:
            self.missing.append(MissingEntry(task=name, why=error.what))
            tell(self.console, f"{name:<16} {error.what}", "yellow", hang=HANG)

    def _score(self, benchmarks: Benchmarks, benchmark: Benchmark, model: str) -> Scored:
        items = sum(map(len, benchmark.rows.values()))
        with (
            self.answerer.as_tuned(model == "tuned"),
            progress_bar(self.console, f"{benchmark.name}: {model}", items) as show,
        ):
            compute = functools.partial(
                benchmarks.score, benchmark, self.answerer.model, self.answerer.tokenizer,
                lambda share: show(round(share * items)),
            )  # fmt: skip
            scored, is_cached = self.store.scored(self._facts(benchmarks, benchmark, model), compute)
        mean, note = sum(scored.values) / items, " (from the cache)" if is_cached else ""
        line = f"{benchmark.name:<16} {model:<6} {scored.metric} {mean:.3f} of {items:,} items{note}"
        tell(self.console, line, hang=HANG)
        return scored

    def _facts(self, benchmarks: Benchmarks, benchmark: Benchmark, model: str) -> dict[str, Any]:
        """Everything that a score depends on."""
        recipe = self.run.recipe.model
        return {
            "base": self.answerer.fingerprint,
            "bits": self.answerer.bits.digest if self.answerer.bits is not None else None,
            "adapter": self.adapter if model == "tuned" else None,
            **({"adapter_config": self.adapter_config} if model == "tuned" else {}),  # it contains alpha
            "quantization": [recipe.quantization, recipe.double_quantization],
            "dtype": str(self.answerer.model.dtype),
            "device": self.answerer.model.device.type,
            "template": None,
            "task": benchmark.name,
            "parts": {part: str(task.VERSION) for part, task in benchmark.tasks.items()},
            "rows": {part: len(rows) for part, rows in benchmark.rows.items()},
            "items": benchmark.digest,
            "of": benchmark.of,
            "data": benchmark.data,
            "lm-eval": benchmarks.version,
            "versions": versions(),
        }

    def measure_held_out(self) -> None:
        """Measure the loss of each of the run's validation rows."""
        if not self._imitated:
            return
        rows = self._imitated.select_columns(["input_ids", "trained"])[:]
        samples = [
            {"input_ids": ids, "trained": trained}
            for ids, trained in zip(rows["input_ids"], rows["trained"], strict=True)
        ]
        base, tuned = self._losses(samples, "held-out loss")
        self.held_out = held_out_entry(base, tuned)

    def measure_preferences(self) -> None:
        """Measure which answer of each of the run's held-out pairs the models prefer."""
        objective = self.run.recipe.train.objective
        if not self.validation or TARGETS[objective] != "pairs":
            return
        rows, pad, found = list(self.validation), self.answerer.tokenizer.pad_token_id, []
        for model in MODELS:
            with (
                self.answerer.as_tuned(model == "tuned"),
                progress_bar(self.console, f"preferences: {model}", len(rows)) as show,
            ):
                found.append(pair_likelihoods(self.answerer.model, rows, pad, show))
        self.preferences = preference_entry(found[0], found[1], objective)
        for line in preference_lines(self.preferences):
            tell(self.console, line, hang=HANG)

    def measure_text(self, text: TextFile) -> None:
        """Measure the perplexity of a text."""
        length = min(TEXT_WINDOW, self.answerer.model.config.max_position_embeddings)
        windows = text_windows(text.text, self.answerer.tokenizer, length)
        if not windows:
            raise EvaluationError(f"{text.file} has fewer than two tokens", fix="give --text a longer text")
        base, tuned = self._losses(windows, text.file.name)
        self.texts.append(
            TextEntry(
                name=text.file.name, tokens=int(base.tokens.sum()), base=loss_entry(base), tuned=loss_entry(tuned)
            )
        )

    def _losses(self, samples: list[dict[str, Any]], what: str) -> tuple[Losses, Losses]:
        """The losses of base and tuned model."""
        pad = self.answerer.tokenizer.pad_token_id
        measured = []
        for model in MODELS:
            with (
                self.answerer.as_tuned(model == "tuned"),
                progress_bar(self.console, f"{what}: {model}", len(samples)) as show,
            ):
                losses = row_losses(self.answerer.model, samples, pad, show)
            line = f"{what:<16} {model:<6} {losses.mean:.4f} nats, perplexity {losses.perplexity:.2f}"
            tell(self.console, line, hang=HANG)
            measured.append(losses)
        return measured[0], measured[1]

    def measure_answers(self, count: int) -> None:
        """Generate greedy answers to held-out prompts, which are scored, and to the fixed prompts, which are only shown."""
        held_out = held_out_prompts(self._imitated, self.answerer.tokenizer, count) if self._imitated else []
        fixed = fixed_prompts(self.answerer)
        prompts, answers = [*held_out, *fixed], {}
        for model in MODELS:
            with self.console.status(f"{model} answers {len(prompts)} prompts"):
                answers[model] = answer(self.answerer, prompts, base=model == "base")
        pairs = [SampleEntry(**pair) for pair in side_by_side(prompts, answers["base"], answers["tuned"])]
        self.samples = [*pairs[: len(held_out)][:SAMPLES], *pairs[len(held_out) :]]
        if not held_out:
            return
        base, tuned = (item_scores(held_out, answers[model][: len(held_out)]) for model in MODELS)
        metrics = [metric_entry(name, base[name], tuned[name]) for name in base]
        metrics.append(
            metric_entry("distinct answers", *(distinct(answers[model][: len(held_out)]) for model in MODELS))
        )
        self.generation = GenerationEntry(rows=len(held_out), metrics=metrics)

    def evaluation(self, limit: int | None, skill: SkillEntry | None, seconds: float) -> Evaluation:
        """The record for evaluation.json, with all comparisons.

        Args:
            limit: the largest number of items per benchmark; None for all.
            skill: scores measured by the caller.
            seconds: how long the evaluation took.
        """
        recipe, device, summary = self.run.recipe, self.answerer.model.device, self.run.summary()
        evaluation = Evaluation(
            run=self.run.folder.resolve().name,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=versions(),
            base=EvaluatedBase(
                name=recipe.model.path,
                fingerprint=self.answerer.fingerprint,
                quantization=recipe.model.quantization,
            ),
            adapter=self.adapter,
            dtype=str(self.answerer.model.dtype).removeprefix("torch."),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            limit=limit,
            seconds=round(seconds, 1),
            tasks=task_entries(self.scored["base"], self.scored["tuned"], self._flags()),
            missing=self.missing,
            texts=self.texts,
            samples=self.samples,
            lengths=self._lengths(),
            max_length=recipe.data.max_length * recipe.train.sequences,
            training=None if summary is None else _cost(summary),
            recipe=dump_recipe(recipe),
            skill=skill,
        )
        measured = {"held_out": self.held_out, "generation": self.generation, "preferences": self.preferences}
        return evaluation.model_copy(update={name: part for name, part in measured.items() if part is not None})

    def _lengths(self) -> dict[str, int]:
        """The number of training rows by their number of tokens."""
        counts = Counter(lengths_of(self.trained).tolist()) if self.trained is not None else {}
        return {str(length): count for length, count in sorted(counts.items())}

    def _flags(self) -> dict[str, list[bool]]:
        """Which items of each benchmark share 13 words in a row with the training rows."""
        if self.trained is None or not self.scored["base"]:
            return {}
        decode = self.answerer.tokenizer.decode
        with self.console.status("searching the training rows for the benchmarks' items"):
            texts = (decode(row["input_ids"], skip_special_tokens=True) for row in self.trained)
            return flag(texts, {scored.task: scored.texts for scored in self.scored["base"]})


def _cost(summary: Summary) -> TrainingCost:
    return TrainingCost(
        steps=summary.steps,
        seconds=summary.seconds,
        tokens=summary.tokens,
        tokens_per_second=summary.tokens_per_second,
        peak_memory_gb=summary.peak_memory_gb,
        device=summary.device,
        trainable_parameters=summary.adapter.trainable_parameters,
        template=summary.data.template,
    )


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
