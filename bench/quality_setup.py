"""What the runs of bench/quality.py are: setup, methods, data sets and their splits."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from nybble.data.sets.prepare import Prepared, prepare
from nybble.recipe import load_recipe


@dataclass(frozen=True)
class Setup:
    """What all runs have in common. Results of different setups are never mixed."""

    steps: int = 300
    rows: int = 16
    """Rows per step, in one micro batch; with GSM8K, 3,500 tokens per step."""
    length: int = 512
    """Longest row in tokens; longer rows are dropped from every split. Rows are not packed, so that each has its own loss."""
    seeds: int = 5
    held_out: int = 1319
    """The most rows of a development or test split that are measured."""
    questions: int = 500
    """The number of test questions to answer, from the beginning of the file."""
    new_tokens: int = 256
    """The most tokens per answer."""
    r: int = 16
    alpha: int = 32


@dataclass(frozen=True)
class Run:
    """What identifies a run."""

    stage: str
    """tune (measured on the development split), test, or before (untrained, on the test split)."""
    data: str
    method: str
    seed: int
    rate: float


@dataclass(frozen=True)
class Method:
    """What is trained and how its base is stored."""

    title: str
    quantization: str
    targets: str
    """If empty, there is no adapter and all weights are trained."""
    fp8: Mapping[str, Any] | None = None
    """The arguments of `nybble.fuse` beside compute="fp8", where it is trained in fp8."""


@dataclass(frozen=True)
class Task:
    """A data set and its splits."""

    title: str
    train: str
    test: str | int
    """A file, or the number of rows held out of `train`."""
    development: int
    """The number of rows held out of `train`."""
    map: str
    prompt: tuple[str, ...]
    """The columns of the prompt; no prompt occurs in two splits."""
    asks: bool
    """Whether answers are scored."""


METHODS = {
    "lora": Method("LoRA, 16-bit base, all linear", "none", "all-linear"),
    "qlora": Method("QLoRA NF4, all linear", "nf4", "all-linear"),
    "qlora-qv": Method("QLoRA NF4, q_proj and v_proj", "nf4", "[q_proj, v_proj]"),
    "full": Method("full fine-tuning, bf16", "none", ""),
}
SLOW_BACKWARD = {"fp8_fast": "forward"}
FP8_METHODS = {
    "fp8": Method("fp8, slow sums in backward", "nf4", "all-linear", SLOW_BACKWARD),
    "fp8-down": Method(
        "the same, down_proj in 16 bits", "nf4", "all-linear", {"fp8_skip": ["down_proj"], **SLOW_BACKWARD}
    ),
    "fp8-ends": Method(
        "the same, first and last layer in 16 bits",
        "nf4",
        "all-linear",
        {"fp8_skip": ["layers.0", "layers.29"], **SLOW_BACKWARD},
    ),
    "fp8-fast": Method("fp8, fast sums", "nf4", "all-linear", {"fp8_fast": "both"}),
}
"""What bench/quality_fp8.py compares with qlora of METHODS."""
ALL_METHODS = METHODS | FP8_METHODS
TASKS = {
    "gsm8k": Task(
        "GSM8K", "gsm8k_train.jsonl", "gsm8k_test.jsonl", 500, "{prompt: question, completion: answer}", ("question",), True
    ),
    "instruct_mix": Task("instruct_mix", "instruct_mix.jsonl", 600, 300, "{}", ("instruction", "input"), False),
}  # fmt: skip


def write_splits(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Write TASK-train.jsonl, TASK-development.jsonl and TASK-test.jsonl, with the same rows at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        parts = split_rows(task, source)
        prompts = [_prompt(task, row) for rows in parts.values() for row in rows]
        assert len(prompts) == len(set(prompts)), "no prompt occurs twice"
        for split, rows in parts.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            file = folder / f"{name}-{split}.jsonl"
            if not file.exists() or file.read_text() != text:
                file.write_text(text)


def split_rows(task: Task, source: pathlib.Path) -> dict[str, list[dict[str, str]]]:
    """Rows of each split, each prompt once; held-out rows are drawn by a random generator of their own."""
    rows = list({_prompt(task, row): row for row in _read(source / task.train)}.values())
    rows = [rows[int(n)] for n in numpy.random.default_rng(0).permutation(len(rows))]
    if isinstance(task.test, int):
        test, rows = rows[: task.test], rows[task.test :]
    else:
        test = list({_prompt(task, row): row for row in _read(source / task.test)}.values())
        asked = {_prompt(task, row) for row in test}
        rows = [row for row in rows if _prompt(task, row) not in asked]
    return {"train": rows[task.development :], "development": rows[: task.development], "test": test}


def _read(file: pathlib.Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _prompt(task: Task, row: dict[str, str]) -> tuple[str, ...]:
    return tuple(" ".join(row[column].split()) for column in task.prompt)


def tokens_of(
    data: str, split: str, setup: Setup, tokenizer: PreTrainedTokenizerBase, folder: pathlib.Path
) -> Prepared:
    """A split as token rows, from the cache if it was tokenised before."""
    recipe = load_recipe(None, [
        f"data.path={folder}/{data}-{split}.jsonl", f"data.map={TASKS[data].map}", "data.validation=0",
        f"data.max_length={setup.length}", "data.overlength=drop",
    ])  # fmt: skip
    return prepare(recipe.data, tokenizer, 0, folder / "cache", lambda _: None)
