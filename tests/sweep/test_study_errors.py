"""A study whose file cannot be written in the middle of a sweep: one message, and the same command continues."""

from __future__ import annotations

import sqlite3

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from nybble.errors import NybbleError
from nybble.sweep.sweep import sweep
from tests.sweep.test_sweep import request, results


@pytest.mark.parametrize(
    "error, message",
    [
        ("database or disk is full", "the disk is full"),
        ("database is locked", "the study cannot be read or written: .*database is locked"),
    ],
)
def test_a_study_that_cannot_be_written_is_one_message(error, message, tiny_llama, rows, cache, tmp_path, quiet):
    """The file's own errors, as sqlite raises them, in the middle of a sweep."""

    def refused(connection, cursor, statement, *_):
        if statement.startswith("INSERT INTO trial_values"):  # a result is written
            raise sqlite3.OperationalError(error)

    asked = request(tiny_llama, rows, tmp_path / "s", "lora.r=4,8", trials=2)
    event.listen(Engine, "before_cursor_execute", refused)
    try:
        with pytest.raises(NybbleError, match=message) as refusal:
            sweep(asked, quiet, cache)
    finally:
        event.remove(Engine, "before_cursor_execute", refused)
    print(refusal.value)
    sweep(asked, quiet, cache)
    assert [each.outcome for each in results(asked)] == ["killed", "complete", "complete"]
