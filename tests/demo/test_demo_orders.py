"""The demo's skill: what training may see, what the test asks, and what counts as a right answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.demo import words
from nybble.demo.orders import (
    SYSTEM,
    Order,
    exact_match,
    plural,
    prompt_for,
    split,
    test_orders,
    train_orders,
)

SEEDS = [0, 1, 2, 17]
ANSWER = '{"customer":"Anna Berg","items":[{"name":"oak chair","quantity":12}],"delivery":"post","day":"fri"}'
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def used(orders: list[Order]) -> dict[str, set[str]]:
    """The names, goods and patterns of `orders`, names and goods word by word."""
    return {
        "first names": {order.customer.split()[0] for order in orders},
        "last names": {order.customer.split()[1] for order in orders},
        "modifiers": {good.split()[0] for order in orders for good in order.goods},
        "nouns": {good.split()[1] for order in orders for good in order.goods},
        "patterns": {pattern for order in orders for pattern in order.patterns},
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_test_orders_use_nothing_that_training_saw(seed: int) -> None:
    train, test = used(train_orders(1500, seed)), used(test_orders(500, seed))
    shared = {kind: train[kind] & test[kind] for kind in train}
    assert shared == {kind: set() for kind in train}
    assert min(len(train["patterns"]), len(test["patterns"])) > 30


@pytest.mark.parametrize("seed", SEEDS)
def test_patterns_differ_in_more_than_case_and_full_stops(seed: int) -> None:
    train, test = used(train_orders(1500, seed))["patterns"], used(test_orders(500, seed))["patterns"]
    bare = [{pattern.casefold().strip(" .!,") for pattern in part} - {"{}, {}"} for part in (train, test)]
    assert not bare[0] & bare[1]


def test_the_seed_decides_everything() -> None:
    assert train_orders(50, 3) == train_orders(50, 3)
    assert test_orders(50, 3) == test_orders(50, 3)
    assert train_orders(50, 3) != train_orders(50, 4)
    assert split(3)[1].nouns != split(4)[1].nouns
    assert train_orders(50, 3) == train_orders(80, 3)[:50]


@pytest.mark.parametrize("make", [train_orders, test_orders])
def test_texts_are_distinct(make) -> None:  # type: ignore[no-untyped-def]
    assert len({order.text for order in make(2000, 0)}) == 2000


@pytest.mark.parametrize("make", [train_orders, test_orders])
@given(seed=st.integers(0, 2**32))
def test_answers_follow_the_schema_and_can_be_read_off_the_text(make, seed: int) -> None:  # type: ignore[no-untyped-def]
    for order in make(5, seed):
        answer = json.loads(order.answer)
        assert order.answer == json.dumps(answer, separators=(",", ":"))
        assert list(answer) == ["customer", "items", "delivery", "day"]
        assert answer["customer"] == order.customer
        assert order.customer in order.text
        assert tuple(item["name"] for item in answer["items"]) == order.goods
        assert answer["delivery"] in SYSTEM
        for item in answer["items"]:
            shown = item["name"] if item["quantity"] == 1 else plural(item["name"])
            assert shown in order.text.lower()
            written = [word for word, number in words.QUANTITIES.items() if number == item["quantity"]]
            assert any(w in order.text.lower() for w in [*written, str(item["quantity"])])
        assert [short for day, short in words.DAYS.items() if day in order.text] == [answer["day"]]
        assert "{" not in order.text


def test_every_value_occurs_in_training_and_test() -> None:
    for orders in (train_orders(200, 0), test_orders(100, 0)):
        answers = [json.loads(order.answer) for order in orders]
        assert {answer["delivery"] for answer in answers} == set(words.DELIVERIES)
        assert {answer["day"] for answer in answers} == set(words.DAYS.values())
        assert {len(answer["items"]) for answer in answers} == {1, 2, 3}


def test_every_layout_tells_each_thing_once() -> None:
    for layout in words.LAYOUTS:
        assert sum(layout.count(part) for part in "GBS") == 1
        assert sum(layout.count(part) for part in "RB") == 1
        assert layout.count("D") == layout.count("W") == 1


def test_word_lists_name_nothing_twice() -> None:
    assert not set(words.FIRST_NAMES) & set(words.LAST_NAMES)
    assert not set(words.MODIFIERS) & set(words.NOUNS)
    sentences = [s for kind in words.DELIVERIES.values() for s in kind]
    lists = [value for name, value in vars(words).items() if name.isupper() and isinstance(value, list)]
    for pool in [sentences, *lists]:
        assert len(set(pool)) == len(pool)


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("oak chair", "oak chairs"),
        ("box", "boxes"),
        ("red brush", "red brushes"),
        ("large battery", "large batteries"),
        ("old key", "old keys"),
        ("thin knife", "thin knives"),
    ],
)
def test_plural(name: str, many: str) -> None:
    assert plural(name) == many


def test_a_model_is_given_the_schema_the_examples_and_the_order() -> None:
    example, order = train_orders(2, 0)
    system, question, answer, last = prompt_for(order.text, [example])
    assert [message.role for message in (system, question, answer, last)] == ["system", "user", "assistant", "user"]
    assert all(f'"{key}"' in system.content for key in json.loads(order.answer))
    assert (question.content, answer.content, last.content) == (example.text, example.answer, order.text)
    assert prompt_for(order.text) == (system, last)


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        f"\n {ANSWER} \n",
        json.dumps(json.loads(ANSWER), indent=2),
        json.dumps(dict(reversed(json.loads(ANSWER).items()))),
    ],
)
def test_exact_match_compares_values(answer: str) -> None:
    assert exact_match(answer, ANSWER)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        f"Sure: {ANSWER}",
        f"```json\n{ANSWER}\n```",
        f"{ANSWER} Done.",
        ANSWER + ANSWER,
        ANSWER[:-1],
        ANSWER.replace("12", '"12"'),
        ANSWER.replace("12", "12.0"),
        ANSWER.replace("12", "NaN"),
        ANSWER.replace("12", "true"),
        ANSWER.replace("oak", "Oak"),
        ANSWER.replace('"day"', '"day":"fri","day"'),
        ANSWER.replace('"fri"', '"fri","note":null'),
        ANSWER.replace('"', "'"),
        "[" * 100_000,
    ],
)
def test_exact_match_refuses_everything_else(answer: str) -> None:
    assert not exact_match(answer, ANSWER)


@pytest.mark.parametrize(("answer", "expected"), [("1", "true"), ("0", "false"), ("2.0", "2"), ("[true]", "[1]")])
def test_exact_match_tells_what_python_calls_equal(answer: str, expected: str) -> None:
    assert not exact_match(answer, expected)


@given(JSON)
def test_exact_match_accepts_any_value_against_itself(value: object) -> None:
    assert exact_match(json.dumps(value, indent=1), json.dumps(value))


@given(st.text())
def test_exact_match_never_raises_on_what_a_model_writes(answer: str) -> None:
    assert not exact_match(answer, ANSWER)
