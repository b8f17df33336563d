"""Find the files of a base model, check them, and identify its weights."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shlex
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from nybble.errors import ModelError
from nybble.files.cached_digests import sha256_of
from nybble.files.reading import read_object
from nybble.model.base.downloads import check_download
from nybble.model.base.fields import check_architecture, check_fields, check_storage, quantized_as
from nybble.model.base.files import FLOATS, WHOLE, check_whole, refuse_pointers, shapes, weight_files
from nybble.model.base.generation import check_generation
from nybble.model.base.headers import index_of
from nybble.model.hub import fetch, first_three, missing_weights
from nybble.run.folder import Run, open_run

# The last release whose package carries Meta's converter (4.57 and 5.x do not).
CONVERT = (
    "python3 -m venv convert && convert/bin/pip install transformers==4.46.3 torch sentencepiece accelerate 'protobuf<5' && "
    "convert/bin/python -m transformers.models.llama.convert_llama_weights_to_hf "
    "--input_dir {folder} --model_size 7B --output_dir {folder}-hf"
)
DESCRIPTION_PATTERNS = ["*.json", "*.model", "*.jinja", "*.txt"]
DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
ADAPTER_FILES = ("adapter_config.json", "recipe.yaml")
"""Files that show that a folder is an adapter, or a run with one."""


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk."""

    name: str
    """A Hub id or a folder, as the user typed it. PEFT records it in the adapter."""
    folder: pathlib.Path
    commit: str | None
    """The Hub commit, None for a local folder."""
    config: dict[str, Any]
    """The content of config.json."""

    @property
    def quantized_as(self) -> str | None:
        """How a checkpoint that came quantised by bitsandbytes is stored: nf4, fp4 or int8; None for others."""
        return quantized_as(self.config)


def find_checkpoint(path: str, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """A model in a folder, or downloaded by its Hub id; without `weights`, configuration and tokenizer only.

    Raises:
        ModelError: there is nothing, no weights, an adapter, another architecture, Meta's own format, or another quantisation.
        HubError: the Hub refuses, and why.
    """
    if not path:
        raise ModelError(
            "no base model was given",
            fix="nybble train MODEL DATA, where MODEL is a folder or a Hub id; for an adapter that names none: --base MODEL",
        )
    folder, commit = pathlib.Path(path), None
    if not _exists(folder):
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ModelError(
                f"there is no folder {path}, and it is not a Hub id (owner/name)", fix=f"ls {folder.parent}"
            )
        folder, commit = fetch(path, revision, None if weights else DESCRIPTION_PATTERNS)
    config = read_description(folder)
    if weights or commit is None:
        _check_weights(folder)
        _check_leftover(folder, config, path if commit is not None else None)
    check_storage(folder / "config.json", config)
    return Checkpoint(path, folder, commit, config)


def read_description(folder: pathlib.Path) -> dict[str, Any]:
    """config.json of a model that can be built; its weights are not read.

    Raises:
        ModelError: there is none, or a field of it or of generation_config.json rules out a model that nybble supports.
    """
    refuse_pointers(folder / name for name in DESCRIPTION_FILES)
    config = _read_config(folder)
    check_generation(folder / "generation_config.json")
    check_architecture(folder / "config.json", config)
    check_fields(folder / "config.json", config)
    _check_pad(folder, config)
    return config


def find_base(run: Run) -> Checkpoint:
    """The base that a run was trained on; a base that was a folder is never looked up on the Hub.

    Raises:
        ModelError: it is gone, or as `find_checkpoint`.
    """
    model = run.recipe.model
    if os.path.isabs(model.path) and not os.path.exists(model.path):
        raise ModelError(
            f"the base of {run.folder} is missing: there is no folder {model.path}",
            fix=f"give its new path: nybble chat {run.folder} --base FOLDER (eval, export and serve take --base too)",
        )
    return find_checkpoint(model.path, model.revision)


def fingerprint(checkpoint: Checkpoint, cache: pathlib.Path, *, prove: bool = False) -> str:
    """Identifies the weights: the Hub commit, or SHA-256 over the folder's configuration and weight files.

    Args:
        checkpoint: the base's files.
        cache: where digests are cached, since SHA-256 of 13.5 GB takes ten seconds.
        prove: read the weights even if they seem unchanged; downloaded ones are compared with the Hub's digests.

    Raises:
        ModelError: a file from the Hub is damaged.
    """
    files = weight_files(checkpoint.folder)
    if checkpoint.commit is not None:
        if prove:
            for file, digest in zip(files, sha256_of(files, cache / "digests", prove=True), strict=True):
                check_download(file, digest)
        return f"{checkpoint.name}@{checkpoint.commit}"
    whole = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for file, digest in zip(files, sha256_of(files, cache / "digests", prove=prove), strict=True):
        whole.update(f"{file.name}:{digest}".encode())
    return f"sha256:{whole.hexdigest()}"


def _exists(folder: pathlib.Path) -> bool:
    """Whether a path exists.

    Raises:
        ModelError: it exists but cannot be read.
    """
    try:
        if folder.is_dir():
            os.listdir(folder)
        return folder.exists()
    except OSError as error:  # no permission, a name that is too long
        raise ModelError(
            f"the model's folder cannot be read: {error.strerror}",
            where=str(folder),
            fix="give a folder that you may read",
        ) from error


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "config.json"
    consolidated = sorted(folder.glob("consolidated.*.pth"))
    if consolidated:
        raise ModelError(
            f"{folder} is in Meta's own format ({consolidated[0].name}), which must be converted first",
            where=str(consolidated[0]),
            fix=CONVERT.format(folder=folder),
        )
    if not file.is_file():
        refuse_adapter(folder)
        raise ModelError(f"{folder} is not a model folder: it has no config.json", fix=f"ls {folder}")
    config = read_object(file)
    if not isinstance(config.get("quantization_config", {}), dict | None):
        raise ModelError(
            f"quantization_config is {config['quantization_config']!r:.40}, not an object",
            where=str(file),
            fix="compare it with config.json on the model's page",
        )
    if "transformers_weights" in config:
        raise ModelError(
            f"config.json names its own weight file ({config['transformers_weights']!r:.60}); nybble reads "
            f"{WHOLE[0]} or {index_of(WHOLE[0])}",
            where=str(file),
            fix='delete "transformers_weights" there, and give the weights that name',
        )
    return config


def _check_weights(folder: pathlib.Path) -> None:
    files = weight_files(folder)
    if not files:
        refuse_adapter(folder)  # one that scaled RoPE has a config.json too
        others = sorted(file.name for end in ("safetensors", "bin") for file in folder.glob(f"*.{end}"))
        unindexed = (
            f"; {first_three(others)} can only be read with their index ({index_of(WHOLE[0])})" if others else ""
        )
        raise ModelError(
            f"{folder} contains no weights ({' or '.join(WHOLE)}, whole or as an index with its shards){unindexed}",
            fix=f"ls {folder}",
        )
    for file in files:
        check_whole(file)
    if missing := missing_weights(folder, {file.name for file in folder.iterdir()}):
        raise ModelError(
            f"{folder} is missing {first_three(missing)}, which its index names",
            fix="finish the download, or copy what is missing",
        )


def _check_leftover(folder: pathlib.Path, config: dict[str, Any], hub_id: str | None) -> None:
    """Refuse unquantised weights that config.json calls quantised: they were dequantised and the entry was left.

    Transformers would quantise them again as the entry says, whatever the recipe says.
    """
    if config.get("quantization_config") is None:
        return
    types = {kind for file in weight_files(folder) for kind, _ in shapes(file).values()}
    if not types <= FLOATS:
        return
    method = config["quantization_config"].get("quant_method", "bitsandbytes")
    edit = 'delete "quantization_config" from'
    raise ModelError(
        f"config.json says that the weights are quantised ({method}), but the files contain plain {' and '.join(sorted(types))} "
        "weights: quantization_config is a leftover",
        where=str(folder / "config.json"),
        fix=f"{edit} config.json"
        if hub_id is None
        else f"hf download {hub_id} --local-dir base, {edit} base/config.json, and name base as the model",
    )


def _check_pad(folder: pathlib.Path, config: dict[str, Any]) -> None:
    """Refuse a pad token without an embedding, with which torch cannot build the embedding layer."""
    pad, size = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise ModelError(
            f"pad_token_id is {pad}, but the model has embeddings for ids 0 to {size - 1} (vocab_size {size})",
            where=str(folder / "config.json"),
            fix="set pad_token_id to null there: nybble then pads with another token, which the loss ignores",
        )


def refuse_adapter(folder: pathlib.Path) -> None:
    """Refuse an adapter, or a run, given as a base model.

    Raises:
        ModelError: with the base that the adapter was trained on, and how to continue training from it.
    """
    if not any((folder / name).exists() for name in ADAPTER_FILES):
        return
    run = open_run(folder)
    base = run.recipe.model.path
    kind = "a LoRA adapter" if run.is_bare_adapter else "a nybble run"
    raise ModelError(
        f"{folder} is {kind}, not a base model" + (f"; its base is {base}" if base else ", and it names no base"),
        where=str(folder),
        fix=f"to continue training from it: nybble train {shlex.quote(base) if base else 'BASE'} DATA "
        f"adapter={shlex.quote(str(run.adapter))}",
    )


def check_length(config: PretrainedConfig, max_length: int, rope_scaling: dict[str, object] | None) -> None:
    """Refuse rows longer than the model's positions, unless rope scaling is set.

    Raises:
        ModelError: with the factor that would be enough.
    """
    positions = config.max_position_embeddings
    if max_length > positions and rope_scaling is None:
        raise ModelError(
            f"data.max_length={max_length} is above the model's {positions} positions",
            fix=f"data.max_length={positions}, or "
            f"'model.rope_scaling={{rope_type: linear, factor: {-(-max_length // positions)}.0}}'",
        )
