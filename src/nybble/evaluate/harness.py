"""Benchmarks of EleutherAI's lm-eval, run in this process with unchanged prompts and metrics."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import os
import pathlib
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import lm_eval
import numpy
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.distributed.group import all_gather, broadcast, share_of
from nybble.errors import EvaluationError
from nybble.evaluate.items import scores_of
from nybble.evaluate.local_rows import check_files, local_tasks
from nybble.evaluate.scores import Benchmark, Scored

FEWSHOT = {"mmlu": 5}
"""Number of few-shot examples for benchmarks that are usually reported with them; others use their task's own setting."""
METRIC_SCRIPTS = ("accuracy", "bertscore", "bleu", "bleurt", "code_eval", "f1", "rouge", "squad_v2")
"""Metrics that lm-eval's tasks load with the package evaluate, which runs NAME/NAME.py of the current folder if it exists."""
CPU_BATCH = 8  # beyond it padding costs more than batching saves; on CUDA lm-eval tries what fits


@functools.cache
def _manager() -> TaskManager:
    """lm-eval's tasks; reading their 14,000 files takes seconds."""
    return TaskManager()


class _SharedModel(HFLM):  # type: ignore[misc]
    """lm-eval's own model, with progress, and with its requests shared out over the processes.

    Each process answers its share of the requests and gets all answers. In each, lm-eval runs as if it were the only process, so
    prompts, few-shot examples and scores are those of one process.
    """

    def __init__(self, show: Callable[[float], None], **settings: Any) -> None:
        super().__init__(**settings)
        self._show, self._done, self._all = show, 0, 1

    def loglikelihood(self, requests: list[Any], **settings: Any) -> list[Any]:
        return self._shared(super().loglikelihood, requests, settings)

    def loglikelihood_rolling(self, requests: list[Any], **settings: Any) -> list[Any]:
        return self._shared(super().loglikelihood_rolling, requests, settings)

    def generate_until(self, requests: list[Any], **settings: Any) -> list[Any]:
        return self._shared(super().generate_until, requests, settings)

    def _shared(
        self, answer: Callable[..., list[Any]], requests: Sequence[Any], settings: Mapping[str, Any]
    ) -> list[Any]:
        share = [requests[index] for index in share_of(len(requests))]
        return all_gather(answer(share, **settings) if share else [])

    def _loglikelihood_tokens(self, requests: list[Any], **settings: Any) -> Any:
        self._done, self._all = 0, max(len(requests), 1)
        return super()._loglikelihood_tokens(requests, **settings)

    def _model_call(self, inps: torch.Tensor, **settings: Any) -> Any:
        logits = super()._model_call(inps, **settings)
        self._done += len(inps)
        self._show(min(self._done / self._all, 1.0))
        return logits


class Harness:
    """Runs benchmarks.

    Args:
        data: a folder of local files, or None for the Hub.
        limit: items per benchmark, divided among the parts of a group; None for all.
        batch: requests in a batch; None for as many as fit.
    """

    def __init__(self, data: pathlib.Path | None, limit: int | None, batch: int | None = None) -> None:
        logging.getLogger("lm_eval").setLevel(
            logging.ERROR
        )  # it warns about a model that is already loaded, which is intended
        self.data = data
        self.limit = limit
        self.batch = batch
        self.manager = _manager()
        self.version: str = lm_eval.__version__

    def parts(self, name: str) -> list[str]:
        """The tasks that a name stands for, in lm-eval's order.

        Raises:
            EvaluationError: there is no such task.
        """
        entry = self.manager.task_index.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self.manager.all_tasks, 3)
            raise EvaluationError(
                f"lm-eval has no task {name!r}{': did you mean ' + ', '.join(near) + '?' if near else ''}",
                fix="lm_eval ls tasks",
            )
        if entry.tags and entry.yaml_path is None:
            return sorted(entry.tags)
        members = (entry.cfg or {}).get("task")
        if not isinstance(members, list):
            return [name]
        names = [member if isinstance(member, str) else member.get("task") or member["group"] for member in members]
        return [part for member in names for part in self.parts(member)]

    def check_rows(self, name: str) -> None:
        """Read the local files of a benchmark, before a model is loaded for it.

        Raises:
            EvaluationError: one of them cannot be read.
        """
        if self.data is not None:
            check_files(self.data, name, self.parts(name), self.manager.task_index)

    @contextlib.contextmanager
    def benchmark(self, name: str) -> Iterator[Benchmark]:
        """A benchmark with its rows read; its temporary files are removed afterwards.

        Raises:
            EvaluationError: there is no such task, or its rows cannot be read.
        """
        _refuse_scripts()
        parts = self.parts(name)
        with tempfile.TemporaryDirectory(prefix="nybble-") as scratch, _without_progress_bars():
            specs, data = parts, "Hub"
            if self.data is not None:
                specs, data = local_tasks(self.data, name, parts, self.manager.task_index, pathlib.Path(scratch))
            try:
                tasks = self.manager.load(specs)["tasks"]
            except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
                raise EvaluationError(
                    f"the rows of {name} cannot be read: {str(error).splitlines()[0]}",
                    fix="check the network, or --data-dir FOLDER with files TASK.SPLIT.jsonl",
                ) from error
            items = {part: task.eval_docs for part, task in tasks.items()}
            rows = _spread({part: len(docs) for part, docs in items.items()}, self.limit)
            chosen = [items[part][index] for part in rows for index in rows[part]]
            digest = hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()
            yield Benchmark(name, tasks, rows, sum(map(len, items.values())), data, digest)

    def score(
        self,
        benchmark: Benchmark,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[float], None] = lambda _: None,
    ) -> Scored:
        """A model's score on every item. All processes of a group must call this; they share the work.

        Args:
            benchmark: the benchmark, with its rows.
            model: the model, on its device and in evaluation mode.
            tokenizer: the model's tokenizer.
            show: called with the share that is done.

        Raises:
            EvaluationError: the task's metric is not one of single items.
        """
        batch = self.batch or ("auto" if model.device.type == "cuda" else CPU_BATCH)
        with _silenced(), _random_state_restored():  # lm-eval seeds every generator that training uses
            results = lm_eval.simple_evaluate(
                model=_SharedModel(show, pretrained=model, tokenizer=tokenizer, batch_size=batch),
                tasks=list(benchmark.tasks.values()), samples=benchmark.rows,
                num_fewshot=FEWSHOT.get(benchmark.name), bootstrap_iters=0, task_manager=self.manager,
            )  # fmt: skip
        # With several processes lm-eval returns the results only in the first.
        scored = broadcast(scores_of(benchmark, results) if results is not None else None)
        assert scored is not None, "the first process has results"
        return scored


def _refuse_scripts() -> None:
    for name in METRIC_SCRIPTS:
        script = pathlib.Path(name, f"{name}.py")
        if script.is_file():
            raise EvaluationError(
                f"the current folder has {script}, which would be run instead of the metric {name}",
                where=str(script.absolute()),
                fix="start nybble in another folder, or rename it",
            )


def _spread(counts: Mapping[str, int], limit: int | None) -> dict[str, list[int]]:
    """Which items are used: the first of each part, evenly from all parts that have more, until there are `limit` in total."""
    taken = dict.fromkeys(counts, 0)
    left = sum(counts.values()) if limit is None else min(limit, sum(counts.values()))
    while left:
        for part in (part for part in counts if taken[part] < counts[part]):
            if left:
                taken[part], left = taken[part] + 1, left - 1
    return {part: list(range(count)) for part, count in taken.items() if count}


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Silence stderr: lm-eval shows a bar for each of 57 subjects, and asks git for a commit even outside a repository."""
    stderr = os.dup(2)
    with pathlib.Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _random_state_restored() -> Iterator[None]:
    """Restore the state of Python's, numpy's and torch's random generators afterwards."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    numpy.random.set_state(arrays)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Disable the progress bars of Datasets, which reads many small files."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
