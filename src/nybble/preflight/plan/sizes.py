"""A base's sizes, from its configuration alone. torch and Transformers are not loaded."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.errors import ModelError
from nybble.files.reading import read_object
from nybble.model.base.fields import FIX, LIMITS, check_architecture, check_fields, check_storage, quantized_as
from nybble.model.hub import fetch
from nybble.plan.known_models import KNOWN, known_model
from nybble.plan.shapes import ModelShape
from nybble.terminal import first_of


@dataclass(frozen=True)
class Sizes:
    """What a base's configuration says of it."""

    shape: ModelShape
    source: str
    """Where it is from."""
    stored: str | None = None
    """How the checkpoint came quantised: nf4, fp4 or int8; None if it did not."""


def sizes_of(model: str, revision: str | None) -> Sizes:
    """The sizes of a base.

    Args:
        model: a folder, a Hub id or one of `KNOWN`.
        revision: a branch, tag or commit on the Hub.

    Raises:
        ModelError: there is no such model, or its config.json does not describe one that nybble trains.
        HubError: the Hub refuses, and why.
    """
    folder = pathlib.Path(model)
    if folder.is_dir():
        return _read(folder / "config.json", "its config.json")
    known = known_model(model)
    if known is not None:
        return Sizes(known.shape, "sizes built in")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelError(
            f"there is no model {model}: it is neither a folder, nor a Hub id (owner/name), nor one of {', '.join(KNOWN)}",
            fix="nybble plan llama-2-7b, a folder, or a Hub id",
        )
    folder, commit = fetch(model, revision, ["config.json"])
    return _read(folder / "config.json", f"config.json on the Hub, commit {commit[:12]}")


def sizes_in(config: Mapping[str, Any], source: str) -> Sizes:
    """The sizes in a checked configuration."""
    return Sizes(ModelShape.from_config(config), source, quantized_as(config))


def _read(file: pathlib.Path, source: str) -> Sizes:
    if not file.is_file():
        raise ModelError(f"{file.parent} is not a model folder: it has no config.json", fix=f"ls {file.parent}")
    config = read_object(file)
    if not isinstance(config.get("quantization_config", {}), dict | None):
        raise ModelError("quantization_config is not an object", where=str(file), fix=FIX)
    check_architecture(file, config)
    odd = [f"{name} is {config[name]!r:.40}" for name in LIMITS if type(config.get(name)) not in (int, type(None))]
    if odd:
        raise ModelError(f"config.json does not describe a working model: {first_of(odd)}", where=str(file), fix=FIX)
    check_fields(file, config)
    check_storage(file, config)
    return sizes_in(config, source)
