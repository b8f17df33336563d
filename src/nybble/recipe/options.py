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
    """The base model and how it is stored in memory."""

    path: str = ""
    """Hub id or folder of a Llama-architecture checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; the commit it resolves to is recorded in the run."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen base is stored: nf4 (QLoRA's 4-bit NormalFloat), fp4, int8 (LLM.int8) or none (16-bit LoRA)."""
    double_quantization: bool = True
    """Also quantise the 4-bit scales: saves 0.37 bits per weight, 0.3 GB on a 7B."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type; auto picks bfloat16 if the device supports it, and prints the reason."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling for contexts beyond the model's positions, e.g. {rope_type: linear, factor: 2.0}."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto picks CUDA if available. It is an error to ask for cuda without a GPU."""


class LoraOptions(Options):
    """The adapter that is trained (LoRA, Hu et al. 2021, by PEFT)."""

    r: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapter."""
    alpha: float = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers with an adapter: all-linear (all but the head), or names such as [q_proj, v_proj]."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed adaptation (DoRA, Liu et al. 2024): slower, sometimes better at small r."""
    init: Literal["default", "gaussian"] = "default"
    """Initialisation of A: default (Kaiming-uniform) or gaussian. B starts at zero, so training starts from the base itself."""


class DataOptions(Options):
    """The training data and how rows become tokens."""

    path: str | list[str] | dict[str, float] = ""
    """Files (json, jsonl, csv, tsv, parquet, txt, each also .gz), folders, patterns or Hub ids; with weights: {a: 2, b: 0.5}."""
    subset: str | None = None
    """Configuration of a Hub data set that has several."""
    split: str = "train"
    """Split of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    streaming: bool = False
    """Read rows as they are needed, for data larger than the disk; needs train.max_steps and keeps duplicates."""
    form: Literal["auto", "alpaca", "messages", "sharegpt", "prompt", "text"] = "auto"
    """Format of the rows: alpaca, messages, sharegpt, prompt (and completion), text; auto detects it per row by the columns."""
    map: dict[str, str] = Field(default_factory=dict)
    """Columns with other names: {prompt: question, completion: answer}."""
    template: str = "auto"
    """auto, model (the model's default), another of the model's templates by name, alpaca, llama2, plain or a Jinja file."""
    max_length: int = Field(default=1024, ge=8)
    """Maximum row length in tokens, and the length of packed rows."""
    overlength: Literal["error", "drop", "truncate", "split"] = "error"
    """Rows over max_length: error (refuse above 1%, else drop), drop, truncate (keeps EOS), split (chats between turns)."""
    bad_rows: Literal["error", "drop"] = "error"
    """Rows that cannot be trained on, such as empty answers: error, or drop and report how many."""
    max_row_mb: int = Field(default=16, ge=1, le=2000)
    """Maximum size of a row or a .txt file in MB, so that a damaged or endless file cannot fill the memory."""
    train_on: Literal["answers", "last", "all"] = "answers"
    """Tokens that the loss counts: all answers of a chat, its last answer only, or prompts too."""
    packing: bool = False
    """Pack several samples into each row of max_length (best fit); samples never attend to each other."""
    validation: float | str = 0.05
    """Rows to hold out: a share (below 1), a number (1 or more), 0 for none, or the path of a file."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many distinct rows, from the beginning."""

    @property
    def names(self) -> list[str]:
        """The sources, without their weights."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class TrainOptions(Options):
    """How the adapter is trained."""

    micro_batch: int = Field(default=4, ge=1)
    """Rows per forward and backward pass on each device."""
    accumulation: int = Field(default=4, ge=1)
    """Micro batches per optimiser step; the loss is averaged over all trained tokens of the step."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; max_steps overrides it."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; overrides epochs."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate. LoRA needs about ten times that of full fine-tuning."""
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
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Random seed of split, order, initialisation and dropout."""
    processes: int = Field(default=1, ge=1)
    """Data-parallel processes; must equal the launcher's world size."""


class EngineOptions(Options):
    """How the decoder layers are computed."""

    fused: bool = True
    """Use nybble's own forward and backward; unsupported layers keep their original ones, and the run reports them."""
    policy: Literal["auto", "keep-all", "drop-mlp", "drop-qkv", "layer-input", "host"] = "auto"
    """What a layer keeps for backward, from fastest to leanest; auto picks the fastest that fits in memory."""
    embedding: Literal["device", "host"] = "device"
    """Where the token embedding is kept; host saves 0.26 GB of GPU memory on a 7B."""

    @property
    def is_shaped(self) -> bool:
        """Whether more than the engine itself is asked for."""
        return self.policy != "auto" or self.embedding != "device"


class TrackerOptions(Options):
    """Experiment tracker, besides RUN/metrics.jsonl."""

    to: Literal["none", "wandb", "tensorboard", "mlflow", "trackio"] = "none"
    """Tracker; wandb runs offline if it finds no key, and never prompts for one."""
    project: str = "nybble"
    """Project or experiment name in the tracker."""


class ExportOptions(Options):
    """Exports made after training; whether they are possible is checked before the first step."""

    to: list[Literal["adapter", "merged", "gguf"]] = Field(default_factory=list)
    """Exports into RUN/export: adapter (PEFT), merged (a Transformers folder), gguf (llama.cpp, Q8_0)."""


class Recipe(Options):
    """One training run."""

    model: ModelOptions = Field(default_factory=ModelOptions)
    """The base model."""
    adapter: str | None = None
    """PEFT adapter folder to continue training from, instead of a new LoRA."""
    lora: LoraOptions = Field(default_factory=LoraOptions)
    """The adapter."""
    data: DataOptions = Field(default_factory=DataOptions)
    """The data."""
    train: TrainOptions = Field(default_factory=TrainOptions)
    """The training."""
    engine: EngineOptions = Field(default_factory=EngineOptions)
    """The fused engine."""
    tracker: TrackerOptions = Field(default_factory=TrackerOptions)
    """Experiment tracking."""
    export: ExportOptions = Field(default_factory=ExportOptions)
    """Exports."""
    out: str | None = None
    """Run folder; default: runs/MODEL-DATA, numbered if that exists."""

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
        f"lora: {', '.join(sorted(lora.model_fields_set))} cannot be set with adapter={recipe.adapter}: "
        "the adapter has its own",
    )
    no_validation = data.validation in (0, 0.0)
    yield (
        no_validation and train.early_stopping is not None,
        "train.early_stopping: needs validation rows, but data.validation is 0",
    )
    yield (
        no_validation and bool(train.eval_tasks),
        "train.eval_tasks: scored when validation rows are, but data.validation is 0",
    )
    yield (
        not no_validation
        and train.keep_best
        and None not in (train.save_every, train.evaluate_every)
        and train.save_every != train.evaluate_every,
        f"train.save_every: {train.save_every} differs from the {train.evaluate_every} steps between evaluations, so the best "
        f"adapter might not be saved; train.save_every={train.evaluate_every}, or train.keep_best=false",
    )
    yield (
        isinstance(data.validation, int | float) and data.validation < 0,
        "data.validation: a share below 1, a number of rows, or a file; not negative",
    )
    yield (
        isinstance(data.path, dict) and any(weight <= 0 for weight in data.path.values()),
        "data.path: weights must be above 0; omit a source to leave it out",
    )
    endless = data.streaming and train.max_steps is None
    yield endless, "data.streaming: the length of a stream is unknown; set train.max_steps"
    yield (
        data.streaming and data.limit is not None,
        "data.limit: does not apply to a stream; set train.max_steps",
    )
    yield (
        data.streaming and isinstance(data.validation, float) and 0 < data.validation < 1,
        "data.validation: cannot hold out a share of a stream; set 0, a number of rows (its first), or a file",
    )
    yield (
        recipe.engine.embedding == "host" and train.processes > 1,
        "engine.embedding: host works with one process only; DDP needs all parameters on one device",
    )
    yield (
        not recipe.engine.fused and recipe.engine.is_shaped,
        "engine: policy and embedding have no effect, because engine.fused is false",
    )
    for name, text in (("model.path", recipe.model.path), ("adapter", recipe.adapter), ("out", recipe.out)):
        yield (
            any("\udc80" <= character <= "\udcff" for character in text or ""),
            f"{name}: {text!r} is not UTF-8, and the libraries that read and write models accept no other names; rename it",
        )
    yield lora.targets == [], "lora.targets: an empty list trains nothing; name layers or use all-linear"


def option_names(model: type[Options] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every option's dotted name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            yield from option_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
