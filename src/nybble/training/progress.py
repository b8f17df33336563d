"""What a run is doing, how far it is, and how long it will take."""

from __future__ import annotations

import statistics
import time
from collections import deque

from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table

from nybble.distributed.heartbeat import beat, rest
from nybble.plan.schedule import Schedule
from nybble.terminal import tell

TRAINING, EVALUATING, SCORING = "training", "evaluating", "scoring benchmarks"
SAMPLING, SAVING, REHEARSING = "answering samples", "saving", "trying an evaluation and a save"
RECENT = 20  # steps from whose time the rest is predicted: a machine may become busy, or idle

SHORT, LONG = 8, 20  # cells of the bar
GAP = 2  # cells between the parts of the bar's line


class _Line(ProgressColumn):
    """The bar's line; on a narrow terminal the least important parts are left out, and none is truncated."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Table:
        steps = f"{task.completed:>{len(str(task.total))}.0f}/{task.total}"
        numbers = enumerate(filter(None, task.fields["text"].split("  ")))
        # Each part has a rank; the highest is left out first.
        bar = ProgressBar(task.total, task.completed, width=SHORT)
        parts: list[tuple[int, str | ProgressBar, str]] = [
            (0, task.fields["what"], ""),
            (4, bar, ""),
            (1, steps, "green"),
            (5, _clock(task.elapsed or 0), "yellow"),
            (2, task.fields["left"], ""),
            *((3 if index == 0 else 5 + index, text, "") for index, text in numbers),
        ]
        parts = [part for part in parts if part[1]]
        while (spare := self._console.width + GAP - sum(_width(part) + GAP for _, part, _ in parts)) < 0 and len(
            parts
        ) > 1:
            parts.remove(max(parts, key=lambda part: part[0]))
        bar.width = min(SHORT + max(spare, 0), LONG)
        line = Table.grid(padding=(0, GAP, 0, 0))
        for _, _, style in parts:
            line.add_column(no_wrap=True, style=style)
        line.add_row(*(part for _, part, _ in parts))
        return line


def _width(part: str | ProgressBar) -> int:
    return SHORT if isinstance(part, ProgressBar) else cell_len(part)


class RunProgress:
    """The progress bar of a run; without a terminal, lines of text."""

    def __init__(self, console: Console, schedule: Schedule, activities: frozenset[str]) -> None:
        """`activities`: which of EVALUATING, SCORING and SAMPLING are part of each evaluation."""
        self._console = console
        self.schedule = schedule
        self.activities = activities
        self._what = TRAINING
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._step = 0
        self._bar = Progress(_Line(console), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(TRAINING, total=schedule.steps, what=TRAINING, text="", left="")

    def start(self, step: int) -> None:
        """Show the bar, at the step from which a resumed run starts."""
        self._step = step
        beat()
        self._bar.start()
        self._bar.update(self._task, completed=step)

    def stop(self) -> None:
        """Remove the bar."""
        rest()
        self._bar.stop()

    def activity(self, what: str, done: int = 0, total: int = 0) -> None:
        """Show the current activity, and how many parts of it are done; records the time of the previous one."""
        beat()
        now, is_new = time.perf_counter(), what != self._what
        if is_new:
            self._seconds[self._what] = now - self._started
            self._what, self._started = what, now
        if is_new and what in self.activities and not self._console.is_terminal:
            tell(self._console, f"step {self._step:>5}  {what}", hang=12)
        parts = f" {min(done + 1, total)} of {total}" if total else ""
        self._bar.update(self._task, what=f"{what}{parts}", left=self.left(), refresh=is_new)

    def step_done(self, step: int, seconds: float, text: str) -> None:
        """Record a step and how long it took, in seconds."""
        self._step = step
        self._steps.append(seconds)
        self._bar.update(self._task, completed=step, text=text, left=self.left())

    def left(self) -> str:
        """Time until the end, including evaluations, sample answers and checkpoints; "" before any step is done.

        It is a lower bound until each activity that is still to come has happened once.
        """
        if not self._steps:
            return ""
        evaluations, saves = self.schedule.evaluations_after(self._step), self.schedule.saves_after(self._step)
        counts = {**dict.fromkeys(self.activities, evaluations), SAVING: saves}
        seconds = (self.schedule.steps - self._step) * statistics.fmean(self._steps)
        seconds += sum(count * self._seconds.get(what, 0.0) for what, count in counts.items())
        known = all(what in self._seconds for what, count in counts.items() if count)
        return f"{'' if known else 'over '}{_clock(seconds)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
