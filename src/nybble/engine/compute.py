"""Which groups of projections are computed in fp8, and what that needs of a device and of a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nybble.engine.layer import GROUPS, FusedLayer
from nybble.engine.matrices import Augmented
from nybble.engine.product_fp8 import Peaks, Scaled
from nybble.engine.reader import PROJECTIONS
from nybble.engine.workspace import MatrixForm
from nybble.errors import EngineError
from nybble.kernels.scaled import MULTIPLE
from nybble.plan.shapes import fault_of_names, unskipped

Compute = Literal["bf16", "fp8", "fp8-if-possible"]
Fast = Literal["forward", "backward", "both", "none"]
OLDEST = (8, 9)  # compute capability of the first cards with fp8 units: Ada


@dataclass(frozen=True)
class Fp8:
    """What a model computes in fp8."""

    skip: tuple[str, ...] = ()
    """Names of projections and layers that stay in 16 bits."""
    fast: tuple[bool, bool] = (True, True)
    """Whether the sums are fast, forward and backward."""

    @functools.cache  # noqa: B019 - a model has few of these, and asks for every batch
    def groups(self, layer: int) -> frozenset[str]:
        """The groups of a layer that are computed in fp8."""
        return frozenset(name for name, is_in in zip(GROUPS, unskipped(self.skip, layer), strict=True) if is_in)

    def __str__(self) -> str:
        fast = [name for name, is_fast in zip(("forward", "backward"), self.fast, strict=True) if is_fast]
        skipped = f"; in 16 bits: {', '.join(self.skip)}" if self.skip else ""
        return f"fp8 (fast sums: {' and '.join(fast) or 'none'}{skipped})"


@dataclass(frozen=True)
class Fp8Choice:
    """What is computed in fp8."""

    fp8: Fp8 | None
    """None for nothing."""
    missing: str = ""
    """Why nothing is, where it was to be if possible."""


IN_16_BITS = Fp8Choice(None)


def choose_fp8(
    compute: Compute, skip: Sequence[str], fast: Fast, device: torch.device, dtype: torch.dtype, layers: int
) -> Fp8Choice:
    """What is computed in fp8, or why nothing is.

    Args:
        compute: what was asked for.
        skip: names of projections and layers that stay in 16 bits.
        fast: where sums are fast.
        device: where the layers are computed.
        dtype: the type of the residual stream.
        layers: the number of layers.

    Raises:
        EngineError: an unknown value or name; where fp8 is a must, also a device without fp8 units or a type they do not give.
    """
    if compute not in ("bf16", "fp8", "fp8-if-possible"):
        raise EngineError(f"there is no compute {compute!r}", fix="one of bf16, fp8, fp8-if-possible")
    if isinstance(skip, str):
        raise EngineError(f"fp8_skip is a text, not a list of names: {skip!r}", fix=f"fp8_skip=[{skip!r}]")
    if fast not in ("forward", "backward", "both", "none"):
        raise EngineError(f"fp8_fast cannot be {fast!r}", fix="forward, backward, both or none")
    asked = Fp8(tuple(skip), (fast in ("forward", "both"), fast in ("backward", "both")))
    if (fault := fault_of_names(skip, layers)) is not None:
        raise EngineError(f"fp8_skip: {fault.what}", fix=fault.fix)
    if compute == "bf16":
        return IN_16_BITS
    why = missing(device) or unfit(dtype, device)
    if not why:
        return Fp8Choice(asked)
    if compute == "fp8":
        raise EngineError(
            f"the products cannot be computed in fp8: {why}",
            fix='compute="bf16", or "fp8-if-possible" (in a recipe: engine.compute)',
        )
    return Fp8Choice(None, f"computed in 16 bits, not in fp8: {why}")


def missing(device: torch.device) -> str:
    """Why a device cannot compute in fp8; empty if it can."""
    if device.type != "cuda":
        return f"{device.type} has no fp8 units"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return (
            f"{name} (compute capability {capability[0]}.{capability[1]}) has no fp8 units; cards from Ada on have them (8.9: "
            "RTX 40, L4, L40S; 9.0: H100, H200; 10 and 12: Blackwell)"
        )
    return ""


def check_layers(layers: Mapping[Any, FusedLayer], fp8: Fp8, numbers: Mapping[Any, int]) -> None:
    """Check that the shapes suit fp8 units.

    Raises:
        EngineError: naming the first projections whose sizes do not divide.
    """
    for key, layer in layers.items():
        for name in sorted(fp8.groups(numbers[key])):
            group = layer.groups[name]
            if group.inputs % MULTIPLE or group.outputs % MULTIPLE:
                projections = ", ".join(PROJECTIONS[name][1])
                raise EngineError(
                    f"layer {numbers[key]}: {group.inputs} inputs and {group.outputs} outputs of {projections}, but fp8 units "
                    f"need multiples of {MULTIPLE}",
                    fix=f"leave them out: fp8_skip={list(PROJECTIONS[name][1])} (in a recipe: engine.fp8_skip)",
                )


def unfit(dtype: torch.dtype, device: torch.device) -> str:
    """Why a model cannot be computed in fp8; empty if it may be: with a residual stream in float32, autocast or the 4-bit
    layers decide for each batch in which type it is computed (`check_type`)."""
    is_unfit = (device.type, dtype) == ("cuda", torch.float16)
    return "its products give bfloat16, but the model is in float16" if is_unfit else ""


def check_type(dtype: torch.dtype, device: torch.device) -> None:
    """Check that the activations' type of a batch is the one that fp8 units give.

    Raises:
        EngineError: it is another.
    """
    if device.type == "cuda" and dtype != torch.bfloat16:
        raise EngineError(
            f"products in fp8 give bfloat16, but the model computes in {str(dtype).removeprefix('torch.')}",
            fix='load the model with dtype=torch.bfloat16 (in a recipe: model.dtype=bfloat16), or fuse with compute="bf16"',
        )


def forms(dtype: torch.dtype, in_fp8: bool, peaks: Peaks) -> list[MatrixForm[Any]]:
    """The forms that a group's matrix has while it is trained."""
    return [Scaled(dtype, False, peaks), Scaled(dtype, True, peaks)] if in_fp8 else [Augmented(dtype)]
