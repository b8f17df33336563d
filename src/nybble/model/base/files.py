"""Weight files: which ones a folder has, what they contain, and whether a saved model equals the one in memory."""

from __future__ import annotations

import pathlib
import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from nybble.errors import ModelError
from nybble.files.lfs import pointer_fault
from nybble.files.reading import KINDS
from nybble.model.base.headers import index_of, read_header, read_index
from nybble.model.hub import first_three

WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Weights in one file, in Transformers' order: the first one or its index is used before the second."""
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
SAVE_AGAIN = (
    "save the model's tensors alone, by model.save_pretrained(FOLDER) where it was trained; or use its safetensors"
)
# What Transformers raises where a configuration or a weight file is wrong: its own checks and huggingface_hub's, torch's asserts,
# and errors of code that assumes that a field exists or is sound (KeyError, ZeroDivisionError, AttributeError).
LOADING_FAULTS: tuple[type[Exception], ...] = (
    OSError, RuntimeError, ValueError, AssertionError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError,
    EOFError, StrictDataclassError, SafetensorError, pickle.UnpicklingError, struct.error,
)  # fmt: skip


def reason(error: Exception) -> str:
    """A library's error as one line."""
    text = re.sub(r"\(\n.*?\n\)", "", str(error).strip(), flags=re.DOTALL)  # a module as torch prints it
    lines = text.splitlines() or [type(error).__name__]
    if isinstance(error, StrictDataclassError):  # its first line names the validator, its last the fault
        return lines[-1].strip().partition(": ")[2] or lines[-1].strip()
    bare = isinstance(error, LookupError | AssertionError | AttributeError | ArithmeticError)
    return f"{type(error).__name__}: {lines[0]}" if bare else lines[0]


def refuse_pointers(files: Iterable[pathlib.Path]) -> None:
    """Refuse what is not a file of a model: git-lfs pointers, broken links, folders, and pipes, sockets and devices, which may
    never end. Files that do not exist are ignored.

    Raises:
        ModelError: naming the first, with the command that fetches the files.
    """
    for file in files:
        try:
            fault = _non_file(file)
        except OSError as error:
            fix = (
                "copy or download it again"
                if not isinstance(error, PermissionError)
                else "let its owner give you access"
            )
            raise ModelError(f"{file.name} cannot be read: {error.strerror}", where=str(file), fix=fix) from error
        if fault is not None:
            raise ModelError(fault[0], where=str(file), fix=fault[1])


def _non_file(file: pathlib.Path) -> tuple[str, str] | None:
    """What a path is, if it is not a regular file, and what fixes it; None for a file, or where nothing exists.

    Raises:
        OSError: it cannot be examined.
    """
    if not file.exists():
        again = "copy or download the file again"
        return (
            (f"{file.name} is a link to {file.readlink()}, which does not exist", again) if file.is_symlink() else None
        )
    if (kind := KINDS.get(stat.S_IFMT(file.stat().st_mode))) is not None:
        return f"{file.name} is {kind}, not a file", f"replace it with the real {file.name}"
    return pointer_fault(file)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that Transformers loads from a folder, and so the ones that are hashed, checked and merged; empty where there
    are none.

    Each must be in the folder itself, but may be a link to another folder, as in the Hub's cache.

    Raises:
        ModelError: one of them is not a file, or an index is damaged, lacks a file or names one in another folder.
    """
    for name in WHOLE:
        whole, index = folder / name, folder / index_of(name)
        refuse_pointers([whole, index])
        if whole.is_file():
            return [whole]
        if index.is_file():
            names = sorted(set(read_index(index).values()))
            files = [folder / name for name in names]
            refuse_pointers(files)
            if missing := [file.name for file in files if not file.is_file()]:
                raise ModelError(
                    f"{folder} is missing {first_three(missing)}, which its index names",
                    where=str(index),
                    fix="finish the download, or copy what is missing",
                )
            return files
    return []


def check_whole(file: pathlib.Path) -> None:
    """Refuse a weight file that is a pointer, has another format, is cut off, or contains anything but tensors.

    Raises:
        ModelError: it is one of these.
    """
    refuse_pointers([file])
    if file.suffix == ".safetensors":
        read_header(file)
        return
    with file.open("rb") as stream:
        head = stream.read(4)
    if head == b"PK\3\4":
        if not zipfile.is_zipfile(file):  # the table of contents of an archive is at its end
            raise ModelError(
                "the file is cut off: the end of the archive is missing", where=str(file), fix="copy it again"
            )
        _unpickled(file)
    elif head[:1] != b"\x80":  # files of torch before 1.6 can only be checked by loading them
        raise ModelError("the file was not written by torch.save", where=str(file), fix="download it again")


def shapes(file: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor by name, without reading a tensor.

    Raises:
        ModelError: the file cannot be read as weights.
    """
    if file.suffix == ".safetensors":
        entries = read_header(file)
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    stored = _unpickled(file)
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in stored.items()}


def open_tensors(file: pathlib.Path) -> tuple[Iterable[str], Callable[[str], torch.Tensor]]:
    """The names in a weight file, and a function that returns the tensor of a name, on the CPU.

    Raises:
        ModelError: the file cannot be read as weights.
    """
    if file.suffix != ".safetensors":
        state = _unpickled(file)
        return state.keys(), state.__getitem__
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the file cannot be read: {reason(error)}", where=str(file), fix="copy it again") from error
    return opened.keys(), opened.get_tensor  # type: ignore[no-untyped-call]


def _unpickled(file: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, mapped instead of read if its format allows; no code in it is run."""
    try:
        with warnings.catch_warnings():  # about a pickle's protocol, even for a file that is then refused
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            stored = torch.load(file, mmap=zipfile.is_zipfile(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {wanted[1]} when it is opened" if wanted else "is not a pickle of tensors"
        raise ModelError(
            f"{file.name} is refused: it {what}, and a weight file may contain only tensors",
            where=str(file),
            fix=SAVE_AGAIN,
        ) from error
    except LOADING_FAULTS as error:
        raise ModelError(
            f"{file.name} is damaged, or was not written by torch.save: {reason(error)}",
            where=str(file),
            fix="copy or download the file again",
        ) from error
    if not isinstance(stored, dict):
        raise ModelError(
            f"{file.name} contains {type(stored).__name__}, not named tensors", where=str(file), fix=SAVE_AGAIN
        )
    for name, value in stored.items():
        if (odd := _non_tensor(name, value)) is not None:
            raise ModelError(f"{file.name} contains {odd} under {name!r:.80}", where=str(file), fix=SAVE_AGAIN)
    return {name: tensor.detach() for name, tensor in stored.items()}


def expected_shapes(config: PretrainedConfig, folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the model that a configuration describes.

    Args:
        config: the configuration.
        folder: where its config.json is.

    Raises:
        ModelError: Transformers cannot build the model, or it would compute nothing but NaN.
    """
    where, fix = str(folder / "config.json"), "compare it with config.json on the model's page"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        frequencies = type(model.model.rotary_emb)(config).inv_freq
    except LOADING_FAULTS as error:
        raise ModelError(
            f"config.json describes a model that Transformers cannot build: {reason(error)}", where=where, fix=fix
        ) from error
    if not frequencies.isfinite().all():
        raise ModelError(
            f"the frequencies of RoPE are not finite with rope_parameters {config.rope_parameters}",
            where=where,
            fix=fix,
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def saving_fault(model: torch.nn.Module, folder: pathlib.Path) -> str | None:
    """Read a saved model back; the first difference from the model in memory, or None.

    One tensor is read at a time, so the largest one decides how much memory this needs.
    """
    live = model.state_dict()
    seen: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name not in live or not torch.equal(stored.get_tensor(name), live[name].cpu()):
                    return f"{name} in {file.name} is not what was saved"
                seen.add(name)
    addresses = {live[name].data_ptr() for name in seen}
    lost = [name for name in live.keys() - seen if live[name].data_ptr() not in addresses]  # a tied head is stored once
    if lost:
        return f"{sorted(lost)[0]} was not saved"
    return None if (folder / "config.json").is_file() else "config.json was not saved"


def _non_tensor(name: object, value: object) -> str | None:
    """What an entry is, if it is not a named tensor with numbers; None if it is."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__}, not a tensor,"
    if value.is_meta:
        return "a tensor without its numbers"
    if value.layout != torch.strided or value.is_quantized:
        return "a sparse or quantised tensor"
    return None if isinstance(name, str) else "a tensor without a name"


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape in the form 32000 x 4096."""
    if len(shape) > 8:
        return f"of {len(shape):,} dimensions"
    return " x ".join(map(str, shape)) or "a single number"
