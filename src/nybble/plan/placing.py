"""Makes a recipe fit into a limit of memory: the fastest way that does, or what would have to change."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nybble.plan import ledger
from nybble.plan.pace import products_per_token
from nybble.plan.policies import KEEP_ALL, LAYER_INPUT, tile
from nybble.plan.shapes import ModelShape
from nybble.plan.solver import SLACK, divide
from nybble.plan.step import Placement, Prediction, Work, held, loss_peak, predict, work_of
from nybble.recipe import Recipe

MARGIN = 0.02  # of the limit: so far the plan has been wrong
SHORTEST = 128  # tokens of a row, below which nobody trains to save memory
SMALL_BATCH = 4096
"""Tokens of a micro batch below which launches cost time: on an H100 1 x 2,048 reached 0.75 of the rate of 4 x 2,048."""
SMALL_BATCH_COST, HOST_EMBEDDING_COST = 1 / 3, 0.01  # in shares of the time of a step
STREAMED_OPERATIONS = 10_000
"""Operations that a GPU computes while a byte comes from the host: 500 TFLOP/s over 53 GB/s on an H100. Slower cards compute
fewer, so their copies are hidden sooner. What comes from other GPUs counts the same, though between some it comes faster."""
CLOSE = 1.02  # times that are nearer than this count as equal: planned speeds are no nearer to measured ones
UNHIDDEN = 0.3
"""Share of the copies' time by which steps are longer even where it is hidden. Reckoned from rows that keep other things: about
8% more for Llama 2 7B and 4% for 13B with 4,096 tokens, and none for Llama 3 8B and Llama 2 70B with 8,192 (H100)."""


@dataclass(frozen=True)
class Option:
    """One way to run a recipe."""

    changes: dict[str, str]
    """Options of the recipe that differ, with their values."""
    work: Work
    placement: Placement
    prediction: Prediction

    @property
    def cost(self) -> float:
        """The time of a token, to compare the options of one recipe; no unit."""
        time = products_per_token(self.work.layer, self.work.shape, self.placement.policies)
        if self.work.tokens < SMALL_BATCH:
            time *= 1 + SMALL_BATCH_COST * (1 - self.work.tokens / SMALL_BATCH) * 2
        time *= 1 + HOST_EMBEDDING_COST * self.work.embedding_on_host
        return max(time, self._copies) + UNHIDDEN * self._copies

    @property
    def _copies(self) -> float:
        """The time of the copies of a micro batch, by token: each layer's weights come twice, for forward and for backward."""
        work = self.work
        if not work.streamed_layers:
            return 0.0
        layer = ledger.streamed_layer_bytes(work.shape, work.quantization, work.double_quantization, work.element)
        return 2 * work.streamed_layers * layer * STREAMED_OPERATIONS / work.tokens


def place(work: Work, policy: str, limit: int | None) -> Placement:
    """What the layers keep.

    Args:
        work: what is trained.
        policy: the recipe's engine.policy.
        limit: bytes that torch may reserve; None if there is no limit, where auto keeps everything.
    """
    layers = work.shape.layers
    if work.plain_mask is not None:  # Transformers' checkpointing
        return Placement((LAYER_INPUT,) * layers)
    if policy != "auto" or limit is None:
        return Placement((KEEP_ALL if policy == "auto" else policy,) * layers)
    # As the engine reckons it once the optimiser has its state.
    state = ledger.optimizer_state([work.trained], work.optimizer).resident
    workspace = ledger.workspace_bytes(work.layer, -(-work.tokens // tile(KEEP_ALL, work.tokens)))
    allocated = sum(held(work).values()) + state + workspace
    free = int((1 - SLACK) * limit) - allocated - ledger.GRADIENT * work.trained
    policies, needed = divide(work.layer, layers, work.tokens, free, loss_peak(work))
    spare = free - max(needed, ledger.MOMENTS * work.trained)
    keeps_all = set(policies) == {KEEP_ALL}
    resident = layers - work.streamed_layers
    cached = min(resident, spare // ledger.dequantised_bytes(work.layer)) if keeps_all else 0
    return Placement(policies, max(0, cached))


@dataclass(frozen=True)
class Rows:
    """The rows that a recipe trains on, as far as they are known."""

    longest: int | None = None
    """Tokens of the longest; None for data.max_length, of each of a pair's sequences."""
    largest: Callable[[int], int] | None = None
    """Tokens of the largest micro batch of so many rows; None where each row may be the longest."""


def as_written(recipe: Recipe, shape: ModelShape, limit: int | None, rows: Rows) -> Option:
    """A recipe as it is."""
    return _option(recipe, shape, limit, rows, {})


def fastest(recipe: Recipe, shape: ModelShape, limit: int, rows: Rows) -> Option | None:
    """The fastest way to take the same steps within a limit, of about equal ones the plainest; None if there is none.

    Micro batches may get smaller, with as many rows in a step; embedding and weights may move to the host, and layers may keep
    less.
    """
    options = _same_steps(recipe, shape, limit, rows)
    fitting = [option for option in options if option.prediction.peak.total <= (1 - MARGIN) * limit]
    if not fitting:
        return None
    most = CLOSE * min(option.cost for option in fitting)
    return min(
        (option for option in fitting if option.cost <= most), key=lambda option: (len(option.changes), option.cost)
    )


def changes_that_fit(recipe: Recipe, shape: ModelShape, limit: int, rows: Rows) -> Option | None:
    """The way with the longest rows that fits, if rows may get shorter too; None if none does, however short they are."""
    longest = rows.longest // recipe.train.sequences if rows.longest else recipe.data.max_length
    lengths = range(SHORTEST, longest, SHORTEST)
    shorter = functools.partial(_shortened, recipe, shape, limit)
    fitting = bisect.bisect_left(lengths, True, key=lambda length: shorter(length) is None)  # a longer row takes more
    if not fitting:
        return None
    length = lengths[fitting - 1]
    found = shorter(length)
    assert found is not None, "it was found to fit"
    return replace(found, changes={"data.max_length": str(length), **found.changes})


def _shortened(recipe: Recipe, shape: ModelShape, limit: int, length: int) -> Option | None:
    return fastest(changed(recipe, {"data.max_length": str(length)}), shape, limit, Rows())


def may_stream(recipe: Recipe) -> bool:
    """Whether weights need not stay on the device: those of fused layers, without benchmarks, which need a cache."""
    return recipe.engine.fused and not recipe.train.eval_tasks


def elsewhere(recipe: Recipe) -> str:
    """The leanest place for weights: the host, or for several processes a share on each one's host."""
    return "host" if recipe.train.processes == 1 else "sharded-host"


def may_move_embedding(recipe: Recipe, shape: ModelShape) -> bool:
    """Whether the embedding may be on the host: with fused layers, and if it is not also the head."""
    return recipe.engine.fused and not shape.tied


def _same_steps(recipe: Recipe, shape: ModelShape, limit: int, rows: Rows) -> Iterator[Option]:
    train, engine = recipe.train, recipe.engine
    whole = train.micro_batch * train.accumulation
    sizes = [size for size in range(train.micro_batch, 0, -1) if whole % size == 0]
    batches = [
        {} if size == train.micro_batch else {
            "train.micro_batch": str(size), "train.accumulation": str(whole // size),
        } for size in sizes
    ]  # fmt: skip
    movable = engine.embedding == "device" and may_move_embedding(recipe, shape)
    embeddings = [{}, {"engine.embedding": "host"}] if movable else [{}]
    policies = [{}] if engine.policy == "auto" else [{}, {"engine.policy": "auto"}]
    for batch, place, embedding, policy in itertools.product(batches, _places(recipe, shape), embeddings, policies):
        yield _option(recipe, shape, limit, rows, batch | place | embedding | policy)


def _places(recipe: Recipe, shape: ModelShape) -> list[dict[str, str]]:
    """Where weights may be: as the recipe says, or on the host with none, a quarter, half or three quarters of the layers on the
    device. Those of several processes are spread over these, or else over their hosts."""
    engine = recipe.engine
    if not may_stream(recipe):
        return [{}]
    usual = ("host",) if recipe.train.processes == 1 else ("sharded", "sharded-host")
    wheres = dict.fromkeys(where for where in (engine.weights, *usual) if where != "device")
    return [{}, *(
        ({} if engine.weights == where else {"engine.weights": where})
        | ({} if resident == engine.resident_layers else {"engine.resident_layers": str(resident)})
        for where in wheres
        for resident in (0, *(shape.layers * quarters // 4 for quarters in (1, 2, 3)))
    )]  # fmt: skip


def _option(recipe: Recipe, shape: ModelShape, limit: int | None, rows: Rows, changes: dict[str, str]) -> Option:
    recipe = changed(recipe, changes)
    tokens = None if rows.largest is None else rows.largest(recipe.train.micro_batch)
    work = work_of(recipe, shape, rows.longest, tokens)
    placement = place(work, recipe.engine.policy, limit)
    return Option(changes, work, placement, predict(work, placement))


def changed(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    """A recipe with options changed, each named by section and option."""
    for name, value in changes.items():
        section, _, option = name.partition(".")
        before = getattr(recipe, section)
        typed = type(getattr(before, option))(value)
        recipe = recipe.model_copy(update={section: before.model_copy(update={option: typed})})
    return recipe
