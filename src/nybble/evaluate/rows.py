"""The rows that a run was trained and validated on, as it saw them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from nybble.data.rows.sources import find_sources, sources_of
from nybble.data.sets.prepare import Prepared, prepare
from nybble.data.text.kept_template import read_template
from nybble.errors import DataError, RecipeError
from nybble.recipe import absolute_paths
from nybble.run.folder import Run


def with_rows(run: Run, places: Sequence[str]) -> Run:
    """The run with its rows somewhere else.

    Args:
        run: the run.
        places: of its sources in their order, and then of its validation file where it has one.

    Raises:
        RecipeError: more or fewer places than the run has.
        DataError: a place is not there.
    """
    data = run.recipe.data
    if run.is_bare_adapter:
        raise RecipeError(f"--data: {run.folder} is an adapter without a run", fix="omit --data")
    files = [*data.names, *([data.validation] if isinstance(data.validation, str) else [])]
    if len(places) not in (len(data.names), len(files)):
        raise RecipeError(
            f"--data was given {len(places)} times, but {run.folder} has its rows from {', '.join(files)}",
            fix=f"nybble eval {run.folder}{' --data FILE' * len(files)}, in that order",
        )
    moved: dict[str, Any] = {"path": places[0]}
    if isinstance(data.path, list):
        moved["path"] = list(places[: len(data.names)])
    elif isinstance(data.path, dict):
        moved["path"] = dict(zip(places, data.path.values(), strict=False))
    if len(places) > len(data.names):
        moved["validation"] = places[-1]
    recipe = run.recipe.model_copy(update={"data": data.model_copy(update=moved)})
    sources_of(recipe.data)
    for name in places[len(data.names) :]:
        find_sources(name)
    return replace(run, recipe=absolute_paths(recipe))


def rows_of(run: Run, tokenizer: PreTrainedTokenizerBase, cache: pathlib.Path) -> tuple[Prepared | None, str]:
    """The run's data read again, or None and why it cannot be had."""
    try:
        template = read_template(tokenizer, run.folder / "template.json")
        prepared = prepare(run.recipe.data, tokenizer, run.recipe.train.seed, cache, template=template)
    except DataError as error:
        place = f" ({error.where})" if error.where else ""
        return None, f"the run's data cannot be read: {error.what}{place}"
    if prepared.fingerprint != run.start()["data"]:
        return None, "the data changed since the run was trained"
    return prepared, ""
