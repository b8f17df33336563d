"""The recipe's section `train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.recipe.options.memory import MemorySize
from nybble.recipe.options.rate import AUTO, LearningRate
from nybble.recipe.options.section import Options


class TrainOptions(Options):
    """How the adapter is trained."""

    objective: Literal["supervised", "dpo", "orpo", "kto", "simpo"] = "supervised"
    """supervised imitates answers; dpo, orpo and simpo learn from chosen and rejected ones, kto from good and bad ones."""
    micro_batch: int = Field(default=4, ge=1)
    """Rows per forward and backward pass on each device."""
    accumulation: int = Field(default=4, ge=1)
    """Micro batches per optimiser step; the loss is averaged over all trained tokens of the step."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; max_steps overrides it."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; overrides epochs."""
    learning_rate: LearningRate = 2e-4
    """Peak learning rate. LoRA needs about ten times that of full fine-tuning. auto finds one by a short run first."""
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Warm-up: a share of the steps (below 1) or a number of steps; shortened if it would cover the whole run."""
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """auto picks paged_adamw_8bit on CUDA (its state can move to host memory) and adamw on a CPU."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum gradient norm; larger gradients are clipped."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings while training (NEFTune, Jain et al. 2023), typically 5."""
    gradient_checkpointing: bool = True
    """Recompute each layer in backward; layers fused by the engine follow engine.policy instead."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; default: five evaluations over the run."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a better validation loss."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; default, and required with keep_best: as between evaluations."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints to keep besides the best; at least two, so that one is complete while another is written."""
    keep_best: bool = True
    """Keep the adapter with the best validation loss instead of the last one."""
    samples: int = Field(default=2, ge=0)
    """Validation prompts to answer at each evaluation (up to 64 tokens or 20 s each) into samples.jsonl; on a CPU from step 1."""
    eval_tasks: list[str] = Field(default_factory=list)
    """lm-eval benchmarks to score at each evaluation, e.g. [arc_easy]; scores are logged with the losses."""
    eval_limit: int = Field(default=50, ge=1)
    """Items per benchmark of eval_tasks."""
    eval_data: str | None = None
    """Folder with the benchmarks' rows, TASK.SPLIT.jsonl; default: the Hub."""
    vram: MemorySize | None = None
    """GPU memory to train in, as in 12GB; auto: what is free. The run is made to fit, and the limit is enforced."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Random seed of split, order, initialisation and dropout."""
    processes: int = Field(default=1, ge=1)
    """Data-parallel processes; must equal the launcher's world size."""

    @property
    def peak_rate(self) -> float:
        """The learning rate as a number; a run whose recipe says auto finds it before it is created."""
        assert self.learning_rate != AUTO, "the learning rate was not found yet"
        return float(self.learning_rate)

    @property
    def loss_unit(self) -> str:
        """What the loss is measured in; a preference's has no unit."""
        return "nats per token" if self.objective == "supervised" else self.objective

    @property
    def sequences(self) -> int:
        """How many sequences a row is: a pair is its prompt with each of two answers."""
        return 2 if self.objective in ("dpo", "orpo", "simpo") else 1
