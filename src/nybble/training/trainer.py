"""transformers.Trainer with the loop it brings, an evaluation weighted by tokens, and a memory of the current step."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from nybble.data.order import GroupedByLength, batches, lengths_of
from nybble.objective.likelihood import summed_loss
from nybble.plan.schedule import Schedule
from nybble.recipe import Recipe
from nybble.training.checkpoints import begin, check_best
from nybble.training.optimizer import FlatAdamW8bit
from nybble.training.progress import EVALUATING, SAVING, SCORING, TRAINING

# Transformers 5.23 has another name for it, and warns of the old one.
NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
RECOMPUTING = "activation" if "activation_checkpointing" in NAMES else "gradient"
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def training_arguments(
    recipe: Recipe,
    folder: pathlib.Path,
    schedule: Schedule,
    device: torch.device,
    dtype: torch.dtype,
    has_validation: bool,
    checkpointing: bool,
) -> TrainingArguments:
    """The recipe in Trainer's terms."""
    train = recipe.train
    automatic = "paged_adamw_8bit" if device.type == "cuda" else "adamw"
    optimizer = OPTIMIZERS[automatic if train.optimizer == "auto" else train.optimizer]
    # In float16 a fused one leaves out the step of an overflow by itself, and Accelerate moves the rate on.
    if optimizer == "adamw_torch" and dtype != torch.float16:
        optimizer = "adamw_torch_fused"
    scheduler: str = train.scheduler
    if scheduler == "constant" and schedule.warmup:
        scheduler = "constant_with_warmup"
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        run_name=folder.name,
        project=recipe.tracker.project,
        per_device_train_batch_size=train.micro_batch,
        per_device_eval_batch_size=train.micro_batch,
        gradient_accumulation_steps=train.accumulation,
        max_steps=schedule.steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=schedule.warmup,
        optim=optimizer,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        neftune_noise_alpha=train.neftune_alpha,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        **{
            f"{RECOMPUTING}_checkpointing": checkpointing,
            f"{RECOMPUTING}_checkpointing_kwargs": {"use_reentrant": False},
        },
        eval_strategy="steps" if has_validation else "no",
        eval_steps=schedule.evaluate_every,
        eval_on_start=has_validation,
        save_strategy="steps",
        save_steps=schedule.save_every,
        save_total_limit=None,  # `checkpoints.rotate` takes its place: Trainer removes older ones before the new one is
        # proven, goes by the time of folders, which a copy changes, and takes checkpoint-1-of-mine for its own
        load_best_model_at_end=has_validation and train.keep_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        restore_callback_states_from_checkpoint=True,
        report_to=[] if recipe.tracker.to == "none" else [recipe.tracker.to],
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and train.processes > 1 else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
        # Packed rows cannot be cut like a batch. A batch that is waited for costs the host its lead over the device: an H200
        # then stood still for 8 ms between 4 x 2,048 tokens' backward and the optimiser (docs/benchmarks.md).
        accelerator_config={"dispatch_batches": False, "non_blocking": device.type == "cuda"},
        disable_tqdm=True,
        log_level_replica="passive",  # else every process but the first says what was silenced
        prediction_loss_only=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    arguments._n_gpu = min(arguments._n_gpu, 1)  # else Trainer wraps the model in DataParallel, which 4-bit cannot do
    return arguments


class Sent:
    """A number that is on its way to the host: to read it waits for what was queued before it, and for nothing after."""

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
class Window:
    """The micro batches of the step in progress, with their losses."""

    batches: list[dict[str, Any]]
    losses: list[Sent]

    def clear(self) -> None:
        """Begin the next step."""
        self.batches.clear()
        self.losses.clear()


@dataclass
class Ahead:
    """Where the batches of a step come from, and those of the next one once they were fetched."""

    source: Iterator[Any]
    count: int
    fetched: tuple[list[dict[str, Any]], torch.Tensor | int | None] | None = None


class QLoraTrainer(Trainer):  # type: ignore[misc]
    """Trainer, but training and evaluation count trained tokens, each once, on any number of processes, and no others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = Window([], [])
        self.eval_tokens = 0
        """Tokens up to which validation rows share a batch; so many of the longest as the arguments say in any case."""
        self.task_scores: Callable[[], dict[str, float]] | None = None
        """Benchmarks that are run at each evaluation."""
        self.doing: Callable[[str, int, int], None] = lambda what, done, of: None
        """Is told what goes on beside the steps, how many parts of it are done, and of how many."""
        self._ahead: Ahead | None = None
        self._order: GroupedByLength | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's loop, without its walks over all modules at every step."""
        with _without_walks(self.model):
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer looks whether it is at the end after each step; a run that goes on from its last step has none to make.

        And a run that goes on within an epoch skips its first batches by a sampler around the others, through which Accelerate
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
        """One forward and backward; batch and loss stay in `window` for the guards until the optimiser has stepped."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.window.batches.append(inputs)
        more = self.state.global_step + 1 < self.state.max_steps
        if more and self._ahead is not None and self.accelerator.sync_gradients:
            source, count = self._ahead.source, self._ahead.count
            self._ahead.fetched = super().get_batch_samples(source, count, self.args.device)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """A step's batches, fetched while the device was at work on the step before.

        Between two steps an H200 waited 8 ms for 4 x 2,048 tokens to be laid out, 17 ms for packed rows (docs/benchmarks.md).
        """
        before, self._ahead = self._ahead, Ahead(epoch_iterator, num_batches)
        if before is not None and before.source is epoch_iterator and before.fetched is not None:
            return before.fetched
        found: tuple[list[dict[str, Any]], torch.Tensor | int | None]
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        return found

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """The norm of all gradients before they are clipped; where the optimiser holds them as a few tensors in a
        few launches, without one a tensor and a walk over all modules."""
        flat = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(flat, FlatAdamW8bit) or flat.missing():  # of what is missing the guards tell
            norm: torch.Tensor = super()._clip_grad_norm(model)
            return norm
        wholes = flat.gather()
        self.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(wholes, self.args.max_grad_norm)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's own, but 8-bit AdamW in a few launches."""
        kind = str(getattr(self.args.optim, "value", self.args.optim))
        if getattr(self, "optimizer", None) is None and "8bit" in kind:
            self.optimizer = FlatAdamW8bit(
                [parameter for parameter in self.model.parameters() if parameter.requires_grad],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
                is_paged="paged" in kind,
            )
        result: torch.optim.Optimizer = super().create_optimizer(model)
        return result

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
        """Cross-entropy summed over this micro batch's trained tokens, divided by those of the whole step."""
        total, _ = summed_loss(model, inputs)
        assert num_items_in_batch is not None, "Trainer counts the trained tokens of a step"
        # DDP averages the gradients of all processes, and each has divided by the tokens of all.
        scaled: torch.Tensor = total * (self.accelerator.num_processes / num_items_in_batch)
        self.window.losses.append(Sent(scaled))  # before backward, which the guards need not wait for
        return scaled

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's share of the validation rows, each row in exactly one share, those of like length together."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        share = range(self.args.process_index, len(rows), self.args.world_size)
        lengths = lengths_of(rows)[share.start :: share.step]
        room = max(self.eval_tokens, self.args.per_device_eval_batch_size * int(lengths.max(initial=0)))
        return DataLoader(
            torch.utils.data.Subset(rows, share),
            batch_sampler=list(batches(lengths.tolist(), room)),
            collate_fn=self.data_collator,
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.doing(SAVING, 0, 0)
        if self.args.should_save:
            begin(pathlib.Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        self.accelerator.wait_for_everyone()  # before another process makes the folder
        super()._save_checkpoint(*args, **kwargs)
        self.doing(TRAINING, 0, 0)

    def _load_best_model(self) -> None:
        check_best(pathlib.Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Mean loss over all trained tokens, in nats per token."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for done, batch in enumerate(dataloader):
            self.doing(EVALUATING, done, len(dataloader))
            with torch.no_grad(), self.compute_loss_context_manager():
                total += torch.stack([part.double() for part in summed_loss(self.model, self._prepare_inputs(batch))])
        total = self.accelerator.reduce(total, "sum")
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        if self.task_scores is not None and self.is_world_process_zero():
            self.doing(SCORING, 0, 0)
            metrics |= {f"{metric_key_prefix}_task/{name}": score for name, score in self.task_scores().items()}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=metrics,
            num_samples=len(self.eval_dataset),
        )


@contextlib.contextmanager
def _without_walks(model: torch.nn.Module) -> Iterator[None]:
    """Trainer calls train() and zero_grad() at every step. A 7B with LoRA is 2,665 modules, and to walk them takes 18 ms,
    in which the device has nothing to do: as long as a tenth of a step of 1 x 2,048 tokens on an H200."""
    model.train()  # all of it once: what from_pretrained loaded is in evaluation mode below a new PeftModel that is not
    model.nybble_walk = _Walk(  # type: ignore[assignment]
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        [module for name, module in model.named_modules() if name.count(".") <= len(["base_model", "model", "layers", "0"])],
    )  # fmt: skip
    model.train = types.MethodType(_train, model)  # type: ignore[method-assign]
    model.zero_grad = types.MethodType(_zero_grad, model)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train, model.zero_grad, model.nybble_walk


@dataclass
class _Walk:
    """What is looked at in place of all modules."""

    trained: list[torch.nn.Parameter]
    upper: list[torch.nn.Module]
    """Down to the decoder layers: whoever changes the mode of a part begins at one of them."""


def _train(self: Any, mode: bool = True) -> Any:
    if any(module.training is not mode for module in self.nybble_walk.upper):
        type(self).train(self, mode)
    return self


def _zero_grad(self: Any, set_to_none: bool = True) -> None:
    for parameter in self.nybble_walk.trained:
        parameter.grad = None
