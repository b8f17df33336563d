"""Checks for NaN and infinity in the files of a model, and in a loaded model."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable

import torch

from nybble.errors import ModelError
from nybble.model.base.files import open_tensors, weight_files
from nybble.model.base.soundness import BUFFER
from nybble.terminal import first_of
from nybble.weights.frozen import float_tensors


def check_files(folder: pathlib.Path) -> list[str]:
    """Look for numbers that are not finite in the files of a model that is about to be quantised, which would spread them.

    The bytes are read from disk only once, since loading then finds them in memory: 2 GB per second on one core.

    Returns:
        A notice where a weight is all zeros.

    Raises:
        ModelError: with the tensors, and how many of their numbers are not finite.
    """
    zeros = []
    for file in weight_files(folder):
        names, get = open_tensors(file)
        tensors = ((name, get(name)) for name in names if not name.endswith(BUFFER))
        zeros += _check_numbers(tensors, str(file), "copy or download the file again")
    return _notice(zeros)


def check_loaded(model: torch.nn.Module, where: pathlib.Path, dtype: torch.dtype) -> list[str]:
    """Look for numbers that are not finite in a loaded model; in quantised weights, in their scales.

    Args:
        model: the base.
        where: its folder.
        dtype: the type in which it computes; float16 cannot represent every number of a bfloat16 checkpoint.

    Returns:
        A notice where a weight is all zeros.

    Raises:
        ModelError: as `check_files`.
    """
    fix = "copy or download the weights again"
    if dtype == torch.float16:
        fix = f"model.dtype=bfloat16, if the numbers are only too large for float16; else {fix}"
    return _notice(_check_numbers(float_tensors(model), str(where), fix))


def _check_numbers(tensors: Iterable[tuple[str, torch.Tensor]], where: str, fix: str) -> list[str]:
    """The weights that are all zeros."""
    odd: dict[str, str] = {}
    zeros = []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        least, greatest = (float(end) for end in torch.aminmax(tensor))  # NaN comes through in both
        if not math.isfinite(least) or not math.isfinite(greatest):
            count = int((~torch.isfinite(tensor)).sum())
            odd.setdefault(name, f"{name} ({count:,} of {tensor.numel():,})")
        elif least == greatest == 0 and name.endswith(".weight"):
            zeros.append(name)
    if odd:
        raise ModelError(
            f"the weights contain numbers that are NaN or infinite: {first_of(list(odd.values()))}",
            where=where,
            fix=fix,
        )
    return zeros


def _notice(zeros: list[str]) -> list[str]:
    return [f"{first_of(zeros)} is all zeros in the base: were its weights lost?"] if zeros else []
