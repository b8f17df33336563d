"""Objects that need an optional package; if it is missing, the error says how to install it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nybble.errors import EvaluationError, ExportError, RecipeError
from nybble.installed import install_extra

if TYPE_CHECKING:
    from nybble.evaluate.harness import Harness
    from nybble.export.gguf.writer import Converter
    from nybble.export.precheck import Preflight


def make_harness(names: list[str], data: pathlib.Path | None, limit: int | None, batch: int | None = None) -> Harness:
    """The harness that runs these benchmarks, once their rows have been found; it needs lm-eval, an optional package."""
    try:
        from nybble.evaluate.harness import Harness
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"benchmarks need lm-eval, which is not installed ({error})",
            fix=f"{install_extra('eval')}, or --tasks none",
        ) from error
    if data is not None and not data.is_dir():
        raise EvaluationError(f"there is no folder {data}", fix="--data-dir FOLDER with files TASK.SPLIT.jsonl")
    harness = Harness(data, limit, batch)
    for name in names:
        harness.check_rows(name)
    return harness


def make_converter() -> Converter:
    """The writer of GGUF files; it needs gguf, an optional package."""
    try:
        from nybble.export.gguf.writer import Converter
    except ModuleNotFoundError as error:
        raise ExportError(
            f"GGUF export needs the gguf package, which is not installed ({error})",
            fix=install_extra("export"),
        ) from error
    return Converter()


def load_sweep() -> Callable[..., pathlib.Path]:
    """The function that runs a sweep; it needs Optuna, an optional package."""
    try:
        from nybble.sweep.sweep import sweep
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"a sweep needs Optuna, which is not installed ({error})", fix=install_extra("sweep")
        ) from error
    return sweep


def make_preflight(targets: Sequence[str]) -> Preflight:
    """The check, before training, that the exports in export.to are possible."""
    converter = make_converter() if "gguf" in targets else None
    from nybble.export.gguf.quants import QUANTS
    from nybble.export.precheck import Preflight

    return Preflight(targets, QUANTS, converter)
