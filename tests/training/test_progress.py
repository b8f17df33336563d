"""What is said of a run while it goes on, and how long it still takes."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nybble.plan.schedule import Schedule, plan_warmup
from nybble.training.progress import EVALUATING, SAMPLING, SAVING, SCORING, TRAINING, RunProgress


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 40))
def test_remaining_evaluations_and_saves_are_counted(steps, evaluate_every, save_every, step):
    schedule = Schedule(steps, evaluate_every, save_every, 0)
    for every, counted in (
        (evaluate_every, schedule.evaluations_after(step)),
        (save_every, schedule.saves_after(step)),
    ):
        assert counted == sum(later % every == 0 or later == steps for later in range(step + 1, steps + 1))


@pytest.mark.parametrize(
    ("asked", "steps", "warmup", "said"),
    [
        (0.03, 1000, 30, ""), (0.03, 2, 1, ""), (0, 1, 0, ""), (5, 6, 5, ""), (2.7, 6, 2, ""),
        (0.03, 1, 0, "the only step"), (10, 10, 1, "all 10 steps: the warm-up is shortened to 1 step"),
        (0.999, 100, 10, "train.warmup=0.999 covers all 100 steps: the warm-up is shortened to 10 steps"),
        (2000, 1500, 150, "all 1,500 steps"),
    ],
)  # fmt: skip
def test_a_warm_up_leaves_steps_to_learn_in(
    asked,
    steps,
    warmup,
    said,
):
    found, notice = plan_warmup(asked, steps)
    assert found == warmup < steps
    assert said in notice
    assert bool(said) == bool(notice)


def test_the_time_left_counts_evaluations_samples_and_checkpoints(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("nybble.training.progress.time.perf_counter", lambda: now[0])
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    work = RunProgress(console, Schedule(12, 4, 4, 0), frozenset({EVALUATING, SAMPLING}))
    work.start(0)
    assert work.left() == "", "nothing is known yet"

    def doing(what: str, seconds: float, *parts: int) -> None:
        work.activity(what, *parts)
        now[0] += seconds

    doing(EVALUATING, 100, 0, 3)
    doing(TRAINING, 0)
    for step in range(1, 5):
        work.step_done(step, 2.0, "loss 1.0")
    assert work.left() == "over 3:36 left", "8 steps of 2 s, 2 evaluations of 100 s; samples are not known yet"
    doing(EVALUATING, 50, 0, 3)
    doing(SAMPLING, 30, 0, 2)
    doing(TRAINING, 0)
    doing(SAVING, 1)
    doing(TRAINING, 0)
    assert work.left() == "2:58 left", "8 x 2 s and 2 x (50 + 30 + 1) s"
    for step in range(5, 13):
        work.step_done(step, 3600.0 if step == 5 else 2.0, "")
    assert work.left() == "0:00 left"
    work.stop()
    shown = console.file.getvalue()
    assert all(text in shown for text in ("evaluating 1 of 3", "answering samples 1 of 2", "saving", "2:58 left")), (
        shown
    )


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
@pytest.mark.parametrize("what", [TRAINING, SCORING])
@pytest.mark.parametrize("steps", [4, 12000])
def test_the_bar_leaves_out_what_does_not_fit_and_cuts_nothing(width, what, steps):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    work = RunProgress(console, Schedule(steps, 4, 4, 0), frozenset({SCORING}))
    work.step_done(3, 2.0, "loss 1.2345  12,345 tokens/s  12.34 GB")
    if what != TRAINING:
        work.activity(what, 3, 25)
    console.print(work._bar)
    lines = console.file.getvalue().splitlines()
    print("\n".join(lines))
    (line,) = lines
    assert len(line) <= width
    parts = re.split(r"\s{2,}", line.strip())
    whole = [
        what if what == TRAINING else f"{what} 4 of 25",
        f"3/{steps}",
        "0:00",
        "loss 1.2345",
        "12,345 tokens/s",
        "12.34 GB",
    ]
    if width > 20:
        assert parts[0] == whole[0]
        assert all(part in whole or part.endswith(" left") or set(part) <= set("━╸ ") for part in parts), (
            "a part was cut"
        )
    if width >= 60:
        assert f"3/{steps}" in parts
    if width == 140:
        assert set(whole) <= set(parts)
