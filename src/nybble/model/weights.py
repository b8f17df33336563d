"""Weight files by what they say of themselves, and a saved model held against the live one."""

from __future__ import annotations

import json
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from nybble.errors import ModelError
from nybble.lfs import pointer_fault

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
# What Transformers raises where a configuration or a weight file is wrong: checks of its own and of huggingface_hub, asserts of
# torch, and whatever its code runs into that takes a field for granted (KeyError, ZeroDivisionError, AttributeError).
LOADING_FAULTS: tuple[type[Exception], ...] = (
    OSError, RuntimeError, ValueError, AssertionError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError,
    EOFError, StrictDataclassError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


def reason(error: Exception) -> str:
    """A library's error as one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, StrictDataclassError):  # its first line names the validator, its last the fault
        return lines[-1].strip().partition(": ")[2] or lines[-1].strip()
    bare = isinstance(error, LookupError | AssertionError | AttributeError | ArithmeticError)
    return f"{type(error).__name__}: {lines[0]}" if bare else lines[0]


def refuse_pointers(files: Iterable[pathlib.Path]) -> None:
    """Refuse git-lfs pointers in place of files of a model; files that do not exist are passed over.

    Raises:
        ModelError: naming the first, with the command that fetches the files.
    """
    for file in files:
        if file.is_file() and (fault := pointer_fault(file)):
            raise ModelError(fault[0], where=str(file), fix=fault[1])


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Safetensors where there are any, else .bin; an adapter's files are no weights."""
    for pattern in WEIGHTS:
        files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("adapter_"))
        if files:
            return files
    return []


def check_whole(file: pathlib.Path) -> None:
    """Refuse a weight file that is a pointer, is no safetensors file, or is cut off.

    Raises:
        ModelError: which of these.
    """
    refuse_pointers([file])
    if file.suffix == ".safetensors":
        _header(file)


def shapes(file: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor by name, without reading a tensor.

    Raises:
        ModelError: the file cannot be read as weights.
    """
    if file.suffix == ".safetensors":
        entries = _header(file)
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    try:
        stored = torch.load(file, mmap=zipfile.is_zipfile(file), weights_only=True)
    except LOADING_FAULTS as error:
        raise ModelError(f"the weights cannot be read: {reason(error)}", where=str(file)) from error
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in stored.items()}


def skeleton(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the model that a configuration describes.

    Raises:
        ModelError: it describes none that Transformers can build.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except LOADING_FAULTS as error:
        raise ModelError(
            f"config.json describes a model that Transformers cannot build: {reason(error)}",
            fix="compare it with config.json on the model's page",
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(folder: pathlib.Path, config: PretrainedConfig) -> list[str]:
    """Hold 16-bit weights against the configuration: loaded as 4 bits, a weight of another shape is not noticed.

    Returns:
        A notice where the files hold weights of no part of the model, such as further layers.

    Raises:
        ModelError: with both sizes of the first tensor that does not fit.
    """
    expected = skeleton(config)
    stored = {name: shape for file in weight_files(folder) for name, (_, shape) in shapes(file).items()}
    odd = [
        f"{name} is {by(shape)} in the file and {by(expected[name])} by config.json"
        for name, shape in stored.items()
        if name in expected and shape != expected[name]
    ]
    if odd:
        raise ModelError(
            f"the weights do not fit config.json: {some(odd)}",
            where=str(folder),
            fix="use config.json and weights from the same copy of the model",
        )
    ignored = sorted(name for name in stored if name.startswith("model.") and name not in expected)
    ignored = [
        name for name in ignored if not name.endswith("rotary_emb.inv_freq")
    ]  # old checkpoints hold what is computed now
    return [f"ignored {some(ignored)}: the files contain it, but the model of config.json does not"] if ignored else []


def differs(model: torch.nn.Module, folder: pathlib.Path) -> str | None:
    """Read back what a model was saved as; what is not as it is in memory, or None where all is.

    A tensor at a time, so memory is that of the largest.
    """
    live = model.state_dict()
    seen: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name not in live or not torch.equal(stored.get_tensor(name), live[name].cpu()):
                    return f"{name} in {file.name} is not what was saved"
                seen.add(name)
    places = {live[name].data_ptr() for name in seen}
    lost = [name for name in live.keys() - seen if live[name].data_ptr() not in places]  # a tied head is stored once
    if lost:
        return f"{sorted(lost)[0]} was not saved"
    return None if (folder / "config.json").is_file() else "config.json was not saved"


def by(shape: tuple[int, ...]) -> str:
    """A shape as people write it: 32000 x 4096."""
    return " x ".join(map(str, shape)) or "a single number"


def some(words: list[str]) -> str:
    """The first of several, and how many more there are."""
    return words[0] + (f" (and {len(words) - 1} more)" if len(words) > 1 else "")


def _header(file: pathlib.Path) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of length, JSON, then the tensors.

    Raises:
        ModelError: it is another kind of file, or its length is not what the header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        start = stream.read(1)
        text = start + stream.read(length - 1) if 0 < length <= size - 8 else b""
    if start not in (b"{", b""):
        raise ModelError("the file is not a safetensors file", where=str(file), fix="download it again")
    cut = ModelError("the file is cut off: it is shorter than its header says", where=str(file), fix="copy it again")
    if not text:
        raise cut
    try:
        entries: dict[str, Any] = json.loads(text)
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            "the header of the safetensors file is damaged", where=str(file), fix="download it again"
        ) from error
    if size < end:
        raise cut
    if size > end:
        raise ModelError("the file is longer than its header says", where=str(file), fix="download it again")
    return entries
