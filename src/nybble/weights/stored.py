"""What bitsandbytes writes beside a quantised weight in a model's files, and the numbers that such a weight stands for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.utils import unpack_tensor_to_dict

STATE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
PACKED = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
BESIDE = (*STATE, *PACKED)
"""How the names of tensors end that describe a quantised weight; before that they are the weight's own name."""
QUANTISED = (*PACKED, ".SCB")
"""Those that a quantised weight always has one of."""
INT8 = 127  # LLM.int8 stores a row as integers up to this, and the row's largest number beside it


class TensorNames(Protocol):
    """The names of the tensors of a model's files."""

    def __contains__(self, name: str, /) -> bool: ...


class StoredTensors(TensorNames, Protocol):
    """The tensors of a model's files by name."""

    def __getitem__(self, name: str, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Packed4bit:
    """A 4-bit weight as its description in the file says."""

    shape: list[int]
    """(outputs, inputs) of the numbers that it stands for."""
    blocksize: int
    nested_blocksize: int
    """Of the scales' own quantisation; 0 without one."""

    def part_bytes(self, name: str) -> Mapping[str, int]:
        """Every tensor of the weight of this name with the bytes that it must have."""
        count = math.prod(self.shape)
        blocks, nested = -(-count // self.blocksize), self.nested_blocksize
        sizes = {name: -(-count // 2), f"{name}.absmax": blocks * (1 if nested else 4), f"{name}.quant_map": 16 * 4}
        if nested:
            sizes |= {f"{name}.nested_absmax": -(-blocks // nested) * 4, f"{name}.nested_quant_map": 256 * 4}
        return sizes


def description_name(name: str, stored: TensorNames) -> str | None:
    """The tensor that describes a 4-bit weight, or None where the weight is none."""
    return next((name + end for end in PACKED if name + end in stored), None)


def int8_scales_name(name: str) -> str:
    """The scales of a weight's rows in LLM.int8."""
    return f"{name.removesuffix('.weight')}.SCB"


def described_name(name: str) -> str:
    """The weight that a tensor describes, or its own name; of LLM.int8's scales the layer."""
    return next((name.removesuffix(end) for end in BESIDE if name.endswith(end)), name)


def read_description(name: str, described: torch.Tensor) -> Packed4bit:
    """What the describing tensor of this name says.

    Raises:
        ValueError: why it cannot be a 4-bit weight's.
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
    """How a weight of the files is quantised in 4 bits, or None where it is not."""
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
        parts: of the rows; each begins where a block of numbers with a scale of its own does.
        device: on which to compute.
    """
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    _, columns = state.shape
    for part in parts:
        first, last = part.start * columns, part.stop * columns
        own = QuantState(
            absmax=scales[first // state.blocksize : -(-last // state.blocksize)].float().to(device),
            shape=torch.Size((part.stop - part.start, columns)),
            code=state.code.to(device),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        yield dequantize_4bit(packed.flatten()[first // 2 : last // 2].unsqueeze(1).to(device), own)


def dequantise_int8_rows(rows: Iterable[torch.Tensor], scales: torch.Tensor) -> Iterator[torch.Tensor]:
    """Consecutive rows of an 8-bit weight by its scales, (outputs,) on the rows' device, in float32."""
    limits, first = scales.float() / INT8, 0
    for part in rows:
        yield part * limits[first : first + len(part), None]
        first += len(part)
