"""After the first step, what comes only later is tried once: an evaluation and a save. So a run fails in its first minute, not in
its third hour."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nybble.model.adapter.lora import check_saved
from nybble.training.checkpoints import discarded_folder
from nybble.training.progress import REHEARSING, TRAINING


class Rehearsal(TrainerCallback):  # type: ignore[misc]
    """Before the second step of a new or resumed run, try what the first step was not followed by.

    By then the optimiser's state exists, which the evaluation before the first step did not have beside it. No number, random
    state or file of the run changes.

    Args:
        evaluate: evaluates the longest batch of validation rows and drops the result; None if there are no validation rows.
        show_activity: shows what the run is doing.
    """

    def __init__(self, evaluate: Callable[[], None] | None, show_activity: Callable[[str], None]) -> None:
        self._evaluate = evaluate
        self._show_activity = show_activity
        self._due = True
        self._start = 0
        self._evaluated = self._saved = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the step from which the run starts."""
        self._start = state.global_step

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the first step there was a real evaluation."""
        self._evaluated = self._evaluated or state.global_step > self._start

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the first step there was a real checkpoint."""
        self._saved = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the second step, try what has not happened yet; after a last step there is always a real one."""
        if not self._due or state.global_step == self._start:
            return
        self._due = False
        self._show_activity(REHEARSING)
        if self._evaluate is not None and not self._evaluated:
            self._evaluate()
        if args.should_save and not self._saved:
            model = kwargs["model"]
            adapted = model if isinstance(model, PeftModel) else model.module
            try_save(pathlib.Path(args.output_dir), adapted, kwargs["optimizer"])
        self._show_activity(TRAINING)


def try_save(checkpoints: pathlib.Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Write what makes a checkpoint large, adapter and optimiser's state, read the adapter back, and remove both.

    The rest of a checkpoint is a few kB. Writing all bytes, instead of only reserving their space, also shows that the states can
    be copied and that the disk and its quotas take them; of a 7B with rank 16 they are 0.24 GB.

    Args:
        checkpoints: the folder of the run's checkpoints.
        model: the model in training.
        optimizer: its optimiser.
    """
    with discarded_folder(checkpoints) as folder:
        model.save_pretrained(folder)
        check_saved(model, folder, learnt=False)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
