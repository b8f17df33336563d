"""All sections together, and the options that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import Field, model_validator

from nybble.recipe.options.data import DataOptions
from nybble.recipe.options.engine import EngineOptions
from nybble.recipe.options.export import ExportOptions
from nybble.recipe.options.lora import LoraOptions
from nybble.recipe.options.model import ModelOptions
from nybble.recipe.options.preference import PreferenceOptions
from nybble.recipe.options.rate import AUTO
from nybble.recipe.options.section import Options
from nybble.recipe.options.tracker import TrackerOptions
from nybble.recipe.options.train import TrainOptions


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
    preference: PreferenceOptions = Field(default_factory=PreferenceOptions)
    """Training on preferences."""
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
        faults = [fault for applies, fault in _contradictions(self) if applies]
        if faults:
            raise ValueError("\n".join(faults))
        return self


def _contradictions(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """Each possible contradiction: whether it applies to this recipe, and its message."""
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
    yield (
        data.streaming and train.max_steps is None,
        "data.streaming: the length of a stream is unknown; set train.max_steps",
    )
    yield (
        data.streaming and data.limit is not None,
        "data.limit: does not apply to a stream; set train.max_steps",
    )
    yield (
        data.streaming and isinstance(data.validation, float) and 0 < data.validation < 1,
        "data.validation: cannot hold out a share of a stream; set 0, a number of rows (its first), or a file",
    )
    yield from _preference_faults(recipe)
    yield from _weights_faults(recipe)
    yield from _fp8_faults(recipe)
    yield (
        not recipe.engine.fused and recipe.engine.is_customised,
        "engine: policy, embedding, weights and compute have no effect, because engine.fused is false",
    )
    for name, text in (("model.path", recipe.model.path), ("adapter", recipe.adapter), ("out", recipe.out)):
        yield (
            any("\udc80" <= character <= "\udcff" for character in text or ""),
            f"{name}: {text!r} is not UTF-8, and the libraries that read and write models accept no other names; rename it",
        )
    yield lora.targets == [], "lora.targets: an empty list trains nothing; name layers or use all-linear"


REFERRING = ("dpo", "kto")  # objectives with a reference


def _preference_faults(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    train, data, preference = recipe.train, recipe.data, recipe.preference
    objective = train.objective
    is_preference = objective != "supervised"
    uses = {"supervised": (), "dpo": ("beta", "reference"), "orpo": ("beta",), "simpo": ("beta", "gamma"),
            "kto": ("beta", "reference", "desirable_weight", "undesirable_weight")}[objective]  # fmt: skip
    defaults = PreferenceOptions()
    unused = [
        name
        for name in PreferenceOptions.model_fields
        if name not in uses and getattr(preference, name) != getattr(defaults, name)
    ]
    yield (
        bool(unused),
        f"preference: {', '.join(unused)} has no effect with train.objective={objective}",
    )
    yield (
        is_preference and data.form != "auto",
        f"data.form: {data.form} is for rows with one answer; train.objective={objective} finds the form by the columns",
    )
    yield (
        is_preference and data.overlength == "split",
        "data.overlength: an answer that is judged as a whole cannot be split; use drop or truncate",
    )
    yield (
        data.train_on == "all" and objective in ("dpo", "kto", "simpo"),
        f"data.train_on: train.objective={objective} compares answers only; leave train_on out",
    )
    yield (
        is_preference and train.neftune_alpha is not None,
        f"train.neftune_alpha: noise would change the likelihoods that train.objective={objective} compares; leave it out",
    )
    yield (
        objective == "kto" and train.micro_batch < 2,
        "train.micro_batch: kto estimates how far the model has moved from the answers of other rows of its micro batch; "
        "it needs at least 2",
    )
    yield (
        is_preference and train.learning_rate == AUTO,
        f"train.learning_rate: auto judges the rate by a loss in nats per token, which train.objective={objective} has not; name "
        "a rate, or search it: nybble sweep train.learning_rate=1e-6..1e-4",
    )
    from_adapter = recipe.adapter is not None
    yield (
        from_adapter and objective == "dpo" and preference.reference == "live",
        "preference.reference: an adapter that is trained further is its own reference, which only `kept` can still know later",
    )
    yield (
        from_adapter and objective == "kto",
        "adapter: kto needs its reference in every step, and an adapter that is trained further is no longer it; merge the "
        "adapter into the base first (nybble export RUN --to merged), or use train.objective=dpo",
    )
    yield (
        data.streaming and objective in REFERRING and preference.reference == "kept",
        "preference.reference: the rows of a stream are not known before the first step; set live",
    )


def _weights_faults(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    weights, train = recipe.engine.weights, recipe.train
    yield (
        weights.startswith("sharded") and train.processes == 1,
        f"engine.weights: {weights} spreads weights over several processes, but train.processes is 1",
    )
    yield (
        weights.endswith("host") and recipe.model.device == "cpu",
        f"engine.weights: {weights} streams weights to a GPU, but model.device=cpu computes on the host",
    )
    yield (
        weights == "device" and recipe.engine.resident_layers > 0,
        "engine.resident_layers: all layers' weights stay on the device unless engine.weights says otherwise",
    )
    yield (
        weights != "device" and bool(train.eval_tasks),
        f"train.eval_tasks: lm-eval builds a key-value cache, which engine.weights={weights} cannot; leave them out, and score "
        "the finished run with nybble eval",
    )


def _fp8_faults(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    engine, model = recipe.engine, recipe.model
    is_default = not engine.fp8_skip and engine.fp8_fast == "both"
    yield (
        engine.compute == "bf16" and not is_default,
        "engine: fp8_skip and fp8_fast have no effect, because engine.compute is bf16",
    )
    yield (
        engine.compute == "fp8" and model.device == "cpu",
        "engine.compute: a CPU has no fp8 units, and model.device is cpu; fp8-if-possible falls back to 16 bits",
    )
    yield (
        engine.compute == "fp8" and model.dtype in ("float16", "float32"),
        f"engine.compute: products in fp8 give bfloat16, but model.dtype is {model.dtype}",
    )
    yield (
        engine.compute == "fp8" and recipe.lora.dora,
        "engine.compute: DoRA is computed by Transformers, which has no fp8; leave lora.dora or engine.compute out",
    )
    yield (
        engine.compute == "fp8" and model.quantization == "int8",
        "engine.compute: layers in int8 are computed by Transformers, which has no fp8; use model.quantization=nf4",
    )


def option_names(model: type[Options] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every option's dotted name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            yield from option_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
