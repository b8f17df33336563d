"""Benchmark items in training rows: what is a copy and what is not."""

from __future__ import annotations

import gzip
import json
import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.evaluate.contamination import BATCH, GRAM, SHORTEST, flag, words
from tests.conftest import SHARED

ITEM = "A man is sitting on a roof, ripping level tiles off; he then starts pulling up roofing on the roof."
SHORT = "Which technology was developed most recently? A cellular telephone."  # 9 words


def flagged(row: str, item: str) -> bool:
    return flag([row], {"task": [item]})["task"][0]


def test_an_item_is_found_though_punctuation_case_and_line_breaks_differ():
    altered = ITEM.upper().replace(", ", " -- ").replace(" ", "\n").replace(";", "_")
    assert flagged(f"Read this: {altered} And go on", ITEM)
    assert flag(["nothing", altered], {"a": ["no such item at all", ITEM], "b": [ITEM]}) == {
        "a": [False, True],
        "b": [True],
    }


def test_thirteen_words_are_a_copy_and_twelve_are_not():
    row = words(ITEM)
    for start in range(len(row) - GRAM + 1):
        assert flagged(" ".join(["x", *row[start:][:GRAM], "y"]), ITEM)
        assert not flagged(" ".join(["x", *row[start:][: GRAM - 1], "y"]), ITEM)


def test_words_of_two_rows_make_no_copy():
    row = words(ITEM)
    assert not flag([" ".join(row[:10]), " ".join(row[10:])], {"a": [ITEM]})["a"][0]
    assert not flag([ITEM], {"a": [" ".join(row[:7]), " ".join(row[7:14])]})["a"][0], "nor do two items"


def test_a_short_item_is_flagged_as_a_whole_and_a_shorter_one_never():
    assert len(words(SHORT)) == 9
    assert flagged(f"Question: {SHORT} Right.", SHORT)
    assert not flagged(" ".join(words(SHORT)[:-1]), SHORT)
    assert not flagged(" ".join(words(SHORT)[1:]), SHORT)
    for count in range(1, GRAM + 1):
        item = " ".join(words(ITEM)[:count])
        assert flagged(item, item) == (count >= SHORTEST)


def test_letters_of_any_alphabet_are_words():
    item = "Как называется самая длинная река, которая течёт через всю страну с юга на север? Енисей"
    assert flagged(item.lower().replace(",", ""), item)


def test_nothing_to_compare():
    assert flag([], {}) == {}
    assert flag(["a"], {"a": []}) == {"a": []}
    assert flag([], {"a": [ITEM], "b": ["", ITEM]}) == {"a": [False], "b": [False, False]}
    assert flag(["", "..."], {"a": ["", "?"]}) == {"a": [False, False]}


def test_the_stream_is_read_once_and_in_batches():
    rows = (ITEM if n == 40_000 else f"row {n} of the man on a roof is long" for n in range(80_000))
    assert 2 * BATCH < 80_000 * 10
    assert flag(rows, {"a": [ITEM, SHORT]}) == {"a": [True, False]}
    assert next(rows, None) is None


LETTERS = st.sampled_from("abc")
TEXT = st.lists(LETTERS, max_size=40).map(" ".join)


def by_hand(rows: list[str], item: str) -> bool:
    own = words(item)
    size = min(GRAM, len(own))
    wanted = {tuple(own[n:][:size]) for n in range(len(own) - size + 1)}
    return size >= SHORTEST and any(
        tuple(words(row)[n:][:size]) in wanted for row in rows for n in range(len(words(row)))
    )


@settings(max_examples=200)
@given(st.lists(TEXT, max_size=4), st.lists(TEXT, max_size=4), st.data())
def test_flags_are_those_of_the_definition(rows, items, data):
    rows = rows + [f"c {data.draw(TEXT)} {item} {data.draw(TEXT)}" for item in items if data.draw(st.booleans())]
    assert flag(rows, {"task": items})["task"] == [by_hand(rows, item) for item in items]


def test_six_thousand_rows_against_fifteen_thousand_items_take_seconds():
    rng = numpy.random.default_rng(0)
    common = [f"w{n}" for n in range(20_000)]

    def text(count: int) -> str:
        return " ".join(common[n] for n in (20_000 * rng.random(count) ** 3).astype(int))

    rows, items = [text(150) for _ in range(6_000)], [text(60) for _ in range(15_000)]
    rows[17] += items[5]
    began = time.process_time()
    flags = flag(rows, {"task": items})["task"]
    took = time.process_time() - began
    print(f"{took:.1f} s")
    assert [n for n, one in enumerate(flags) if one] == [5]
    assert took < 5


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_training_rows_hold_few_real_items():
    with gzip.open(SHARED / "bench" / "arc_challenge.validation.jsonl.gz", "rt") as file:
        questions = [json.loads(line)["question"] for line in file]
    with open(SHARED / "train" / "instruct_mix.jsonl") as file:
        rows = [" ".join(map(str, json.loads(line).values())) for line in file]
    assert sum(flag(rows, {"arc": questions})["arc"]) <= 3
    rows[5] += questions[0]
    assert flag(rows, {"arc": questions})["arc"][0]
