"""The end of a command's help: its examples, and the most used options with their documentation from the recipe."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from nybble.recipe import Options, Recipe

EXAMPLES = {
    "train": (
        ("nybble train models/llama-2-7b rows.jsonl", "model from a folder or the Hub, rows from a file"),
        ("nybble train models/llama-2-7b rows.jsonl train.epochs=3 lora.r=32 out=runs/first", "with options"),
        ("nybble train -c recipes/llama2-7b-alpaca.yaml data.path=rows.csv", "a recipe, with a change"),
        ("nybble train --resume runs/first", "resume an interrupted run"),
    ),
    "plan": (
        ("nybble plan llama-2-7b --vram 12GB", "what fits a card, before anything is downloaded"),
        ("nybble plan models/llama-2-7b rows.jsonl lora.r=32", "with your rows and options"),
        ("nybble plan -c recipes/llama2-7b-alpaca.yaml data.path=rows.csv", "a recipe, with a change"),
    ),
    "sweep": (
        (
            "nybble sweep models/llama-2-7b rows.jsonl train.learning_rate=1e-4..1e-3 lora.r=8,16,32",
            "a range and a list",
        ),
        ("nybble sweep -c recipe.yaml lora.r=8,16,32 --trials 3", "a recipe, and so many trainings"),
        ("nybble sweep models/llama-2-7b rows.jsonl --find-lr", "only suggest a learning rate"),
    ),
}
KEYS = (
    "train.epochs",
    "train.learning_rate",
    "train.micro_batch",
    "train.accumulation",
    "data.max_length",
    "data.validation",
    "data.template",
    "lora.r",
    "lora.targets",
    "out",
)


def print_keys(console: Console, name: str) -> None:
    """Print the examples of a command and the table of options."""
    console.print(" Examples", style="bold")
    for command, meaning in EXAMPLES[name]:  # soft_wrap: a command must stay on one line to be copied
        console.print(f"   {command}", soft_wrap=True, highlight=False)
        console.print(f"     {meaning}", style="dim", highlight=False)
    table = Table("Key", "Default", "Meaning", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for key in KEYS:
        default, meaning = _described(key)
        table.add_row(key, default, meaning)
    table.columns[0].no_wrap = True
    console.print()
    console.print(Padding(table, (0, 0, 0, 1)))
    console.print("\n All options: nybble train --print-config\n", highlight=False)


def _described(key: str) -> tuple[str, str]:
    section: Options = Recipe()
    *path, leaf = key.split(".")
    for name in path:
        section = getattr(section, name)
    value = getattr(section, leaf)
    meaning = type(section).model_fields[leaf].description
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value), (meaning or "").replace(
        "[", "\\["
    )
