"""DPO on made-up pairs by nybble's own trainer: what bench/preference.py and bench/scale.py measure."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import tempfile
import time
from typing import Any

import torch

from bench.train import counted_tokens
from nybble.data.judged_batches import JudgedCollator
from nybble.engine.fuse import fusion
from nybble.objective.preference import PairObjective
from nybble.plan.schedule import Schedule
from nybble.recipe import Recipe
from nybble.training.arguments import training_arguments
from nybble.training.optimizer import make_optimizer
from nybble.training.reference import computed_likelihoods
from nybble.training.trainer import QLoraTrainer

RATE, BETA, RANK = 5e-5, 0.1, 16
WORKS = {
    "short prompts": (128, 384, 8),
    "long prompts": (1024, 256, 4),
}  # tokens of prompt and answer, pairs of a micro batch
PLAIN = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""The text alone and an end, as TRL makes of pairs of texts."""


def pairs(tokenizer: Any, data: pathlib.Path, work: str, steps: int, tiny: bool) -> list[dict[str, str]]:
    """Pairs of text whose parts have about so many tokens."""
    prompt, answer, count = shape_of(work, tiny)
    rows = [json.loads(line) for line in data.open()]
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}\n" for row in rows]
    ids = list(itertools.chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"]))
    sizes = [prompt, answer, answer]
    made = []
    for n in range(count * steps):
        start = n * sum(sizes) % (len(ids) - sum(sizes))
        cuts = list(itertools.accumulate(sizes, initial=start))
        parts = [tokenizer.decode(ids[begin:end]).strip() for begin, end in itertools.pairwise(cuts)]
        made.append(dict(zip(("prompt", "chosen", "rejected"), parts, strict=True)))
    return made


def shape_of(work: str, tiny: bool) -> tuple[int, int, int]:
    """Tokens of prompt and answer, and pairs of a micro batch."""
    prompt, answer, count = WORKS[work]
    return (prompt // 16, answer // 16, 2) if tiny else (prompt, answer, count)


def judging_trainer(
    model: Any, tokenizer: Any, recipe: Recipe, rows: Any, steps: int, *, live: bool, callbacks: list[Any]
) -> tuple[QLoraTrainer, dict[str, Any]]:
    """nybble's trainer for DPO with a fused model, without evaluation and saving; and the time of a reference that is kept."""
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    collate, more = JudgedCollator(0, flatten=True, shares_prompts=fusion(model).shares_prompts), {}
    if not live:
        began = time.perf_counter()
        collate = dataclasses.replace(
            collate, reference=computed_likelihoods(model, collate, rows, list(rows["length"]), dtype)
        )
        more["reference_s"] = round(time.perf_counter() - began, 1)
    arguments = training_arguments(
        recipe, pathlib.Path(tempfile.mkdtemp()), Schedule(steps, 10**6, 10**6, 0), torch.device(model.device.type), dtype,
        has_validation=False, checkpointing=False,
    )  # fmt: skip
    arguments.save_strategy = "no"
    trainer = QLoraTrainer(
        objective=PairObjective("dpo", BETA), optimizer=make_optimizer(model, recipe.train.optimizer, dtype, RATE, 0.0),
        model=model, args=arguments, train_dataset=rows, data_collator=collate, processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip
    counted_tokens(trainer)
    return trainer, more
