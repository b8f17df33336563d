"""The licence of an artefact: that of the base, of which it is a derivative."""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass

import yaml

from nybble.model.base.checkpoint import Checkpoint

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LLAMA2_NAME = re.compile(r"llama-?2-\d+b", re.IGNORECASE)
TEXTS = ("LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*", "Notice*")
# For example, a date with month 13 is a ValueError.
YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
LONGEST = 65536  # bytes of a model card's front matter
BY_TEXT = {
    # the beginning of a licence file: the Hub's short name
    "LLAMA 2 COMMUNITY LICENSE": "llama2",
    "Apache License": "apache-2.0",
    "MIT License": "mit",
}
# Section 1.b.iii of the Llama 2 Community License Agreement requires this sentence in a file "Notice" with every copy.
LLAMA2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)
LLAMA2_LICENCE = "https://ai.meta.com/llama/license/"
LLAMA2_POLICY = "https://ai.meta.com/llama/use-policy/"


@dataclass(frozen=True)
class Licence:
    """The base's licence.

    Attributes:
        name: the Hub's short name, such as llama2 or apache-2.0; None if it is unknown.
        link: a link to its text.
        policy: a link to its use policy.
        notice: a sentence that every copy must contain.
        files: licence files in the base's folder.
    """

    name: str | None
    link: str | None
    policy: str | None
    notice: str | None
    files: tuple[pathlib.Path, ...]


def find_licence(checkpoint: Checkpoint) -> Licence:
    """The licence according to the base's card, or else its licence file, or else, for Llama 2, the base's name."""
    files = tuple(sorted({file for pattern in TEXTS for file in checkpoint.folder.glob(pattern) if file.is_file()}))
    name = _of_card(checkpoint.folder) or _of_texts(files)
    if name is None and LLAMA2_NAME.search(pathlib.Path(checkpoint.name).name):
        name = "llama2"
    if name == "llama2":
        return Licence(name, LLAMA2_LICENCE, LLAMA2_POLICY, LLAMA2_NOTICE, files)
    return Licence(name, None, None, None, files)


def hub_id(checkpoint: Checkpoint) -> str | None:
    """The base's Hub id; for a folder it is known only for Llama 2."""
    if checkpoint.commit is not None:
        return checkpoint.name
    folder = pathlib.Path(checkpoint.name).name
    return f"meta-llama/{folder}" if re.fullmatch(r"Llama-2-\d+b(-chat)?-hf", folder) else None


def _of_card(folder: pathlib.Path) -> str | None:
    front = re.match(r"---\n(.*?)\n---", _beginning(folder / "README.md"), re.DOTALL)
    try:
        fields = yaml.safe_load(front[1]) if front else None
    except YAML_FAULTS:
        return None
    name = fields.get("license") if isinstance(fields, dict) else None
    return name if isinstance(name, str) and name != "other" else None


def _of_texts(files: tuple[pathlib.Path, ...]) -> str | None:
    for file in files:
        head = _beginning(file)[:400]
        for begins, name in BY_TEXT.items():
            if begins.lower() in head.lower():
                return name
    return None


def _beginning(file: pathlib.Path) -> str:
    """The first 64 KiB of a text file; empty if it cannot be read."""
    if not file.is_file():
        return ""
    try:
        with file.open("rb") as stream:
            return stream.read(LONGEST).decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
