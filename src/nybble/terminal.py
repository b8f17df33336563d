"""Text for people. Lines on a terminal: wrapped at words and hung under their beginning; in a pipe or a file each stays whole."""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

LABEL = 10
"""Characters before a line's text, which say what it is about."""
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
NARROW = 24  # with less room than this beside a label, lines hang by two characters only
JOINT = "\ue0f3"  # of Unicode's private use area: stands for a space at which a line must not be broken
COMMAND = re.compile(
    r"(?<![\w/.-])(nybble (chat|data|demo|doctor|eval|export|help|serve|train)|(uv pip|pip|hf|git|wandb) [\w-]+|python3? -\w+"
    r"|ls|mv|cp -r|rm -r|jq|gzip|iconv|accelerate launch|curl|kill)(?![\w-])(\"[^\"\n]*\"|'[^'\n]*'|[^,;`\"\n])*|'[\w.]+=[^'\n]*'"
)


def bytes_text(count: float, decimals: int = 2, unit: str | None = "GB") -> str:
    """Bytes as people read them, in decimal units.

    Args:
        count: how many.
        decimals: digits after the point.
        unit: GB, MB or kB; None is the largest of them that is reached.
    """
    if unit is None:
        unit = next((name for name, size in UNITS.items() if count >= size), None)
    return f"{count / UNITS[unit]:.{decimals}f} {unit}" if unit else f"{count} bytes"


def tell(console: Console, text: str | Text, style: str = "", *, hang: int = LABEL) -> None:
    """Print a line.

    Args:
        text: as it is: brackets are no markup.
        style: of what stands behind the first `hang` characters.
        hang: by how many characters the lines after the first are indented.
    """
    line = Text(text) if isinstance(text, str) else text.copy()
    if style:
        line.stylize(style, hang)
    console.print(hung(console, line, hang), soft_wrap=True, highlight=False)


def hung(console: Console, text: Text, hang: int) -> Text:
    """A line as it fits the terminal; a command in it, which is copied whole, is never broken."""
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


def _breaks(text: str, room: int) -> list[int]:
    """Where lines of so many cells begin. Rich's own wrapping folds or cuts what is longer than a line."""
    whole = COMMAND.sub(lambda found: found[0].rstrip().replace(" ", JOINT) + " " * found[0].endswith(" "), text)
    places, filled = [], 0
    for word in re.finditer(r"^\s+|\S+\s*", whole):
        if filled and filled + cell_len(word[0].rstrip()) > room:
            places.append(word.start())
            filled = 0
        filled += cell_len(word[0])
    return places


def tell_error(console: Console, who: str, error: str) -> None:
    """An error's lines, each hung under what it begins with."""
    first, *others = error.splitlines() or [""]
    opening = f"{who}error: "
    tell(console, Text.assemble((opening, "bold red"), first), hang=len(opening))
    for line in others:
        begins = re.match(r"\s*(where:|fix:|-)?\s*", line)
        assert begins is not None, "the pattern matches everything"
        tell(console, line, hang=begins.end() + (0 if begins[1] else 2))
