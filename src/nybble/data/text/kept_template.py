"""The template that a run keeps: written when it begins, and read by everything that takes the run."""

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
    """Keep a template with its run; its Jinja text goes into the tokenizer as well, for other programs."""
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
    """The template of a run; one of 0.5.1 that reads the clock gets the day on which the run began."""
    kept = read_shape(file, RecordedTemplate, RunError, RESTORE)
    if kept.bos is not None:
        return Template(
            tokenizer,
            kept.name,
            kept.source,
            verbatim=kept.verbatim,
            day=kept.day,
            bos=kept.bos,
            rules=Rules(kept.rules),
        )
    began = _day_of(file.parent) if reads_clock(kept.source) else None
    return Template(
        tokenizer, kept.name, kept.source, verbatim=kept.verbatim, day=began, bos=True, known_as=kept.source,
        rules=Rules.V0_5,
    )  # fmt: skip


def _day_of(run: pathlib.Path) -> datetime.date:
    """The day on which a run of 0.5.1 began: its summary tells it, and until there is one, the time of start.json."""
    if not (run / "summary.json").exists():
        return datetime.date.fromtimestamp((run / "start.json").stat().st_mtime)
    summary = read_record(run / "summary.json", Ended)
    ended = datetime.datetime.fromisoformat(summary.date).astimezone()
    return (ended - datetime.timedelta(seconds=summary.seconds)).date()
