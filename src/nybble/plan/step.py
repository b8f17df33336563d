"""What a training run takes on its device, item by item, at each moment of it.

What is on the device at the peak comes from recorded allocations (`python -m bench.peak`). The sums are held against
`torch.cuda.max_memory_reserved` of runs of four shapes, whole and lean, of 2,048 to 120,000 tokens (tests/plan/measured.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nybble.plan import ledger
from nybble.plan.policies import tile
from nybble.plan.shapes import LayerShape, ModelShape, layer_shape, unskipped
from nybble.recipe import Recipe

WEIGHTS, SCALES, EMBEDDING, HEAD, NORMS = "weights", "their scales", "embedding", "head", "norms and biases"
ADAPTERS, GRADIENTS, OPTIMIZER, OTHERS = "adapters", "gradients", "optimiser state", "CUDA libraries, allocator"
KEPT, BACKWARD, LOSS, FORWARD = "kept activations", "one layer's backward", "the loss", "one layer's forward"
FRAGMENTED = "lost between tensors"
WORKSPACE, CACHED, QUANTISED = "a layer's weights, dequantised", "weights that stay dequantised", "a weight in 16 bits"
STAGING, SHARE, BUCKETS = "two layers' weights, when used", "share of the weights", "gradients, to be added up"
ITEMS = (WEIGHTS, SCALES, SHARE, STAGING, EMBEDDING, HEAD, NORMS, ADAPTERS, BUCKETS, GRADIENTS, OPTIMIZER, KEPT, BACKWARD, LOSS,
         FORWARD, WORKSPACE, CACHED, QUANTISED, FRAGMENTED, OTHERS)  # fmt: skip
"""The items of every moment, in the order in which they are shown."""
LOADING = "loading"
SCATTERED = 0.3
"""Share of the gradients that are not there at the peak by which reserved memory grows all the same: their memory is not in one
piece (ranks of 64 and 128 on an H100)."""
LIBRARIES = 84_000_000
"""Bytes of cuBLAS's workspaces and what else libraries keep, whatever the model: 68 MB are allocated, and the smallest model
reserves 16 MB more (H100, `python -m bench.peak`)."""
PLAIN_HIDDEN, PLAIN_INTERMEDIATE = 2.1, 11.6
"""Tensors of the residual stream's and of the MLP's width that a layer of Transformers and PEFT has at the peak of its backward,
in 16 bits: fitted to three runs (SmolLM2, Llama 2 7B, Llama 3 8B), and within 1% of them and of a fourth (docs/benchmarks.md)."""
PLAIN_MASK = 3  # bytes for each pair of tokens of a row
CONTEXT = 500_000_000  # bytes: about what CUDA itself takes beside torch's memory
EVALUATED_TOKENS = (
    4096  # of a batch of validation rows, unless a micro batch of the longest has more (training.trainer)
)


@dataclass(frozen=True)
class Work:
    """What is trained, in sizes."""

    shape: ModelShape
    layer: LayerShape
    quantization: str
    double_quantization: bool
    trained: int
    """Numbers of the adapter."""
    optimizer: str
    tokens: int
    """Of the largest micro batch."""
    accumulates: bool
    """Whether a step has several micro batches: all but the first find gradients there."""
    evaluated: int
    """Tokens of the largest batch of validation rows; 0 if nothing is held out."""
    embedding_on_host: bool
    processes: int
    streamed_layers: int
    """Layers whose weights do not stay on the device."""
    ranks: int
    """How many processes hold a share of each of these; 1 if every process has them."""
    shares_on_host: bool
    """Whether these weights, or this process's share of them, are on the host."""
    plain_mask: int | None
    """Bytes of attention's mask where Transformers computes the layers; None where they are fused."""

    @property
    def element(self) -> int:
        """Bytes of a number that is not quantised."""
        return self.layer.element


def work_of(recipe: Recipe, shape: ModelShape, longest: int | None = None, tokens: int | None = None) -> Work:
    """A recipe's work on a base.

    Args:
        recipe: the recipe.
        shape: the base's sizes.
        longest: tokens of the longest row; None for data.max_length, of each of a pair's sequences.
        tokens: of the largest micro batch; None if each of its rows is the longest.
    """
    model, lora, train = recipe.model, recipe.lora, recipe.train
    targets = (
        tuple(shape.projections) if lora.targets == "all-linear" else tuple(shape.projections.keys() & {*lora.targets})
    )
    allowed = train.micro_batch * train.sequences * recipe.data.max_length
    longest = train.sequences * recipe.data.max_length if longest is None else longest
    weights = recipe.engine.weights
    rows, element = train.micro_batch * longest, 4 if model.dtype == "float32" else 2
    return Work(
        shape=shape,
        layer=layer_shape(shape, lora.r, targets, element=element, residual=element, fp8=_in_fp8(recipe, shape)),
        quantization=model.quantization,
        double_quantization=model.double_quantization,
        trained=shape.adapter_parameters(lora.r, targets, dora=lora.dora),
        optimizer="paged_adamw_8bit" if train.optimizer == "auto" else train.optimizer,
        tokens=rows if tokens is None or not recipe.engine.fused else tokens,  # Transformers' rows are padded
        accumulates=train.accumulation > 1,
        evaluated=0 if recipe.data.validation in (0, 0.0) else max(min(allowed, EVALUATED_TOKENS), rows),
        embedding_on_host=recipe.engine.embedding == "host",
        processes=train.processes,
        streamed_layers=0 if weights == "device" else shape.layers - recipe.engine.resident_layers,
        ranks=train.processes if weights.startswith("sharded") else 1,
        shares_on_host=weights.endswith("host"),
        plain_mask=None if recipe.engine.fused else PLAIN_MASK * train.micro_batch * longest**2,
    )


def _in_fp8(recipe: Recipe, shape: ModelShape) -> tuple[bool, ...]:
    """Which groups are computed in fp8, in any of the layers: that takes no less memory."""
    engine = recipe.engine
    if not engine.fused or engine.compute == "bf16":
        return (False,) * 4
    layers = [unskipped(engine.fp8_skip, number) for number in range(shape.layers)]
    return tuple(map(any, zip(*layers, strict=True)))


def unplanned(recipe: Recipe) -> str | None:
    """What in a recipe has no plan yet, with the reason; None if it has one."""
    cases = (
        (
            not recipe.engine.fused and not recipe.train.gradient_checkpointing,
            "train.gradient_checkpointing=false: Transformers' layers keep everything",
        ),
        (recipe.model.quantization == "int8", "model.quantization=int8: Transformers computes the layers"),
        (recipe.lora.dora, "lora.dora=true: Transformers computes the layers"),
        (recipe.adapter is not None, f"adapter={recipe.adapter}: its rank and targets are not in the recipe"),
    )
    return next((what for applies, what in cases if applies), None)


@dataclass(frozen=True)
class Placement:
    """What each layer keeps."""

    policies: tuple[str, ...]
    cached_layers: int = 0
    """Layers whose weights stay dequantised."""


@dataclass(frozen=True)
class Moment:
    """The memory of one moment of a run, in bytes by item."""

    name: str
    items: Mapping[str, int]

    @property
    def total(self) -> int:
        """The sum of all items."""
        return sum(self.items.values())


@dataclass(frozen=True)
class Prediction:
    """A run's memory on its device."""

    moments: Sequence[Moment]

    @property
    def peak(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.total)

    def moment(self, name: str) -> Moment:
        """A moment by its name."""
        return next(moment for moment in self.moments if moment.name == name)


def predict(work: Work, placement: Placement) -> Prediction:
    """The memory of a run's moments."""
    moments = [_loading(work)]
    if work.evaluated:
        moments.append(Moment("evaluation", {**held(work), **_forward(work, work.evaluated), **_optimizer(work)}))
    step = {**held(work), **_optimizer(work), **_step(work, placement)}
    return Prediction([*moments, Moment("step", step)])


def held(work: Work) -> dict[str, int]:
    """What stays on the device from the first step to the last, but for the optimiser's state."""
    base = ledger.base_bytes(work.shape, work.quantization, work.double_quantization, work.element)
    embedding = 0 if work.embedding_on_host else base.embedding
    layers, resident = work.shape.layers, work.shape.layers - work.streamed_layers
    codes, scales = base.codes * resident // layers, (base.absmax + base.tables) * resident // layers
    staged = 0
    if work.streamed_layers:
        staged = ledger.streamed_bytes(
            work.shape, work.quantization, work.double_quantization, work.element, resident, work.ranks
        )
    return _without_zeros({
        WEIGHTS: codes, SCALES: scales, SHARE: 0 if work.shares_on_host else _elsewhere(work), STAGING: staged,
        EMBEDDING: embedding, HEAD: base.head, NORMS: base.norms + base.biases, ADAPTERS: ledger.ADAPTER * work.trained,
        BUCKETS: ledger.GRADIENT * work.trained if work.processes > 1 else 0, OTHERS: LIBRARIES,
    })  # fmt: skip


def host_bytes(work: Work) -> int:
    """Pinned host memory that a process takes for weights."""
    return _elsewhere(work) if work.shares_on_host else 0


def _elsewhere(work: Work) -> int:
    """Bytes of what a process has of the weights that do not stay on the device."""
    if not work.streamed_layers:
        return 0
    layer = ledger.streamed_layer_bytes(work.shape, work.quantization, work.double_quantization, work.element)
    return work.streamed_layers * (ledger.share_bytes(layer, work.ranks) if work.ranks > 1 else layer)


def _optimizer(work: Work) -> dict[str, int]:
    """What cannot move to the host: paged state is in memory that CUDA moves, which torch does not count."""
    return _without_zeros({OPTIMIZER: ledger.optimizer_state([work.trained], work.optimizer).resident})


def _loading(work: Work) -> Moment:
    """One weight at a time is quantised, from its 16 bits; or the copy is read in its own size."""
    widest = max(projection.parameters for projection in work.shape.projections.values())
    work = replace(work, processes=1)  # gradients are added up only later
    if work.streamed_layers:  # they are quantised and read there, and the device gets only the rest
        return Moment(LOADING, held(work))
    loaded = held(replace(work, embedding_on_host=False))  # it moves to the host only once all is loaded
    items = {name: count for name, count in loaded.items() if name != ADAPTERS}
    return Moment(LOADING, {**items, **_without_zeros({QUANTISED: 0 if work.quantization == "none" else 2 * widest})})


def _step(work: Work, placement: Placement) -> dict[str, int]:
    """What a step adds at its peak: that of the loss, or of a layer's backward.

    The last layer's backward finds most activations, the first layer's most gradients.
    """
    if work.plain_mask is not None:
        return _plain_step(work, work.plain_mask)
    layer, tokens = work.layer, work.tokens
    kept = [tokens * ledger.kept_bytes(policy, layer) for policy in placement.policies]
    gradients = ledger.GRADIENT * work.trained
    moments: list[dict[str, int]] = [
        {KEPT: sum(kept), LOSS: loss_peak(work), GRADIENTS: gradients if work.accumulates else 0}
    ]
    below = list(itertools.accumulate(kept, initial=0))
    for number in _ends_of_runs(placement.policies):
        above = 1 - (number + 1) / len(kept)
        moments.append({
            KEPT: below[number], BACKWARD: ledger.working_set_bytes(layer, tokens, placement.policies[number]),
            GRADIENTS: gradients if work.accumulates else int(above * gradients),
        })  # fmt: skip
    lost = ledger.fragment_bytes(layer, tokens)
    for moment in moments:
        moment[FRAGMENTED] = lost + int(SCATTERED * (gradients - moment[GRADIENTS]))
    peak = max(moments, key=lambda moment: sum(moment.values()))
    tiles = max(-(-tokens // tile(policy, tokens)) for policy in placement.policies)
    return _without_zeros({
        **peak,
        WORKSPACE: ledger.workspace_bytes(layer, tiles),
        CACHED: placement.cached_layers * ledger.dequantised_bytes(layer),
    })  # fmt: skip


def _plain_step(work: Work, mask: int) -> dict[str, int]:
    """The same where Transformers computes the layers, each of which keeps its input: at the last layer's backward."""
    widest = max(projection.parameters for projection in work.shape.projections.values())
    numbers = PLAIN_HIDDEN * work.layer.hidden + PLAIN_INTERMEDIATE * work.layer.intermediate
    gradients = ledger.GRADIENT * work.trained
    return _without_zeros({
        KEPT: work.shape.layers * work.tokens * work.layer.hidden * work.layer.residual,
        BACKWARD: int(work.tokens * numbers * work.element) + mask,
        GRADIENTS: gradients if work.accumulates else 0,
        FRAGMENTED: ledger.fragment_bytes(work.layer, work.tokens),
        QUANTISED: 0 if work.quantization == "none" else widest * work.element,
    })  # fmt: skip


def _ends_of_runs(policies: Sequence[str]) -> list[int]:
    """The first and the last layer of each policy's: in between, memory grows or shrinks evenly."""
    last = len(policies) - 1
    return [
        number for number, policy in enumerate(policies)
        if number in (0, last) or policy != policies[number - 1] or policy != policies[number + 1]
    ]  # fmt: skip


def _forward(work: Work, tokens: int) -> dict[str, int]:
    """What a forward without gradients takes."""
    layer = work.layer
    rows = min(tokens, tile("host", tokens))
    streams = 3 * layer.hidden * layer.residual + (layer.qkv + layer.query) * layer.element
    mlp = (3 * layer.intermediate + 2 * layer.hidden + sum(layer.ranks)) * layer.element
    loss = ledger.loss_bytes(tokens, work.shape.vocabulary, layer.hidden, chunked=True)
    tiles = -(-tokens // tile("host", tokens))
    return {
        FORWARD: max(tokens * streams + rows * mlp, loss),
        FRAGMENTED: ledger.fragment_bytes(layer, tokens),
        WORKSPACE: ledger.workspace_bytes(layer, tiles),
    }


def loss_peak(work: Work) -> int:
    """Bytes of the loss of the largest micro batch."""
    return ledger.loss_bytes(work.tokens, work.shape.vocabulary, work.layer.hidden, chunked=True)


def _without_zeros(items: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in items.items() if count}
