"""The rows that a run was trained and validated on, as it saw them."""

from __future__ import annotations

import json
import pathlib

from transformers import PreTrainedTokenizerBase

from nybble.data.prepare import Prepared, prepare
from nybble.data.template import read_template
from nybble.errors import DataError
from nybble.run import Run


def rows_of(run: Run, tokenizer: PreTrainedTokenizerBase, cache: pathlib.Path) -> tuple[Prepared | None, str]:
    """The run's data read again, or None and why it cannot be had."""
    try:
        template = read_template(tokenizer, run.folder / "template.json")
        prepared = prepare(run.recipe.data, tokenizer, run.recipe.train.seed, cache, template=template)
    except DataError as error:
        return None, f"the run's data cannot be read: {error.what}"
    then = json.loads((run.folder / "start.json").read_text(encoding="utf-8"))["data"]
    if prepared.fingerprint != then:
        return None, "the data changed since the run was trained"
    return prepared, ""
