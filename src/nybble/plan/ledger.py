"""How many bytes everything takes: weights, adapters, a training step, generation, files. Nothing else in nybble reckons them.

All of it follows from sizes (`nybble.plan.shapes`); nothing is measured and torch is not loaded. What a tensor takes is exact
to the byte; blocks that an allocator rounds up, and CUDA's own memory, come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from nybble.plan.policies import DROP_MLP, DROP_QKV, KEEP_ALL, LADDER, LAYER_INPUT, LOSS_CHUNK, LOSS_MULTIPLE, tile
from nybble.plan.shapes import LayerShape, ModelShape, Projection

# Weights

BLOCK = 64  # weights with one absmax (Dettmers et al. 2023; bitsandbytes' default)
ABSMAX_BLOCK = 256  # 8-bit absmax values with one of the second level
CODES = 4 * 16  # bytes of the table of 4-bit values, float32, which each weight has
NESTED_CODES = 4 * 256 + 4  # of the table of 8-bit values and the mean that was subtracted


class StoredWeight(NamedTuple):
    """Bytes of a linear layer's frozen weight."""

    codes: int
    """The numbers themselves, however many bits each."""
    absmax: int
    """Their scales, on both levels where these are quantised too."""
    tables: int
    """What the codes stand for."""


def stored_weight(projection: Projection, quantization: str, double_quantization: bool, element: int) -> StoredWeight:
    """A weight as bitsandbytes lays it out, or as it is.

    Args:
        projection: its sizes.
        quantization: nf4, fp4, int8 or none.
        double_quantization: whether the absmax values of 4-bit weights are quantised once more.
        element: bytes of a number that is not quantised.
    """
    numbers = projection.parameters
    if quantization == "none":
        return StoredWeight(numbers * element, 0, 0)
    if quantization == "int8":
        return StoredWeight(numbers, 4 * projection.outputs, 0)
    codes, blocks = _ceil(numbers, 2), _ceil(numbers, BLOCK)
    if not double_quantization:
        return StoredWeight(codes, 4 * blocks, CODES)
    return StoredWeight(codes, blocks + 4 * _ceil(blocks, ABSMAX_BLOCK), CODES + NESTED_CODES)


@dataclass(frozen=True)
class BaseBytes:
    """A frozen base in memory, item by item."""

    codes: int
    absmax: int
    tables: int
    biases: int
    norms: int
    embedding: int
    head: int
    """0 where the embedding is the head too."""

    @property
    def total(self) -> int:
        """All items."""
        return sum(getattr(self, item.name) for item in fields(self))


def base_bytes(shape: ModelShape, quantization: str, double_quantization: bool, element: int) -> BaseBytes:
    """A base in memory; the arguments as of `stored_weight`. Only the decoder layers' projections are quantised."""
    weights = [stored_weight(one, quantization, double_quantization, element) for one in shape.projections.values()]
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
"""Numbers of a tensor below which bitsandbytes keeps its state in float32, and below which it does not page it."""


class StateBytes(NamedTuple):
    """An optimiser's state."""

    resident: int
    """Always on the device."""
    paged: int
    """Moved to host memory where the device has none left."""

    @property
    def total(self) -> int:
        """Both."""
        return self.resident + self.paged


def optimizer_state(sizes: Sequence[int], optimizer: str) -> StateBytes:
    """AdamW's state after its first step.

    Args:
        sizes: numbers of each tensor that the optimiser has: adapters may be flattened into a few.
        optimizer: adamw (torch's), adamw_8bit or paged_adamw_8bit (bitsandbytes').
    """
    if optimizer == "adamw":
        return StateBytes(sum(MOMENTS * size + 4 for size in sizes), 0)  # torch counts the steps of each tensor
    resident = paged = 0
    for size in sizes:
        moments = MOMENTS * size if size < SMALL_STATE else 2 * size
        resident += 0 if size < SMALL_STATE else 2 * 4 * _ceil(size, STATE_BLOCK)
        if optimizer == "paged_adamw_8bit" and size >= UNPAGED:
            paged += moments
        else:
            resident += moments
    tables = 2 * 4 * 256 if any(size >= SMALL_STATE for size in sizes) else 0
    return StateBytes(resident + tables, paged)


# A training step

QKV, OUT, GATE_UP, DOWN = range(4)  # groups of projections with one input


def kept_bytes(policy: str, shape: LayerShape) -> int:
    """Device bytes a token and layer that a policy keeps from forward to backward."""
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


def _group_numbers(shape: LayerShape) -> tuple[int, int, int, int]:
    """Numbers of each group's weights in the type of the activations, with the adapters around them."""
    sizes = ((shape.hidden, shape.qkv), (shape.query, shape.hidden), (shape.hidden, 2 * shape.intermediate),
             (shape.intermediate, shape.hidden))  # fmt: skip
    qkv, out, gate_up, down = ((n + r) * (m + r) for (m, n), r in zip(sizes, shape.ranks, strict=True))
    return qkv, out, gate_up, down


def dequantised_bytes(shape: LayerShape) -> int:
    """Device bytes of a layer's weights in the type of its activations, with the adapters around them."""
    return sum(_group_numbers(shape)) * shape.element


def workspace_bytes(shape: LayerShape, tiles: int) -> int:
    """Device bytes that all layers share for their dequantised weights.

    Args:
        shape: a layer's sizes.
        tiles: in which a batch is computed. With several, groups are needed side by side; only q-k-v and gate-up never are.
    """
    qkv, out, gate_up, down = _group_numbers(shape)
    numbers = max(qkv, gate_up) + out + down if tiles > 1 else max(qkv, out, gate_up, down)
    return numbers * shape.element


def working_set_bytes(shape: LayerShape, tokens: int, policy: str) -> int:
    """Device bytes that one layer's backward needs at its peak, for a batch of so many tokens.

    The larger of two moments: the MLP of one tile (gate, up and their gradients in place, the activation, the norm) beside
    what the layer keeps of all tokens; and attention's backward with its inputs, its output and their gradients.
    """
    hidden, rows = shape.hidden * shape.residual, min(tokens, tile(policy, tokens))
    recomputed = shape.hidden * shape.residual + (shape.qkv + shape.query) * shape.element + 4 * shape.heads
    streams = 2 * hidden + shape.ranks[OUT] * shape.element  # gradients of the layer's output and of the sum
    mlp = (3 * shape.intermediate + 4 * shape.hidden + sum(shape.ranks)) * shape.element
    at_mlp = tokens * (recomputed + streams + shape.query * shape.element) + rows * mlp
    # flash sums the query's gradient in float32
    attention = (shape.qkv + 2 * shape.query) * shape.element + 4 * shape.query
    return max(at_mlp, tokens * (recomputed + streams + attention))


def padding_bytes(shape: LayerShape, late: int, seen: int) -> int:
    """Device bytes that padding on the right adds to a layer's backward.

    Args:
        shape: the layer's sizes.
        late: tokens of padding behind the last real token of their row.
        seen: real tokens that these see.
    """
    of_late = 4 * shape.query * shape.element + 4 * shape.query  # flash sums the query's gradient in float32
    return late * of_late + seen * 2 * (shape.qkv - shape.query) * shape.element


def loss_bytes(tokens: int, vocabulary: int, hidden: int, *, chunked: bool) -> int:
    """Device bytes of the loss at its peak, the gradient of its input included; 16-bit logits.

    Args:
        tokens: of the batch.
        vocabulary: columns of the head.
        hidden: its rows.
        chunked: whether `nybble.engine.loss` computes it; else a whole batch's logits are there.
    """
    if chunked:
        rows = _ceil(tokens, LOSS_MULTIPLE) * LOSS_MULTIPLE
        return min(LOSS_CHUNK, rows) * vocabulary * 2 + rows * hidden * 4
    # Transformers: 16-bit logits, their float32 copy, its logarithms and their gradient
    return tokens * vocabulary * 14


# Generation


def kv_cache_bytes_per_token(shape: ModelShape, element: int) -> int:
    """Keys and values of a token in all layers: 0.5 MB on Llama 2 7B in 16 bits.

    Args:
        shape: the model's sizes.
        element: bytes of a number.
    """
    return 2 * shape.layers * shape.key_value_heads * shape.head_size * element


# Files

SPARE = 1.02  # of an export: headers, tokenizer, card and report come on top
CACHE_SPARE = 1.1  # of a quantised copy: what else is written there meanwhile
GGUF_BITS: Mapping[str, float] = {"F16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}
"""Bits per weight of the GGUF types that the gguf package writes."""
GGUF_K_BITS: Mapping[str, float] = {
    "Q2_K": 3.2, "Q3_K_S": 3.6, "Q3_K_M": 4.0, "Q3_K_L": 4.3, "Q4_K_S": 4.7, "Q4_K_M": 4.9, "Q5_K_S": 5.6, "Q5_K_M": 5.7,
    "Q6_K": 6.6,
}  # fmt: skip
"""Of those that llama.cpp's own tool makes of an F16, about: as llama.cpp lists them for Llama 2 7B."""


def download_bytes(shape: ModelShape) -> int:
    """A base's weights as the Hub has them, in 16 bits."""
    return 2 * shape.parameters.total


def cached_copy_bytes(size: int) -> int:
    """Disk that must be free for a quantised copy of so many bytes."""
    return int(CACHE_SPARE * size)


def adapter_file_bytes(trained: int) -> int:
    """The saved adapter.

    Args:
        trained: its parameters.
    """
    return trained * ADAPTER


def checkpoint_bytes(trained: int) -> int:
    """A checkpoint at most: the adapter, and AdamW's moments in float32."""
    return trained * (ADAPTER + MOMENTS)


def run_folder_bytes(trained: int, keep: int) -> int:
    """What a run writes: the checkpoints that are kept, the best, the one being written, and the adapter.

    Args:
        trained: trained parameters.
        keep: checkpoints kept beside the best.
    """
    return (keep + 2) * checkpoint_bytes(trained) + adapter_file_bytes(trained)


def export_bytes(to: str, parameters: int, quants: Sequence[str] = (), adapter: int = 0) -> int:
    """An export, with the files that are there only while it is written.

    Args:
        to: adapter, merged or gguf.
        parameters: of the whole model.
        quants: GGUF types.
        adapter: bytes of the adapter.
    """
    if to == "adapter":
        return int(adapter * SPARE)
    if to == "merged":
        return int(2 * parameters * SPARE)
    bits = sum({**GGUF_BITS, **GGUF_K_BITS}[quant] for quant in quants)
    bits += GGUF_BITS["F16"] if set(quants) & set(GGUF_K_BITS) else 0.0  # what the K types are made of
    return int(parameters * bits / 8 * SPARE)


def _ceil(count: int, size: int) -> int:
    """How many parts of a size hold so many."""
    return -(-count // size)
