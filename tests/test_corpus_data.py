"""Damaged data files: each ends in one message that names the place, or is read as it must be."""

from __future__ import annotations

import io
import pathlib

import pytest
from rich.console import Console

from corpus.cases import Case, Outcome, held, sampled
from corpus.data import CASES
from nybble.check import check
from nybble.errors import NybbleError
from nybble.recipe import Recipe


def checked(folder: pathlib.Path, case: Case) -> Outcome:
    """What `nybble data check` says of a case's data, without a model."""
    made = case.make(folder)
    path, *words = made if isinstance(made, list) else [made]
    size = int(words[0].rpartition("=")[2]) if words else 16
    recipe = Recipe.model_validate({"data": {"path": str(path), "max_row_mb": size}})
    stream = io.StringIO()
    try:
        fit = check(recipe, Console(file=stream, width=200))
    except NybbleError as error:
        return Outcome(error.exit_code, str(error))
    return Outcome(int(not fit), stream.getvalue())


@pytest.mark.parametrize("case", sampled(CASES, 4))
def test_a_damaged_file_is_one_message(tmp_path, case):
    held(case, checked(tmp_path, case))


def test_there_are_enough_cases():
    assert len(CASES) >= 250
