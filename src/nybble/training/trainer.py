"""transformers.Trainer with the loop it brings: order and batches, look-ahead, the hooks around checkpoints. What is trained
towards is an objective, how parameters move is an optimiser, and both are passed in."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput

from nybble.data.order import GroupedByLength, batches, lengths_of
from nybble.distributed.group import all_reduce
from nybble.objective.objective import MetricMeans, MetricSums, Objective
from nybble.training.checkpoints import begin, check_best
from nybble.training.module_walks import without_module_walks
from nybble.training.optimizer import flat_gradients
from nybble.training.progress import EVALUATING, SAVING, SCORING, TRAINING


class PendingScalar:
    """A number on its way to the host: reading it waits for what was queued before it, and for nothing after."""

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
    """The micro batches of the step in progress, with their losses and what was measured beside them."""

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
    """Where the batches of a step come from, and those of the next step once they were fetched."""

    source: Iterator[Any]
    count: int
    fetched: tuple[list[dict[str, Any]], torch.Tensor] | None = None


class QLoraTrainer(Trainer):  # type: ignore[misc]
    """Trainer for any `Objective`: each of its terms counts once, in training and evaluation, on any number of processes.

    Args:
        objective: gives the loss of a batch.
        optimizer: over the parameters that are trained; None for a trainer that only evaluates.
        settings: Trainer's own.
    """

    def __init__(self, *, objective: Objective, optimizer: torch.optim.Optimizer | None, **settings: Any) -> None:
        super().__init__(optimizers=(optimizer, None), **settings)
        self.objective = objective
        self.current_step = CurrentStep()
        self.eval_tokens = 0
        """Tokens up to which validation rows share a batch; `per_device_eval_batch_size` of the longest do in any case."""
        self.task_scores: Callable[[], dict[str, float]] | None = None
        """Benchmarks that are run at each evaluation, on all processes together."""
        self.show_activity: Callable[[str, int, int], None] = lambda what, done, total: None
        """Is called with what goes on beside the steps, how many parts of it are done, and of how many."""
        self._prefetch: Prefetch | None = None
        self._order: GroupedByLength | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loop, without its walks over all modules at every step."""
        with without_module_walks(self.model):
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer checks for the end only after a step; a run that resumes from its last step has none left to make.

        And a run that resumes within an epoch skips its first batches by a sampler around the others, through which Accelerate
        does not reach the order of several processes: it would be that of the first epoch.
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
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        self._order = GroupedByLength(lengths_of(rows), step, arguments.seed)
        return self._order

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward; batch and loss stay in `current_step` for the guards until the optimiser has stepped."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.current_step.batches.append(inputs)
        more = self.state.global_step + 1 < self.state.max_steps
        if more and self._prefetch is not None and self.accelerator.sync_gradients:
            self._prefetch.fetched = self._fetch(self._prefetch.source, self._prefetch.count)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """A step's batches, fetched while the device was at work on the step before, and how many terms their loss has.

        Between two steps an H200 waited 8 ms for 4 x 2,048 tokens to be laid out, 17 ms for packed rows (docs/benchmarks.md).
        """
        before, self._prefetch = self._prefetch, Prefetch(epoch_iterator, num_batches)
        if before is not None and before.source is epoch_iterator and before.fetched is not None:
            return before.fetched
        return self._fetch(epoch_iterator, num_batches)

    def _fetch(self, source: Iterator[Any], count: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
        found = list(itertools.islice(source, count))
        terms = sum(self.objective.count(batch) for batch in found)
        return found, all_reduce(
            torch.full((), terms, device=self.args.device)
        )  # a tensor from the host would be waited for

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """The norm of all gradients before they are clipped; where the optimiser holds them as a few tensors in a
        few launches, without one a tensor and a walk over all modules."""
        flat = flat_gradients(self.optimizer)
        if flat is None:  # of a gradient that is missing the guards tell
            norm: torch.Tensor = super()._clip_grad_norm(model)
            return norm
        self.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(flat, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate walks all modules at every step, 20 ms for a 7B, for a number that nobody reads here."""
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
        found = self.objective.loss(model, inputs, num_items_in_batch / self.accelerator.num_processes)
        self.current_step.losses.append(
            PendingScalar(found.loss)
        )  # before backward, which the guards need not wait for
        self.current_step.metrics.append(found.metrics)
        return found.loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's share of the validation rows, each row in exactly one share, those of like length together."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        share = range(self.args.process_index, len(rows), self.args.world_size)
        lengths = lengths_of(rows)[share.start :: share.step]
        tokens = max(self.eval_tokens, self.args.per_device_eval_batch_size * int(lengths.max(initial=0)))
        return DataLoader(
            torch.utils.data.Subset(rows, share),
            batch_sampler=list(batches(lengths.tolist(), tokens)),
            collate_fn=self.data_collator,
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.show_activity(SAVING, 0, 0)
        if self.args.should_save:
            begin(pathlib.Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        self.accelerator.wait_for_everyone()  # before another process makes the folder
        super()._save_checkpoint(*args, **kwargs)
        self.show_activity(TRAINING, 0, 0)

    def _load_best_model(self) -> None:
        check_best(pathlib.Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """What the objective measures, over all validation rows, and the benchmarks' scores."""
        self.model.eval()
        sums = MetricSums(["loss", *self.objective.metrics], self.args.device)
        for done, batch in enumerate(dataloader):
            self.show_activity(EVALUATING, done, len(dataloader))
            with torch.no_grad(), self.compute_loss_context_manager():
                sums.add(self.objective.measure(self.model, self._prepare_inputs(batch)))
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
