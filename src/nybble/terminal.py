"""Text for people. On a terminal, long lines wrap at words with a hanging indent; in a pipe or a file they are not wrapped."""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

LABEL = 10
"""Width of the label with which a line begins, in characters."""
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
NARROW = 24  # if fewer columns than this remain beside a label, lines are indented by two characters only
JOINT = "\ue0f3"  # of Unicode's private use area: stands for a space at which a line must not be broken
COMMAND = re.compile(
    r"(?<![\w/.-])(nybble (chat|data|demo|doctor|eval|export|help|serve|train)|(uv pip|pip|hf|git|wandb) [\w-]+|python3? -\w+"
    r"|ls|mv|cp -r|rm -r|jq|gzip|iconv|accelerate launch|curl|kill)(?![\w-])(\"[^\"\n]*\"|'[^'\n]*'|[^,;`\"\n])*|'[\w.]+=[^'\n]*'"
)


def bytes_text(count: float, decimals: int = 2, unit: str | None = "GB") -> str:
    """Bytes in decimal units, for people.

    Args:
        count: bytes.
        decimals: digits after the decimal point.
        unit: GB, MB or kB; None chooses the largest that is not more than `count`.
    """
    if unit is None:
        unit = next((name for name, size in UNITS.items() if count >= size), None)
    return f"{count / UNITS[unit]:.{decimals}f} {unit}" if unit else f"{count} bytes"


def first_of(items: list[str]) -> str:
    """The first of several items, and how many more there are."""
    return items[0] + (f" (and {len(items) - 1} more)" if len(items) > 1 else "")


def tell(console: Console, text: str | Text, style: str = "", *, hang: int = LABEL) -> None:
    """Print a line.

    Args:
        text: printed as it is; brackets are not markup.
        style: for everything after the first `hang` characters.
        hang: characters by which the lines after the first are indented.
    """
    line = Text(text) if isinstance(text, str) else text.copy()
    if style:
        line.stylize(style, hang)
    console.print(hung(console, line, hang), soft_wrap=True, highlight=False)


def hung(console: Console, text: Text, hang: int) -> Text:
    """A line wrapped to the terminal's width. Commands in it are never broken, so that they can be copied."""
    if not console.is_terminal or text.cell_len <= console.width:
        return text
    if console.width - hang < NARROW:
        label, body, hang = Text(), text, 2
    else:
        label, body = text.divide([hang])
    lines = body.divide(_breaks(body.plain, console.width - hang))
    for line in lines:
        line.rstrip()
    return label + Text("\n" + " " * hang).join(lines)


def _breaks(text: str, width: int) -> list[int]:
    """Offsets at which lines of at most `width` cells begin. Rich's own wrapping folds or cuts words longer than a line."""
    whole = COMMAND.sub(lambda match: match[0].rstrip().replace(" ", JOINT) + " " * match[0].endswith(" "), text)
    offsets, filled = [], 0
    for word in re.finditer(r"^\s+|\S+\s*", whole):
        if filled and filled + cell_len(word[0].rstrip()) > width:
            offsets.append(word.start())
            filled = 0
        filled += cell_len(word[0])
    return offsets


def tell_error(console: Console, who: str, error: str) -> None:
    """Print an error; each line is indented to its own label (`where:`, `fix:`)."""
    first, *others = error.splitlines() or [""]
    opening = f"{who}error: "
    tell(console, Text.assemble((opening, "bold red"), first), hang=len(opening))
    for line in others:
        label = re.match(r"\s*(where:|fix:|-)?\s*", line)
        assert label is not None, "the pattern matches everything"
        tell(console, line, hang=label.end() + (0 if label[1] else 2))
