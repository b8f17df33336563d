"""Reading and writing checkpoints one slice of rows at a time, so that memory does not grow with the model.

Files are mapped, so the system may drop pages that were read; only the current slice is a copy. safetensors'
`save_file` needs all tensors of a file in memory, so the format is written here: 8 bytes of length, a JSON header, the tensors.
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nybble.model.base.files import open_tensors

SHARD = 5_000_000_000  # the largest file in bytes, as the Hub recommends
SLICE = 1 << 24  # numbers processed at once: 64 MB in float32
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}


class Tensors:
    """The tensors of a checkpoint's files by name, each mapped from its file when it is read.

    Raises:
        ModelError: a file is cut off, or not what its name says.
    """

    def __init__(self, files: Iterable[pathlib.Path]) -> None:
        self._readers: dict[str, Callable[[str], torch.Tensor]] = {}
        for file in files:
            names, get = open_tensors(file)
            self._readers |= dict.fromkeys(names, get)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._readers[name](name)

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)


@dataclass(frozen=True)
class Spec:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Slices = Callable[[str], Iterator[torch.Tensor]]
"""Gives a tensor by its name as consecutive slices of its rows."""


def slices_of(rows: int, columns: int, multiple: int = 64) -> Iterator[slice]:
    """Slices of at most `SLICE` numbers; the rows of each, except the last, are a multiple of `multiple`."""
    step = max(SLICE // max(columns, 1) // multiple, 1) * multiple
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def write_shards(
    folder: pathlib.Path, specs: Sequence[Spec], produce: Slices, done: Callable[[int], None], shard: int = SHARD
) -> None:
    """Write model.safetensors, or several shards with an index.

    Args:
        folder: an existing folder.
        specs: the tensors, in the order in which they are written.
        produce: returns a tensor's rows, already in its dtype.
        done: called with the bytes written so far.
        shard: the largest file in bytes; a larger tensor gets a separate file.
    """
    parts = _parts(specs, shard)
    names = [f"model-{n + 1:05}-of-{len(parts):05}.safetensors" for n in range(len(parts))]
    names = ["model.safetensors"] if len(parts) == 1 else names
    written = 0
    for name, part in zip(names, parts, strict=True):
        with (folder / name).open("wb") as stream:
            stream.write(_header(part))
            for spec in part:
                for rows in produce(spec.name):
                    assert rows.dtype == spec.dtype, f"{spec.name} is {rows.dtype}"
                    raw = rows.contiguous().flatten().view(torch.uint8).numpy()
                    stream.write(raw.data)
                    written += len(raw)
                    done(written)
        assert (folder / name).stat().st_size == len(_header(part)) + sum(spec.bytes for spec in part), name
    if len(parts) > 1:
        files = {spec.name: name for name, part in zip(names, parts, strict=True) for spec in part}
        index = {"metadata": {"total_size": sum(spec.bytes for spec in specs)}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _parts(specs: Sequence[Spec], shard: int) -> list[list[Spec]]:
    """The tensors of each file, in order."""
    parts: list[list[Spec]] = []
    left = 0
    for spec in specs:
        if spec.bytes > left or not parts:
            parts.append([])
            left = shard
        parts[-1].append(spec)
        left -= spec.bytes
    return parts


def _header(part: Sequence[Spec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in part:
        entries[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
