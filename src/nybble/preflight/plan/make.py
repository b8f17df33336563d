"""Makes the plan of a recipe: memory, disk and time, and what would have to change to fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nybble.errors import RecipeError
from nybble.plan import file_bytes, ledger
from nybble.plan.pace import Pace, pace
from nybble.plan.placing import (
    SHORTEST,
    Option,
    Rows,
    as_written,
    changed,
    changes_that_fit,
    elsewhere,
    fastest,
    may_move_embedding,
    may_stream,
)
from nybble.plan.policies import LADDER
from nybble.plan.shapes import ModelShape, fault_of_names
from nybble.plan.step import unplanned
from nybble.preflight.plan.card import Card
from nybble.preflight.plan.sizes import Sizes
from nybble.recipe import Recipe


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes."""

    download: int
    """The base's weights in 16 bits."""
    copy: int
    """Its quantised copy in the cache."""
    run: int
    """The run folder."""


@dataclass(frozen=True)
class RowFacts:
    """The rows that a recipe trains on."""

    rows: Rows
    count: int
    """Rows of the training set; packed ones if it is packed."""
    steps: int
    tokens_of_run: int
    """In all steps and processes, prompts included."""
    typical: int
    """Tokens of the row that the average token is in: attention's work grows with it."""


@dataclass(frozen=True)
class RunPlan:
    """What a recipe takes."""

    recipe: Recipe
    """As it would run: with the option's changes."""
    sizes: Sizes
    limit: int | None
    """Bytes that torch may reserve; None if nothing is known of the card."""
    facts: RowFacts | None
    option: Option
    ladder: tuple[Option, ...]
    """The recipe with each policy, from the leanest; only without a limit."""
    verdict: str
    """fits, over (as written, which may not change), shorter (only with shorter rows) or too large."""
    disk: Disk
    pace: Pace | None
    seconds: float | None
    """Of training, without evaluations; None if the rows or the card are not known, or weights are streamed."""


def make_plan(
    recipe: Recipe, sizes: Sizes, *, limit: int | None, card: Card | None, facts: RowFacts | None = None, adapt: bool = True,
) -> RunPlan:  # fmt: skip
    """The plan of a recipe.

    Args:
        recipe: the recipe.
        sizes: of the base.
        limit: bytes that torch may reserve; None for no limit.
        card: whose speed is estimated.
        facts: the rows; None if the data was not read.
        adapt: whether the recipe may change to fit.

    Raises:
        RecipeError: the plan does not know what the recipe asks for.
    """
    shape = sizes.shape
    recipe = as_stored(recipe, sizes.stored)
    if (what := unplanned(recipe)) is not None:
        raise RecipeError(
            f"{what}, whose memory is not planned yet", fix="leave it out, or read the peak that nybble train prints"
        )
    check_resident_layers(recipe, shape)
    check_fp8_names(recipe, shape)
    rows = facts.rows if facts is not None else Rows()
    option, verdict = _choose(recipe, shape, limit, rows, adapt=adapt)
    recipe = changed(recipe, option.changes)
    work = option.work
    length = facts.typical if facts is not None else recipe.data.max_length
    engine = recipe.engine
    in_fp8 = engine.compute == "fp8" and not engine.fp8_skip
    # The rate of the link to the host is not known, nor how fast Transformers' layers or some products in fp8 are.
    known = not work.streamed_layers and engine.fused and (in_fp8 or not any(work.layer.fp8))
    speed = None
    if card is not None and known:
        speed = pace(work.layer, shape, option.placement.policies, length, card.name, fp8=in_fp8)
    base = ledger.base_bytes(shape, recipe.model.quantization, recipe.model.double_quantization, work.element).total
    copied = recipe.model.quantization != "none" and sizes.stored is None
    disk = Disk(
        base if sizes.stored is not None else file_bytes.download_bytes(shape),
        file_bytes.cached_copy_bytes(base) if copied else 0,
        file_bytes.run_folder_bytes(work.trained, recipe.train.keep_checkpoints),
    )
    ladder = () if limit is not None or not recipe.engine.fused else tuple(
        as_written(changed(recipe, {"engine.policy": policy}), shape, None, rows) for policy in LADDER
    )  # fmt: skip
    seconds = None
    if facts is not None and speed is not None:
        seconds = facts.tokens_of_run / recipe.train.processes / speed.tokens_per_second
    return RunPlan(recipe, sizes, limit, facts, option, ladder, verdict, disk, speed, seconds)


def check_positions(recipe: Recipe, shape: ModelShape) -> None:
    """Refuse rows longer than the model's positions, as training does.

    Raises:
        RecipeError: they are.
    """
    if recipe.data.max_length > shape.positions and recipe.model.rope_scaling is None:
        raise RecipeError(
            f"data.max_length={recipe.data.max_length} is above the model's {shape.positions} positions",
            fix=f"data.max_length={shape.positions}, or set model.rope_scaling",
        )


def check_resident_layers(recipe: Recipe, shape: ModelShape) -> None:
    """Refuse as many resident layers as the model has, as the engine does once the base is loaded.

    Raises:
        RecipeError: there are.
    """
    if recipe.engine.resident_layers >= shape.layers:
        raise RecipeError(
            f"engine.resident_layers={recipe.engine.resident_layers}, but the model has {shape.layers} layers, of which at "
            "least one is streamed",
            fix="engine.weights=device, or fewer",
        )


def check_fp8_names(recipe: Recipe, shape: ModelShape) -> None:
    """Refuse names in engine.fp8_skip that leave out nothing or everything, as the engine does once the base is loaded.

    Raises:
        RecipeError: there are.
    """
    if (fault := fault_of_names(recipe.engine.fp8_skip, shape.layers)) is not None:
        raise RecipeError(f"engine.fp8_skip: {fault.what}", fix=fault.fix)


def as_stored(recipe: Recipe, stored: str | None) -> Recipe:
    """A recipe whose base is stored as the checkpoint came quantised, if it did."""
    return recipe if stored is None else changed(recipe, {"model.quantization": stored})


def _choose(recipe: Recipe, shape: ModelShape, limit: int | None, rows: Rows, *, adapt: bool) -> tuple[Option, str]:
    written = as_written(recipe, shape, limit, rows)
    if limit is None or (not adapt and written.prediction.peak.total <= limit):
        return written, "fits"
    if not adapt:
        return written, "over"
    found = fastest(recipe, shape, limit, rows)
    if found is not None:
        return found, "fits"
    shorter = changes_that_fit(recipe, shape, limit, rows)
    return (shorter, "shorter") if shorter is not None else (_leanest(recipe, shape, limit), "too large")


def _leanest(recipe: Recipe, shape: ModelShape, limit: int) -> Option:
    train = recipe.train
    changes = {
        "data.max_length": str(min(SHORTEST, recipe.data.max_length)), "train.micro_batch": "1",
        "train.accumulation": str(train.micro_batch * train.accumulation),
        **({"engine.policy": "host"} if recipe.engine.fused else {}),
        **({"engine.embedding": "host"} if may_move_embedding(recipe, shape) else {}),
        **({"engine.weights": elsewhere(recipe), "engine.resident_layers": "0"} if may_stream(recipe) else {}),
    }  # fmt: skip
    return replace(as_written(changed(recipe, changes), shape, limit, Rows()), changes=changes)
