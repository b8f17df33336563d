"""Requirements on an evaluation, judged by the bounds of intervals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nybble.errors import RecipeError
from nybble.evaluate.gate import Requirement, judge, key_of, parse_requirements, tell_judgements
from nybble.run.evaluation import (
    ANSWER_METRICS,
    Evaluation,
    GenerationEntry,
    HeldOutEntry,
    LossEntry,
    MetricEntry,
    ScoreEntry,
    TaskEntry,
)


def score(mean, low=None, high=None):
    return ScoreEntry(mean=mean, interval=None if low is None else [low, high])


def evaluated(difference, tuned=None):
    entry = {"base": score(0.5), "tuned": tuned or score(0.6), "difference": difference}
    return Evaluation(
        date="2026-11-28", tasks=[TaskEntry(name="arc_easy", **entry)],
        held_out=HeldOutEntry(base=LossEntry(loss=2.0), tuned=LossEntry(loss=1.0), difference=difference),
        generation=GenerationEntry(metrics=[MetricEntry(name="exact match", **entry)]),
    )  # fmt: skip


def outcome(text, difference, tuned=None):
    (requirement,) = parse_requirements([text], ["arc_easy"], 10)
    return judge(requirement, evaluated(difference, tuned)).outcome


@pytest.mark.parametrize(
    ("text", "interval", "expected"),
    [
        ("held_out_loss<=base", (-0.3, -0.1), "met"),
        ("held_out_loss<=base", (-0.3, 0.0), "met"),
        ("held_out_loss<=base", (-0.3, 0.1), "not shown"),
        ("held_out_loss<=base", (0.1, 0.3), "missed"),
        ("held_out_loss <= base + 0.2", (-0.3, 0.1), "met"),
        ("arc_easy>=base-0.02", (-0.02, 0.1), "met"),
        ("arc_easy>=base-0.02", (-0.05, 0.1), "not shown"),
        ("arc_easy>=base-0.02", (-0.05, -0.03), "missed"),
        ("arc_easy>=base+0.05", (0.0, 0.1), "not shown"),
        ("exact_match>=base", (0.2, 0.4), "met"),
        ("Exact-Match>=base", (-0.4, -0.2), "missed"),
    ],
)
def test_the_bound_of_the_difference_decides(text, interval, expected):
    assert outcome(text, score(sum(interval) / 2, *interval)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exact_match>=0.9", "met"),
        ("arc_easy>=0.93", "not shown"),
        ("arc_easy>=0.96", "missed"),
        ("arc_easy<=1", "met"),
    ],
)
def test_a_number_is_held_against_the_tuned_model(text, expected):
    assert outcome(text, score(-0.4, -0.5, -0.3), score(0.93, 0.91, 0.95)) == expected


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(sorted), st.floats(-1, 1), st.booleans())
def test_outcomes_are_ordered_as_limits_are(numbers, limit, at_most):
    low, mean, high = numbers

    def at(limit):
        requirement = Requirement("", "arc_easy", at_most, True, limit)
        return ["missed", "not shown", "met"].index(judge(requirement, evaluated(score(mean, low, high))).outcome)

    looser = at(limit + 0.1 if at_most else limit - 0.1)
    assert looser >= at(limit)
    assert at(high if at_most else low) == 2
    assert at(low - 0.01 if at_most else high + 0.01) == 0


def test_what_was_not_measured_or_has_no_interval_is_not_shown():
    (requirement,) = parse_requirements(["arc_easy>=base"], ["arc_easy"], 0)
    empty = judge(requirement, Evaluation(date="2026-11-28", tasks=[]))
    assert (empty.outcome, empty.why) == ("not shown", "it was not measured")
    single = judge(requirement, evaluated(score(0.1)))
    assert (single.outcome, single.why[:30]) == ("not shown", "difference without an interval")


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        (
            "arc_easy",
            "a requirement is MEASURE, <= or >=, and base, base-NUMBER or NUMBER",
            "--require 'held_out_loss<=base'",
        ),
        ("arc_easy>base", "a requirement is MEASURE", "--require"),
        ("arc_easy=>0.5", "a requirement is MEASURE", "--require"),
        (
            "hellaswag>=base",
            "nothing named hellaswag will be measured",
            "one of held_out_loss, arc_easy, exact_match, rouge_1",
        ),
        ("arc_easy>=base-0.0.2", "the number cannot be read", "0.02"),
        ("held_out_loss<=1.5", "the held-out loss is compared with the base's only", "'held_out_loss<=base'"),
    ],
)
def test_a_requirement_that_cannot_be_read_is_one_message(text, message, fix):
    with pytest.raises(RecipeError) as caught:
        parse_requirements([text], ["arc_easy"], 10)
    print(caught.value)
    assert message in caught.value.what
    assert caught.value.where == f"--require {text!r}"
    assert fix in caught.value.fix


def test_answers_that_are_not_asked_for_cannot_be_required():
    with pytest.raises(RecipeError, match="nothing named exact_match will be measured"):
        parse_requirements(["exact_match>=base"], [], 0)


def test_the_worst_outcome_is_the_exit_status():
    found = evaluated(score(0.1, -0.1, 0.3))
    texts = {"arc_easy>=base-0.2": "met", "arc_easy>=base": "not shown", "arc_easy>=base+0.4": "missed"}
    judgements = [judge(each, found) for each in parse_requirements(list(texts), ["arc_easy"], 10)]
    assert [each.outcome for each in judgements] == list(texts.values())
    console = Console(width=100, record=True)
    assert [tell_judgements(part, console) for part in (judgements[:1], judgements[:2], judgements)] == [0, 3, 1]
    assert tell_judgements([], console) == 0
    said = console.export_text()
    print(said)
    assert "require   arc_easy>=base-0.2  met: difference +0.100 (-0.100, +0.300)" in said
    assert said.count("more items may show it") == 1


def test_names_are_keys():
    assert [key_of(name) for name in ANSWER_METRICS] == [
        "exact_match",
        "rouge_1",
        "rouge_2",
        "rouge_l",
        "ends_by_itself",
    ]


def test_the_command_ends_with_the_status(here, tuned_run, cache):
    command = ["--cache", cache, "eval", tuned_run.folder, "--tasks", "none", "--answers", 4, "--require"]
    met = here(*command, "held_out_loss<=base")
    print(met.stdout, met.stderr)
    assert met.returncode == 0
    assert "require   held_out_loss<=base  met: difference -" in met.stdout
    missed = here(*command, "held_out_loss>=base", "--require", "exact_match>=base+0.1")
    assert missed.returncode == 1
    assert "held_out_loss>=base  missed" in missed.stdout
    refused = here(*command, "arc_easy>=base")
    assert refused.returncode == 2
    assert "nothing named arc_easy will be measured" in refused.stderr
