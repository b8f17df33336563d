"""Checks of generation_config.json, before anything is built from it."""

from __future__ import annotations

import pathlib

from transformers import GenerationConfig

from nybble.errors import ModelError
from nybble.files.reading import read_object
from nybble.model.base.files import LOADING_FAULTS, reason


def check_generation(file: pathlib.Path) -> None:
    """Refuse generation settings that Transformers does not accept, and control tokens that are not token ids.

    Raises:
        ModelError: naming the field.
    """
    if not file.is_file():
        return
    settings, fix = read_object(file), "compare it with generation_config.json on the model's page, or remove it"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in ids):
            raise ModelError(f"{name} is {value!r:.60}, which is not a token id", where=str(file), fix=fix)
    try:
        GenerationConfig.from_pretrained(file.parent)
    except LOADING_FAULTS as error:
        raise ModelError(
            f"Transformers cannot read generation_config.json: {reason(error)}", where=str(file), fix=fix
        ) from error
