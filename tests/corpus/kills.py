"""Runs that are killed: eight configurations, the moments at which they are, and sixty sequences of these."""

from __future__ import annotations

import random
from dataclasses import dataclass

SEED = 7
EVERY = "train.evaluate_every=3"
OVERFITS = [EVERY, "train.learning_rate=0.03", "train.scheduler=constant", "lora.alpha=256"]  # after 18 steps

CONFIGURATIONS = {
    "epochs": ["train.epochs=1.5", EVERY],
    "steps": ["train.max_steps=12", EVERY, "train.samples=1"],
    "best kept": ["train.max_steps=24", *OVERFITS],
    "packed": ["train.max_steps=12", EVERY, "data.packing=true", "train.accumulation=1", "data.max_length=128"],
    "float32": ["train.max_steps=12", EVERY, "model.quantization=none", "train.keep_best=false"],
    "accumulation": ["train.epochs=2", EVERY, "train.micro_batch=2", "train.accumulation=5", "train.neftune_alpha=5"],
    "early stopping": ["train.max_steps=60", *OVERFITS, "train.early_stopping=2"],
    "two processes": ["train.max_steps=15", EVERY, "train.processes=2", "train.micro_batch=2"],
}
"""Options of each, beside those that all have."""

COMMON = [
    "model.device=cpu", "model.dtype=float32", "data.max_length=256", "data.validation=8", "train.micro_batch=4",
    "train.accumulation=2", "train.samples=0", "lora.dropout=0.1", "lora.r=4",
]  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """When a process is killed: just before it changes something, so many changes later, or while it writes a file."""

    event: str
    """As Python audits it: open, os.mkdir, os.rename, shutil.rmtree."""
    path: str
    """A regular expression of the path in the folder that is watched."""
    count: int = 1
    """Which of these events."""
    later: int = 0
    """How many changes after it."""
    bytes: int = 0
    """What a file may grow to from then on; the write beyond it is the last."""


@dataclass(frozen=True)
class Elapsed:
    """Some time after so many changes; without any, just before the last of these."""

    changes: int
    seconds: float = 0.0


CHECKPOINT = r"checkpoint-\d+"
NAMED = {
    "before the run's folder": Moment("os.rename", r"^run$"),
    "after the run's folder": Moment("os.rename", r"^run$", later=1),
    "before a step's line": Moment("open", r"^run/metrics\.jsonl$", 3),
    "before a checkpoint": Moment("os.mkdir", rf"{CHECKPOINT}$", 2),
    "in a checkpoint's adapter": Moment("os.mkdir", rf"{CHECKPOINT}$", 2, bytes=30_000),
    "in a checkpoint's optimizer": Moment("os.mkdir", rf"{CHECKPOINT}$", 2, bytes=70_000),
    "in the first checkpoint's optimizer": Moment("os.mkdir", rf"{CHECKPOINT}$", 1, bytes=70_000),
    "between a checkpoint's files": Moment("open", rf"{CHECKPOINT}/adapter_config\.json$", 2),
    "before a checkpoint's state": Moment("open", rf"{CHECKPOINT}/trainer_state\.json$", 2),
    "before a checkpoint is marked": Moment("os.rename", rf"{CHECKPOINT}/COMPLETE$", 2),
    "after a checkpoint is marked": Moment("os.rename", rf"{CHECKPOINT}/COMPLETE$", 2, later=1),
    "before a checkpoint is removed": Moment("shutil.rmtree", rf"{CHECKPOINT}$"),
    "while a checkpoint is removed": Moment("shutil.rmtree", rf"{CHECKPOINT}$", later=4),
    "after the last checkpoint": Moment("os.rename", r"^run/summary\.json$"),
    "after the summary": Moment("os.rename", r"^run/loss\.png$"),
    "before the card": Moment("os.rename", r"^run/README\.md$"),
    "before the adapter's folder": Moment("os.mkdir", r"^run/\.[\w-]*writing-\w+$"),
    "in the adapter": Moment("os.mkdir", r"^run/\.[\w-]*writing-\w+$", bytes=20_000),
    "between the adapter's files": Moment("open", r"^run/\.[\w-]*writing-\w+/adapter_config\.json$"),
    "before the adapter is there": Moment("os.rename", r"^run/adapter$"),
    "after the adapter is there": Moment("os.rename", r"^run/adapter$", later=1),
}


Kill = str | tuple[float, float]
"""The name of a moment; or a share of the changes that the whole run makes, and seconds after it."""


@dataclass(frozen=True)
class Sequence:
    """Kills of one run, one after another, before it may end."""

    name: str
    configuration: str
    kills: list[Kill]


def sequences() -> list[Sequence]:
    """Eight of each configuration with one process: each meets ten of the named moments, and others at random.

    Of two processes four: each moment is one of the first process.
    """
    chance, names, found = random.Random(SEED), list(NAMED), []

    def elapsed(most: float) -> tuple[float, float]:
        return round(chance.uniform(0.02, 0.9), 2), round(chance.uniform(0, most), 3)

    for number, configuration in enumerate(CONFIGURATIONS):
        turn = [names[(number * 8 + place * 5) % len(names)] for place in range(10)]
        kills: list[list[Kill]] = [[turn[0]], turn[1:3], [turn[3], elapsed(0)], turn[4:6], turn[6:8]]
        kills += [[turn[8], elapsed(0.02), turn[9]], [elapsed(0), elapsed(0)], [elapsed(0.02) for _ in range(3)]]
        if configuration == "two processes":
            kills = [["before a checkpoint is marked"], ["in a checkpoint's optimizer", "before the adapter is there"]]
            kills += [["before the run's folder", (0.6, 0.0)], [(0.5, 0.02), "after the last checkpoint"]]
        for place, several in enumerate(kills):
            several.sort(key=lambda kill: names.index(kill) / len(names) if isinstance(kill, str) else kill[0])
            told = " + ".join(kill if isinstance(kill, str) else _told(*kill) for kill in several)
            found.append(Sequence(f"{configuration} {place + 1}: {told}", configuration, several))
    return found


def _told(share: float, seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms after {share:.0%}" if seconds else f"at {share:.0%}"
