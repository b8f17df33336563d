"""What an entry of the register says."""

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
"""The lower end of each library's window in pyproject.toml, and its upper end in constraints.txt."""


AT_START = "checked before work begins (`unmet`)"
BY_TESTS = "by tests/test_couplings.py alone: what is done without it is slower, or an error of Python that names it"


@dataclass(frozen=True)
class Coupling:
    """One reliance on what a library does not promise."""

    name: str
    library: str
    """Its distribution, a key of TESTED."""
    symbols: tuple[str, ...]
    """`module:name.attribute` of what must be there; `module:Class#attribute` of what its instances set for themselves."""
    files: tuple[str, ...]
    """Where it is relied upon, below src/nybble."""
    breaks: str
    """What goes wrong when the library changes it."""
    guard: str
    """What notices, before the wrong thing is done."""
    parameters: tuple[str, ...] = ()
    """Parameters that the first symbol must take, in this order."""
    written: tuple[str, ...] = ()
    """How the files mention it, where they do not write the last name of a symbol."""

    @property
    def seen(self) -> tuple[str, str]:
        """The oldest and the newest version it was seen with."""
        return TESTED[self.library]
