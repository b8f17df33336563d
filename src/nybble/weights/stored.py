"""Quantised weights in a model's files: the tensors that bitsandbytes stores with each, and how to dequantise it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.utils import unpack_tensor_to_dict

from nybble.plan.ledger import packed_weight

STATE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
PACKED = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
BESIDE = (*STATE, *PACKED)
"""Suffixes of the tensors that describe a quantised weight; the name before them is the weight's own."""
QUANTISED = (*PACKED, ".SCB")
"""Suffixes of which every quantised weight has one."""
INT8 = 127  # LLM.int8 stores a row as integers up to this, and the row's largest number as its scale


class TensorNames(Protocol):
    """The names of the tensors in a model's files."""

    def __contains__(self, name: str, /) -> bool: ...


class StoredTensors(TensorNames, Protocol):
    """The tensors in a model's files by name."""

    def __getitem__(self, name: str, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Packed4bit:
    """A 4-bit weight as the file describes it."""

    shape: list[int]
    """(outputs, inputs) of the dequantised weight."""
    blocksize: int
    nested_blocksize: int
    """Block size of the scales' own quantisation; 0 if they are not quantised."""

    def part_bytes(self, name: str) -> Mapping[str, int]:
        """Every tensor of the weight with this name, and the bytes that it must have."""
        size = packed_weight(math.prod(self.shape), self.blocksize, self.nested_blocksize)
        sizes = {name: size.codes, f"{name}.absmax": size.absmax, f"{name}.quant_map": size.table}
        if self.nested_blocksize:
            sizes |= {f"{name}.nested_absmax": size.nested_absmax, f"{name}.nested_quant_map": size.nested_table}
        return sizes


def description_name(name: str, stored: TensorNames) -> str | None:
    """The tensor that describes a weight, if that is stored in 4 bits, or None."""
    return next((name + end for end in PACKED if name + end in stored), None)


def int8_scales_name(name: str) -> str:
    """The tensor with the scales of a weight's rows in LLM.int8."""
    return f"{name.removesuffix('.weight')}.SCB"


def described_name(name: str) -> str:
    """The weight that a tensor describes, or its own name; for LLM.int8's scales, the layer."""
    return next((name.removesuffix(end) for end in BESIDE if name.endswith(end)), name)


def read_description(name: str, described: torch.Tensor) -> Packed4bit:
    """The 4-bit weight that the describing tensor with this name describes.

    Raises:
        ValueError: it describes none, and why.
    """
    try:
        state = unpack_tensor_to_dict(described)
        shape, block, nested = list(state["shape"]), int(state["blocksize"]), int(state.get("nested_blocksize") or 0)
        is_known = hasattr(torch, state["dtype"]) and name.endswith(state["quant_type"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("it does not describe a 4-bit weight") from error
    if not is_known or block < 1 or nested < 0:
        raise ValueError(f"it describes a weight that bitsandbytes does not know ({state!r:.80})")
    return Packed4bit(shape, block, nested)


def read_state(name: str, tensors: StoredTensors) -> QuantState | None:
    """The quantisation state of a 4-bit weight in the files; None for other weights."""
    described = description_name(name, tensors)
    if described is None:
        return None
    parts = [name + end for end in STATE if name + end in tensors]
    return QuantState.from_dict({part: tensors[part] for part in [*parts, described]}, torch.device("cpu"))


def dequantise_rows(
    packed: torch.Tensor, state: QuantState, parts: Iterable[slice], device: torch.device
) -> Iterator[torch.Tensor]:
    """Rows of a 4-bit weight, in the type it was quantised from.

    Args:
        packed: the stored bytes.
        state: from `read_state`.
        parts: slices of the rows; each starts where a block of numbers with one scale starts.
        device: the device to compute on.
    """
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    _, columns = state.shape
    for part in parts:
        first, last = part.start * columns, part.stop * columns
        part_state = QuantState(
            absmax=scales[first // state.blocksize : -(-last // state.blocksize)].float().to(device),
            shape=torch.Size((part.stop - part.start, columns)),
            code=state.code.to(device),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        yield dequantize_4bit(packed.flatten()[first // 2 : last // 2].unsqueeze(1).to(device), part_state)


def dequantise_int8_rows(rows: Iterable[torch.Tensor], scales: torch.Tensor) -> Iterator[torch.Tensor]:
    """Dequantise consecutive rows of an 8-bit weight to float32; its scales, (outputs,), are on the rows' device."""
    limits, first = scales.float() / INT8, 0
    for part in rows:
        yield part * limits[first : first + len(part), None]
        first += len(part)
