"""The template saved with a run: written when the run begins, and read by everything that uses the run."""

from __future__ import annotations

import datetime
import pathlib

from transformers import PreTrainedTokenizerBase

from nybble.data.rows.formats import Rules
from nybble.data.text.clock import reads_clock
from nybble.data.text.template import Template
from nybble.errors import RunError
from nybble.files.reading import RESTORE, read_shape
from nybble.files.writing import write_json
from nybble.run.records import read_record
from nybble.run.summary import Ended
from nybble.run.template import RecordedTemplate


def save_template(template: Template, file: pathlib.Path) -> None:
    """Save a template with its run."""
    day = None if template.day is None else template.day.isoformat()
    facts = {
        "name": template.name,
        "verbatim": template.verbatim,
        "day": day,
        "bos": template.document_bos,
        "rules": template.rules.value,
    }
    write_json(file, {**facts, "source": template.source})


def read_template(tokenizer: PreTrainedTokenizerBase, file: pathlib.Path) -> Template:
    """The template of a run; one saved by 0.5.1 that reads the clock gets the day on which the run began."""
    saved = read_shape(file, RecordedTemplate, RunError, RESTORE)
    if saved.bos is not None:
        return Template(
            tokenizer,
            saved.name,
            saved.source,
            verbatim=saved.verbatim,
            day=saved.day,
            bos=saved.bos,
            rules=Rules(saved.rules),
        )
    day = _first_day(file.parent) if reads_clock(saved.source) else None
    return Template(
        tokenizer, saved.name, saved.source, verbatim=saved.verbatim, day=day, bos=True, fingerprint_source=saved.source,
        rules=Rules.V0_5,
    )  # fmt: skip


def _first_day(run: pathlib.Path) -> datetime.date:
    """The day on which a run of 0.5.1 began, from its summary or, if it has none yet, from the time of start.json."""
    if not (run / "summary.json").exists():
        return datetime.date.fromtimestamp((run / "start.json").stat().st_mtime)
    summary = read_record(run / "summary.json", Ended)
    ended = datetime.datetime.fromisoformat(summary.date).astimezone()
    return (ended - datetime.timedelta(seconds=summary.seconds)).date()
