"""Trainer's arguments for a recipe."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import torch
from transformers import TrainingArguments

from nybble.plan.schedule import Schedule
from nybble.recipe import Recipe, TrainOptions

# Transformers 5.23 renamed the option and warns about the old name.
NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation" if "activation_checkpointing" in NAMES else "gradient"


def training_arguments(
    recipe: Recipe,
    folder: pathlib.Path,
    schedule: Schedule,
    device: torch.device,
    dtype: torch.dtype,
    has_validation: bool,
    checkpointing: bool,
) -> TrainingArguments:
    """Trainer's arguments for a recipe; `nybble.training.optimizer` makes the optimiser.

    Args:
        recipe: all options.
        folder: the run folder; checkpoints go below it.
        schedule: steps, and when the run evaluates and saves.
        device: the device that computes.
        dtype: the compute type.
        has_validation: whether there are validation rows.
        checkpointing: whether Transformers recomputes activations; the fused layers do so themselves.
    """
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        run_name=folder.name,
        project=recipe.tracker.project,
        report_to=[] if recipe.tracker.to == "none" else [recipe.tracker.to],
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level_replica="passive",  # otherwise every process but the first logs what was silenced
        **_steps(recipe.train, schedule),
        **_evaluation(schedule, has_validation, recipe.train.keep_best),
        **_computation(device, dtype, recipe.train.processes, checkpointing),
        **_rows(recipe.train, device),
    )
    # Otherwise Trainer wraps the model in DataParallel, which does not work in 4 bits.
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _steps(train: TrainOptions, schedule: Schedule) -> dict[str, Any]:
    """The number of steps, and what a step does."""
    scheduler: str = train.scheduler
    if scheduler == "constant" and schedule.warmup:
        scheduler = "constant_with_warmup"
    return {
        "max_steps": schedule.steps,
        "learning_rate": train.peak_rate,
        "lr_scheduler_type": scheduler,
        "warmup_steps": schedule.warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "neftune_noise_alpha": train.neftune_alpha,
        "seed": train.seed,
        "data_seed": train.seed,
    }


def _evaluation(schedule: Schedule, has_validation: bool, keep_best: bool) -> dict[str, Any]:
    """When the run evaluates and saves, and which checkpoint it ends with."""
    return {
        "eval_strategy": "steps" if has_validation else "no",
        "eval_steps": schedule.evaluate_every,
        "eval_on_start": has_validation,
        "save_strategy": "steps",
        "save_steps": schedule.save_every,
        # `checkpoints.remove_old` replaces it: Trainer removes older ones before the new one is verified, sorts by the time of
        # folders, which a copy changes, and mistakes checkpoint-1-of-mine for its own.
        "save_total_limit": None,
        "load_best_model_at_end": has_validation and keep_best,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
        "prediction_loss_only": True,
    }


def _computation(device: torch.device, dtype: torch.dtype, processes: int, checkpointing: bool) -> dict[str, Any]:
    """Device, precision and processes."""
    return {
        "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        f"{CHECKPOINTING}_checkpointing": checkpointing,
        f"{CHECKPOINTING}_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_backend": "gloo" if device.type == "cpu" and processes > 1 else None,
        "ddp_find_unused_parameters": False,
    }


def _rows(train: TrainOptions, device: torch.device) -> dict[str, Any]:
    """How rows become batches on the device."""
    on_cuda = device.type == "cuda"
    return {
        "per_device_train_batch_size": train.micro_batch,
        "per_device_eval_batch_size": train.micro_batch,
        "gradient_accumulation_steps": train.accumulation,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": on_cuda,
        # Packed rows cannot be split like a batch. If the host waits for a batch, it loses its lead over the device: an H200
        # was then idle for 8 ms between the backward of 4 x 2,048 tokens and the optimiser (docs/benchmarks.md).
        "accelerator_config": {"dispatch_batches": False, "non_blocking": on_cuda},
    }
