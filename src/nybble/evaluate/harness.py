"""Benchmarks by EleutherAI's lm-eval in this process, their prompts and metrics unchanged."""

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
"""Examples before each question where that is how a benchmark is reported; the others as their task says."""
METRIC_SCRIPTS = ("accuracy", "bertscore", "bleu", "bleurt", "code_eval", "f1", "rouge", "squad_v2")
"""What lm-eval's tasks ask of the package evaluate, which runs NAME/NAME.py of the current folder where there is one."""
CPU_BATCH = 8  # more padding than speed beyond it; on CUDA lm-eval tries what fits


@functools.cache
def _manager() -> TaskManager:
    """lm-eval's tasks; to read their 14,000 files takes seconds."""
    return TaskManager()


class _SharedModel(HFLM):  # type: ignore[misc]
    """lm-eval's own model, which shows how far it is. Of several processes each answers its share of the requests and has all
    answers: lm-eval works in each as if it were alone, so prompts, few-shot examples and scores are those of one process."""

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
        own = [requests[index] for index in share_of(len(requests))]
        return all_gather(answer(own, **settings) if own else [])

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
        limit: items per benchmark, spread over the parts of a group; None for all.
        batch: requests in a batch; None for what fits.
    """

    def __init__(self, data: pathlib.Path | None, limit: int | None, batch: int | None = None) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is loaded, as intended
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
        """A benchmark with its rows read; what it needs on the disk is gone afterwards.

        Raises:
            EvaluationError: there is no such task, or its rows cannot be read.
        """
        _refuse_scripts()
        parts = self.parts(name)
        with tempfile.TemporaryDirectory(prefix="nybble-") as scratch, _quiet():
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
            asked = [items[part][index] for part in rows for index in rows[part]]
            digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
            yield Benchmark(name, tasks, rows, sum(map(len, items.values())), data, digest)

    def score(
        self,
        benchmark: Benchmark,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[float], None] = lambda _: None,
    ) -> Scored:
        """A model's score on every item. Processes that belong together all call this, and share the work.

        Args:
            benchmark: with its rows.
            model: on its device, in evaluation mode.
            tokenizer: the model's.
            show: called with the share that is done.

        Raises:
            EvaluationError: the task's metric is not one of single items.
        """
        batch = self.batch or ("auto" if model.device.type == "cuda" else CPU_BATCH)
        with _silenced(), _randomness_kept():  # lm-eval seeds every generator that training goes on with
            found = lm_eval.simple_evaluate(
                model=_SharedModel(show, pretrained=model, tokenizer=tokenizer, batch_size=batch),
                tasks=list(benchmark.tasks.values()), samples=benchmark.rows,
                num_fewshot=FEWSHOT.get(benchmark.name), bootstrap_iters=0, task_manager=self.manager,
            )  # fmt: skip
        # Of several processes lm-eval gives the results to the first only.
        scored = broadcast(scores_of(benchmark, found) if found is not None else None)
        assert scored is not None, "the first process has results"
        return scored


def _refuse_scripts() -> None:
    for name in METRIC_SCRIPTS:
        script = pathlib.Path(name, f"{name}.py")
        if script.is_file():
            raise EvaluationError(
                f"the current folder has {script}, which would be run in place of the metric {name}",
                where=str(script.absolute()),
                fix="start nybble in another folder, or rename it",
            )


def _spread(counts: Mapping[str, int], limit: int | None) -> dict[str, list[int]]:
    """Which items are asked: the first of each part, as many of each as it can give, until there are `limit` in all."""
    taken = dict.fromkeys(counts, 0)
    left = sum(counts.values()) if limit is None else min(limit, sum(counts.values()))
    while left:
        for part in (part for part in counts if taken[part] < counts[part]):
            if left:
                taken[part], left = taken[part] + 1, left - 1
    return {part: list(range(count)) for part, count in taken.items() if count}


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Nothing on stderr: lm-eval shows a bar for each of 57 subjects, and asks git for a commit even outside a repository."""
    kept = os.dup(2)
    with pathlib.Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _randomness_kept() -> Iterator[None]:
    """Python's, numpy's and torch's generators as they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    numpy.random.set_state(arrays)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Datasets' bars; many small files are read."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
