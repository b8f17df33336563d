"""The evaluation of base and tuned model in numbered steps: benchmarks, held-out loss, texts, answers, then the report."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from nybble.chat.answerer import Answerer
from nybble.chat.loading import load_answerer
from nybble.evaluate.console import HANG
from nybble.evaluate.findings import Findings
from nybble.evaluate.fused import computed_as_in_training
from nybble.evaluate.report.page import write_report
from nybble.evaluate.scores import Benchmarks
from nybble.evaluate.texts import read_texts
from nybble.files.atomic import run_lock
from nybble.files.disk_errors import explained_disk_errors
from nybble.files.outputs import check_report
from nybble.files.paths import check_cache, default_cache
from nybble.run.evaluation import Evaluation, SampleEntry, SkillEntry
from nybble.run.folder import Run
from nybble.run.log import read_metrics
from nybble.run.records import write_record
from nybble.terminal import tell


@dataclass(frozen=True)
class Measures:
    """What an evaluation measures.

    Attributes:
        tasks: benchmarks, by their names in lm-eval.
        texts: files whose perplexity is measured.
        answers: how many held-out prompts are answered.
        skill: scores measured by the caller, for the report.
        samples: answers for the report, if the caller has them; otherwise the models generate them.
    """

    tasks: Sequence[str] = ()
    texts: Sequence[pathlib.Path] = ()
    answers: int = 50
    skill: SkillEntry | None = None
    samples: Sequence[SampleEntry] | None = None


def evaluate(
    run: Run, measures: Measures, benchmarks: Benchmarks | None, console: Console, cache: pathlib.Path | None = None,
    answerer: Answerer | None = None,
) -> Evaluation:  # fmt: skip
    """Compare a run with its base; writes evaluation.json, report.html and report.md into its folder.

    Args:
        run: a finished run, or an adapter folder.
        measures: what to measure.
        benchmarks: runs benchmarks; None if there are none.
        console: progress and results.
        cache: folder of cached scores, so that an interrupted evaluation can continue; None for the user's default cache.
        answerer: the run, if the caller has loaded it already.

    Raises:
        NybbleError: the run, its base, a task or its rows cannot be read, or the run cannot be written, for example because
            another process is writing it.
    """
    cache = cache or default_cache()
    check_report(run.folder)
    check_cache(cache)
    with explained_disk_errors(run.folder, cache), run_lock(run.folder, "evaluated"):
        return _evaluate(run, measures, benchmarks, console, cache, answerer)


def _evaluate(
    run: Run,
    measures: Measures,
    benchmarks: Benchmarks | None,
    console: Console,
    cache: pathlib.Path,
    answerer: Answerer | None,
) -> Evaluation:
    started = time.time()
    # 1. The texts, before anything is loaded; then the model, once: the base is the same model with the adapter disabled.
    texts, metrics = read_texts(measures.texts), read_metrics(run)
    if answerer is None:
        with console.status("loading"):
            answerer = load_answerer(run, cache, dequantise=True)
        tell(console, f"{'adapter':<16} {answerer.updates}", "yellow" if answerer.updates.is_odd else "", hang=HANG)
    findings = Findings(run, answerer, console, cache)
    # 2. Benchmarks.
    for name in measures.tasks:
        assert benchmarks is not None, "tasks without a harness to run them"
        findings.measure_benchmark(benchmarks, name)
    # 3. Loss and preferences on the validation rows, and loss on texts.
    with computed_as_in_training(answerer.model, run.recipe.engine.fused):
        findings.measure_held_out()
        findings.measure_preferences()
        for text in texts:
            findings.measure_text(text)
    # 4. Answers.
    if measures.samples is None:
        findings.measure_answers(measures.answers)
    else:
        findings.samples = list(measures.samples)
    # 5. Compare and write.
    evaluation = findings.evaluation(benchmarks.limit if benchmarks else None, measures.skill, time.time() - started)
    write_record(run.folder / "evaluation.json", evaluation)
    write_report(run.folder, evaluation, metrics)
    return evaluation
