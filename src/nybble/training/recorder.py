"""What a run records during training: metrics.jsonl, samples.jsonl, the progress line, a tracker's tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nybble.distributed.group import all_gather, all_reduce_number
from nybble.objective.objective import MetricMeans, MetricSums
from nybble.run.folder import Run
from nybble.run.log import MetricsLine, SampleLine, append_line
from nybble.terminal import bytes_text, tell
from nybble.training.preference_watch import PreferenceWatch
from nybble.training.progress import SAMPLING, TRAINING, RunProgress
from nybble.training.resource_use import peak_memory
from nybble.training.trackers import log_samples
from nybble.training.trainer import CurrentStep

SampleAnswering = Callable[[Callable[[int, int], None]], list[dict[str, Any]]]
"""Answers this process's share of the sample prompts, one record each; its argument shows how many are done."""


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Write metrics.jsonl, count tokens, show progress and answer the sample prompts.

    Args:
        run: the run whose folder is written.
        current_step: the step in progress.
        metrics: what the objective measures besides the loss.
        console: for lines if there is no progress bar.
        progress: the bar.
        answers: answers this process's share of the samples; None if no process has any.
        tracker: `tracker.to` of the recipe.
    """

    def __init__(
        self, run: Run, current_step: CurrentStep, metrics: Sequence[str], console: Console, progress: RunProgress,
        answers: SampleAnswering | None, tracker: str,
    ) -> None:  # fmt: skip
        self.run = run
        self.current_step = current_step
        self.metrics = metrics
        self.console = console
        self.progress = progress
        self.answers = answers
        self.tracker = tracker
        self.watch = PreferenceWatch()
        self.steps = 0
        self.kept_step = 0
        self.history: list[dict[str, Any]] = []
        """What Trainer has logged since the start of the run; its checkpoints save it."""
        self._tokens: list[torch.Tensor] = []
        self._measured: list[MetricMeans] = []
        self._started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, at the step from which a resumed run starts."""
        self.progress.start(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Time steps only: evaluations and saving are not training speed."""
        self._started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step's tokens without waiting for the device."""
        self._tokens = [_real_tokens(batch) for batch in self.current_step.batches]
        self._measured = list(self.current_step.metrics)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write the numbers of a step or an evaluation to metrics.jsonl and to the terminal."""
        if "loss" in logs:
            self._log_step(args, state, logs)
        elif "eval_loss" in logs:
            self._log_evaluation(state, logs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer a few validation prompts, each process its share. On a CPU, which is slow at this, not before the first step."""
        too_early = state.global_step == 0 and args.device.type == "cpu"
        if self.answers is not None and not too_early:
            answered = self.answers(lambda done, total: self.progress.activity(SAMPLING, done, total))
            samples = [{"step": state.global_step, **sample} for sample in all_gather(answered)]
            if state.is_world_process_zero:
                for sample in samples:
                    append_line(self.run.samples, SampleLine(**sample))
                log_samples(self.tracker, state.global_step, samples)
        self.progress.activity(TRAINING)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        self.progress.stop()

    def _log_evaluation(self, state: TrainerState, logs: dict[str, Any]) -> None:
        start = "eval_task/"
        tasks = {name.removeprefix(start): score for name, score in logs.items() if name.startswith(start)}
        measured = {f"eval_{name}": logs[f"eval_{name}"] for name in ("loss", *self.metrics)}
        if state.is_world_process_zero:
            append_line(self.run.metrics, MetricsLine(step=state.global_step, **measured, scores=tasks))
        more = {name: logs[f"eval_{name}"] for name in self.metrics} | tasks
        text = "".join(f"  {name} {number:.3f}" for name, number in more.items())
        tell(self.console, f"step {state.global_step:>5}  validation loss {logs['eval_loss']:.4f}{text}", hang=12)

    def _log_step(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        seconds = time.perf_counter() - self._started
        tokens = all_reduce_number(int(sum(count.item() for count in self._tokens)), args.device)
        sums = MetricSums(self.metrics, args.device)
        for metrics in self._measured:
            sums.add(metrics)
        measured = sums.means() if self.metrics else {}
        self._tokens, self._measured = [], []
        speed = tokens / seconds
        if state.is_world_process_zero:
            keys = ("loss", "grad_norm", "learning_rate")
            logged = {key: logs[key] for key in keys if key in logs} | measured
            line = MetricsLine(step=state.global_step, **logged, tokens=tokens, seconds=round(seconds, 4))
            append_line(self.run.metrics, line)
        for notice in self.watch.see(measured):
            tell(self.console, f"notice    {notice}", "yellow", hang=10)
        text = f"loss {logs['loss']:.4f}  {speed:,.0f} tokens/s  {bytes_text(peak_memory(args.device))}"
        self.progress.step_done(state.global_step, seconds, text)
        if not self.console.is_terminal and (state.global_step % 10 == 0 or state.global_step == 1):
            tell(
                self.console, f"step {state.global_step:>5}/{state.max_steps}  {text}  {self.progress.left()}", hang=12
            )


def _real_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens that are not padding; in packed rows, the padding after the last sample is counted too (under 1%)."""
    if "attention_mask" in batch:
        count: torch.Tensor = batch["attention_mask"].sum()
        return count
    return torch.tensor(batch["input_ids"].numel())
