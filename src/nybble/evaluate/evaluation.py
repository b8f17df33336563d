"""Base against tuned, as numbered steps: benchmarks, held-out loss, texts, answers; then the comparison and its report."""

from __future__ import annotations

import datetime
import functools
import hashlib
import pathlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from nybble.chat.answerer import Answerer
from nybble.chat.loading import load_answerer
from nybble.data.batches import PackedRows
from nybble.data.order import lengths_of
from nybble.errors import EvaluationError
from nybble.evaluate.contamination import flag
from nybble.evaluate.generation import answer, distinct, fixed_prompts, held_out_prompts, item_scores, side_by_side
from nybble.evaluate.perplexity import Losses, row_losses, text_windows
from nybble.evaluate.report.page import write_report
from nybble.evaluate.results import compared_tasks, entry_of, held_out_entry, metric_entry
from nybble.evaluate.rows import rows_of
from nybble.evaluate.scores import Benchmarks, MissingRowsError, Scored, Store
from nybble.evaluate.tell import progress_bar
from nybble.evaluate.texts import Text, read_texts
from nybble.files.places import check_cache, check_report, default_cache, explained_disk, writing
from nybble.model.adapter.config import CONFIG
from nybble.model.adapter.tensors import weights_file
from nybble.recipe import dump_recipe
from nybble.run.folder import Run, versions, write_json
from nybble.run.log import read_metrics
from nybble.terminal import tell

WHO = ("base", "tuned")
HANG = 17  # characters before what is told of a benchmark or text
TEXT_WINDOW = 2048  # tokens of a text that are read at once, the model's positions permitting
SAMPLES = 4  # held-out prompts shown in the report, besides the fixed ones


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked for.

    Attributes:
        tasks: benchmarks by lm-eval's names.
        texts: files whose perplexity is wanted.
        answers: held-out prompts that are answered.
        skill: what somebody else measured, shown in the report: a description and scores by name.
        samples: answers that are shown, where somebody has them already.
    """

    tasks: Sequence[str] = ()
    texts: Sequence[pathlib.Path] = ()
    answers: int = 50
    skill: dict[str, str] | None = None
    samples: Sequence[dict[str, str]] | None = None


def evaluate(
    run: Run, asked: Asked, benchmarks: Benchmarks | None, console: Console, cache: pathlib.Path | None = None,
    answerer: Answerer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a run against its base; writes evaluation.json, report.html and report.md into it.

    Args:
        run: a finished run, or an adapter folder.
        asked: what to measure.
        benchmarks: runs them; None where none are asked for.
        console: progress and results.
        cache: where scores are kept, so that an evaluation that was cut off goes on; None is this user's own place.
        answerer: the run, where somebody has loaded it already.

    Raises:
        NybbleError: the run, its base, a task or its rows are not to be had, or the run cannot be written, also because
            another process writes it.
    """
    cache = cache or default_cache()
    check_report(run.folder)
    check_cache(cache)
    with explained_disk(run.folder, cache), writing(run.folder, "evaluated"):
        return _evaluate(run, asked, benchmarks, console, cache, answerer)


def _evaluate(
    run: Run,
    asked: Asked,
    benchmarks: Benchmarks | None,
    console: Console,
    cache: pathlib.Path,
    answerer: Answerer | None,
) -> dict[str, Any]:
    began = time.time()
    # 1. The texts, before anything is loaded; then the model, once: the base is the same with the adapter switched off.
    texts, metrics = read_texts(asked.texts), read_metrics(run)
    if answerer is None:
        with console.status("loading"):
            answerer = load_answerer(run, cache, dequantise=True)
        tell(console, f"{'adapter':<16} {answerer.updates}", "yellow" if answerer.updates.is_odd else "", hang=HANG)
    found = Findings(run, answerer, console, cache)
    # 2. Benchmarks.
    for name in asked.tasks:
        assert benchmarks is not None, "benchmarks were asked for without a harness"
        found.score(benchmarks, name)
    # 3. Loss on the validation rows, and on texts.
    found.measure_held_out()
    for text in texts:
        found.measure_text(text)
    # 4. Answers.
    if asked.samples is None:
        found.ask(asked.answers)
    else:
        found.parts["samples"] = list(asked.samples)
    # 5. Compare, write, tell.
    results = found.results(benchmarks.limit if benchmarks else None, time.time() - began)
    results["skill"] = asked.skill
    write_json(run.folder / "evaluation.json", results)
    write_report(run.folder, results, metrics)
    return results


class Findings:
    """What was measured of base and tuned model so far."""

    def __init__(self, run: Run, answerer: Answerer, console: Console, cache: pathlib.Path) -> None:
        self.run = run
        self.answerer = answerer
        self.console = console
        self.store = Store(cache / "evaluations")
        self.cache = cache
        self.adapter = _digest(weights_file(run.adapter))
        self.adapter_config = _digest(run.adapter / CONFIG)
        self.scored: dict[str, list[Scored]] = {who: [] for who in WHO}
        self.missing: list[dict[str, str]] = []
        self.parts: dict[str, Any] = {"texts": []}
        self.trained, self.validation = self._rows()

    def _rows(self) -> tuple[Dataset | None, Dataset | None]:
        """Training and validation rows as the run saw them."""
        if self.run.is_bare_adapter:
            return None, None
        with self.console.status("reading the run's data"):
            prepared, why = rows_of(self.run, self.answerer.tokenizer, self.cache)
        if prepared is None:
            why = f"{why}; give their new location: nybble eval {self.run.folder} --data FILE"
            self.missing.append({"task": "held-out loss", "why": why})
            self.console.print(f"{'held-out loss':<16} {why}", style="yellow", markup=False)
            return None, None
        rows = prepared.sample
        return rows.samples if isinstance(rows, PackedRows) else rows, prepared.validation

    def score(self, benchmarks: Benchmarks, name: str) -> None:
        """Base and tuned model on one benchmark; what is kept from before is not computed again."""
        try:
            with benchmarks.benchmark(name) as benchmark:
                for who in WHO:
                    self.scored[who].append(self._score(benchmarks, benchmark, who))
        except MissingRowsError as error:
            self.missing.append({"task": name, "why": error.what})
            tell(self.console, f"{name:<16} {error.what}", "yellow", hang=HANG)

    def _score(self, benchmarks: Benchmarks, benchmark: Any, who: str) -> Scored:
        items = sum(map(len, benchmark.rows.values()))
        with (
            self.answerer.as_tuned(who == "tuned"),
            progress_bar(self.console, f"{benchmark.name}: {who}", items) as show,
        ):
            compute = functools.partial(
                benchmarks.score, benchmark, self.answerer.model, self.answerer.tokenizer,
                lambda share: show(round(share * items)),
            )  # fmt: skip
            scored, kept = self.store.scored(self._facts(benchmarks, benchmark, who), compute)
        mean, note = sum(scored.values) / items, " (kept from before)" if kept else ""
        line = f"{benchmark.name:<16} {who:<6} {scored.metric} {mean:.3f} of {items:,} items{note}"
        tell(self.console, line, hang=HANG)
        return scored

    def _facts(self, benchmarks: Benchmarks, benchmark: Any, who: str) -> dict[str, Any]:
        """All that a score depends on."""
        recipe = self.run.recipe.model
        return {
            "base": self.answerer.fingerprint,
            "bits": self.answerer.bits.digest if self.answerer.bits is not None else None,
            "adapter": self.adapter if who == "tuned" else None,
            **({"adapter_config": self.adapter_config} if who == "tuned" else {}),  # alpha is there
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
        """Loss on the run's validation rows, row by row."""
        if self.validation is None:
            return
        rows = self.validation.select_columns(["input_ids", "trained"])[:]
        samples = [
            {"input_ids": ids, "trained": trained}
            for ids, trained in zip(rows["input_ids"], rows["trained"], strict=True)
        ]
        losses = self._losses(samples, "held-out loss")
        self.parts["held_out"] = held_out_entry(losses["base"], losses["tuned"])

    def measure_text(self, text: Text) -> None:
        """Perplexity of a text."""
        length = min(TEXT_WINDOW, self.answerer.model.config.max_position_embeddings)
        windows = text_windows(text.text, self.answerer.tokenizer, length)
        if not windows:
            raise EvaluationError(f"{text.file} has fewer than two tokens", fix="give --text a longer text")
        losses = self._losses(windows, text.file.name)
        tokens = int(losses["base"].tokens.sum())
        self.parts["texts"].append(
            {"name": text.file.name, "tokens": tokens, **{who: entry_of(losses[who]) for who in WHO}}
        )

    def _losses(self, samples: list[dict[str, Any]], what: str) -> dict[str, Losses]:
        pad = self.answerer.tokenizer.pad_token_id
        found = {}
        for who in WHO:
            with (
                self.answerer.as_tuned(who == "tuned"),
                progress_bar(self.console, f"{what}: {who}", len(samples)) as show,
            ):
                found[who] = row_losses(self.answerer.model, samples, pad, show)
            line = f"{what:<16} {who:<6} {found[who].mean:.4f} nats, perplexity {found[who].perplexity:.2f}"
            tell(self.console, line, hang=HANG)
        return found

    def ask(self, count: int) -> None:
        """Greedy answers to held-out prompts, scored, and to the fixed ones, shown."""
        held_out = held_out_prompts(self.validation, self.answerer.tokenizer, count) if self.validation else []
        fixed = fixed_prompts(self.answerer)
        asked, answers = [*held_out, *fixed], {}
        for who in WHO:
            with self.console.status(f"{who} answers {len(asked)} prompts"):
                answers[who] = answer(self.answerer, asked, base=who == "base")
        everything = side_by_side(asked, answers["base"], answers["tuned"])
        self.parts["samples"] = [*everything[: len(held_out)][:SAMPLES], *everything[len(held_out) :]]
        if not held_out:
            return
        base, tuned = (item_scores(held_out, answers[who][: len(held_out)]) for who in WHO)
        metrics = [metric_entry(name, base[name], tuned[name]) for name in base]
        metrics.append(metric_entry("distinct answers", *(distinct(answers[who][: len(held_out)]) for who in WHO)))
        self.parts["generation"] = {"rows": len(held_out), "metrics": metrics}

    def results(self, limit: int | None, seconds: float) -> dict[str, Any]:
        """All of it, compared, as it is written to evaluation.json."""
        recipe, device = self.run.recipe, self.answerer.model.device
        return {
            "run": self.run.folder.resolve().name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "base": {
                "name": recipe.model.path,
                "fingerprint": self.answerer.fingerprint,
                "quantization": recipe.model.quantization,
            },
            "adapter": self.adapter,
            "dtype": str(self.answerer.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "limit": limit,
            "seconds": round(seconds, 1),
            "tasks": compared_tasks(self.scored["base"], self.scored["tuned"], self._flags()),
            "missing": self.missing,
            **self.parts,
            "lengths": self._lengths(),
            "max_length": recipe.data.max_length,
            "training": _training(self.run.summary()),
            "recipe": dump_recipe(recipe),
        }

    def _lengths(self) -> dict[str, int]:
        """How many training rows have so many tokens."""
        counts = Counter(lengths_of(self.trained).tolist()) if self.trained is not None else {}
        return {str(length): count for length, count in sorted(counts.items())}

    def _flags(self) -> dict[str, list[bool]]:
        """Items of each benchmark of which the training rows hold 13 words in a row."""
        if self.trained is None or not self.scored["base"]:
            return {}
        decode = self.answerer.tokenizer.decode
        with self.console.status("searching the training rows for the benchmarks' items"):
            texts = (decode(row["input_ids"], skip_special_tokens=True) for row in self.trained)
            return flag(texts, {scored.task: scored.texts for scored in self.scored["base"]})


def _training(summary: dict[str, Any] | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {
        **{
            name: summary[name]
            for name in ("steps", "seconds", "tokens", "tokens_per_second", "peak_memory_gb", "device")
        },
        "trainable_parameters": summary["adapter"]["trainable_parameters"],
        "template": summary["data"]["template"],
    }


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
