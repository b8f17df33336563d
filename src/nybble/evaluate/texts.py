"""Texts whose perplexity is measured, read before anything large is loaded."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from nybble.data.rows.readers import MB, TooLargeError, read_text_file
from nybble.errors import DataError, EvaluationError

MAX_LENGTH = 256 * MB  # characters: a whole text is in memory


@dataclass(frozen=True)
class TextFile:
    """A document and its file."""

    file: pathlib.Path
    text: str


def read_texts(files: Sequence[pathlib.Path]) -> list[TextFile]:
    """Read all texts.

    Raises:
        EvaluationError: one is missing, empty, a folder, or not UTF-8 text.
    """
    return [_read(file) for file in files]


def _read(file: pathlib.Path) -> TextFile:
    if file.is_dir():
        raise EvaluationError(f"{file} is a folder, not a text", fix=f"--text {file}/FILE.txt, once for each text")
    if not file.exists():
        raise EvaluationError(f"there is no file {file}", fix=f"ls {file.parent}; nybble eval RUN --text FILE.txt")
    try:
        text = read_text_file(file, MAX_LENGTH)
    except TooLargeError as error:
        raise EvaluationError(
            f"the text cannot be read: {error.what}", where=error.where, fix="give --text a part of it"
        ) from error
    except DataError as error:
        raise EvaluationError(f"the text cannot be read: {error.what}", where=error.where, fix=error.fix) from error
    except OSError as error:
        raise EvaluationError(f"the text cannot be read: {error.strerror}", where=str(file)) from error
    if not text.strip():
        raise EvaluationError(f"the text {file} is empty", fix="give --text a file with text in it")
    return TextFile(file, text)
