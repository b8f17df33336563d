"""Damaged caches: what may happen to the entries of a cache that a run has filled.

Every case gets a folder with two caches, `cache` and `other`, the latter filled by another model and other rows, and damages the
first. All of them mend themselves.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import struct
from collections.abc import Callable

from safetensors.torch import load_file, save_file

from tests.corpus.cases import Case

Edit = Callable[[pathlib.Path], object]
MENDED = {
    "base": "the cached copy of the quantised base was damaged",
    "tokens": "the cached rows were damaged",
    "digests": "the cached digests of",
    "evaluations": "the cached scores were damaged",
}


def entry(folder: pathlib.Path, room: str, cache: str = "cache") -> pathlib.Path:
    """The one entry of a room."""
    (found,) = (folder / cache / room).iterdir()
    return found


# What can happen to any file.


def cut(keep: float) -> Edit:
    return lambda file: os.truncate(file, int(file.stat().st_size * keep))


def shorter(file: pathlib.Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def longer(file: pathlib.Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\n")


def flipped(place: float, bit: int = 0) -> Edit:
    """One bit, at a share of the file's length; size and time stay."""

    def edit(file: pathlib.Path) -> None:
        status, content = file.stat(), bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1 << bit
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    return edit


def holding(content: bytes) -> Edit:
    return lambda file: file.write_bytes(content)


def gone(place: pathlib.Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()


def a_folder(place: pathlib.Path) -> None:
    gone(place)
    (place / "inside").mkdir(parents=True)


def a_file(place: pathlib.Path) -> None:
    gone(place)
    place.write_text("x")


def a_pipe(place: pathlib.Path) -> None:
    gone(place)
    os.mkfifo(place)


def a_dead_link(place: pathlib.Path) -> None:
    gone(place)
    place.symlink_to("nowhere")


def empty_folder(place: pathlib.Path) -> None:
    gone(place)
    place.mkdir()


# What can happen to weights.


def header_of(file: pathlib.Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(edit: Callable[[dict], object]) -> Edit:
    def change(file: pathlib.Path) -> None:
        header, body = header_of(file)
        edit(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + body)

    return change


def exchanged(one: str, other: str) -> Edit:
    def edit(header: dict) -> None:
        a, b = (f"model.layers.{layer}.{name}" for layer, name in ((0, one), (0, other)))
        header[a], header[b] = header[b], header[a]

    return with_header(edit)


def retyped(header: dict) -> None:
    header["model.layers.0.self_attn.q_proj.weight"]["dtype"] = "I8"


def reshaped(header: dict) -> None:
    shape = header["model.layers.0.self_attn.q_proj.weight"]["shape"]
    shape.reverse()


def renamed(header: dict) -> None:
    header["model.layers.7.input_layernorm.weight"] = header.pop("model.layers.0.input_layernorm.weight")


def zeroed(ending: str, count: int = 256) -> Edit:
    """Zeros at the beginning of each tensor of that name: the attack that moved a loss from 3.44 to 4.37."""

    def edit(file: pathlib.Path) -> None:
        header, _ = header_of(file)
        content = bytearray(file.read_bytes())
        start = 8 + struct.unpack("<Q", content[:8])[0]
        places = [value["data_offsets"] for name, value in header.items() if name.endswith(ending)]
        assert places
        for first, last in places:
            length = min(count, last - first)
            content[start + first : start + first + length] = bytes(length)
        file.write_bytes(content)

    return edit


def rewritten(edit: Callable[[dict], object]) -> Edit:
    def change(file: pathlib.Path) -> None:
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def doubled(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2


def halved_type(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def with_json(**changes: object) -> Edit:
    def edit(file: pathlib.Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


WEIGHTS: dict[str, Edit] = {
    "zeros in each down_proj": zeroed("down_proj.weight"),
    "zeros in the scales": zeroed(".absmax", 16),
    "zeros in the head": zeroed("lm_head.weight"),
    "a bit of a weight": flipped(0.9),
    "the highest bit of a weight": flipped(0.6, 7),
    "a bit of the header": flipped(0.01),
    "the last bit": flipped(1.0),
    "another type": with_header(retyped),
    "another shape": with_header(reshaped),
    "another name": with_header(renamed),
    "k and v exchanged": exchanged("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "a norm doubled": rewritten(doubled),
    "a norm in float16": rewritten(halved_type),
    "a tensor lost": rewritten(lambda tensors: tensors.pop("model.norm.weight")),
    "a tensor more": rewritten(lambda tensors: tensors.update(more=tensors["model.norm.weight"].clone())),
    "a byte shorter": shorter,
    "a byte longer": longer,
    "half of it": cut(0.5),
    "empty": cut(0),
    "another file": holding(b"not weights"),
    "gone": gone,
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a dead link": a_dead_link,
}
CONFIG: dict[str, Edit] = {
    "gone": gone,
    "garbled": holding(b"{"),
    "empty": holding(b""),
    "binary": holding(b"\xff\xfe\x00"),
    "a list": holding(b"[]"),
    "not quantised": with_json(quantization_config=None),
    "other angles": with_json(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "a folder": a_folder,
    "a bit": flipped(0.5),
}
NOTE: dict[str, Edit] = {
    "empty": holding(b""),
    "garbled": holding(b"{"),
    "binary": holding(b"\xff\xfe\x00\x01"),
    "a list": holding(b"[]"),
    "null": holding(b"null"),
    "an empty object": holding(b"{}"),
    "nested deeply": holding(b"[" * 100_000 + b"]" * 100_000),
    "a number of 5,000 digits": holding(b'{"digest": ' + b"1" * 5000 + b"}"),
    "cut off": cut(0.7),
    "a bit": flipped(0.5),
    "another bit": flipped(0.8),
    "a bare digest, as 0.5.1 wrote it": holding(b"0" * 64),
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a dead link": a_dead_link,
}
PLACE: dict[str, Edit] = {
    "a file": a_file,
    "an empty folder": empty_folder,
    "a dead link": a_dead_link,
    "a pipe": a_pipe,
}
ROWS: dict[str, Edit] = {
    "a bit of the ids": flipped(0.3),
    "a bit near the end": flipped(0.7, 3),
    "a bit of the beginning": flipped(0.02),
    "empty": cut(0),
    "half of it": cut(0.5),
    "a byte shorter": shorter,
    "a byte longer": longer,
    "gone": gone,
    "another file": holding(b"ARROW1"),
    "a folder": a_folder,
    "a pipe": a_pipe,
}
FOUND: dict[str, Edit] = {
    "gone": gone,
    "empty": holding(b""),
    "garbled": holding(b'{"counts": '),
    "a list": holding(b"[]"),
    "other lengths": with_json(lengths={"5": 80}),
    "no counts": with_json(counts={}),
    "a bit": flipped(0.5),
    "binary": holding(b"\x80"),
}


def _of_file(room: str, name: str, kinds: dict[str, Edit]) -> list[Case]:
    def made(edit: Edit) -> Callable[[pathlib.Path], object]:
        return lambda folder: edit(entry(folder, room) / name)

    return [Case(f"{room}: {name}: {kind}", made(edit), 0, (MENDED[room],)) for kind, edit in kinds.items()]


def _of_entry(room: str, kinds: dict[str, Edit]) -> list[Case]:
    def made(edit: Edit) -> Callable[[pathlib.Path], object]:
        return lambda folder: edit(entry(folder, room))

    return [Case(f"{room}: {kind}", made(edit), 0, (MENDED[room],)) for kind, edit in kinds.items()]


def _of_another(room: str) -> Case:
    def made(folder: pathlib.Path) -> None:
        place, other = entry(folder, room), entry(folder, room, "other")
        gone(place)
        (shutil.copytree if other.is_dir() else shutil.copy)(other, place)

    return Case(f"{room}: what was kept of something else", made, 0, (MENDED[room],))


def _room_is_a_file(room: str) -> Case:
    return Case(f"{room}: the folder is a file", lambda folder: a_file(folder / "cache" / room), 0, ("is now",))


CASES = [
    *_of_file("base", "model.safetensors", WEIGHTS),
    *_of_file("base", "config.json", CONFIG),
    *_of_file("base", "manifest.json", {**NOTE, "gone": gone}),
    *_of_entry("base", PLACE),
    *_of_file("tokens", "tokens.arrow", ROWS),
    *_of_file("tokens", "found.json", FOUND),
    *_of_file("tokens", "manifest.json", {**NOTE, "gone": gone}),
    *_of_entry("tokens", PLACE),
    *_of_entry("digests", NOTE),
    *_of_entry("evaluations", NOTE),
    *(_of_another(room) for room in MENDED),
    *(_room_is_a_file(room) for room in MENDED),
]
