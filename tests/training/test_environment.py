"""Environment variables that a run sets are gone when it ends, however it ends."""

from __future__ import annotations

import os

import pytest

from nybble.distributed.environment import environment_restored
from nybble.recipe import TrackerOptions
from nybble.training import trackers
from nybble.training.trackers import tracking


def change(*, fails: bool) -> None:
    """Set, change and remove variables."""
    os.environ.update(KEPT="new", ADDED="new")
    del os.environ["REMOVED"]
    if fails:
        raise ValueError


def test_variables_that_were_set_removed_or_changed_are_restored(monkeypatch):
    monkeypatch.setenv("KEPT", "old")
    monkeypatch.setenv("REMOVED", "old")
    before = dict(os.environ)
    with environment_restored():
        change(fails=False)
    assert dict(os.environ) == before
    with pytest.raises(ValueError), environment_restored():
        change(fails=True)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("tracker", "variable", "value"),
    [
        ("tensorboard", "TENSORBOARD_LOGGING_DIR", "{run}/tensorboard"),
        ("mlflow", "MLFLOW_TRACKING_URI", "sqlite:///{run}/mlflow.db"),
        ("trackio", "TRACKIO_DIR", "{run}/trackio"),
    ],
)
def test_each_tracker_writes_into_the_run(tracker, variable, value, tmp_path, monkeypatch):
    """Also those that are not installed here: what they read is an environment variable."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    before = dict(os.environ)
    with environment_restored(), tracking(TrackerOptions(to=tracker), tmp_path, {}) as notice:
        assert notice is None
        assert os.environ[variable] == value.format(run=tmp_path)
    assert dict(os.environ) == before
