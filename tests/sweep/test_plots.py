"""The pictures of a sweep."""

from __future__ import annotations

import pytest

from nybble.evaluate.report.plots import NARROW, WIDE
from nybble.sweep.plots import history_plot, parallel_plot
from nybble.sweep.space import Range
from nybble.sweep.study import TrialResult

SPACE = {"train.learning_rate": Range(1e-4, 0.1, is_log=True, is_integer=False)}


def results(*losses):
    return [
        TrialResult(number, {"train.learning_rate": "0.001"}, "complete", loss, "", 1.0, [loss])
        for number, loss in enumerate(losses)
    ]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_trials_that_diverged_do_not_press_the_others_together(width):
    diverged = results(2.7, 21.0, 2.6, 2.65, 1e9)
    axes = history_plot(diverged)(width).axes[0]
    assert axes.get_ylim()[1] < 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["complete", "higher", "best so far"]
    texts = [text.get_text() for text in parallel_plot(diverged, SPACE)(width).axes[0].texts]
    assert "2.9000 or more" in texts
    axes = history_plot(results(2.7, 2.6, 2.65))(width).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["complete", "best so far"]
