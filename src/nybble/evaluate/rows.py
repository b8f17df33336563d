"""The rows that a run was trained and validated on, as it tokenised them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from nybble.data.rows.formats import TARGETS
from nybble.data.rows.sources import find_sources, sources_of
from nybble.data.sets.prepare import Prepared, prepare
from nybble.data.text.saved_template import read_template
from nybble.errors import DataError, RecipeError
from nybble.recipe import absolute_paths
from nybble.run.folder import Run


def with_rows(run: Run, paths: Sequence[str]) -> Run:
    """The run, with new paths of its rows.

    Args:
        run: the run.
        paths: the paths of its sources in their order, then of its validation file if it has one.

    Raises:
        RecipeError: there are more or fewer paths than the run has.
        DataError: a path does not exist.
    """
    data = run.recipe.data
    if run.is_bare_adapter:
        raise RecipeError(f"--data: {run.folder} is an adapter without a run", fix="omit --data")
    files = [*data.names, *([data.validation] if isinstance(data.validation, str) else [])]
    if len(paths) not in (len(data.names), len(files)):
        raise RecipeError(
            f"--data was given {len(paths)} times, but {run.folder} has its rows from {', '.join(files)}",
            fix=f"nybble eval {run.folder}{' --data FILE' * len(files)}, in that order",
        )
    moved: dict[str, Any] = {"path": paths[0]}
    if isinstance(data.path, list):
        moved["path"] = list(paths[: len(data.names)])
    elif isinstance(data.path, dict):
        moved["path"] = dict(zip(paths, data.path.values(), strict=False))
    if len(paths) > len(data.names):
        moved["validation"] = paths[-1]
    recipe = run.recipe.model_copy(update={"data": data.model_copy(update=moved)})
    sources_of(recipe.data)
    for name in paths[len(data.names) :]:
        find_sources(name)
    return replace(run, recipe=absolute_paths(recipe))


def rows_of(run: Run, tokenizer: PreTrainedTokenizerBase, cache: pathlib.Path) -> tuple[Prepared | None, str]:
    """The run's data, read again, or None and the reason why it cannot be read."""
    try:
        template = read_template(tokenizer, run.folder / "template.json")
        target = TARGETS[run.recipe.train.objective]
        prepared = prepare(run.recipe.data, tokenizer, run.recipe.train.seed, cache, template=template, target=target)
    except DataError as error:
        where = f" ({error.where})" if error.where else ""
        return None, f"the run's data cannot be read: {error.what}{where}"
    if prepared.fingerprint != run.start().data:
        return None, "the data changed since the run was trained"
    return prepared, ""
