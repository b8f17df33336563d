"""A tokenizer's regular expressions, tried on long texts before any row: they run in Rust and cannot be interrupted.

Those of well-known models are not tried, since that takes a process and a second or two.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from nybble.errors import ModelError
from nybble.isolated import attempt, run_job

SECONDS = 20.0  # to read a large tokenizer and encode 100 texts: an ordinary one takes 2
MEMORY = 8_000_000_000  # bytes of address space, of which a large tokenizer uses a fifth
LONGEST = 10_000  # characters of an expression; Llama 3's has 120
TEXT = 4000  # characters of a text that is tried: 2 ** n steps never end, n * n steps are hardly noticeable
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        *(
            f"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|{digits}|{_REST}"
            for digits in (r"\p{N}{1,3}", r"\p{N}")  # Llama 3 and GPT-4; Qwen 2
        ),
        r"\p{N}{1,3}",
        r"\p{N}",
        r"\d",
        r"\s+",
        " ",
        " {2,}",
    }
)


def try_expressions(described: Mapping[str, Any], file: pathlib.Path, fix: str) -> None:
    """Refuse a tokenizer that cannot process a few thousand characters.

    Args:
        described: the content of tokenizer.json.
        file: tokenizer.json.
        fix: what to do.

    Raises:
        ModelError: with the expression.
    """
    parts = [described.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    found = sorted({text for part in parts for text in _expressions(part)} - KNOWN)
    if not found:
        return
    long = next((text for text in found if len(text) > LONGEST), None)
    fault = f"it has {len(long):,} characters" if long else attempt(
        __name__, [str(file.absolute()), list(_texts(found))], seconds=SECONDS, memory=MEMORY
    )  # fmt: skip
    if fault is not None:
        shown = found[0] if len(found[0]) <= 60 else f"{found[0][:59]}…"
        raise ModelError(
            f"{file.name} splits text with a regular expression that cannot be used ({shown}): {fault}",
            where=str(file),
            fix=fix,
        )


def _expressions(part: Any) -> Iterator[str]:
    if isinstance(part, dict) and isinstance(part.get("Regex"), str):
        yield part["Regex"]
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _expressions(inner)


def _texts(expressions: list[str]) -> Iterator[str]:
    """Long runs of the letters in the expressions, and of common ones, each with an end that does not match."""
    named = sorted({letter for text in expressions for letter in text if letter.isalnum()})[:24]
    units = [
        *named,
        *" \n\t.,'-_a1é中",
        *map("".join, itertools.pairwise([*named, *"a1 ."])),
        "ab ",
        "a1",
        "'s ",
        "\r\n",
    ]
    for unit in dict.fromkeys(units):
        run = unit * (TEXT // len(unit))
        yield from (f"{run}!", f"{run}\0x")


def _examine(job: tuple[str, list[str]]) -> str | None:
    file, texts = job
    try:
        tokenizer = Tokenizer.from_file(file)
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokenizer.decode(ids[:TEXT])
    except BaseException as error:  # noqa: BLE001 - tokenizers raises bare Exceptions, and its panics are BaseExceptions
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


if __name__ == "__main__":
    run_job(_examine)
