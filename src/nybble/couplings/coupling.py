"""An entry of the register of couplings."""

from __future__ import annotations

from dataclasses import dataclass

TESTED = {
    "accelerate": ("1.15", "1.15.0"),
    "bitsandbytes": ("0.50", "0.50.2"),
    "datasets": ("4.8", "5.2.0"),
    "h11": ("0.16", "0.16.0"),
    "huggingface-hub": ("1.33", "2.4.0"),
    "jinja2": ("3.1", "3.1.6"),
    "lm-eval": ("0.4.13", "0.4.13"),
    "peft": ("0.21", "0.21.2"),
    "tokenizers": ("0.22", "0.23.3"),
    "torch": ("2.11", "2.13.0"),
    "transformers": ("5.17", "5.23.0"),
    "triton": ("3.6", "3.7.1"),
    "typer": ("0.16", "0.29.2"),
    "uvicorn": ("0.40", "0.54.0"),
    "wandb": ("0.26", "0.31.0"),
}
"""The tested window of each library: its lower end is in pyproject.toml, its upper end in constraints.txt."""


AT_START = "checked before work starts (`first_incompatibility`)"
BY_TESTS = "only by tests/test_couplings.py: without it, something is slower, or Python raises an error that names it"


@dataclass(frozen=True)
class Coupling:
    """One reliance on something that a library does not promise."""

    name: str
    library: str
    """The library's distribution, a key of TESTED."""
    symbols: tuple[str, ...]
    """What must exist: `module:name.attribute`, or `module:Class#attribute` for what instances set themselves."""
    files: tuple[str, ...]
    """The files that rely on it, below src/nybble."""
    breaks: str
    """What goes wrong when the library changes it."""
    guard: str
    """What notices the change before it does harm."""
    parameters: tuple[str, ...] = ()
    """Parameters that the first symbol must have, in this order."""
    written: tuple[str, ...] = ()
    """How the files mention it, if they do not use the last name of a symbol."""

    @property
    def seen(self) -> tuple[str, str]:
        """The oldest and the newest version that it was tested with."""
        return TESTED[self.library]
