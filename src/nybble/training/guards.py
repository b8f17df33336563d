"""A run stops before the optimiser where training has gone wrong, and what it saves is read back."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nybble.distributed.group import all_reduce_number, barrier
from nybble.distributed.launcher import rank
from nybble.errors import TrainingError
from nybble.model.adapter.lora import check_gradients, check_saved
from nybble.run.folder import Run
from nybble.run.log import MetricsLine, append_line
from nybble.training.checkpoints import mark, rotate
from nybble.training.resource_use import ResourceUse
from nybble.training.trainer import CurrentStep
from nybble.weights.on_cpu import assert_unpacked


class Guards(TrainerCallback):  # type: ignore[misc]
    """Stop before the optimiser where training has gone wrong, and read back what is saved."""

    def __init__(self, run: Run, current_step: CurrentStep, used: ResourceUse) -> None:
        self.run = run
        self.current_step = current_step
        self.used = used
        self.first = True
        self.check_next = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say where the best checkpoint is: a resumed run's may be where it was copied from, or gone from there."""
        best = pathlib.Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Losses are finite; at the first step and the first after an evaluation, every tensor has a gradient."""
        self._check_losses(state.global_step + 1, args.device)
        if self.check_next:
            check_gradients(kwargs["model"], first=self.first and state.global_step == 0, scaled=args.fp16)
            self.check_next = self.first = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is over: forget its batches."""
        self.current_step.clear()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation must leave the 4-bit weights as they were."""
        assert_unpacked(kwargs["model"])
        self.check_next = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Once every process has written its part, read the checkpoint's adapter back and mark the checkpoint as complete; only
        then may older ones go."""
        folder = pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"
        barrier()
        if args.should_save:
            model = kwargs["model"]
            adapted = model if isinstance(model, PeftModel) else model.module
            # In float16 the first steps may all be left out, until the scale of the loss fits.
            check_saved(adapted, folder, learnt=state.global_step > 1 and not args.fp16)
            mark(folder, self.used.so_far(args.device))
            rotate(self.run, state.best_model_checkpoint)

    def _check_losses(self, step: int, device: torch.device) -> None:
        losses = [loss.read() for loss in self.current_step.losses]
        broken = sum(not math.isfinite(loss) for loss in losses)
        if not all_reduce_number(broken, device):  # all processes stop together
            return
        file = self.run.folder / f"nonfinite-step-{step}{f'-process-{rank()}' if rank() else ''}.pt"
        bad = [batch for batch, loss in zip(self.current_step.batches, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            torch.save({"step": step, "losses": torch.tensor(losses), "batches": bad}, file)
        if not rank():
            append_line(self.run.metrics, MetricsLine(step=step, loss=str(sum(losses))))
        barrier()  # before the first process tidies up, every batch is saved
        raise TrainingError(
            f"the loss of step {step} is not finite ({losses}); this step did not change the adapter",
            where=f"{file} (the batch)",
            fix=f"a lower train.learning_rate, then: nybble train -c {self.run.folder}/recipe.yaml out=ANOTHER",
        )
