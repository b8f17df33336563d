"""transformers.Trainer with changes to its loop: the order of rows, prefetched batches, evaluation, and hooks around checkpoints.
Objective and optimiser are passed in."""

from __future__ import annotations

import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from nybble.data.batches import FilledRows
from nybble.data.order import GroupedByLength, batches, lengths_of
from nybble.distributed.data_parallel import leave_frozen_out
from nybble.distributed.group import all_gather, all_reduce
from nybble.distributed.heartbeat import announce_wait, beat
from nybble.engine.fusion import uneven_passes
from nybble.objective.objective import MetricMeans, MetricSums, Objective
from nybble.training.checkpoints import check_best, start_checkpoint
from nybble.training.module_walks import without_module_walks
from nybble.training.optimizer import flat_gradients
from nybble.training.progress import EVALUATING, SAVING, SCORING, TRAINING


class PendingScalar:
    """A number that is being copied to the host: reading it waits for what was queued before it, but for nothing after."""

    def __init__(self, number: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._number = number.detach()
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._number.copy_(number.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> float:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


@dataclass
class CurrentStep:
    """The micro batches of the step in progress, with their losses and what else was measured."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    losses: list[PendingScalar] = field(default_factory=list)
    metrics: list[MetricMeans] = field(default_factory=list)

    def clear(self) -> None:
        """Start the next step."""
        self.batches.clear()
        self.losses.clear()
        self.metrics.clear()


@dataclass
class Prefetch:
    """The source of the batches of a step, and the next step's batches once they are fetched."""

    source: Iterator[Any]
    count: int
    fetched: tuple[list[dict[str, Any]], torch.Tensor] | None = None


class QLoraTrainer(Trainer):  # type: ignore[misc]
    """Trainer for any `Objective`: each of its terms counts once, in training and evaluation, with any number of processes.

    Args:
        objective: computes the loss of a batch.
        optimizer: updates the trained parameters; None for a trainer that only evaluates.
        settings: Trainer's own arguments.
    """

    def __init__(self, *, objective: Objective, optimizer: torch.optim.Optimizer | None, **settings: Any) -> None:
        super().__init__(optimizers=(optimizer, None), **settings)
        leave_frozen_out(self.model)
        self.objective = objective
        self.current_step = CurrentStep()
        self.eval_tokens = 0
        """The largest number of tokens in a batch of validation rows; `per_device_eval_batch_size` of the longest always fit."""
        self.task_scores: Callable[[], dict[str, float]] | None = None
        """Runs the benchmarks at each evaluation, in all processes together."""
        self.show_activity: Callable[[str, int, int], None] = lambda what, done, total: None
        """Called with the current activity, how many parts of it are done, and the total."""
        self._prefetch: Prefetch | None = None
        self._order: GroupedByLength | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loop, without visiting all modules at every step."""
        with without_module_walks(self.model):
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Stop at once if a run is resumed at its end: Trainer would check for the end only after another step.

        The order is set here because a run that resumes within an epoch skips its first batches through a wrapper around the
        sampler. With several processes Accelerate does not set the epoch through it: the order would be that of the first epoch.
        """
        if self._order is not None:
            self._order.set_epoch(kwargs["epoch"])
        early = [call for call in self.callback_handler.callbacks if isinstance(call, EarlyStoppingCallback)]
        stopped = any(call.early_stopping_patience_counter >= call.early_stopping_patience for call in early)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, torch.utils.data.IterableDataset):
            return None
        arguments = self.args
        together = arguments.train_batch_size * arguments.world_size
        is_filled = isinstance(rows, FilledRows)
        lengths = lengths_of(rows.rows if is_filled else rows)
        step = together * arguments.gradient_accumulation_steps
        self._order = GroupedByLength(lengths, step, arguments.seed, together if is_filled else 1)
        return self._order

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward; batch and loss stay in `current_step` for the guards until the optimiser steps."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        beat(micro_batch=True)
        self.current_step.batches.append(inputs)
        has_next = self.state.global_step + 1 < self.state.max_steps
        if has_next and self._prefetch is not None and self.accelerator.sync_gradients:
            self._prefetch.fetched = self._fetch(self._prefetch.source, self._prefetch.count)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """A step's batches, fetched while the device was computing the step before, and the number of terms in their loss.

        Between two steps an H200 waited 8 ms for 4 x 2,048 tokens to be collated, 17 ms for packed rows (docs/benchmarks.md).
        """
        previous, self._prefetch = self._prefetch, Prefetch(epoch_iterator, num_batches)
        if previous is not None and previous.source is epoch_iterator and previous.fetched is not None:
            return previous.fetched
        return self._fetch(epoch_iterator, num_batches)

    def _fetch(self, source: Iterator[Any], count: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
        fetched = list(itertools.islice(source, count))
        counts = numpy.asarray([self.objective.count(batch) for batch in fetched]).sum(axis=0)
        # Made on the device: copying a tensor from the host would wait for the device.
        terms = [torch.full((), int(number), device=self.args.device) for number in counts.flatten()]
        return fetched, all_reduce(torch.stack(terms) if counts.ndim else terms[0])

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip the gradients and return their norm before; with an optimiser of flat tensors this takes a few launches, instead
        of one per tensor and a visit to all modules."""
        flat = flat_gradients(self.optimizer)
        if flat is None:  # the guards report a missing gradient
            norm: torch.Tensor = super()._clip_grad_norm(model)
            return norm
        self.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(flat, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: Trainer's estimate visits all modules at every step, 20 ms for a 7B, and is not used."""
        return 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The objective's loss of this micro batch, as its share of the whole step's."""
        assert num_items_in_batch is not None, "`get_batch_samples` counts the terms of a step"
        # DDP averages the gradients of all processes, and each has divided by the terms of all.
        result = self.objective.loss(model, inputs, num_items_in_batch / self.accelerator.num_processes)
        # Queued before backward, so that the guards need not wait for that.
        self.current_step.losses.append(PendingScalar(result.loss))
        self.current_step.metrics.append(result.metrics)
        announce_wait()  # DDP exchanges gradients within backward
        return result.loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's share of the validation rows, batched by similar length; each row is in exactly one share."""
        rows, positions = _batched_share(
            self.eval_dataset if eval_dataset is None else eval_dataset, self.args, self.eval_tokens
        )
        return DataLoader(rows, batch_sampler=positions, collate_fn=self.data_collator)

    def try_evaluation(self) -> None:
        """Evaluate this process's longest batch of validation rows, which takes the most memory, and drop the result.

        No DataLoader is iterated: it would draw a seed from torch's generator, and later dropout would differ.
        """
        rows, positions = _batched_share(self.eval_dataset, self.args, self.eval_tokens)
        self.model.eval()
        with uneven_passes(self.model):
            if positions:  # none if there are more processes than rows
                batch = self.data_collator([rows[position] for position in positions[0]])
                sums = MetricSums(["loss"], self.args.device)
                sums.add(self._measured(batch))
                sums.wait()

    def _measured(self, batch: dict[str, Any]) -> MetricMeans:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.objective.measure(self.model, self._prepare_inputs(batch))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.show_activity(SAVING, 0, 0)
        if self.args.should_save:
            start_checkpoint(pathlib.Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(*args, **kwargs)
        self.show_activity(TRAINING, 0, 0)

    def _save_rng_state(self, output_dir: str) -> None:
        """The first process writes the states of all: others may be on machines without the folder."""
        with tempfile.TemporaryDirectory() as own:
            super()._save_rng_state(own)
            files = all_gather([(file.name, file.read_bytes()) for file in pathlib.Path(own).iterdir()])
        if self.args.should_save:
            for name, content in files:
                (pathlib.Path(output_dir) / name).write_bytes(content)

    def _load_best_model(self) -> None:
        check_best(pathlib.Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """What the objective measures, over all validation rows, and the benchmarks' scores."""
        self.model.eval()
        sums = MetricSums(["loss", *self.objective.metrics], self.args.device)
        with uneven_passes(self.model):
            for done, batch in enumerate(dataloader):
                self.show_activity(EVALUATING, done, len(dataloader))
                sums.add(self._measured(batch))
        metrics = sums.means()
        if self.task_scores is not None:
            self.show_activity(SCORING, 0, 0)
            metrics |= {f"task/{name}": score for name, score in self.task_scores().items()}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": number for name, number in metrics.items()},
            num_samples=len(self.eval_dataset),
        )


def _batched_share(
    rows: Any, arguments: TrainingArguments, tokens: int
) -> tuple[torch.utils.data.Subset[Any], list[list[int]]]:
    """This process's share of the validation rows, and the positions in it of each batch's rows, the longest first.

    Args:
        rows: all validation rows.
        arguments: of the run.
        tokens: as `QLoraTrainer.eval_tokens`.
    """
    share = range(arguments.process_index, len(rows), arguments.world_size)
    lengths = lengths_of(rows)[share.start :: share.step]
    tokens = max(tokens, arguments.per_device_eval_batch_size * int(lengths.max(initial=0)))
    return torch.utils.data.Subset(rows, share), list(batches(lengths.tolist(), tokens))
