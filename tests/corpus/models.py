"""Damaged folders of base models: each is a copy of the tiny Llama (two layers, 64 wide, 400 tokens) with one thing wrong."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.corpus.cases import Case

Change = Callable[[pathlib.Path], object]
Tensors = dict[str, torch.Tensor]
WEIGHTS, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP, QUERY = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4ec71fd53e99766de38f24\nsize 9976578928\n"
CONFIG = "compare it with config.json on the model's page"


@dataclass(frozen=True)
class ModelCase(Case):
    """A folder, and how it is loaded."""

    quantization: str = "nf4"
    dtype: torch.dtype = torch.float32


def refused(name: str, make: Change, *names: str, **how: Any) -> ModelCase:
    """One that is refused with a message that names these."""
    return ModelCase(name, make, 1, names, **how)


def taken(name: str, make: Change, *names: str, **how: Any) -> ModelCase:
    """One that looks odd and is whole, with what is said of it."""
    return ModelCase(name, make, 0, names, **how)


# Text files


def text(name: str, content: bytes | str) -> Change:
    def change(folder: pathlib.Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def config(**changes: Any) -> Change:
    """config.json with other fields; ... takes one away."""

    def change(folder: pathlib.Path) -> None:
        fields = json.loads((folder / "config.json").read_text()) | changes
        fields = {key: value for key, value in fields.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(fields))

    return change


def literal(field: str, value: str) -> Change:
    """config.json with a value that json.dumps would not write."""

    def change(folder: pathlib.Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        fields.pop(field, None)
        (folder / "config.json").write_text(json.dumps(fields)[:-1] + f', "{field}": {value}}}')

    return change


def recoded(name: str, encoding: str) -> Change:
    def change(folder: pathlib.Path) -> None:
        (folder / name).write_bytes((folder / name).read_text().encode(encoding))

    return change


def both(*changes: Change) -> Change:
    def change(folder: pathlib.Path) -> None:
        for one in changes:
            one(folder)

    return change


# Special files


def in_place(name: str, make: Callable[[pathlib.Path], object]) -> Change:
    """Something else under a file's name."""

    def change(folder: pathlib.Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def listens(file: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        here = os.getcwd()
        os.chdir(file.parent)  # a socket's path has 108 bytes at most
        try:
            door.bind(file.name)
        finally:
            os.chdir(here)


def link_to(target: str) -> Callable[[pathlib.Path], object]:
    return lambda file: file.symlink_to(target)


# Tensors


def tensors(change: Callable[[Tensors], Tensors | None]) -> Change:
    """The weights with other tensors."""

    def apply(folder: pathlib.Path) -> None:
        held = load_file(folder / WEIGHTS)
        save_file(change(held) or held, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def without(*names: str) -> Change:
    return tensors(lambda held: {name: value for name, value in held.items() if name not in names})


def with_(**more: torch.Tensor) -> Change:
    """With tensors; __ in a name is a dot."""
    return tensors(lambda held: held | {name.replace("__", "."): value for name, value in more.items()})


def altered(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors(lambda held: held | {name: change(held[name]).contiguous()})


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors(lambda held: {name: change(value) for name, value in held.items()})


def renamed(change: Callable[[str], str]) -> Change:
    return tensors(lambda held: {change(name): value for name, value in held.items()})


def put(value: float, *places: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A number at so many places of a tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[list(places)] = value
        return tensor

    return change


def tied(*changes: Change) -> Change:
    """A model whose head is its embedding, stored once."""
    return both(config(tie_word_embeddings=True), without(HEAD), *changes)


# A safetensors file's header


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """The header with other entries; the tensors' bytes stay."""

    def apply(folder: pathlib.Path) -> None:
        entries, data = opened(folder / WEIGHTS)
        change(entries)
        raw_header(json.dumps(entries).encode(), data)(folder)

    return apply


def opened(file: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def raw_header(head: bytes, data: bytes | None = None, length: int | None = None) -> Change:
    def apply(folder: pathlib.Path) -> None:
        kept = opened(folder / WEIGHTS)[1] if data is None else data
        size = struct.pack("<Q", len(head) if length is None else length)
        (folder / WEIGHTS).write_bytes(size + head + kept)

    return apply


def entry(name: str, **fields: Any) -> Change:
    return header(lambda entries: entries[name].update(fields))


def moved(by: int) -> Change:
    def change(entries: dict[str, Any]) -> None:
        entries[UP]["data_offsets"] = [place + by for place in entries[UP]["data_offsets"]]

    return header(change)


def twice(folder: pathlib.Path) -> None:
    entries, data = opened(folder / WEIGHTS)
    again = json.dumps({NORM: entries[NORM]})[1:-1]
    raw_header(json.dumps(entries)[:-1].encode() + f", {again}}}".encode(), data)(folder)


# Files of torch.save


def binary(make: Callable[[Tensors], Any], **how: Any) -> Change:
    """The weights in pytorch_model.bin, or whatever is made of them."""

    def apply(folder: pathlib.Path) -> None:
        torch.save(make(load_file(folder / WEIGHTS)), folder / BIN, **how)
        (folder / WEIGHTS).unlink()

    return apply


def raw_binary(content: bytes) -> Change:
    return both(text(BIN, content), lambda folder: (folder / WEIGHTS).unlink())


class Call:
    """A pickle of it calls a function when it is opened."""

    def __init__(self, function: Callable[..., object], *words: object) -> None:
        self.call = (function, words)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class Settings:
    """Somebody's class, pickled beside the weights."""

    def __init__(self) -> None:
        self.rate = 0.1


def cut_binary(folder: pathlib.Path) -> None:
    binary(dict)(folder)
    content = (folder / BIN).read_bytes()
    (folder / BIN).write_bytes(content[: len(content) // 2])


# Shards


def sharded(change: Callable[[dict[str, Any], list[Tensors]], object] = lambda index, parts: None) -> Change:
    """The weights in two files with their index, either of them changed."""

    def apply(folder: pathlib.Path) -> None:
        held = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(held)
        parts = [{name: held[name] for name in names[part::2]} for part in (0, 1)]
        files = [f"model-0000{part + 1}-of-00002.safetensors" for part in (0, 1)]
        places = {name: files[part] for part in (0, 1) for name in parts[part]}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        change(index, parts)
        for file, part in zip(files, parts, strict=True):
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def swapped(index: dict[str, Any], parts: list[Tensors]) -> None:
    """The index says that the norm is in the file in which it is not."""
    places = index["weight_map"]
    places[NORM] = next(file for file in sorted(set(places.values())) if file != places[NORM])


def elsewhere(name: str) -> Change:
    """One file of the index lies outside of the folder, and is there."""

    def apply(folder: pathlib.Path) -> None:
        where = (folder / name).resolve() if not os.path.isabs(name) else pathlib.Path(name)
        sharded(lambda index, parts: _point(index, 0, str(where) if os.path.isabs(name) else name))(folder)
        where.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "model-00001-of-00002.safetensors", where)

    return apply


def _point(index: dict[str, Any], part: int, name: Any) -> None:
    file = f"model-0000{part + 1}-of-00002.safetensors"
    index["weight_map"] = {key: name if value == file else value for key, value in index["weight_map"].items()}


def absolute(folder: pathlib.Path) -> None:
    elsewhere(str(folder.parent / "outside" / "part.safetensors"))(folder)


def snapshot(folder: pathlib.Path) -> None:
    """As the Hub's cache keeps a model: links to files named by their digest."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(f"../blobs/{number:064x}")


def bin_shards(folder: pathlib.Path) -> None:
    """The weights in two files of torch.save with their index."""
    held = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(held)
    places = {name: f"part-{1 + (name > names[len(names) // 2])}.bin" for name in names}
    for file in set(places.values()):
        torch.save({name: held[name] for name in names if places[name] == file}, folder / file)
    (folder / f"{BIN}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def bin_index(first: str) -> Change:
    def apply(folder: pathlib.Path) -> None:
        index = json.loads((folder / f"{BIN}.index.json").read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], first)
        (folder / f"{BIN}.index.json").write_text(json.dumps(index))

    return apply


# Checkpoints that came quantised


def quantised(change: Callable[[Tensors], object] = lambda held: None, **fields: Any) -> Change:
    """The model as bitsandbytes stores it in 4 bits; what tests/test_corpus_models.py made lies beside the folder."""

    def apply(folder: pathlib.Path) -> None:
        shutil.copytree(folder.parent / "nf4", folder, dirs_exist_ok=True)
        if fields:
            stored = json.loads((folder / "config.json").read_text())["quantization_config"]
            config(quantization_config=stored | fields)(folder)
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def in_int8(change: Callable[[Tensors], object] = lambda held: None) -> Change:
    """The model as bitsandbytes stores it in 8 bits."""
    return both(lambda folder: shutil.copytree(folder.parent / "int8", folder, dirs_exist_ok=True), _held(change))


def _held(change: Callable[[Tensors], object]) -> Change:
    def apply(held: Tensors) -> None:
        change(held)

    return tensors(apply)


def state(name: str, **fields: Any) -> Callable[[Tensors], object]:
    """A 4-bit weight that says otherwise of itself."""

    def change(held: Tensors) -> None:
        key = f"{name}.quant_state.bitsandbytes__nf4"
        described = json.loads(bytes(held[key].tolist())) | fields
        held[key] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)

    return change


NO_FLOATS = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DEEP = "[" * 100_000
LONG = "1" * 5_000

DESCRIPTIONS = [
    refused("config-binary", text("config.json", bytes(range(256))), "config.json", "UTF-8"),
    refused("config-utf16", recoded("config.json", "utf-16"), "config.json", "UTF-8"),
    refused("config-utf16-without-mark", recoded("config.json", "utf-16-le"), "config.json is not valid JSON"),
    refused("config-latin", text("config.json", b'{\n"a": "\xe9"}'), "config.json is not UTF-8: byte 0xe9", ":2"),
    refused("config-mark", recoded("config.json", "utf-8-sig"), "config.json", "BOM"),
    refused("config-empty", text("config.json", ""), "config.json is empty"),
    refused("config-spaces", text("config.json", " \n\n"), "config.json is empty"),
    refused("config-zeros", text("config.json", bytes(700)), "config.json is empty"),
    refused("config-list", text("config.json", "[]"), "config.json is not a JSON object"),
    refused("config-text", text("config.json", '"llama"'), "config.json is not a JSON object"),
    refused("config-null", text("config.json", "null"), "config.json is not a JSON object"),
    refused("config-deep", text("config.json", DEEP), "config.json is nested too deeply"),
    refused("config-deep-object", text("config.json", '{"a":' * 100_000), "config.json is nested too deeply"),
    refused("config-page", text("config.json", "<!DOCTYPE html>"), "config.json is not valid JSON"),
    refused("config-pointer", text("config.json", POINTER), "config.json is a git-lfs pointer"),
    refused(
        "config-cut-off", text("config.json", '{"model_type": "llama",\n"hid'), "is not valid JSON", "config.json:2"
    ),
    refused("config-long-number", literal("hidden_size", LONG), "config.json"),
    refused("config-nan", literal("hidden_size", "NaN"), "hidden_size"),
    refused("config-infinity", literal("rms_norm_eps", "Infinity"), "rms_norm_eps"),
    refused("config-too-large", literal("rms_norm_eps", "1e999"), "rms_norm_eps"),
    refused(
        "config-nan-within", literal("rope_parameters", '{"rope_type": "default", "rope_theta": NaN}'), "rope_theta"
    ),
    taken(
        "config-key-twice",
        lambda folder: text(
            "config.json", (folder / "config.json").read_text().replace("{", '{"hidden_size": 64, ', 1)
        )(folder),
    ),
    refused(
        "config-key-twice-otherwise",
        literal("vocab_size", '64, "vocab_size": 401'),
        "400 x 64 in the file, but 401 x 64",
    ),
    taken("config-key-unknown", literal("x", "[" * 300 + "]" * 300)),
    refused("config-nan-deep", literal("x", "[" * 300 + "NaN" + "]" * 300), "x is nan"),
    refused("config-missing", lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    refused("generation-garbled", text("generation_config.json", '{"eos'), "generation_config.json is not valid JSON"),
    refused("generation-list", text("generation_config.json", "[2]"), "generation_config.json is not a JSON object"),
    refused("generation-deep", text("generation_config.json", DEEP), "generation_config.json is nested too deeply"),
    refused("generation-utf16", recoded("generation_config.json", "utf-16"), "generation_config.json", "UTF-8"),
    refused("generation-word", text("generation_config.json", '{"eos_token_id": "</s>"}'), "generation_config.json"),
    taken("generation-odd-sampling", text("generation_config.json", '{"temperature": "hot"}')),
    refused("generation-negative", text("generation_config.json", '{"max_new_tokens": -5}'), "generation_config.json"),
]

FIELDS = [
    refused("size-text", config(hidden_size="64"), "hidden_size", "int"),
    refused("size-float", config(hidden_size=64.5), "hidden_size", "int"),
    refused("size-list", config(intermediate_size=[128]), "intermediate_size", "int"),
    refused("size-negative", config(hidden_size=-64), "hidden_size is -64"),
    refused("size-zero", config(hidden_size=0), "hidden_size is 0"),
    refused("size-true", config(num_hidden_layers=True), "num_hidden_layers"),
    refused("size-billion", config(hidden_size=10**9), "hidden_size is 1,000,000,000"),
    refused("size-beyond-64-bits", config(intermediate_size=2**64), "config.json"),
    refused("vocabulary-zero", config(vocab_size=0), "vocab_size is 0"),
    refused(
        "vocabulary-larger",
        config(vocab_size=405),
        "lm_head.weight is 400 x 64 in the file, but 405 x 64 according to config.json",
    ),
    refused("vocabulary-smaller", config(vocab_size=399), "400 x 64 in the file, but 399 x 64"),
    refused("layers-none", config(num_hidden_layers=0), "num_hidden_layers is 0"),
    refused("layers-negative", config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    refused("layers-absent", config(num_hidden_layers=...), "there is no model.layers.2."),
    refused(
        "heads-do-not-divide", config(num_attention_heads=5), "not a multiple of the number of attention heads (5)"
    ),
    refused("heads-none", config(num_attention_heads=0), "num_attention_heads is 0"),
    refused("key-heads-none", config(num_key_value_heads=0), "num_key_value_heads is 0"),
    refused(
        "key-heads-do-not-divide",
        config(num_key_value_heads=3),
        "num_attention_heads (4) is not a multiple of num_key_value_heads (3)",
    ),
    refused(
        "key-heads-fewer",
        config(num_key_value_heads=1),
        "k_proj.weight is 32 x 64 in the file, but 16 x 64 according to config.json",
    ),
    refused("head-odd", config(head_dim=15), "head_dim is 15"),
    refused("head-text", config(head_dim="16"), "head_dim"),
    refused("positions-none", config(max_position_embeddings=0), "max_position_embeddings is 0"),
    refused("positions-text", config(max_position_embeddings="many"), "max_position_embeddings"),
    refused("eps-text", config(rms_norm_eps="1e-5"), "rms_norm_eps"),
    refused("dropout-2", config(attention_dropout=2), "attention_dropout is 2"),
    refused("dropout-negative", config(attention_dropout=-0.5), "attention_dropout is -0.5"),
    refused("eps-negative", config(rms_norm_eps=-1.0), "rms_norm_eps is -1.0"),
    refused("activation-unknown", config(hidden_act="swish-9"), "swish-9"),
    refused("activation-number", config(hidden_act=3), "hidden_act"),
    refused("dtype-unknown", config(dtype="int5"), "int5"),
    refused("dtype-of-old-unknown", config(dtype=..., torch_dtype="float33"), "float33"),
    refused("dtype-number", config(dtype=16), "dtype"),
    refused("rope-unknown", config(rope_parameters={"rope_type": "no-such"}), "no-such"),
    refused("rope-list", config(rope_parameters=[1]), "rope"),
    refused("rope-text", config(rope_parameters="linear"), "rope"),
    refused("rope-without-factor", config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor"),
    refused(
        "rope-factor-text", config(rope_parameters={"rope_type": "linear", "factor": "2", "rope_theta": 1e4}), "factor"
    ),
    refused(
        "rope-factor-zero", config(rope_parameters={"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}), "factor"
    ),
    refused("rope-theta-zero", config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "rope_theta"),
    refused("rope-theta-negative", config(rope_parameters={"rope_type": "default", "rope_theta": -1e4}), "rope_theta"),
    refused("rope-theta-text", config(rope_parameters={"rope_type": "default", "rope_theta": "big"}), "rope_theta"),
    refused("rope-of-old-without-factor", config(rope_parameters=..., rope_scaling={"type": "linear"}), "factor"),
    refused("pad-beyond", config(pad_token_id=400), "pad_token_id is 400"),
    refused("pad-text", config(pad_token_id="<pad>"), "pad_token_id"),
    refused("kind-missing", config(model_type=...), "the architecture is None"),
    refused("kind-other", config(model_type="gpt2"), "the architecture is 'gpt2'"),
    refused("kind-number", config(model_type=5), "the architecture is 5"),
    taken(
        "code-of-its-own",
        config(auto_map={"AutoModelForCausalLM": "owner/repo--modeling_x.Model", "AutoConfig": "x.Config"}),
    ),
    taken("name-elsewhere", config(_name_or_path="/etc/passwd")),
    refused(
        "weights-named-in-config",
        config(transformers_weights="../other.safetensors"),
        "transformers_weights",
        "../other.safetensors",
    ),
    refused("quantization-word", config(quantization_config="nf4"), "quantization_config is 'nf4', not an object"),
    refused("quantization-other", config(quantization_config={"quant_method": "gptq"}), "gptq"),
    refused(
        "quantization-left-over",
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "a leftover",
    ),
    refused("quantization-empty", config(quantization_config={}), "a leftover"),
    refused("ties-text", config(tie_word_embeddings="yes"), "tie_word_embeddings"),
]

PLACES = [
    refused("no-weights", lambda folder: (folder / WEIGHTS).unlink(), "contains no weights"),
    refused("weights-pipe", in_place(WEIGHTS, os.mkfifo), "model.safetensors is a pipe, not a file"),
    refused("weights-folder", in_place(WEIGHTS, pathlib.Path.mkdir), "model.safetensors is a folder, not a file"),
    refused("weights-socket", in_place(WEIGHTS, listens), "model.safetensors is a socket, not a file"),
    refused("weights-device", in_place(WEIGHTS, link_to("/dev/zero")), "model.safetensors is a device, not a file"),
    refused(
        "weights-link-to-nothing",
        in_place(WEIGHTS, link_to("gone")),
        "model.safetensors is a link to gone, which does not exist",
    ),
    refused(
        "weights-link-to-itself",
        in_place(WEIGHTS, link_to(WEIGHTS)),
        "model.safetensors is a link to model.safetensors",
    ),
    refused(
        "bin-pipe",
        both(lambda folder: (folder / WEIGHTS).unlink(), in_place(BIN, os.mkfifo)),
        "pytorch_model.bin is a pipe",
    ),
    refused("config-pipe", in_place("config.json", os.mkfifo), "config.json is a pipe, not a file"),
    refused("config-folder", in_place("config.json", pathlib.Path.mkdir), "config.json is a folder, not a file"),
    refused("config-device", in_place("config.json", link_to("/dev/null")), "config.json is a device, not a file"),
    refused("generation-pipe", in_place("generation_config.json", os.mkfifo), "generation_config.json is a pipe"),
    refused(
        "index-pipe", both(lambda folder: (folder / WEIGHTS).unlink(), in_place(INDEX, os.mkfifo)), f"{INDEX} is a pipe"
    ),
    refused(
        "shard-pipe",
        both(sharded(), in_place("model-00001-of-00002.safetensors", os.mkfifo)),
        "model-00001-of-00002.safetensors is a pipe",
    ),
    refused(
        "bin-shards-without-one",
        both(bin_shards, lambda folder: (folder / "part-2.bin").unlink()),
        "is missing part-2.bin",
    ),
    refused("bin-shards-elsewhere", both(bin_shards, bin_index("../part-1.bin")), "'../part-1.bin'", "not a .bin file"),
    refused("bin-shards-with-a-pipe", both(bin_shards, in_place("part-1.bin", os.mkfifo)), "part-1.bin is a pipe"),
    taken("bin-shards", bin_shards),
    taken("snapshot-of-the-hub", snapshot),
    taken("shards-linked", both(sharded(), snapshot)),
    taken("shards", sharded()),
    taken("shards-of-another-program-beside", both(sharded(), text("consolidated.safetensors", b"\0" * 64))),
    taken("adapter-beside", text("adapter_model.safetensors", "no adapter")),
    taken("bin-of-another-program-beside", text(BIN, b"junk")),
    refused(
        "index-of-another-copy-beside",
        text(INDEX, '{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}'),
        "is missing gone.safetensors, which its index names",
    ),
    taken("variant-beside", text("model.fp16.safetensors", b"junk")),
    refused(
        "index-parent",
        elsewhere("../outside.safetensors"),
        INDEX,
        "'../outside.safetensors'",
        "not a .safetensors file in this folder",
    ),
    refused("index-absolute", absolute, INDEX, "/outside/part.safetensors'", "not a .safetensors file in this folder"),
    refused("index-subfolder", elsewhere("sub/part.safetensors"), INDEX, "'sub/part.safetensors'"),
    refused("index-pickle", elsewhere("part.bin"), INDEX, "'part.bin'", "not a .safetensors file"),
    refused("index-number", sharded(lambda index, parts: _point(index, 0, 7)), INDEX, "in 7,"),
    refused(
        "index-null-byte",
        sharded(lambda index, parts: _point(index, 0, "a\0.safetensors")),
        INDEX,
        "not a .safetensors file",
    ),
    refused("index-dots", sharded(lambda index, parts: _point(index, 0, "..")), INDEX, "'..'"),
    refused("index-list", both(sharded(), text(INDEX, "[]")), f"{INDEX} is not a JSON object"),
    refused("index-cut-off", both(sharded(), text(INDEX, '{"weight_map": ')), f"{INDEX} is not valid JSON"),
    refused("index-without-map", sharded(lambda index, parts: index.pop("weight_map")), INDEX, "weight_map"),
    refused(
        "index-with-map-of-nothing", sharded(lambda index, parts: index.update(weight_map={})), INDEX, "weight_map"
    ),
    refused("index-without-metadata", sharded(lambda index, parts: index.pop("metadata")), INDEX, "metadata"),
    refused("index-deep", both(sharded(), text(INDEX, DEEP)), f"{INDEX} is nested too deeply"),
    refused(
        "index-names-a-tensor-of-no-file",
        sharded(lambda index, parts: [part.pop(EMBEDDING, None) for part in parts]),
        EMBEDDING,
    ),
    refused("index-lacks-a-tensor", sharded(lambda index, parts: index["weight_map"].pop(NORM)), INDEX, NORM),
    refused("index-says-another-file", sharded(swapped), INDEX, NORM),
    refused(
        "shard-missing",
        both(sharded(), lambda folder: (folder / "model-00002-of-00002.safetensors").unlink()),
        "is missing model-00002-of-00002.safetensors",
    ),
    refused(
        "shards-without-index",
        both(sharded(), lambda folder: (folder / INDEX).unlink()),
        "contains no weights",
        "model-00001-of-00002.safetensors",
    ),
    taken("shards-with-a-copy", sharded(lambda index, parts: [part.update({NORM: torch.ones(64)}) for part in parts])),
    refused(
        "shards-with-one-tensor-twice",
        sharded(
            lambda index, parts: (
                parts[0].update({NORM: torch.full((64,), 3.0)}) or parts[1].update({NORM: torch.ones(64)})
            )
        ),
        NORM,
        "with different numbers",
    ),
    refused(
        "shards-of-two-shapes",
        sharded(
            lambda index, parts: parts[0].update({NORM: torch.ones(32)}) or parts[1].update({NORM: torch.ones(64)})
        ),
        NORM,
        "with different numbers",
    ),
]

TENSORS = [
    refused("head-lost", without(HEAD), "there is no lm_head.weight"),
    refused("head-lost-16-bit", without(HEAD), "there is no lm_head.weight", quantization="none"),
    refused("embeddings-lost", without(EMBEDDING), "there is no model.embed_tokens.weight"),
    refused("embeddings-and-head-lost", without(EMBEDDING, HEAD), EMBEDDING, HEAD),
    refused("norm-lost", without(NORM), "there is no model.norm.weight"),
    refused(
        "norms-of-layers-lost",
        tensors(lambda held: {name: value for name, value in held.items() if "layernorm" not in name}),
        "there is no model.layers.0.input_layernorm.weight",
        "and 1 more",
    ),
    refused(
        "half-of-the-layers",
        tensors(lambda held: {name: value for name, value in held.items() if "layers.1" not in name}),
        "there is no model.layers.1.self_attn.q_proj.weight",
        "and 6 more",
    ),
    refused("half-of-a-layer", without(UP, QUERY), "there is no", UP, QUERY),
    refused("nothing", tensors(lambda held: {"a": torch.zeros(1)}), "there is no model.embed_tokens.weight"),
    refused("no-tensors", both(raw_header(b"{}", b"")), "there is no model.embed_tokens.weight"),
    refused(
        "more-layers",
        config(num_hidden_layers=1),
        "the files contain model.layers.1.input_layernorm.weight",
        "and 6 more",
    ),
    refused(
        "more-layers-16-bit", config(num_hidden_layers=1), "the files contain model.layers.1.", quantization="none"
    ),
    refused(
        "a-bias",
        with_(model__layers__0__self_attn__q_proj__bias=torch.zeros(64)),
        "the files contain model.layers.0.self_attn.q_proj.bias",
    ),
    refused("no-bias", config(attention_bias=True), "there is no model.layers.0.self_attn.q_proj.bias"),
    refused("another-head", with_(score__weight=torch.zeros(2, 64)), "the files contain score.weight"),
    refused(
        "an-adapter-within",
        with_(model__layers__0__self_attn__q_proj__lora_A__weight=torch.zeros(8, 64)),
        "q_proj.lora_A.weight",
    ),
    refused("without-the-prefix", renamed(lambda name: name.removeprefix("model.")), "lack 'model.'"),
    refused("wrapped", renamed(lambda name: f"module.{name}"), "begin with 'module.'"),
    refused("wrapped-by-peft", renamed(lambda name: f"base_model.model.{name}"), "begin with 'base_model.model.'"),
    refused(
        "of-gpt2",
        renamed(lambda name: name.replace("model.layers", "transformer.h")),
        "transformer.h.0.",
        "there is no model.layers.0.",
    ),
    refused(
        "transposed",
        altered(UP, torch.t),
        "mlp.up_proj.weight is 64 x 128 in the file, but 128 x 64 according to config.json",
    ),
    refused(
        "transposed-16-bit", altered(UP, torch.t), "mlp.up_proj.weight is 64 x 128 in the file", quantization="none"
    ),
    refused("flat", altered(UP, torch.flatten), "mlp.up_proj.weight is 8192 in the file"),
    refused("one-dimension-more", altered(NORM, lambda held: held[None]), "model.norm.weight is 1 x 64 in the file"),
    refused("a-number", altered(NORM, lambda held: held[0]), "model.norm.weight is a single number in the file"),
    refused("of-no-size", altered(UP, lambda held: held[:0]), "mlp.up_proj.weight is 0 x 64 in the file"),
    refused("a-row-less", altered(HEAD, lambda held: held[:-1]), "lm_head.weight is 399 x 64 in the file"),
    *(
        refused(f"stored-as-{kind}", altered(UP, lambda held, dtype=dtype: held.to(dtype)), UP, f"is stored as {kind},")
        for kind, dtype in NO_FLOATS.items()
    ),
    refused("all-integers", every(lambda held: (held * 100).to(torch.int8)), "is stored as I8", "and 20 more"),
    refused(
        "integers-16-bit",
        altered(NORM, lambda held: held.to(torch.int64)),
        NORM,
        "is stored as I64",
        quantization="none",
    ),
    taken("double-precision", every(lambda held: held.double())),
    taken("mixed-precision", altered(NORM, lambda held: held.bfloat16())),
    taken(
        "old-buffers",
        with_(
            model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
            model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(8),
        ),
    ),
    taken("tied", tied()),
    taken("tied-16-bit", tied(), quantization="none"),
    taken(
        "tied-with-a-copy",
        both(config(tie_word_embeddings=True), tensors(lambda held: held | {HEAD: held[EMBEDDING].clone()})),
    ),
    refused("tied-with-another-head", config(tie_word_embeddings=True), "tie_word_embeddings", HEAD, "two different"),
    refused(
        "tied-without-embeddings",
        both(config(tie_word_embeddings=True), without(EMBEDDING)),
        "there is no model.embed_tokens.weight",
    ),
]

NUMBERS = [
    refused("nan", altered(UP, put(float("nan"), 7)), f"{UP} (1 of 8,192)", WEIGHTS),
    refused("nan-16-bit", altered(UP, put(float("nan"), 7, 8)), f"{UP} (2 of 8,192)", quantization="none"),
    refused("infinite", altered(QUERY, put(float("inf"), 0, 1, 4095)), f"{QUERY} (3 of 4,096)"),
    refused("infinite-16-bit", altered(QUERY, put(float("-inf"), 0)), f"{QUERY} (1 of 4,096)", quantization="none"),
    refused("nan-in-a-norm", altered(NORM, put(float("nan"), 63)), f"{NORM} (1 of 64)"),
    refused("nan-in-the-head", altered(HEAD, put(float("nan"), 5)), HEAD),
    refused("nan-in-the-embeddings", altered(EMBEDDING, put(float("nan"), 5)), EMBEDDING, quantization="none"),
    refused("nan-in-two", both(altered(UP, put(float("nan"), 5)), altered(HEAD, put(float("inf"), 5))), "(and 1 more)"),
    refused("all-nan", every(lambda held: held * float("nan")), "(and 20 more)"),
    refused(
        "nan-in-bfloat16",
        both(every(lambda held: held.bfloat16()), altered(UP, put(float("nan"), 7))),
        f"{UP} (1 of 8,192)",
    ),
    refused(
        "nan-in-a-shard",
        sharded(lambda index, parts: parts[1].update({name: value * float("nan") for name, value in parts[1].items()})),
        "model-00002-of-00002.safetensors",
        "NaN",
    ),
    refused("nan-in-a-bin", binary(lambda held: held | {UP: held[UP] * float("nan")}), BIN, UP),
    refused(
        "too-large-for-float16",
        altered(NORM, put(1e6, 3)),
        NORM,
        "model.dtype=bfloat16",
        quantization="none",
        dtype=torch.float16,
    ),
    taken("large", altered(NORM, put(1e6, 3)), quantization="none", dtype=torch.bfloat16),
    taken(
        "nan-in-an-old-buffer", with_(model__layers__0__self_attn__rotary_emb__inv_freq=torch.full((8,), float("nan")))
    ),
    taken("a-weight-of-zeros", altered(UP, torch.zeros_like), f"{UP} is all zeros"),
    taken("a-weight-of-zeros-16-bit", altered(UP, torch.zeros_like), f"{UP} is all zeros", quantization="none"),
    taken("all-zeros", every(torch.zeros_like), "is all zeros", "and 20 more"),
    taken(
        "a-bias-of-zeros",
        both(
            config(attention_bias=True),
            tensors(
                lambda held: (
                    held
                    | {
                        name.replace("weight", "bias"): torch.zeros(len(value))
                        for name, value in held.items()
                        if "self_attn" in name
                    }
                )
            ),
        ),
    ),
]

HEADERS = [
    refused("file-empty", text(WEIGHTS, ""), "the file is cut off"),
    refused("file-of-four-bytes", text(WEIGHTS, "abcd"), "the file is cut off"),
    refused("file-of-zeros", text(WEIGHTS, bytes(4096)), "not a safetensors file"),
    refused(
        "file-cut-off",
        lambda folder: text(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-100])(folder),
        "the file is cut off",
    ),
    refused(
        "file-cut-off-in-its-header",
        lambda folder: text(WEIGHTS, (folder / WEIGHTS).read_bytes()[:100])(folder),
        "the file is cut off",
    ),
    refused(
        "file-longer",
        lambda folder: text(WEIGHTS, (folder / WEIGHTS).read_bytes() + b"more")(folder),
        "longer than its header says",
    ),
    refused("file-pointer", text(WEIGHTS, POINTER), "(10.0 GB) was not downloaded"),
    refused("file-page", text(WEIGHTS, "<!DOCTYPE html><html>not found</html>"), "not a safetensors file"),
    refused("file-zip", lambda folder: torch.save({}, folder / WEIGHTS), "not a safetensors file"),
    refused("header-of-2-to-the-63", raw_header(b"{}", length=2**63), "the header", "9,223,372,036,854,775,808"),
    refused("header-of-2-to-the-64", raw_header(b"{}", length=2**64 - 1), "the header", "18,446,744,073,709,551,615"),
    refused("header-of-no-length", raw_header(b"", length=0), "safetensors"),
    refused("header-longer-than-the-file", raw_header(b"{}", length=50_000_000), "the file is cut off"),
    refused("header-garbled", raw_header(b'{"a": }'), "is damaged: it is not valid JSON"),
    refused("header-cut-off", raw_header(b'{"a'), "is damaged: it is not valid JSON"),
    refused("header-not-utf8", raw_header(b'{"\xff\xfe": 1}'), "is not UTF-8"),
    refused("header-deep", raw_header(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    refused(
        "header-long-number",
        raw_header(b'{"a": ' + LONG.encode() + b"}"),
        "the header of the safetensors file is damaged",
    ),
    refused("header-name-twice", twice, "it names model.norm.weight twice"),
    refused(
        "header-metadata-list", header(lambda entries: entries.update(__metadata__=[])), "__metadata__ is not an object"
    ),
    refused(
        "header-metadata-numbers", header(lambda entries: entries.update(__metadata__={"format": 1})), "__metadata__"
    ),
    refused("entry-list", header(lambda entries: entries.update({UP: []})), UP, "not described by an object"),
    refused("entry-null", header(lambda entries: entries.update({UP: None})), UP, "not described by an object"),
    refused(
        "entry-without-offsets",
        header(lambda entries: entries[UP].pop("data_offsets")),
        f"data_offsets of {UP} are None",
    ),
    refused("entry-without-shape", header(lambda entries: entries[UP].pop("shape")), f"shape of {UP} is None"),
    refused("entry-without-type", header(lambda entries: entries[UP].pop("dtype")), f"{UP} has the type None"),
    refused("type-unknown", entry(UP, dtype="F99"), f"{UP} has the type 'F99'"),
    refused("type-in-small-letters", entry(UP, dtype="f32"), f"{UP} has the type 'f32'"),
    refused("type-list", entry(UP, dtype=["F32"]), UP, "type"),
    refused(
        "type-of-another-size",
        entry(UP, dtype="F16"),
        f"{UP} (F16 of shape [128, 64]) has 32,768 bytes, and needs 16,384",
    ),
    refused("shape-negative", entry(UP, shape=[-128, -64]), f"shape of {UP} is [-128, -64]"),
    refused("shape-floats", entry(UP, shape=[128.0, 64.0]), f"shape of {UP} is"),
    refused("shape-booleans", entry(UP, shape=[True, 8192]), f"shape of {UP} is"),
    refused("shape-text", entry(UP, shape="128x64"), f"shape of {UP} is"),
    refused("shape-huge", entry(UP, shape=[2**62, 2**62]), UP, "needs"),
    refused("shape-overflows", entry(UP, shape=[2**32, 2**32, 0, 8]), UP),
    refused("shape-of-10000-dimensions", entry(UP, shape=[1] * 10_000 + [128, 64]), UP),
    refused(
        "shape-of-a-million-dimensions",
        entry(UP, shape=[2**62] * 1_000_000),
        f"shape of {UP} is [4611686018427387904, ",
    ),
    refused("offsets-negative", entry(UP, data_offsets=[-8192, 24576]), f"data_offsets of {UP} are"),
    refused("offsets-reversed", entry(UP, data_offsets=[40_000, 7232]), f"data_offsets of {UP} are"),
    refused("offsets-huge", entry(UP, data_offsets=[2**63 - 32768, 2**63]), UP),
    refused("offsets-beyond-the-file", entry(UP, data_offsets=[10**12, 10**12 + 32768]), "begins after a gap"),
    refused("offsets-three", entry(UP, data_offsets=[0, 1, 2]), f"data_offsets of {UP} are"),
    refused("offsets-overlap", moved(-4), "overlaps the tensor before it"),
    refused("offsets-leave-a-gap", moved(4), "begins after a gap"),
    refused(
        "offsets-shared",
        header(
            lambda entries: entries[UP].update(
                data_offsets=entries["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
            )
        ),
        "overlaps",
    ),
    refused("bytes-of-no-tensor", header(lambda entries: entries.pop(UP)), "begins after a gap"),
]

PICKLES = [
    taken("bin", binary(dict)),
    taken("bin-16-bit", binary(dict), quantization="none"),
    taken("bin-of-old", binary(dict, _use_new_zipfile_serialization=False)),
    taken("bin-of-parameters", binary(lambda held: {name: torch.nn.Parameter(value) for name, value in held.items()})),
    refused(
        "bin-runs-a-command",
        binary(lambda held: held | {"x": Call(os.system, "touch ran")}),
        BIN,
        "asks for posix.system",
    ),
    refused(
        "bin-of-old-runs-a-command",
        binary(lambda held: held | {"x": Call(os.system, "touch ran")}, _use_new_zipfile_serialization=False),
        BIN,
        "asks for posix.system",
    ),
    refused("bin-evaluates", binary(lambda held: held | {"x": Call(eval, "1 + 1")}), BIN, "asks for", "eval"),
    refused(
        "bin-imports", binary(lambda held: held | {"x": Call(__import__, "antigravity")}), BIN, "asks for", "__import__"
    ),
    refused(
        "bin-with-somebodys-class",
        binary(lambda held: held | {"args": Settings()}),
        BIN,
        "asks for tests.corpus.models.Settings",
    ),
    refused("bin-plain-pickle", raw_binary(pickle.dumps({"a": [1, 2]})), BIN),
    refused(
        "bin-plain-pickle-that-runs",
        raw_binary(pickle.dumps(Call(os.system, "touch ran"), protocol=2)),
        BIN,
        "asks for posix.system",
    ),
    refused(
        "bin-new-pickle-that-runs",
        raw_binary(pickle.dumps(Call(os.system, "touch ran"))),
        BIN,
        "is not a pickle of tensors",
    ),
    refused("bin-list", binary(lambda held: list(held.values())), f"{BIN} contains list, not named tensors"),
    refused("bin-tensor", binary(lambda held: held[UP]), f"{BIN} contains Tensor, not named tensors"),
    refused(
        "bin-of-a-trainer",
        binary(lambda held: {"model": held, "step": 5}),
        f"{BIN} contains dict, not a tensor, under 'model'",
    ),
    refused(
        "bin-with-a-number",
        binary(lambda held: held | {"epoch": 3}),
        f"{BIN} contains int, not a tensor, under 'epoch'",
    ),
    refused(
        "bin-with-a-text", binary(lambda held: held | {UP: "lost"}), f"{BIN} contains str, not a tensor, under '{UP}'"
    ),
    refused("bin-with-a-number-as-name", binary(lambda held: held | {5: torch.ones(1)}), BIN, "under 5"),
    refused(
        "bin-without-numbers",
        binary(lambda held: held | {UP: torch.empty(128, 64, device="meta")}),
        f"a tensor without its numbers under '{UP}'",
    ),
    refused("bin-sparse", binary(lambda held: held | {UP: held[UP].to_sparse()}), BIN, UP),
    refused("bin-integers", binary(lambda held: held | {UP: held[UP].int()}), UP, "is stored as int32"),
    refused("bin-cut-off", cut_binary, "the file is cut off: the end of the archive is missing"),
    refused("bin-empty", raw_binary(b""), BIN),
    refused("bin-garbage", raw_binary(b"\x80garbage" * 100), BIN),
    refused("bin-zeros", raw_binary(bytes(1000)), "not written by torch.save"),
    refused("bin-zip-of-nothing", raw_binary(b"PK\x05\x06" + bytes(18)), BIN),
    refused("bin-page", raw_binary(b"<!DOCTYPE html>"), "not written by torch.save"),
    refused("bin-pointer", raw_binary(POINTER.encode()), "pytorch_model.bin is a git-lfs pointer"),
    refused("bin-is-safetensors", lambda folder: (folder / WEIGHTS).rename(folder / BIN), "not written by torch.save"),
    refused(
        "bin-head-lost",
        binary(lambda held: {name: value for name, value in held.items() if name != HEAD}),
        "there is no lm_head.weight",
    ),
]

SCALES = f"{UP}.absmax"
ROWS = f"{UP.removesuffix('.weight')}.SCB"
QUANTISED = [
    taken("nf4", quantised()),
    refused("nf4-head-lost", quantised(lambda held: held.pop(HEAD)), "there is no lm_head.weight"),
    refused(
        "nf4-layer-lost",
        quantised(lambda held: [held.pop(name) for name in list(held) if "layers.1" in name]),
        "there is no model.layers.1.",
    ),
    refused("nf4-more-layers", both(quantised(), config(num_hidden_layers=1)), "the files contain model.layers.1."),
    refused("nf4-scales-lost", quantised(lambda held: held.pop(SCALES)), SCALES, "missing"),
    refused("nf4-map-lost", quantised(lambda held: held.pop(f"{UP}.quant_map")), f"{UP}.quant_map", "missing"),
    refused("nf4-state-lost", quantised(lambda held: held.pop(f"{UP}.quant_state.bitsandbytes__nf4")), UP),
    refused(
        "nf4-scales-cut",
        quantised(lambda held: held.update({SCALES: held[SCALES][:-1].clone()})),
        SCALES,
        "bytes and needs",
    ),
    refused("nf4-weight-cut", quantised(lambda held: held.update({UP: held[UP][:-1].clone()})), UP, "bytes and needs"),
    refused("nf4-scales-nan", quantised(lambda held: held[f"{UP}.nested_absmax"].fill_(float("nan"))), UP, "NaN"),
    refused("nf4-norm-nan", quantised(lambda held: held[NORM].fill_(float("nan"))), NORM, "NaN"),
    refused("nf4-another-shape", quantised(state(UP, shape=[64, 128])), UP, "128 x 64 according to config.json"),
    refused("nf4-shape-of-words", quantised(state(UP, shape="big")), UP),
    refused("nf4-block-of-none", quantised(state(UP, blocksize=0)), UP, "does not know"),
    refused("nf4-type-unknown", quantised(state(UP, dtype="float5")), UP, "does not know"),
    refused(
        "nf4-state-garbled",
        quantised(lambda held: held[f"{UP}.quant_state.bitsandbytes__nf4"].fill_(7)),
        UP,
        "does not describe",
    ),
    refused(
        "nf4-of-another-vocabulary", both(quantised(), config(vocab_size=401)), "400 x 64 in the file, but 401 x 64"
    ),
    refused(
        "nf4-without-its-entry",
        both(quantised(), config(quantization_config=...)),
        "config.json has no quantization_config",
    ),
    taken("int8", in_int8(), dtype=torch.bfloat16),
    refused("int8-head-lost", in_int8(lambda held: held.pop(HEAD)), "there is no lm_head.weight", dtype=torch.bfloat16),
    refused("int8-scales-lost", in_int8(lambda held: held.pop(ROWS)), UP, "is stored as I8", dtype=torch.bfloat16),
    refused(
        "int8-scales-cut",
        in_int8(lambda held: held.update({ROWS: held[ROWS][:-1].clone()})),
        ROWS,
        "128 scales belong to the rows of",
        dtype=torch.bfloat16,
    ),
    refused("int8-scales-nan", in_int8(lambda held: held[ROWS].fill_(float("nan"))), UP, "NaN", dtype=torch.bfloat16),
    refused(
        "int8-plain", in_int8(lambda held: held.update({UP: held[UP].float()})), UP, "not as I8", dtype=torch.bfloat16
    ),
    refused("nf4-kind-unknown", quantised(bnb_4bit_quant_type="nf5"), "nf5"),
]

CASES: list[ModelCase] = [*DESCRIPTIONS, *FIELDS, *PLACES, *TENSORS, *NUMBERS, *HEADERS, *PICKLES, *QUANTISED]
# The same, as a user would meet them.
TOLD = {
    "config-deep",
    "size-zero",
    "weights-pipe",
    "index-parent",
    "head-lost",
    "nan",
    "offsets-overlap",
    "bin-runs-a-command",
}
COMMANDS = [replace(case, name=f"command-{case.name}") for case in CASES if case.name in TOLD]
