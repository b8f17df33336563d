"""Find a base model's files, and say which they are."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import struct
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from nybble.errors import ModelError
from nybble.model.hub import fetch
from nybble.places import replacing
from nybble.run import Run

# The last release whose package carries Meta's converter (4.57 and 5.x do not).
CONVERT = (
    "python3 -m venv convert && convert/bin/pip install transformers==4.46.3 torch sentencepiece accelerate 'protobuf<5' && "
    "convert/bin/python -m transformers.models.llama.convert_llama_weights_to_hf "
    "--input_dir {folder} --model_size 7B --output_dir {folder}-hf"
)
DESCRIPTION = ["*.json", "*.model", "*.jinja", "*.txt"]
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A base model on this disk."""

    name: str
    """As the user wrote it: a Hub id or a folder. PEFT records it in the adapter."""
    folder: pathlib.Path
    commit: str | None
    """The Hub commit, None for a local folder."""
    config: dict[str, Any]
    """config.json as it stands."""

    @property
    def quantized_as(self) -> str | None:
        """How a checkpoint that is already quantised by bitsandbytes is stored: nf4, fp4 or int8."""
        stored = self.config.get("quantization_config")
        if stored is None:
            return None
        return str(stored.get("bnb_4bit_quant_type", "fp4")) if stored.get("load_in_4bit") else "int8"


def find_checkpoint(path: str, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """A folder as it is, or a Hub id downloaded; without `weights`, configuration and tokenizer only.

    Raises:
        ModelError: nothing there, no weights, another architecture, Meta's own format, or another quantisation.
        HubError: the Hub refuses, and why.
    """
    if not path:
        raise ModelError("no base model was named", fix="nybble train MODEL DATA, where MODEL is a folder or a Hub id")
    folder, commit = pathlib.Path(path), None
    if not folder.exists():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ModelError(f"there is no folder {path}, and it is no Hub id (owner/name)", fix=f"ls {folder.parent}")
        folder, commit = fetch(path, revision, None if weights else DESCRIPTION)
    config = _read_config(folder)
    _check_architecture(folder, config)
    if weights or commit is None:
        _check_weights(folder)
    return Checkpoint(path, folder, commit, config)


def find_base(run: Run) -> Checkpoint:
    """The base that a run was trained on; one that was a folder is never asked of the Hub.

    Raises:
        ModelError: it is gone, or as `find_checkpoint`.
    """
    model = run.recipe.model
    if os.path.isabs(model.path) and not os.path.exists(model.path):
        raise ModelError(
            f"the base of {run.folder} is not there: there is no folder {model.path}",
            fix=f"say where it is now: nybble chat {run.folder} --base FOLDER (eval, export and serve take --base too)",
        )
    return find_checkpoint(model.path, model.revision)


def fingerprint(checkpoint: Checkpoint, cache: pathlib.Path) -> str:
    """Which weights these are: the Hub commit, or SHA-256 over the folder's configuration and weight files.

    Hashing 13.5 GB takes half a minute, so a file's digest is remembered for its path, size and time of change.
    """
    if checkpoint.commit is not None:
        return f"{checkpoint.name}@{checkpoint.commit}"
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for file in weight_files(checkpoint.folder):
        digest.update(f"{file.name}:{_file_digest(file, cache)}".encode())
    return f"sha256:{digest.hexdigest()}"


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Safetensors where there are any, else .bin."""
    for pattern in WEIGHTS:
        files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("adapter_"))
        if files:
            return files
    return []


def _file_digest(file: pathlib.Path, cache: pathlib.Path) -> str:
    status = file.stat()
    place = repr((str(file.resolve()), status.st_size, status.st_mtime_ns))
    note = cache / "digests" / hashlib.sha256(place.encode()).hexdigest()
    if note.exists():
        return note.read_text()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    with replacing(note) as temporary:
        temporary.write_text(digest)
    return digest


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "config.json"
    consolidated = sorted(folder.glob("consolidated.*.pth"))
    if consolidated:
        raise ModelError(
            f"{folder} holds Meta's own format ({consolidated[0].name}), which has to be converted once",
            where=str(consolidated[0]),
            fix=CONVERT.format(folder=folder),
        )
    if not file.is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json", fix=f"ls {folder}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"config.json is not valid JSON: {error.msg}", where=f"{file}:{error.lineno}") from error
    if not isinstance(config, dict):
        raise ModelError("config.json is not an object", where=str(file))
    return config


def _check_architecture(folder: pathlib.Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind != "llama":
        raise ModelError(
            f"the architecture is {kind!r}; nybble trains Llama-architecture models (model_type llama: LLaMA 2, "
            "Llama 3, CodeLlama, Vicuna, TinyLlama, SmolLM2, ...)",
            where=str(folder / "config.json"),
        )
    stored = config.get("quantization_config")
    if stored is not None and stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise ModelError(
            f"the checkpoint is quantised by {stored['quant_method']}, which adapters cannot be trained on here",
            fix="take the 16-bit checkpoint it was made from",
        )


def _check_weights(folder: pathlib.Path) -> None:
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder} holds no weights (model*.safetensors or pytorch_model*.bin)", fix=f"ls {folder}")
    for file in files:
        if file.suffix == ".safetensors" and not _is_whole(file):
            raise ModelError(
                "the file is cut off: it is shorter than its header says", where=str(file), fix="copy it again"
            )


def _is_whole(file: pathlib.Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of length, JSON, then the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8 or (length := struct.unpack("<Q", head)[0]) > size - 8:
            return False
        tensors = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    return bool(size == 8 + length + max(ends, default=0))


def check_length(config: PretrainedConfig, max_length: int, rope_scaling: dict[str, object] | None) -> None:
    """Refuse rows longer than the positions the model knows, unless rope scaling is set.

    Raises:
        ModelError: with the factor that would do.
    """
    positions = config.max_position_embeddings
    if max_length > positions and rope_scaling is None:
        raise ModelError(
            f"data.max_length={max_length} is above the model's {positions} positions",
            fix=f"data.max_length={positions}, or "
            f"'model.rope_scaling={{rope_type: linear, factor: {-(-max_length // positions)}.0}}'",
        )
