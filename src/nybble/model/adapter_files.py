"""The tensors of an adapter's file: read once, and nothing in them but finite floating-point numbers."""

from __future__ import annotations

import contextlib
import pathlib
import pickle
import re
import struct
import zipfile

import torch
from safetensors import safe_open

from nybble.errors import ModelError
from nybble.model.weights import FLOATS, LOADING_FAULTS, check_whole, reason, refuse_pointers, some
from nybble.reading import check_regular

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""PEFT's names; where both are there, PEFT takes the first and so do we."""
AGAIN = "copy the adapter again"
FAULTS: tuple[type[Exception], ...] = (
    *LOADING_FAULTS,
    struct.error,
)  # torch's reader of pickles runs into the latter where one is cut off
CALLED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's words on a pickle that it refuses


def weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The file with an adapter's tensors.

    Raises:
        ModelError: there is none, or it is no file that can be read to its end.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise ModelError(f"there are no adapter weights in {folder} (no {WEIGHTS[0]})", fix=f"ls {folder}")
    check_regular(file, ModelError, AGAIN)
    if not file.stat().st_size:
        raise ModelError(f"{file.name} is empty", where=str(file), fix=AGAIN)
    refuse_pointers([file])
    return file


def read_tensors(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, torch.Tensor]]:
    """An adapter's file and its tensors by name, on the CPU, mapped from the file.

    Raises:
        ModelError: naming the file, or the first tensor that cannot be one of an adapter.
    """
    file = weights_file(folder)
    tensors = _from_safetensors(file) if file.suffix == ".safetensors" else _from_pickle(file)
    if not tensors:
        raise ModelError(f"{file.name} holds no tensors", where=str(file), fix=AGAIN)
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in FLOATS:
            raise ModelError(
                f"{name} holds {kind} numbers; an adapter's are float32, bfloat16, float16 or float64",
                where=str(file),
                fix=AGAIN,
            )
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise ModelError(
            f"{some(broken)} is not finite: it holds NaN or infinity, so its training diverged or the file is damaged",
            where=str(file),
            fix="train again with a lower learning rate, or copy the adapter again",
        )
    return file, tensors


def _from_safetensors(file: pathlib.Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FAULTS as error:
        with contextlib.suppress(RecursionError):  # a header nested deeper than Python's own stack
            check_whole(file)  # says more of most of them
        raise ModelError(f"{file.name} cannot be read: {reason(error)}", where=str(file), fix=AGAIN) from error


def _from_pickle(file: pathlib.Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(file, mmap=zipfile.is_zipfile(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = CALLED.search(str(error))
        what = f"asks for {called[1]} when it is opened" if called else "is not a pickle of tensors"
        raise ModelError(
            f"{file.name} is refused: it {what}, and an adapter's file may hold tensors only",
            where=str(file),
            fix="do not open it elsewhere unless you trust who made it; ask for adapter_model.safetensors",
        ) from error
    except FAULTS as error:
        why = reason(error).partition(". ")[0]  # torch goes on with advice
        raise ModelError(f"{file.name} cannot be read: {why}", where=str(file), fix=AGAIN) from error
    if not isinstance(state, dict):
        raise ModelError(f"{file.name} holds a {type(state).__name__}, not tensors by name", where=str(file), fix=AGAIN)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{file.name} holds a {type(value).__name__} under {name!r}, not tensors by name",
                where=str(file),
                fix=AGAIN,
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ModelError(f"{name} is not a plain tensor", where=str(file), fix=AGAIN)
    return {name: value.detach() for name, value in state.items()}
