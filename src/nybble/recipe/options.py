"""Every option of a training run: once, typed, documented beneath."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Options(BaseModel):
    """A section of the recipe: unknown keys are refused, values are checked when set."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class ModelOptions(Options):
    """The base model: what is loaded and how it is held in memory."""

    path: str = ""
    """Hub id or folder of a Llama-architecture checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; the commit it resolves to is recorded in the run."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen base is stored: nf4 (QLoRA's 4-bit NormalFloat), fp4, int8 (LLM.int8) or none (16-bit LoRA)."""
    double_quantization: bool = True
    """Quantise the 4-bit scales as well: 0.37 bits a weight less, 0.3 GB on a 7B."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type; auto takes bfloat16 where the device has it, and says why."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling for contexts beyond the model's positions, e.g. {rope_type: linear, factor: 2.0}."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto takes CUDA where there is one. Asking for cuda without one is an error."""


class LoraOptions(Options):
    """The adapter that is trained (LoRA, Hu et al. 2021, by PEFT)."""

    r: int = Field(default=16, ge=1, le=1024)
    """Rank of the update of each target."""
    alpha: float = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get an adapter: all-linear (all but the head), or names such as [q_proj, v_proj]."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed adaptation (DoRA, Liu et al. 2024): slower, sometimes better at small r."""
    init: Literal["default", "gaussian"] = "default"
    """How A starts: default (Kaiming-uniform) or gaussian. B starts at zero, so the base is unaltered at first."""


class DataOptions(Options):
    """What is trained on and how a row becomes tokens."""

    path: str | list[str] | dict[str, float] = ""
    """Files (json, jsonl, csv, tsv, parquet, txt, each also .gz), folders, patterns or Hub ids; with weights: {a: 2, b: 0.5}."""
    subset: str | None = None
    """Configuration name of a Hub data set that has several."""
    split: str = "train"
    """Split of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    streaming: bool = False
    """Read rows as they are needed, for data larger than the disk; wants train.max_steps, and keeps duplicates."""
    form: Literal["auto", "alpaca", "messages", "sharegpt", "prompt", "text"] = "auto"
    """Form of the rows: alpaca, messages, sharegpt, prompt (and completion), text; auto tells by the columns, row by row."""
    map: dict[str, str] = Field(default_factory=dict)
    """Columns that carry other names: {prompt: question, completion: answer}."""
    template: str = "auto"
    """auto, model (its own; of several the default), alpaca, llama2, plain, the name of another of its own, or a Jinja file."""
    max_length: int = Field(default=1024, ge=8)
    """Longest row in tokens, and the length of a packed one."""
    overlength: Literal["error", "drop", "truncate", "split"] = "error"
    """A row over max_length: error (refuse above 1%, else drop), drop, truncate (EOS stays), split (chats between turns)."""
    bad_rows: Literal["error", "drop"] = "error"
    """Rows that cannot be trained on, such as empty answers: refuse, or leave them out and say how many."""
    train_on: Literal["answers", "last", "all"] = "answers"
    """Which tokens the loss counts: all answers of a chat, its last answer, or prompts too."""
    packing: bool = False
    """Fill each row of max_length with several samples (best fit); samples never see each other."""
    validation: float | str = 0.05
    """Share of the rows held out (below 1), number of rows (1 and above), 0 for none, or the path of a file."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many distinct rows only."""

    @property
    def names(self) -> list[str]:
        """The sources, without their weights."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class TrainOptions(Options):
    """How the adapter is trained."""

    micro_batch: int = Field(default=4, ge=1)
    """Rows in one forward and backward on one device."""
    accumulation: int = Field(default=4, ge=1)
    """Micro batches in one optimiser step; the loss is normalised by the trained tokens of the whole step."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; max_steps goes before it."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps, where epochs should not decide."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate. LoRA wants about ten times that of full fine-tuning."""
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Warm-up: a share of the steps (below 1) or a number of steps; one that would cover the whole run is shortened."""
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """auto takes paged_adamw_8bit on CUDA (its state can move to host memory) and adamw on a CPU."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings while training (NEFTune, Jain et al. 2023), typically 5."""
    gradient_checkpointing: bool = True
    """Recompute each layer in backward, where the engine does not compute it (engine.policy says what that keeps)."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; without it, five times over the run."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better validation loss."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; without it, and wherever the best is kept, those between evaluations."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints kept beside the best; two, so that one is whole while another is written."""
    keep_best: bool = True
    """The adapter of the run is that of the best validation loss, not of the last step."""
    samples: int = Field(default=2, ge=0)
    """Validation prompts answered at each evaluation, up to 64 tokens or 20 s each, into samples.jsonl; on a CPU from step 1."""
    eval_tasks: list[str] = Field(default_factory=list)
    """Benchmarks (lm-eval's names) scored at each evaluation, e.g. [arc_easy]; their curves go where the losses go."""
    eval_limit: int = Field(default=50, ge=1)
    """Items of each of them."""
    eval_data: str | None = None
    """Folder with their rows, TASK.SPLIT.jsonl; else the Hub."""
    seed: int = Field(default=42, ge=0)
    """Seed of everything random: split, order, initialisation, dropout."""
    processes: int = Field(default=1, ge=1)
    """Data-parallel processes; the world size is held against it."""


class EngineOptions(Options):
    """How the decoder layers are computed."""

    fused: bool = True
    """nybble's own forward and backward of the layers; what it does not know keeps its own, and the run says so."""
    policy: Literal["auto", "keep-all", "drop-mlp", "drop-qkv", "layer-input", "host"] = "auto"
    """What a layer keeps for backward, from the fastest to the leanest; auto takes the fastest that fits the memory."""
    embedding: Literal["device", "host"] = "device"
    """Where the token embedding lies; host saves 0.26 GB of a 7B's on the device."""

    @property
    def is_shaped(self) -> bool:
        """Whether more than the engine itself is asked for."""
        return self.policy != "auto" or self.embedding != "device"


class TrackerOptions(Options):
    """Where curves go, besides RUN/metrics.jsonl."""

    to: Literal["none", "wandb", "tensorboard", "mlflow", "trackio"] = "none"
    """Tracker; wandb runs offline where it finds no key, and never asks."""
    project: str = "nybble"
    """Project or experiment name in the tracker."""


class ExportOptions(Options):
    """What is made of the run when it has ended; that it can be made is checked before the first step."""

    to: list[Literal["adapter", "merged", "gguf"]] = Field(default_factory=list)
    """Artefacts, each in RUN/export: adapter (PEFT), merged (a Transformers folder), gguf (llama.cpp, Q8_0)."""


class Recipe(Options):
    """One training run."""

    model: ModelOptions = Field(default_factory=ModelOptions)
    """The base model."""
    adapter: str | None = None
    """PEFT adapter folder to go on training from, in place of a new LoRA."""
    lora: LoraOptions = Field(default_factory=LoraOptions)
    """The adapter."""
    data: DataOptions = Field(default_factory=DataOptions)
    """The data."""
    train: TrainOptions = Field(default_factory=TrainOptions)
    """The training."""
    engine: EngineOptions = Field(default_factory=EngineOptions)
    """The computation of the layers."""
    tracker: TrackerOptions = Field(default_factory=TrackerOptions)
    """Experiment tracking."""
    export: ExportOptions = Field(default_factory=ExportOptions)
    """Artefacts."""
    out: str | None = None
    """Run folder; without it, runs/MODEL-DATA, numbered when that is taken."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        faults = [fault for holds, fault in _contradictions(self) if holds]
        if faults:
            raise ValueError("\n".join(faults))
        return self


def _contradictions(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    lora, train, data = recipe.lora, recipe.train, recipe.data
    yield (
        recipe.adapter is not None and bool(lora.model_fields_set),
        f"lora: {', '.join(sorted(lora.model_fields_set))} cannot be set beside adapter={recipe.adapter}: "
        "the adapter brings its own",
    )
    no_validation = data.validation in (0, 0.0)
    yield (
        no_validation and train.early_stopping is not None,
        "train.early_stopping: needs validation rows, and data.validation is 0",
    )
    yield (
        no_validation and bool(train.eval_tasks),
        "train.eval_tasks: are scored where the validation rows are, and data.validation is 0",
    )
    yield (
        not no_validation
        and train.keep_best
        and None not in (train.save_every, train.evaluate_every)
        and train.save_every != train.evaluate_every,
        f"train.save_every: {train.save_every} differs from the {train.evaluate_every} steps between evaluations, so the best "
        f"adapter might not be among the saved; train.save_every={train.evaluate_every}, or train.keep_best=false",
    )
    yield (
        isinstance(data.validation, int | float) and data.validation < 0,
        "data.validation: a share below 1, a number of rows, or a file; not negative",
    )
    yield (
        isinstance(data.path, dict) and any(weight <= 0 for weight in data.path.values()),
        "data.path: a weight is above 0; leave out what should not be used",
    )
    endless = data.streaming and train.max_steps is None
    yield endless, "data.streaming: nobody knows how long a stream is; set train.max_steps"
    yield (
        data.streaming and data.limit is not None,
        "data.limit: a stream has no end to stop before; set train.max_steps",
    )
    yield (
        data.streaming and isinstance(data.validation, float) and 0 < data.validation < 1,
        "data.validation: a stream has no share to hold out; set 0, a number of rows (its first), or a file",
    )
    yield (
        recipe.engine.embedding == "host" and train.processes > 1,
        "engine.embedding: host is for one process; DDP wants a model's parameters on one device",
    )
    yield (
        not recipe.engine.fused and recipe.engine.is_shaped,
        "engine: policy and embedding say how the engine works, and engine.fused is false",
    )
    for name, text in (("model.path", recipe.model.path), ("adapter", recipe.adapter), ("out", recipe.out)):
        yield (
            any("\udc80" <= character <= "\udcff" for character in text or ""),
            f"{name}: {text!r} is not UTF-8, and the libraries that read and write models take no other names; rename it",
        )
    yield lora.targets == [], "lora.targets: an empty list trains nothing; name layers or say all-linear"


def option_names(model: type[Options] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every option's dotted name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            yield from option_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
