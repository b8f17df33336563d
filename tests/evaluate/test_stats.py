"""Verdicts on synthetic scores whose truth is known."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.evaluate.statistics import compare, holm, verdict

TRIALS, DRAWS = 1_000, 1_000
SIZES = numpy.random.default_rng(0).integers(5, 40, size=57)
SIZES[:3] = 150  # as MMLU's: three subjects hold a third of the items
SUBJECTS = numpy.repeat(numpy.arange(57), SIZES)


def bits(rng, items, shift=0.0, differing=0.3):
    """0/1 scores: base and tuned agree on all but `differing` of the items; tuned gains `shift` in the mean."""
    base = rng.random(items) < 0.6
    differs, gained = rng.random(items) < differing, rng.random(items) < (1 + shift / differing) / 2
    base = numpy.where(differs, ~gained, base)
    return base.astype(float), numpy.where(differs, gained, base).astype(float)


def skewed(rng, items, shift=0.0):
    """Scores such as a loss: a long tail, and now and then tuned is much worse."""
    base = rng.gamma(2.0, 1.0, items)
    return base, base + shift + 1 - rng.exponential(1.0, items)


def subjects(rng, shift=0.0):
    """0/1 scores of 57 subjects; the subjects differ in difficulty and in what tuning changes in them."""
    hard, effect = rng.normal(0, 0.1, 57)[SUBJECTS], rng.normal(0, 0.05, 57)[SUBJECTS] + shift
    base, turn = rng.random(len(SUBJECTS)) < 0.5 + hard, rng.random(len(SUBJECTS))
    tuned = numpy.where(base, turn >= 0.15 - effect, turn < 0.15 + effect)
    return base.astype(float), tuned.astype(float)


def judged(draw, trials=TRIALS, **options):
    """Shares of the trials without a true difference in which better and worse are claimed, and zero lies in the interval."""
    rng, claims, covered = numpy.random.default_rng(1), [], 0
    for trial in range(trials):
        found = compare(*draw(rng), draws=DRAWS, seed=trial, **options)
        claims.append(verdict(found.difference.mean, found.p))
        covers = found.difference.interval[0] <= 0 <= found.difference.interval[1]
        assert covers == (claims[-1] == "no difference shown"), "interval and p say the same"
        covered += covers
    better, worse, covered = claims.count("better") / trials, claims.count("worse") / trials, covered / trials
    print(f"false better {better:.3f}, false worse {worse:.3f}, interval covers the truth {covered:.3f}")
    return better, worse, covered


# Measured: false better, false worse, covered. With few items the bounds (Student's t, signs) make claims rarer still.
CASES = {
    "bits, 50 items": (lambda rng: bits(rng, 50), {}),  # 0.025, 0.012, 0.963
    "bits, 200 items": (lambda rng: bits(rng, 200), {}),  # 0.017, 0.019, 0.964
    "skewed, 20 items": (lambda rng: skewed(rng, 20), {}),  # 0.037, 0.005, 0.958
    "skewed, 50 items": (lambda rng: skewed(rng, 50), {}),  # 0.026, 0.009, 0.965
    "57 subjects, over items": (subjects, {"clusters": SUBJECTS}),  # 0.026, 0.028, 0.946
    "57 subjects, over subjects": (subjects, {"clusters": SUBJECTS, "over": "clusters"}),  # 0.020, 0.022, 0.958
}


def sampled() -> list:
    """The fast suite takes one of bits, one of measures and one of clusters."""
    quick = ("bits, 50 items", "skewed, 20 items", "57 subjects, over subjects")
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", sampled())
def test_without_a_difference_better_is_seldom_claimed_and_intervals_cover(case):
    draw, options = CASES[case]
    better, worse, covered = judged(draw, **options)
    assert better <= 0.05
    assert better + worse <= 0.065, "0.05, and two standard errors of 1,000 trials"
    assert 0.935 <= covered <= 0.985


def test_with_six_items_or_one_large_subject_claims_stay_rare():
    better, worse, _ = judged(lambda rng: bits(rng, 6, differing=0.9))
    assert better + worse <= 0.05
    labels = numpy.repeat(numpy.arange(10), [200, *[20] * 9])  # items within a subject tell the same

    def draw(rng):
        effect, noise = rng.normal(size=10)[labels], rng.normal(size=len(labels))
        return noise, noise + effect + rng.normal(size=len(labels))

    better, worse, _ = judged(draw, clusters=labels, over="clusters")
    assert better + worse <= 0.065
    better, worse, _ = judged(draw, clusters=labels)
    assert better + worse <= 0.08, "half of the items in one subject: 0.061 were measured"
    assert better <= 0.05


def test_treating_subjects_as_independent_items_would_claim_too_much():
    better, worse, _ = judged(subjects, trials=400)
    assert better + worse > 0.1


def test_among_five_tasks_a_false_better_stays_as_rare():
    rng, better, claimed = numpy.random.default_rng(2), 0, 0
    for trial in range(TRIALS):
        found = [compare(*bits(rng, items), draws=DRAWS, seed=trial) for items in (50, 100, 200, 200, 400)]
        adjusted = holm([one.p for one in found])
        verdicts = {verdict(one.difference.mean, p) for one, p in zip(found, adjusted, strict=True)}
        better += "better" in verdicts
        claimed += len(verdicts) > 1
    print(f"any false better {better / TRIALS:.3f}, any false claim {claimed / TRIALS:.3f}")
    assert better / TRIALS <= 0.05
    assert claimed / TRIALS <= 0.065


def test_intervals_cover_a_difference_that_is_there_and_both_means():
    rng, hits = numpy.random.default_rng(3), numpy.zeros(6)
    for trial in range(TRIALS):
        one = compare(*bits(rng, 100, shift=0.1), draws=DRAWS, seed=trial)
        two = compare(*skewed(rng, 50, shift=0.5), draws=DRAWS, seed=trial)
        # Base is right in 0.6 of the 70% that agree and in (1 - 0.1 / 0.3) / 2 of the others: 0.52.
        truths = (0.52, 0.62, 0.1, 2.0, 2.5, 0.5)
        estimates = (one.base, one.tuned, one.difference, two.base, two.tuned, two.difference)
        hits += [e.interval[0] <= truth <= e.interval[1] for e, truth in zip(estimates, truths, strict=True)]
    print("covered:", hits / TRIALS)
    assert ((hits / TRIALS >= 0.93) & (hits / TRIALS <= 0.98)).all()


POWERED = {
    "bits": (lambda rng, shift: bits(rng, 200, shift), {}),
    "skewed": (lambda rng, shift: skewed(rng, 200, shift), {}),
    "57 subjects": (subjects, {"clusters": SUBJECTS}),
}


@pytest.mark.parametrize("case", POWERED)
def test_a_detectable_difference_is_found_four_times_in_five(case):
    draw, options = POWERED[case]
    rng, shift = numpy.random.default_rng(4), 0.0
    for _ in range(3):  # what is detectable depends, a little, on the difference
        found = [compare(*draw(rng, shift), draws=DRAWS, seed=trial, **options) for trial in range(50)]
        shift = float(numpy.mean([one.detectable for one in found]))
    found = [compare(*draw(rng, shift), draws=DRAWS, seed=trial, **options) for trial in range(400)]
    power = numpy.mean([verdict(one.difference.mean, one.p) == "better" for one in found])
    print(f"{shift:.3f} is found in {power:.2f}")
    assert 0.7 <= power <= 0.9


def test_numbers_are_those_of_the_textbook():
    base, tuned = bits(numpy.random.default_rng(5), 400, shift=0.1)
    found = compare(base, tuned)
    assert found.base.mean == pytest.approx(base.mean())
    assert found.base.stderr == pytest.approx(base.std(ddof=1) / 20), "lm-eval's standard error"
    assert found.difference.stderr == pytest.approx((tuned - base).std(ddof=1) / 20)
    assert found.detectable == pytest.approx(2.8 * found.difference.stderr, rel=0.05)
    assert found.difference.interval == pytest.approx(
        [found.difference.mean + side * 1.96 * found.difference.stderr for side in (-1, 1)], abs=0.004
    )
    wilson = compare(numpy.r_[numpy.zeros(1), numpy.ones(9)], numpy.zeros(10))
    assert wilson.base.interval == pytest.approx((0.596, 0.982), abs=1e-3)
    assert wilson.tuned.interval == pytest.approx((0.0, 0.278), abs=1e-3)


def test_both_means_over_subjects():
    base, tuned = numpy.zeros(9), numpy.array([1.0, 1, 1, 1, 1, 1, 0, 0, 0])
    labels = ["a"] * 6 + ["b"] + ["c"] * 2
    assert compare(base, tuned, clusters=labels).difference.mean == pytest.approx(6 / 9)
    assert compare(base, tuned, clusters=labels, over="clusters").difference.mean == pytest.approx(1 / 3)


def test_too_little_to_show_anything():
    one = compare(numpy.array([0.0]), numpy.array([1.0]))
    assert (one.p, one.detectable, one.difference.stderr) == (1.0, math.inf, math.inf)
    assert one.difference.interval == (-math.inf, math.inf)
    assert 0 <= one.base.interval[0] < one.base.interval[1] <= 1
    subject = compare(*bits(numpy.random.default_rng(6), 40, shift=0.2), clusters=["law"] * 40)
    assert (subject.p, subject.detectable, subject.base.interval) == (1.0, math.inf, (0.0, 1.0))
    for count in range(1, 6):
        few = compare(numpy.zeros(count), numpy.full(count, 0.3))
        assert few.p > 0.05, "not even where every item gains"
        assert few.difference.interval[0] <= 0
        assert few.detectable == math.inf
        sure = compare(numpy.zeros(50), numpy.r_[numpy.ones(count), numpy.zeros(50 - count)])
        assert sure.p > 0.05, "five items that differ are no evidence"
    assert compare(numpy.zeros(50), numpy.r_[numpy.ones(9), numpy.zeros(41)]).p < 0.05


def test_models_that_score_the_same():
    same = bits(numpy.random.default_rng(7), 200)[0]
    found = compare(same, same)
    assert (found.p, found.difference.mean) == (1.0, 0.0)
    low, high = found.difference.interval
    assert low < 0 < high, "200 items that do not differ are no proof that none does"
    assert found.detectable == pytest.approx(7.91 / 200)
    real = numpy.random.default_rng(7).normal(size=200)
    assert compare(real, real).p == 1.0
    assert compare(numpy.zeros(200), numpy.zeros(200)).difference.mean == 0
    all_gained = compare(numpy.zeros(200), numpy.ones(200))
    assert all_gained.p < 0.001
    assert all_gained.base.interval[1] < 0.03 < 0.97 < all_gained.tuned.interval[0]


def test_a_seed_gives_the_same_numbers_and_another_seed_nearly():
    scores = skewed(numpy.random.default_rng(8), 80, shift=0.2)
    assert compare(*scores) == compare(*scores)
    other = compare(*scores, seed=1)
    assert other != compare(*scores)
    assert other.p == pytest.approx(compare(*scores).p, abs=0.02)


def test_fifteen_thousand_items_take_seconds_and_little_memory():
    scores = skewed(numpy.random.default_rng(9), 15_000)
    began = time.process_time()
    compare(*scores, draws=2_500)
    took = time.process_time() - began
    tracemalloc.start()
    compare(*scores, draws=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{took:.1f} s, {peak / 1e6:.0f} MB")
    assert took < 3
    assert peak < 50e6


def test_holm_gives_the_known_answers():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(p, "holm")
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p):
    adjusted = holm(p)
    assert all(a <= b <= min(1.0, a * len(p)) for a, b in zip(p, adjusted, strict=True))
    for (a, x), (b, y) in itertools.combinations(zip(p, adjusted, strict=True), 2):
        assert (x <= y) if a <= b else (x >= y)


def test_a_verdict_depends_on_which_direction_is_better():
    assert verdict(0.1, 0.01) == "better"
    assert verdict(-0.1, 0.01) == "worse"
    assert verdict(-0.1, 0.01, higher_is_better=False) == "better"
    assert verdict(0.1, 0.01, higher_is_better=False) == "worse"
    assert verdict(0.1, 0.06) == "no difference shown"
    assert verdict(0.1, 0.01, level=0.001) == "no difference shown"


PAIRS = st.lists(st.tuples(*[st.integers(-4, 4).map(float)] * 2), min_size=1, max_size=40)


def near(one, two):
    return one == pytest.approx(two, abs=1e-9)


@settings(max_examples=60)
@given(PAIRS, st.booleans())
def test_swapped_models_give_the_opposite_difference(pairs, clustered):
    base, tuned = numpy.array(pairs).T
    options = {"clusters": numpy.arange(len(base)) % 7, "draws": 2_000} if clustered else {"draws": 2_000}
    one, two = compare(base, tuned, **options), compare(tuned, base, **options)
    assert near(one.difference.mean, -two.difference.mean)
    assert (one.base.mean, one.tuned.stderr) == (two.tuned.mean, two.base.stderr)
    assert near(one.difference.stderr, two.difference.stderr)
    assert one.p == pytest.approx(two.p, abs=0.2), "kinds of items are drawn in another order"
    low, high = one.difference.interval
    assert low <= one.difference.mean <= high
    assert (low <= 0 <= high) == (one.p > 0.05)


@settings(max_examples=60)
@given(PAIRS, st.integers(5, 9))
def test_a_constant_moves_the_means_and_nothing_else(pairs, constant):
    base, tuned = numpy.array(pairs).T + 10  # no 0/1 scores, which are read as shares
    one, both = compare(base, tuned, draws=200), compare(base + constant, tuned + constant, draws=200)
    assert near(both.base.mean, one.base.mean + constant)
    assert near(both.difference.mean, one.difference.mean)
    assert both.p == pytest.approx(one.p, abs=1e-6)
    assert near(compare(base, tuned + constant, draws=200).difference.mean, one.difference.mean + constant)


@settings(max_examples=60)
@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_items_does_not_matter(pairs, random):
    mixed = random.sample(pairs, len(pairs))
    one, two = compare(*numpy.array(pairs).T, draws=2_000), compare(*numpy.array(mixed).T, draws=2_000)
    assert near(one.difference.mean, two.difference.mean)
    assert one.difference.stderr == two.difference.stderr or near(one.difference.stderr, two.difference.stderr)
    assert one.p == pytest.approx(two.p, abs=0.2), "another order is another seed"


@pytest.mark.parametrize("base, tuned", [([], []), ([1.0], [1.0, 0.0]), ([math.nan], [1.0]), ([[1.0]], [[1.0]])])
def test_scores_that_are_a_defect(base, tuned):
    with pytest.raises(AssertionError):
        compare(numpy.array(base), numpy.array(tuned))
