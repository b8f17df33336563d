"""The index of a sharded model, and the header of a safetensors file.

A safetensors file has 8 bytes with the length of the header, JSON with type, shape and position of each tensor, then their bytes.
What the format forbids (huggingface.co/docs/safetensors) is refused with the tensor's name, which the library's errors leave out.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import struct
from collections import Counter
from typing import Any, TypeGuard

from nybble.errors import ModelError
from nybble.files.reading import json_fault, read_object

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, by the format
MAX_DIMENSIONS = 64  # torch's limit; the product of a million numbers takes hours


def printable(name: str) -> str:
    """A name from a file, made safe to print: on one line, without control characters, not too long."""
    plain = name if name.isprintable() else ascii(name)[1:-1]
    return plain if len(plain) <= 120 else f"{plain[:119]}…"


def index_of(name: str) -> str:
    """The name of the index for weights in several files, for model.safetensors or pytorch_model.bin."""
    return f"{name}.index.json"


def read_index(index: pathlib.Path) -> dict[str, str]:
    """The file of each tensor, according to the index of a sharded model.

    Raises:
        ModelError: it cannot be read, or names something other than a weight file in its own folder.
    """
    described = read_object(index)
    files, end = described.get("weight_map"), index.name.removesuffix(".index.json").rpartition(".")[2]
    fix = "download it again, from where the weights came"
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{index.name} has no weight_map, which says where each tensor is", where=str(index), fix=fix)
    for tensor, name in files.items():
        if not isinstance(name, str) or not re.fullmatch(rf"[^/\\\0]+\.{end}", name):
            raise ModelError(
                f"{index.name} says that {printable(tensor)} is in {name!r:.200}, which is not a .{end} file in this folder",
                where=str(index),
                fix=fix,
            )
    return files


def read_header(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """`dtype`, `shape` and `data_offsets` of each tensor by name; no tensor is read.

    Raises:
        ModelError: it is another kind of file, its header breaks the format, or its length is not what the header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        start = stream.read(1)
        text = start + stream.read(length - 1) if 0 < length <= min(size - 8, MAX_HEADER) else b""
    if start not in (b"{", b""):
        raise ModelError("the file is not a safetensors file", where=str(file), fix="download it again")
    if length > MAX_HEADER:
        raise _damaged(file, f"it claims to be {length:,} bytes long, and the format allows {MAX_HEADER:,}")
    if not text:
        raise _cut(file)
    entries = _parse(file, text)
    end = 8 + length + _check_offsets(file, entries)
    if size < end:
        raise _cut(file)
    if size > end:
        raise ModelError("the file is longer than its header says", where=str(file), fix="download it again")
    return entries


def _parse(file: pathlib.Path, text: bytes) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _damaged(file, f"byte {error.start + 8:,} of the file is not UTF-8") from error
    except RecursionError as error:
        raise _damaged(file, "it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise _damaged(file, f"it is not valid JSON ({json_fault(error)})") from error
    except ValueError as error:  # a name that occurs twice, a number of thousands of digits
        raise _damaged(file, str(error).partition(";")[0]) from error
    notes = entries.pop("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(notes, dict):
        raise _damaged(file, "it is not an object" if notes is None else "its __metadata__ is not an object")
    if odd := [key for key, note in notes.items() if not isinstance(note, str)]:
        raise _damaged(file, f"{odd[0]!r:.40} in its __metadata__ is not text")
    for name, entry in entries.items():
        _check_entry(file, name, entry)
    return dict(entries)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it names {printable(repeated)} twice")
    return entries


def _check_entry(file: pathlib.Path, name: str, entry: Any) -> None:
    """Refuse an entry that does not describe a tensor."""
    name = printable(name)
    if not isinstance(entry, dict):
        raise _damaged(file, f"{name} is not described by an object")
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in BITS:
        raise _damaged(file, f"{name} has the type {kind!r:.40}, which is not a type of safetensors")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(file, f"the shape of {name} is {shape!r:.60}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"the data_offsets of {name} are {offsets!r:.60}")
    bits = math.prod(shape) * BITS[kind]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _damaged(
            file,
            f"{name} ({kind} of shape {shape!s:.60}) has {offsets[1] - offsets[0]:,} bytes, and needs {bits // 8:,}",
        )


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_offsets(file: pathlib.Path, entries: dict[str, dict[str, Any]]) -> int:
    """The total length of the tensors, which must follow one another without gaps."""
    end = 0
    for first, last, name in sorted((*entry["data_offsets"], name) for name, entry in entries.items()):
        if first != end:
            raise _damaged(
                file, f"{printable(name)} {'overlaps the tensor before it' if first < end else 'begins after a gap'}"
            )
        end = last
    return end


def _damaged(file: pathlib.Path, why: str) -> ModelError:
    return ModelError(
        f"the header of the safetensors file is damaged: {why}", where=str(file), fix="download the file again"
    )


def _cut(file: pathlib.Path) -> ModelError:
    return ModelError("the file is cut off: it is shorter than its header says", where=str(file), fix="copy it again")
