"""Benchmarks by EleutherAI's lm-eval in this process, their prompts and metrics unchanged, from the Hub or from local files.

Local files are named TASK.SPLIT.jsonl or .jsonl.gz, after lm-eval's name of the task, of its data set's configuration
(winogrande_xl) or of its group (mmlu, whose rows say their `subject`). A task is then lm-eval's own YAML with another
data set: `include` keeps everything else.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import gzip
import hashlib
import json
import logging
import os
import pathlib
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import lm_eval
import numpy
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.data.rows.readers import TooLargeError, kind_of, read_file
from nybble.distributed.group import from_first, gathered, share_of
from nybble.errors import DataError, EvaluationError
from nybble.evaluate.scores import MissingRowsError, Scored

FEWSHOT = {"mmlu": 5}
"""Examples before each question where that is how a benchmark is reported; the others as their task says."""
METRICS = ("acc_norm", "exact_match", "acc")
"""Which metric of a task counts, the first it has; else its own first."""
METRIC_SCRIPTS = ("accuracy", "bertscore", "bleu", "bleurt", "code_eval", "f1", "rouge", "squad_v2")
"""What lm-eval's tasks ask of the package evaluate, which runs NAME/NAME.py of the current folder where there is one."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
CPU_BATCH = 8  # more padding than speed beyond it; on CUDA lm-eval tries what fits


@dataclass(frozen=True)
class File:
    """Rows on the disk, and the file that they came from."""

    path: pathlib.Path
    origin: str


@dataclass(frozen=True)
class Benchmark:
    """A task or a group of tasks, ready to be run."""

    name: str
    tasks: dict[str, Any]
    """lm-eval's tasks by name."""
    rows: dict[str, list[int]]
    """Which items of each."""
    of: int
    """How many items there are in all."""
    data: str
    """Where they came from."""
    digest: str
    """Of the items that are asked: equal means equal items."""


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
        return gathered(answer(own, **settings) if own else [])

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
        limit: items a benchmark, spread over the parts of a group; None for all.
        batch: requests in a batch; None for what fits.
    """

    def __init__(self, data: pathlib.Path | None, limit: int | None, batch: int | None = None) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant: a model already loaded
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
        return [part for own in names for part in self.parts(own)]

    def check_rows(self, name: str) -> None:
        """Read the local files of a benchmark, before a model is loaded for it.

        Raises:
            EvaluationError: one of them cannot be read.
        """
        if self.data is None:
            return
        parts = self.parts(name)
        configs = [(self.manager.task_index[part].cfg or {}).get("dataset_name") for part in parts]
        for stem in sorted({name, *parts, *filter(None, configs)}):
            for file in _named(self.data, stem).values():
                _check(file)

    @contextlib.contextmanager
    def benchmark(self, name: str) -> Iterator[Benchmark]:
        """A benchmark with its rows read; what it needs on the disk is gone afterwards.

        Raises:
            EvaluationError: the task or its rows are not to be had.
        """
        _refuse_scripts()
        parts = self.parts(name)
        with tempfile.TemporaryDirectory(prefix="nybble-") as scratch, _quiet():
            specs, data = parts, "Hub"
            if self.data is not None:
                specs, data = self._localised(name, parts, pathlib.Path(scratch))
            try:
                tasks = self.manager.load(specs)["tasks"]
            except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
                raise EvaluationError(
                    f"the rows of {name} cannot be read: {str(error).splitlines()[0]}",
                    fix="check the network, or --data-dir FOLDER with files TASK.SPLIT.jsonl",
                ) from error
            items = {part: task.eval_docs for part, task in tasks.items()}
            rows = _spread({part: len(own) for part, own in items.items()}, self.limit)
            asked = [items[part][place] for part in rows for place in rows[part]]
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
        scored = from_first(_scored(benchmark, found) if found is not None else None)
        assert scored is not None, "the first process has results"
        return scored

    def _localised(self, name: str, parts: Sequence[str], scratch: pathlib.Path) -> tuple[list[str], str]:
        """lm-eval's own tasks on local files, as YAML files; and the name of the file with the items."""
        specs, data = [], ""
        for part in parts:
            entry = self.manager.task_index[part]
            own: Mapping[str, Any] = entry.cfg or {}
            files = self._files(name, part, own, scratch)
            given = {key: own[key] if own.get(key) in files else None for key in SPLITS if key in own}
            items = given.get("test_split") or given.get("validation_split")
            if items is None:
                continue
            data = data or files[items].origin
            task = {
                "include": str(entry.yaml_path), "task": part, "dataset_path": "json", "dataset_name": None,
                "dataset_kwargs": {
                    "data_files": {split: str(file.path) for split, file in files.items()},
                    "cache_dir": str(scratch / "cache"),
                },
                **given,
            }  # fmt: skip
            file = scratch / f"{part}.yaml"
            file.write_text(yaml.safe_dump(task), encoding="utf-8")
            specs.append(str(file))
        if not specs:
            raise MissingRowsError(
                f"no file for it in {self.data}", fix=f"put {name}.validation.jsonl or {name}.test.jsonl there"
            )
        return specs, data

    def _files(self, name: str, part: str, own: Mapping[str, Any], scratch: pathlib.Path) -> dict[str, File]:
        """A task's files by split; of a group's, the rows of the task's subject."""
        assert self.data is not None
        for stem in filter(None, (part, own.get("dataset_name"), name)):
            found = _named(self.data, stem)
            if found and stem == name != part:
                parted = {split: _of_subject(file, own["dataset_name"], scratch) for split, file in found.items()}
                return {split: File(path, found[split].name) for split, path in parted.items() if path is not None}
            if found:
                return {split: File(file, file.name) for split, file in found.items()}
        return {}


def _refuse_scripts() -> None:
    for name in METRIC_SCRIPTS:
        script = pathlib.Path(name, f"{name}.py")
        if script.is_file():
            raise EvaluationError(
                f"the current folder has {script}, which would be run in place of the metric {name}",
                where=str(script.absolute()),
                fix="start nybble in another folder, or rename it",
            )


def _named(folder: pathlib.Path, stem: str) -> dict[str, pathlib.Path]:
    """The files STEM.SPLIT.jsonl, packed or not, by split."""
    files = [file for file in sorted(folder.glob(f"{stem}.*")) if kind_of(file) == ".jsonl"]
    return {file.name.removeprefix(f"{stem}.").split(".")[0]: file for file in files}


def _check(file: pathlib.Path) -> None:
    """Refuse a file of rows that cannot be read, where Datasets names neither the line nor the way out.

    Raises:
        EvaluationError: the first of its faults.
    """
    try:
        for item in read_file(file):
            if isinstance(item, DataError):
                raise item
    except DataError as fault:
        fix = (
            "shorten the row, or remove it" if isinstance(fault, TooLargeError) else fault.fix
        )  # no option raises it here
        raise EvaluationError(f"a benchmark's rows cannot be read: {fault.what}", where=fault.where, fix=fix) from fault


def _of_subject(file: pathlib.Path, subject: str, scratch: pathlib.Path) -> pathlib.Path | None:
    """The rows of one subject, in a file of their own; None where there are none."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8-sig") as stream:
        lines = [line for line in stream if line.strip() and json.loads(line).get("subject") == subject]
    if not lines:
        return None
    part = scratch / f"{subject}.{file.name.split('.')[1]}.jsonl"
    part.write_text("".join(lines), encoding="utf-8")
    return part


def _spread(counts: Mapping[str, int], limit: int | None) -> dict[str, list[int]]:
    """Which items are asked: the first of each part, as many of each as it can give, until there are `limit` in all."""
    taken = dict.fromkeys(counts, 0)
    left = sum(counts.values()) if limit is None else min(limit, sum(counts.values()))
    while left:
        for part in (part for part in counts if taken[part] < counts[part]):
            if left:
                taken[part], left = taken[part] + 1, left - 1
    return {part: list(range(count)) for part, count in taken.items() if count}


def _scored(benchmark: Benchmark, found: Mapping[str, Any]) -> Scored:
    """lm-eval's log of every item as scores."""
    metric, values, subjects, texts = "", [], [], []
    for part in benchmark.rows:
        logged = found["samples"][part]
        one_filter = [entry for entry in logged if entry["filter"] == logged[0]["filter"]]
        metric = metric or next(
            (name for name in METRICS if name in one_filter[0]["metrics"]), one_filter[0]["metrics"][0]
        )
        for entry in sorted(one_filter, key=lambda entry: entry["doc_id"]):
            if not isinstance(entry[metric], int | float):
                raise EvaluationError(
                    f"{benchmark.name}: {metric} is not a score of single items, so it cannot be compared"
                )
            values.append(float(entry[metric]))
            subjects.append(part)
            texts.append(_said(entry))
    first = next(iter(benchmark.rows))
    return Scored(
        benchmark.name, metric, found["higher_is_better"][first].get(metric, True), str(found["versions"].get(first)),
        found["n-shot"][first], benchmark.of, benchmark.data, values, subjects, texts,
    )  # fmt: skip


def _said(entry: Mapping[str, Any]) -> str:
    """All that an item says, and its question followed by the right answer where lm-eval asked for just that."""
    target, asked = entry["target"], entry["arguments"]
    right = asked[target] if isinstance(target, int) and 0 <= target < len(asked) else ()
    return "\n".join([*_strings(entry["doc"]), "".join(part for part in right if isinstance(part, str))])


def _strings(value: Any) -> Iterator[str]:
    """Every text in an item."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Nothing on stderr: lm-eval shows a bar for each of 57 subjects, and asks git for a commit outside of repositories too."""
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
