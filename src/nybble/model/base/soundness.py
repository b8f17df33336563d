"""Checks that the weights are those of the model that config.json describes: every tensor, with its shape and type.

Loading alone does not show it. Transformers initialises a missing tensor at random, ignores an unexpected one, accepts integers
as weights, and in 4 bits accepts a tensor of any shape.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from nybble.errors import ModelError
from nybble.files.reading import read_object
from nybble.model.base.files import (
    FLOATS,
    WHOLE,
    expected_shapes,
    open_tensors,
    shape_text,
    shapes,
    weight_files,
)
from nybble.model.base.headers import BITS, index_of, printable, read_index
from nybble.model.hub import first_three
from nybble.terminal import first_of
from nybble.weights.stored import (
    BESIDE,
    QUANTISED,
    described_name,
    description_name,
    int8_scales_name,
    read_description,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFER = "rotary_emb.inv_freq"  # old checkpoints contain what is computed today
SAME_COPY = "use config.json and weights from the same copy of the model"


@dataclass(frozen=True)
class Stored:
    """A tensor as its file describes it."""

    kind: str
    shape: tuple[int, ...]
    file: pathlib.Path
    copies: frozenset[str] = frozenset()
    """Names of other files that have the same numbers."""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        dtype = getattr(torch, self.kind, None)
        bits = BITS[self.kind] if self.kind in BITS else 8 * dtype.itemsize if dtype is not None else 0
        return math.prod(self.shape) * bits // 8


def check_tensors(folder: pathlib.Path, config: PretrainedConfig, *, is_quantized: bool) -> None:
    """Compare every tensor of a model's files with its configuration, by the files' headers alone.

    Args:
        folder: the model's folder.
        config: the configuration with which it is loaded.
        is_quantized: whether the files came quantised by bitsandbytes.

    Raises:
        ModelError: tensors that are missing, unknown, duplicated, or of another shape or type; an index that
            contradicts its files; a head that is tied to the embeddings but differs from them.
    """
    stored = _stored(folder)
    expected = expected_shapes(config, folder)
    tied = bool(config.tie_word_embeddings)
    if prefix := _wrapped(stored, expected):
        raise ModelError(prefix, where=str(folder), fix="save the model itself: model.save_pretrained(FOLDER)")
    if not is_quantized and any(name.endswith(QUANTISED) for name in stored):
        raise ModelError(
            "the weights were quantised by bitsandbytes, and config.json has no quantization_config, which says how",
            where=str(folder / "config.json"),
            fix="copy config.json from where the weights came",
        )
    packed = {name for name in expected if is_quantized and description_name(name, stored)}
    scaled = {name for name in expected if is_quantized and int8_scales_name(name) in stored}
    odd = [
        f"{name} is {shape_text(entry.shape)} in the file, but {shape_text(expected[name])} according to config.json"
        for name, entry in stored.items()
        if name in expected and name not in packed and entry.shape != expected[name]
    ]
    missing = [name for name in expected if name not in stored and not (tied and name == HEAD)]
    foreign = [name for name in stored if name not in expected and not _is_beside(name, expected, is_quantized)]
    wrong = [
        f"{name} is stored as {entry.kind}, not as {'I8' if name in scaled else 'F32, F16 or BF16'}"
        for name, entry in stored.items()
        if name in expected and name not in packed and entry.kind not in ({"I8", "int8"} if name in scaled else FLOATS)
    ]
    _refuse(folder, odd, missing, foreign, wrong)
    _check_index(folder, stored)
    for name in packed:
        _check_packed(name, expected[name], stored)
    for name in scaled:
        if stored[int8_scales_name(name)].shape != expected[name][:1]:
            raise _odd_state(
                int8_scales_name(name), stored, f"{shape_text(expected[name][:1])} scales belong to the rows of {name}"
            )
    if tied and HEAD in stored:
        _check_head(stored)


def check_report(report: Mapping[str, Any], config: PretrainedConfig, where: pathlib.Path) -> None:
    """Check Transformers' report on loading in the same way: it compares with the model that was built.

    Raises:
        ModelError: something is missing, unknown, or of another shape.
    """
    odd = [
        f"{name} is {shape_text(own)} in the file, but {shape_text(wanted)} according to config.json"
        for name, own, wanted in report["mismatched_keys"]
    ]
    missing = [name for name in report["missing_keys"] if not (config.tie_word_embeddings and name == HEAD)]
    foreign = [name for name in report["unexpected_keys"] if not name.endswith((BUFFER, *BESIDE))]
    _refuse(where, sorted(odd), sorted(missing), sorted(foreign), [])


def _stored(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a folder's weights.

    Raises:
        ModelError: two files contain the same tensor with different numbers; Transformers would use the last.
    """
    tensors: dict[str, Stored] = {}
    for file in weight_files(folder):
        for name, (kind, shape) in shapes(file).items():
            entry, first = Stored(kind, shape, file), tensors.get(name)
            if first is not None:
                entry = replace(entry, copies=first.copies | {first.file.name})
            if first is not None and not _is_equal((name, entry), (name, first)):
                raise ModelError(
                    f"{printable(name)} is in {first.file.name} and in {file.name}, with different numbers",
                    where=str(file),
                    fix="remove the files of other copies of the model, or download all of them again",
                )
            tensors[name] = entry
    return tensors


def _is_equal(one: tuple[str, Stored], other: tuple[str, Stored]) -> bool:
    """Whether two named tensors contain the same numbers."""
    if (one[1].kind, one[1].shape) != (other[1].kind, other[1].shape):
        return False
    return torch.equal(*(open_tensors(entry.file)[1](name) for name, entry in (one, other)))


def _check_head(stored: Mapping[str, Stored]) -> None:
    """A head that is tied to the embeddings may be stored too, as a copy of them."""
    if not _is_equal((HEAD, stored[HEAD]), (EMBEDDING, stored[EMBEDDING])):
        raise ModelError(
            f"config.json says that {HEAD} is {EMBEDDING} (tie_word_embeddings), but the file has two different ones",
            where=str(stored[HEAD].file),
            fix='set "tie_word_embeddings" to false in config.json, if the model was trained with a head of its own',
        )


def _check_index(folder: pathlib.Path, stored: Mapping[str, Stored]) -> None:
    """Compare an index with the headers of its files. Transformers loads what the files contain, whatever the index says."""
    files = {entry.file.name for entry in stored.values()}
    index = next((folder / index_of(name) for name in WHOLE if (folder / index_of(name)).is_file()), None)
    if index is None or files <= set(WHOLE):
        return
    listed = read_index(index)
    if not isinstance(read_object(index).get("metadata"), dict):  # Transformers requires it
        raise ModelError(
            f"{index.name} has no metadata, without which Transformers does not read it",
            where=str(index),
            fix='add "metadata": {"total_size": 0} to it',
        )
    odd = [
        f"{printable(name)} is said to be in {listed.get(name, 'no file')} and is in "
        f"{stored[name].file.name if name in stored else 'none'}"
        for name in sorted(listed.keys() | stored.keys())
        if not name.endswith(BUFFER)
        and (name not in stored or listed.get(name) not in {stored[name].file.name, *stored[name].copies})
    ]
    if odd:
        raise ModelError(
            f"{index.name} does not match its files: {first_of(odd)}",
            where=str(index),
            fix="copy or download the index and its files from the same source",
        )


def _refuse(where: pathlib.Path, odd: list[str], missing: list[str], foreign: list[str], wrong: list[str]) -> None:
    faults = [first_of(odd)] if odd else []
    faults += [f"there is no {first_three(missing)}"] if missing else []
    if foreign:
        names = first_three([printable(name) for name in foreign])
        faults.append(f"the files contain {names}, which the model of config.json does not have")
    faults += [first_of(wrong)] if wrong else []
    if faults:
        only = wrong and len(faults) == 1
        raise ModelError(
            f"the weights do not match config.json: {'; '.join(faults)}",
            where=str(where),
            fix="use a 16-bit checkpoint of the model" if only else SAME_COPY,
        )


def _wrapped(stored: Mapping[str, Stored], expected: Mapping[str, object]) -> str | None:
    """What is wrong with all names: an extra prefix of a wrapper, or a missing one if only the inner model was saved."""
    if expected.keys() & stored.keys() - {HEAD}:
        return None
    for name in stored:
        if f"model.{name}" in expected:
            return f"the names of the tensors lack 'model.': {name} is model.{name} in a model with its head"
        start = name.removesuffix(EMBEDDING)
        if start and start != name:
            return f"the names of the tensors begin with {start!r}, left over from a wrapper around the model: {printable(name)}"
    return None


def _is_beside(name: str, expected: Mapping[str, object], is_quantized: bool) -> bool:
    """Whether a tensor that is not a weight is expected: an old buffer, or what bitsandbytes stores with a weight."""
    if name.endswith(BUFFER):
        return name.startswith("model.")
    if not is_quantized:
        return False
    weight = described_name(name)
    return weight in expected or f"{weight}.weight" in expected


def _check_packed(name: str, shape: tuple[int, ...], stored: Mapping[str, Stored]) -> None:
    """Compare a 4-bit weight and its scales with the shape that they represent."""
    described = description_name(name, stored)
    assert described is not None
    _, get = open_tensors(stored[described].file)
    try:
        packed = read_description(described, get(described))
    except ValueError as error:
        raise _odd_state(described, stored, str(error)) from error
    if packed.shape != list(shape):
        raise _odd_state(
            described, stored, f"it is {packed.shape} there, but {shape_text(shape)} according to config.json"
        )
    for part, size in packed.part_bytes(name).items():
        if part not in stored:
            raise _odd_state(part, stored, "it is missing")
        if stored[part].bytes != size:
            raise _odd_state(part, stored, f"it has {stored[part].bytes:,} bytes and needs {size:,}")


def _odd_state(name: str, stored: Mapping[str, Stored], why: str) -> ModelError:
    files = [entry.file for part, entry in stored.items() if name.startswith(part) or part == name]
    return ModelError(
        f"a quantised weight is damaged: {name}: {why}",
        where=str(files[0]) if files else None,
        fix="copy or download the checkpoint again, or start from the 16-bit one",
    )
