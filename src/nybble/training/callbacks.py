"""What happens beside the training loop: guards, records, progress, sample answers."""

from __future__ import annotations

import math
import pathlib
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nybble.distributed.launcher import rank
from nybble.errors import TrainingError
from nybble.model.adapter.lora import check_gradients, check_saved
from nybble.run.folder import Run
from nybble.run.log import MetricsLine, SampleLine, append_line
from nybble.terminal import tell
from nybble.training.checkpoints import mark, rotate
from nybble.training.progress import SAMPLING, TRAINING, Work
from nybble.training.trackers import log_samples
from nybble.training.trainer import Window
from nybble.weights.on_cpu import assert_unpacked

Answers = Callable[[Callable[[int, int], None]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Spent:
    """What a run has taken, the legs before it was resumed included."""

    began: float
    """When this leg began, seconds since 1970."""
    earlier: Mapping[str, Any]
    """What the legs before it took, as the checkpoint it goes on from says; nothing of a first leg."""

    def now(self, device: torch.device) -> dict[str, float]:
        """`seconds`, and `peak_memory` in bytes."""
        seconds, peak = self.earlier.get("seconds", 0.0) + time.time() - self.began, peak_memory(device)
        return {"seconds": round(seconds, 1), "peak_memory": max(peak, int(self.earlier.get("peak_memory", 0)))}


class Guards(TrainerCallback):  # type: ignore[misc]
    """Stop before the optimiser where training has gone wrong, and read back what is saved."""

    def __init__(self, run: Run, window: Window, spent: Spent) -> None:
        self.run = run
        self.window = window
        self.spent = spent
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
        self.window.clear()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation must leave the 4-bit weights as they were."""
        assert_unpacked(kwargs["model"])
        self.check_next = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Once every process has written its part, read the checkpoint's adapter back and mark the checkpoint as whole; only
        then older ones may go."""
        folder = pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if args.should_save:
            model = kwargs["model"]
            adapted = model if isinstance(model, PeftModel) else model.module
            # In float16 the first steps may all be left out, until the scale of the loss fits.
            check_saved(adapted, folder, learnt=state.global_step > 1 and not args.fp16)
            mark(folder, self.spent.now(args.device))
            rotate(self.run, state.best_model_checkpoint)

    def _check_losses(self, step: int, device: torch.device) -> None:
        losses = [loss.read() for loss in self.window.losses]
        broken = sum(not math.isfinite(loss) for loss in losses)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everywhere = torch.tensor(broken, device=device)
            torch.distributed.all_reduce(everywhere)  # all processes stop together
            broken = int(everywhere)
        if not broken:
            return
        file = self.run.folder / f"nonfinite-step-{step}{f'-process-{rank()}' if rank() else ''}.pt"
        bad = [batch for batch, loss in zip(self.window.batches, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            torch.save({"step": step, "losses": torch.tensor(losses), "batches": bad}, file)
        if not rank():
            append_line(self.run.metrics, MetricsLine(step=step, loss=str(sum(losses))))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # before the first process tidies up, every batch is saved
        raise TrainingError(
            f"the loss of step {step} is not finite ({losses}); this step did not change the adapter",
            where=f"{file} (the batch)",
            fix=f"a lower train.learning_rate, then: nybble train -c {self.run.folder}/recipe.yaml out=ANOTHER",
        )


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Write metrics.jsonl, count tokens, show progress and sample answers."""

    def __init__(
        self, run: Run, window: Window, console: Console, work: Work, answers: Answers | None, tracker: str
    ) -> None:
        self.run = run
        self.window = window
        self.console = console
        self.work = work
        self.answers = answers
        self.tracker = tracker
        self.steps = 0
        self.kept_step = 0
        self.history: list[dict[str, Any]] = []
        """What Trainer has logged since the run began, which its checkpoints keep."""
        self._pending: list[torch.Tensor] = []
        self._began = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, at the step a resumed run begins with."""
        self.work.begin(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Time steps only: evaluations and saving are not training speed."""
        self._began = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step's tokens without waiting for the device."""
        self._pending = [_real_tokens(batch) for batch in self.window.batches]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """A step's or an evaluation's numbers, as a line of metrics.jsonl and in the progress bar."""
        if "loss" in logs:
            self._log_step(args, state, logs)
        elif "eval_loss" in logs:
            start = "eval_task/"
            tasks = {name.removeprefix(start): score for name, score in logs.items() if name.startswith(start)}
            if state.is_world_process_zero:
                line = MetricsLine(step=state.global_step, eval_loss=logs["eval_loss"], scores=tasks)
                append_line(self.run.metrics, line)
            told = "".join(f"  {name} {score:.3f}" for name, score in tasks.items())
            tell(self.console, f"step {state.global_step:>5}  validation loss {logs['eval_loss']:.4f}{told}", hang=12)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer a few validation prompts; on a CPU, where that takes longer than steps, not before something is learnt."""
        too_early = state.global_step == 0 and args.device.type == "cpu"
        if self.answers is not None and state.is_world_process_zero and not too_early:
            answers = self.answers(lambda done, of: self.work.doing(SAMPLING, done, of))
            samples = [{"step": state.global_step, **sample} for sample in answers]
            for sample in samples:
                append_line(self.run.samples, SampleLine(**sample))
            log_samples(self.tracker, state.global_step, samples)
        self.work.doing(TRAINING)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar down."""
        self.work.end()

    def _log_step(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        seconds = time.perf_counter() - self._began
        tokens = int(sum(count.item() for count in self._pending)) * args.world_size
        self._pending = []
        speed = tokens / seconds
        if state.is_world_process_zero:
            keys = ("loss", "grad_norm", "learning_rate")
            logged = {key: logs[key] for key in keys if key in logs}
            line = MetricsLine(step=state.global_step, **logged, tokens=tokens, seconds=round(seconds, 4))
            append_line(self.run.metrics, line)
        text = f"loss {logs['loss']:.4f}  {speed:,.0f} tokens/s  {peak_memory(args.device) / 1e9:.2f} GB"
        self.work.step_done(state.global_step, seconds, text)
        if not self.console.is_terminal and (state.global_step % 10 == 0 or state.global_step == 1):
            tell(self.console, f"step {state.global_step:>5}/{state.max_steps}  {text}  {self.work.left()}", hang=12)


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch has reserved on CUDA at most, or the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _real_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens that are not padding; in packed rows, the padding behind the last sample is counted too (under 1%)."""
    if "attention_mask" in batch:
        count: torch.Tensor = batch["attention_mask"].sum()
        return count
    return torch.tensor(batch["input_ids"].numel())
