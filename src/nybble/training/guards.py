"""Checks during training: a run stops before the optimiser if training has gone wrong, and what it saves is read back."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nybble.distributed.group import all_gather, all_reduce_number, barrier
from nybble.distributed.launcher import rank
from nybble.errors import TrainingError
from nybble.model.adapter.lora import check_gradients, check_saved
from nybble.run.folder import Run
from nybble.run.log import MetricsLine, append_line
from nybble.training.checkpoints import mark_complete, remove_old
from nybble.training.resource_use import ResourceUse
from nybble.training.trainer import CurrentStep
from nybble.weights.on_cpu import assert_unpacked


class Guards(TrainerCallback):  # type: ignore[misc]
    """Stop before the optimiser if training has gone wrong, and read back what is saved."""

    def __init__(self, run: Run, current_step: CurrentStep, used: ResourceUse) -> None:
        self.run = run
        self.current_step = current_step
        self.used = used
        self.first = True
        self.check_next = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Correct the path of the best checkpoint: a resumed run may have been copied or moved."""
        best = pathlib.Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that losses are finite and, at the first step and the first after an evaluation, that no gradient is missing."""
        self._check_losses(state.global_step + 1, args.device)
        if self.check_next:
            check_gradients(kwargs["model"], first=self.first and state.global_step == 0, scaled=args.fp16)
            self.check_next = self.first = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Clear the batches of the finished step."""
        self.current_step.clear()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the evaluation left the 4-bit weights as they were."""
        assert_unpacked(kwargs["model"])
        self.check_next = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the checkpoint's adapter back, mark the checkpoint as complete, and only then remove older ones."""
        folder = pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save:
            model = kwargs["model"]
            adapted = model if isinstance(model, PeftModel) else model.module
            # In float16 the first steps may all be skipped, until the loss scale fits.
            check_saved(adapted, folder, learnt=state.global_step > 1 and not args.fp16)
            mark_complete(folder, self.used.so_far(args.device))
            remove_old(self.run, state.best_model_checkpoint)

    def _check_losses(self, step: int, device: torch.device) -> None:
        losses = [loss.read() for loss in self.current_step.losses]
        broken = sum(not math.isfinite(loss) for loss in losses)
        if not all_reduce_number(broken, device):  # all processes stop together
            return
        bad = [batch for batch, loss in zip(self.current_step.batches, losses, strict=True) if not math.isfinite(loss)]
        # The first process writes those of all: others may be on machines without the run folder.
        saved = all_gather(
            [(rank(), {"step": step, "losses": torch.tensor(losses), "batches": _on_host(bad)})] if bad else []
        )
        if not rank():
            for number, content in saved:
                torch.save(content, self._nonfinite_file(step, number))
            append_line(self.run.metrics, MetricsLine(step=step, loss=str(sum(losses))))
        barrier()  # every batch is saved before the first process cleans up
        file = self._nonfinite_file(step, saved[0][0])
        raise TrainingError(
            f"the loss of step {step} is not finite ({losses}); this step did not change the adapter",
            where=f"{file} (the batch)",
            fix=f"a lower train.learning_rate, then: nybble train -c {self.run.folder}/recipe.yaml out=ANOTHER",
        )

    def _nonfinite_file(self, step: int, process: int) -> pathlib.Path:
        return self.run.folder / f"nonfinite-step-{step}{f'-process-{process}' if process else ''}.pt"


def _on_host(value: Any) -> Any:
    """Batches without a device, which another process may not have."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: _on_host(part) for name, part in value.items()}
    return [_on_host(part) for part in value] if isinstance(value, list) else value
