"""How many bytes everything in memory takes: weights, adapters, a training step. They are computed nowhere else.

Generation's are in `nybble.plan.generation_bytes`, those of files in `nybble.plan.file_bytes`.

Everything follows from sizes (`nybble.plan.shapes`): nothing is measured, and torch is not loaded. A tensor's size is exact to
the byte; the allocator's rounding and CUDA's own memory come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from nybble.plan.policies import (
    DROP_MLP,
    DROP_QKV,
    HOST,
    KEEP_ALL,
    LADDER,
    LAYER_INPUT,
    LOSS_CHUNK,
    LOSS_MULTIPLE,
    tile,
)
from nybble.plan.shapes import LayerShape, ModelShape, Projection

# Weights

BLOCK = 64  # weights with one absmax (Dettmers et al. 2023; bitsandbytes' default)
ABSMAX_BLOCK = 256  # 8-bit absmax values with one of the second level
CODES = 4 * 16  # bytes of each weight's table of 4-bit values, in float32
NESTED_CODES = 4 * 256  # bytes of the table of 8-bit values
OFFSET = 4  # bytes of the mean that was subtracted from the absmax values; a file has it in the weight's description


class PackedWeight(NamedTuple):
    """Bytes of the tensors of a 4-bit weight."""

    codes: int
    absmax: int
    table: int
    """The values that the codes stand for."""
    nested_absmax: int = 0
    nested_table: int = 0


def packed_weight(numbers: int, block: int = BLOCK, nested_block: int = 0) -> PackedWeight:
    """A weight in 4 bits as bitsandbytes stores it.

    Args:
        numbers: how many numbers it has.
        block: numbers with one absmax.
        nested_block: absmax values with one of the second level; 0 if they are not quantised.
    """
    codes, blocks = _ceil_div(numbers, 2), _ceil_div(numbers, block)
    if not nested_block:
        return PackedWeight(codes, 4 * blocks, CODES)
    return PackedWeight(codes, blocks, CODES, 4 * _ceil_div(blocks, nested_block), NESTED_CODES)


class StoredWeight(NamedTuple):
    """Bytes of a linear layer's frozen weight."""

    codes: int
    """The numbers themselves, however many bits each."""
    absmax: int
    """Their scales; both levels, if the scales are quantised too."""
    tables: int
    """The values that the codes stand for."""


def stored_weight(projection: Projection, quantization: str, double_quantization: bool, element: int) -> StoredWeight:
    """A weight as bitsandbytes stores it, or unquantised.

    Args:
        projection: its sizes.
        quantization: nf4, fp4, int8 or none.
        double_quantization: whether the absmax values of 4-bit weights are quantised too.
        element: bytes of a number that is not quantised.
    """
    numbers = projection.parameters
    if quantization == "none":
        return StoredWeight(numbers * element, 0, 0)
    if quantization == "int8":
        return StoredWeight(numbers, 4 * projection.outputs, 0)
    packed = packed_weight(numbers, nested_block=ABSMAX_BLOCK if double_quantization else 0)
    tables = packed.table + packed.nested_table + (OFFSET if double_quantization else 0)
    return StoredWeight(packed.codes, packed.absmax + packed.nested_absmax, tables)


STAGING_BUFFERS = 2  # on the device, with one layer's weights each: one is read while the other is filled
STAGING_ALIGNMENT = 256  # bytes: where each tensor starts in such a buffer


def aligned(size: int) -> int:
    """Bytes of a tensor with the gap to the next one, where weights are streamed."""
    return _ceil_div(size, STAGING_ALIGNMENT) * STAGING_ALIGNMENT


def share_bytes(size: int, ranks: int) -> int:
    """Bytes of a layer's weights that each of several ranks holds."""
    return aligned(_ceil_div(size, ranks))


def streamed_layer_bytes(shape: ModelShape, quantization: str, double_quantization: bool, element: int) -> int:
    """A decoder layer's weights in one buffer, which is copied to the device at once: 104 MB on Llama 2 7B in NF4.

    Args:
        shape: the model's sizes.
        quantization: nf4, fp4 or none; layers in int8 are not fused.
        double_quantization: as for `stored_weight`.
        element: bytes of a number that is not quantised.
    """
    assert quantization != "int8", "8-bit weights are not streamed"
    total = 0
    for projection in shape.projections.values():
        if quantization == "none":
            total += aligned(projection.parameters * element)
            continue
        packed = packed_weight(projection.parameters, nested_block=ABSMAX_BLOCK if double_quantization else 0)
        total += sum(map(aligned, packed)) + (aligned(OFFSET) if double_quantization else 0)
    return total


def streamed_bytes(
    shape: ModelShape,
    quantization: str,
    double_quantization: bool,
    element: int,
    resident_layers: int = 0,
    ranks: int = 1,
) -> int:
    """Device bytes of the buffers for weights that are not there; other arguments as for `stored_weight`.

    Args:
        resident_layers: how many layers' weights stay on the device; they come on top.
        ranks: how many ranks hold a share of each of the others.
    """
    buffers = min(STAGING_BUFFERS, shape.layers - resident_layers)
    layer = streamed_layer_bytes(shape, quantization, double_quantization, element)
    return buffers * (ranks * share_bytes(layer, ranks) if ranks > 1 else layer)


@dataclass(frozen=True)
class BaseBytes:
    """The bytes of a frozen base in memory, by item."""

    codes: int
    absmax: int
    tables: int
    biases: int
    norms: int
    embedding: int
    head: int
    """0 if the head is tied to the embedding."""

    @property
    def total(self) -> int:
        """The sum of all items."""
        return sum(getattr(self, item.name) for item in fields(self))


def base_bytes(shape: ModelShape, quantization: str, double_quantization: bool, element: int) -> BaseBytes:
    """A base in memory; arguments as for `stored_weight`. Only the decoder layers' projections are quantised."""
    weights = [
        stored_weight(projection, quantization, double_quantization, element)
        for projection in shape.projections.values()
    ]
    codes, absmax, tables = (shape.layers * sum(part) for part in zip(*weights, strict=True))
    counts = shape.parameters
    others = (counts.biases, counts.norms, counts.embedding, counts.head)
    return BaseBytes(codes, absmax, tables, *(element * count for count in others))


# What is trained

ADAPTER = 4  # bytes of a trained parameter: adapters are float32
GRADIENT = 4
MOMENTS = 8  # AdamW's two, in float32
STATE_BLOCK = 256  # 8-bit state values with one absmax, float32
SMALL_STATE, UNPAGED = 4096, 100_000
"""Tensors with fewer numbers than these have their state in float32, and unpaged, respectively (bitsandbytes)."""


class StateBytes(NamedTuple):
    """An optimiser's state."""

    resident: int
    """Always on the device."""
    paged: int
    """Moved to host memory when the device has none left."""

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.resident + self.paged


def optimizer_state(sizes: Sequence[int], optimizer: str) -> StateBytes:
    """AdamW's state after its first step.

    Args:
        sizes: numbers in each of the optimiser's tensors; adapters may be flattened into a few of them.
        optimizer: adamw (torch's), adamw_8bit or paged_adamw_8bit (bitsandbytes').
    """
    if optimizer == "adamw":
        return StateBytes(sum(MOMENTS * size + 4 for size in sizes), 0)  # torch has a step counter for each tensor
    resident = paged = 0
    for size in sizes:
        moments = MOMENTS * size if size < SMALL_STATE else 2 * size
        resident += 0 if size < SMALL_STATE else 2 * 4 * _ceil_div(size, STATE_BLOCK)
        if optimizer == "paged_adamw_8bit" and size >= UNPAGED:
            paged += moments
        else:
            resident += moments
    tables = 2 * 4 * 256 if any(size >= SMALL_STATE for size in sizes) else 0
    return StateBytes(resident + tables, paged)


# A training step

QKV, OUT, GATE_UP, DOWN = range(4)  # groups of projections with one input


def kept_bytes(policy: str, shape: LayerShape) -> int:
    """Device bytes per token and layer that a policy keeps from forward to backward."""
    rung = LADDER.index(policy)
    total = 0
    if rung >= LADDER.index(LAYER_INPUT):
        total += shape.hidden * shape.residual  # the layer's input
    if rung >= LADDER.index(DROP_QKV):
        total += shape.hidden * shape.residual  # the residual stream after attention
        total += shape.query * shape.element + 4 * shape.heads  # attention's output and the log of its sums
        total += sum(shape.ranks) * shape.element
    if rung >= LADDER.index(DROP_MLP):
        total += shape.qkv * shape.element
    if rung >= LADDER.index(KEEP_ALL):
        total += (2 * shape.intermediate + shape.ranks[GATE_UP]) * shape.element
    return total


SCALED_MULTIPLE, SCALED_ALIGNMENT = 16, 256
"""Columns of matrices in e4m3 are a multiple of the first, and the bytes of their parts one of the second."""


def _group_bytes(shape: LayerShape) -> tuple[int, int, int, int]:
    """Bytes of each group's weights, dequantised, with the adapters around them."""
    sizes = ((shape.hidden, shape.qkv), (shape.query, shape.hidden), (shape.hidden, 2 * shape.intermediate),
             (shape.intermediate, shape.hidden))  # fmt: skip
    qkv, out, gate_up, down = (
        _scaled_bytes(n, m, r, shape.element) if in_fp8 else (n + r) * (m + r) * shape.element
        for (m, n), r, in_fp8 in zip(sizes, shape.ranks, shape.fp8, strict=True)
    )
    return qkv, out, gate_up, down


def _scaled_bytes(outputs: int, inputs: int, ranks: int, element: int) -> int:
    """A group's matrices in e4m3, forward and transposed, with their scales, and its adapters beside each of them."""
    total = 0
    for rows, columns in ((outputs, inputs), (inputs, outputs)):
        width = columns + split_columns(ranks)
        for part in (rows * width, 4 * rows, outputs * ranks * element, inputs * ranks * element, 8):
            total += _ceil_div(part, SCALED_ALIGNMENT) * SCALED_ALIGNMENT
    return total


def split_columns(ranks: int) -> int:
    """Columns of e4m3 that stand for the ranks beside a matrix: three for each."""
    return _ceil_div(3 * ranks, SCALED_MULTIPLE) * SCALED_MULTIPLE


def dequantised_bytes(shape: LayerShape) -> int:
    """Device bytes of a layer's dequantised weights, with the adapters around them; in fp8 those of both directions."""
    return sum(_group_bytes(shape))


def workspace_bytes(shape: LayerShape, tiles: int) -> int:
    """Device bytes of the workspace for dequantised weights that all layers share.

    Args:
        shape: a layer's sizes.
        tiles: how many tiles a batch is computed in. With several, groups are needed at the same time, except q-k-v and gate-up.
    """
    qkv, out, gate_up, down = _group_bytes(shape)
    return max(qkv, gate_up) + out + down if tiles > 1 else max(qkv, out, gate_up, down)


def working_set_bytes(shape: LayerShape, tokens: int, policy: str) -> int:
    """Device bytes that one layer's backward needs at its peak, for a batch of this many tokens, with what the layer kept.

    The peak is the larger of two moments: the MLP of one tile (gate, up and their gradients in place, the activation, the norm,
    the gradient of the output, and the sum after attention where it is recomputed) together with what the layer has of all
    tokens; and attention's backward with its inputs, its output and their gradients.
    """
    hidden, rows = shape.hidden * shape.residual, min(tokens, tile(policy, tokens))
    recomputed = hidden + (shape.qkv + shape.query) * shape.element + 4 * shape.heads
    if policy == HOST:
        recomputed += hidden  # the input of the next layer is on its way
    streams = 2 * hidden + shape.ranks[OUT] * shape.element  # gradients of the layer's output and of the sum
    in_tile = 2 if LADDER.index(policy) >= LADDER.index(DROP_QKV) else 3  # with the sum
    mlp = (3 * shape.intermediate + in_tile * shape.hidden + sum(shape.ranks)) * shape.element
    if shape.fp8[GATE_UP]:  # their gradients are there in e4m3 too
        mlp += 2 * shape.intermediate + split_columns(shape.ranks[GATE_UP])
    to_attended = shape.query * shape.element if rows < tokens else 0  # only after the first tile
    at_mlp = tokens * (recomputed + streams + to_attended) + rows * mlp
    # flash sums the query's gradient in float32
    attention = (shape.qkv + 2 * shape.query) * shape.element + 4 * shape.query
    return max(at_mlp, tokens * (recomputed + streams + attention))


FRAGMENTS = 2.4
"""Tensors of the residual stream's size by which reserved memory exceeds what is allocated at the peak: 2.1 to 2.9 where the
allocations of a step were recorded (`python -m bench.peak`; Llama 2 7B's width, 2,048 and 8,192 tokens, H100)."""
FRAGMENTED_TOKENS = 12_288
"""Beyond these it does not grow: what fits badly is of a tile's size. It is 1.2, 1.4 and 0.2 streams of Llama 2 7B with 16,384,
20,000 and 150,000 tokens (H200)."""


def fragment_bytes(shape: LayerShape, tokens: int) -> int:
    """Device bytes that the allocator loses between tensors of a batch."""
    return int(FRAGMENTS * min(tokens, FRAGMENTED_TOKENS) * shape.hidden * shape.residual)


def padding_bytes(shape: LayerShape, late: int, seen: int) -> int:
    """Device bytes that padding on the right adds to a layer's backward.

    Args:
        shape: the layer's sizes.
        late: number of padding tokens after the last real token of their row.
        seen: number of real tokens that these attend to.
    """
    per_late = 4 * shape.query * shape.element + 4 * shape.query  # flash sums the query's gradient in float32
    return late * per_late + seen * 2 * (shape.qkv - shape.query) * shape.element


def branch_bytes(shape: LayerShape, keys: int) -> int:
    """Device bytes that answers with a common prompt in one row add to a layer's backward: keys, values and their gradients, in
    the order in which attention reads them.

    Args:
        shape: the layer's sizes.
        keys: tokens of the batch, and for each answer but the first those of its prompt.
    """
    return keys * 2 * (shape.qkv - shape.query) * shape.element


def loss_bytes(tokens: int, vocabulary: int, hidden: int, *, chunked: bool) -> int:
    """Device bytes of the loss at its peak; the logits have 16 bits.

    Args:
        tokens: in the batch.
        vocabulary: columns of the head.
        hidden: rows of the head.
        chunked: whether `nybble.engine.loss` computes it in chunks; else the logits of the whole batch exist at once.
    """
    if chunked:
        rows = _ceil_div(tokens, LOSS_MULTIPLE) * LOSS_MULTIPLE
        # The last layer's output, its norm, the rows that are trained, and their gradients.
        return min(LOSS_CHUNK, rows) * vocabulary * 2 + 4 * rows * hidden * 2
    # Transformers: 16-bit logits, their float32 copy, its logarithms and their gradient
    return tokens * vocabulary * 14


def _ceil_div(count: int, size: int) -> int:
    """The quotient rounded up: how many blocks of a size are needed for a count."""
    return -(-count // size)
