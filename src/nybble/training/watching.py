"""Shows another part of the program each validation loss of a run, and ends the run if that part says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Watch = Callable[[int, float, bool], bool]
"""Called with the number of an evaluation, from 1, its loss, and whether it is the run's last one; returns whether the run shall
end there. The evaluation before the first step is not counted."""


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Report evaluations to a `Watch`; a run that it ends is finished as after early stopping."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report an evaluation after the first step."""
        if not state.global_step:
            return
        number = sum("eval_loss" in entry and entry["step"] > 0 for entry in state.log_history)
        is_last = state.global_step >= state.max_steps
        if self._watch(number, kwargs["metrics"]["eval_loss"], is_last):
            control.should_training_stop = True
