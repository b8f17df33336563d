"""The demo's skill, turning a customer's free-text order into strict JSON: its generator and its score.

A test order shares no sentence, no order of sentences, no name and no goods with training (see `Stock`), so a
right answer is not a memorised one. Only the words for quantities and days are shared:
they are what is to be learned.

There is no yes-or-no field, on purpose. After 240 training orders, `urgent` was still a guess (37 of 100 wrong),
while every field that the text states in words was right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from nybble.data.rows.formats import Conversation, Message
from nybble.demo import words

T = TypeVar("T")

# Short, since every training example repeats it. It replaces the system message of the model's chat template.
SYSTEM = (
    'Write the order as JSON only: {"customer":str,"items":[{"name":lowercase singular,"quantity":int}],'
    '"delivery":"pickup|courier|post","day":"mon..sun"}'
)

# One in this many entries of each list is reserved for the test.
_TEST_SHARE = 4


def prompt_for(order_text: str, examples: Sequence[Order] = ()) -> Conversation:
    """The messages that ask for an order's JSON: the schema, examples with their answers, and the order."""
    turns = [(Message("user", example.text), Message("assistant", example.answer)) for example in examples]
    return (Message("system", SYSTEM), *(message for turn in turns for message in turn), Message("user", order_text))


@dataclass(frozen=True)
class Order:
    """One example: what a customer wrote, and the correct JSON."""

    text: str
    answer: str
    """Compact JSON, keys in the order of the schema."""
    customer: str
    goods: tuple[str, ...]
    """Names of the items, as in the answer: lower case, singular."""
    patterns: tuple[str, ...]
    """Layout, sentences and list style before their slots are filled."""


@dataclass(frozen=True)
class Stock:
    """The words and sentences that one split (training or test) may use. The two splits of a seed share none."""

    first_names: Sequence[str]
    last_names: Sequence[str]
    modifiers: Sequence[str]
    nouns: Sequence[str]
    greetings: Sequence[str]
    requests: Sequence[str]
    requests_with_customer: Sequence[str]
    sign_offs: Sequence[str]
    deliveries: dict[str, Sequence[str]]
    days_wanted: Sequence[str]
    lists: Sequence[tuple[str, str]]
    layouts: Sequence[str]


def train_orders(count: int, seed: int) -> list[Order]:
    """`count` distinct orders for training; the same seed gives the same orders."""
    return _orders(count, split(seed)[0], Random(f"train {seed}"))


def test_orders(count: int, seed: int) -> list[Order]:
    """`count` distinct orders made only of what `train_orders` never uses with this seed."""
    return _orders(count, split(seed)[1], Random(f"test {seed}"))


# The name follows train_orders; without this line pytest would collect it wherever it is imported.
test_orders.__test__ = False  # type: ignore[attr-defined]


def exact_match(answer: str, expected: str) -> bool:
    """Whether `answer` is one JSON value, with nothing around it but whitespace, equal to `expected`.

    The order of keys does not count. True and 1, or 2 and 2.0, which Python calls equal, are different here.
    """
    try:
        value = json.loads(answer, object_pairs_hook=_object, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return _canonical(value) == _canonical(json.loads(expected))


def split(seed: int) -> tuple[Stock, Stock]:
    """The training and the test stock of `seed`: every list is shuffled and cut once."""
    random = Random(f"split {seed}")
    parts = {
        "first_names": _cut(words.FIRST_NAMES, random),
        "last_names": _cut(words.LAST_NAMES, random),
        "modifiers": _cut(words.MODIFIERS, random),
        "nouns": _cut(words.NOUNS, random),
        "greetings": _cut(words.GREETINGS, random),
        "requests": _cut(words.REQUESTS, random),
        "requests_with_customer": _cut(words.REQUESTS_WITH_CUSTOMER, random),
        "sign_offs": _cut(words.SIGN_OFFS, random),
        "days_wanted": _cut(words.DAYS_WANTED, random),
        "layouts": _cut(words.LAYOUTS, random),
    }
    deliveries = {kind: _cut(sentences, random) for kind, sentences in words.DELIVERIES.items()}
    lists = _cut(words.LISTS, random)
    train, test = (
        Stock(
            **{name: part[side] for name, part in parts.items()},
            deliveries={kind: part[side] for kind, part in deliveries.items()},
            lists=lists[side],
        )
        for side in (0, 1)
    )
    return train, test


def _cut(pool: Sequence[T], random: Random) -> tuple[list[T], list[T]]:
    shuffled = random.sample(pool, len(pool))
    test_size = len(pool) // _TEST_SHARE
    return shuffled[test_size:], shuffled[:test_size]


def _orders(count: int, stock: Stock, random: Random) -> list[Order]:
    orders: dict[str, Order] = {}
    while len(orders) < count:
        order = _order(stock, random)
        orders.setdefault(order.text, order)
    return list(orders.values())


def _order(stock: Stock, random: Random) -> Order:
    customer = f"{random.choice(stock.first_names)} {random.choice(stock.last_names)}"
    goods = _goods(random.choice((1, 1, 1, 2, 2, 3)), stock, random)
    quantities = [_quantity(random) for _ in goods]
    delivery = random.choice(list(stock.deliveries))
    day = random.choice(list(words.DAYS))
    layout = random.choice(stock.layouts)
    sentences = [random.choice(_sentences(part, delivery, stock)) for part in layout]
    separators = random.choice(stock.lists)
    listed = _listed(list(zip(quantities, goods, strict=True)), separators, random)
    answer = {
        "customer": customer,
        "items": [{"name": name, "quantity": n} for name, (_, n) in zip(goods, quantities, strict=True)],
        "delivery": delivery,
        "day": words.DAYS[day],
    }
    return Order(
        text=" ".join(_capitalised(s.format(customer=customer, items=listed, day=day)) for s in sentences),
        answer=json.dumps(answer, separators=(",", ":")),
        customer=customer,
        goods=tuple(goods),
        patterns=(layout, *sentences, *([f"{{}}{'{}'.join(separators)}{{}}"] if len(goods) > 1 else [])),
    )


def _goods(count: int, stock: Stock, random: Random) -> list[str]:
    modifiers = random.sample(stock.modifiers, count)
    return [f"{m} {n}" for m, n in zip(modifiers, random.sample(stock.nouns, count), strict=True)]


def _quantity(random: Random) -> tuple[str, int]:
    """A quantity as written in the order, and its value: half in words, a third in digits, the rest like `3 x`."""
    style = random.randrange(6)
    if style < 3:
        return random.choice(list(words.QUANTITIES.items()))
    number = random.randint(2, 48)
    return (str(number) if style < 5 else f"{number} x"), number


def _sentences(part: str, delivery: str, stock: Stock) -> Sequence[str]:
    """The sentences that a letter of the layout stands for, before their slots are filled."""
    return {
        "G": stock.greetings,
        "R": stock.requests,
        "B": stock.requests_with_customer,
        "D": stock.deliveries[delivery],
        "W": stock.days_wanted,
        "S": stock.sign_offs,
    }[part]


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _listed(items: Sequence[tuple[tuple[str, int], str]], separators: tuple[str, str], random: Random) -> str:
    """`3 red lamps, a dozen blue mugs and one oak desk`: singular or plural, one in four in Title Case."""
    written = []
    for (quantity, number), name in items:
        shown = name if number == 1 else plural(name)
        if random.randrange(4) == 0:
            shown = shown.title()
        written.append(f"{quantity} {shown}")
    between, before_last = separators
    return before_last.join([*([between.join(written[:-1])] if written[1:] else []), written[-1]])


def plural(name: str) -> str:
    """The plural of an item's name, by the rules of English spelling and the few exceptions in the word lists."""
    modifier, _, noun = name.rpartition(" ")
    if noun in words.IRREGULAR_PLURALS:
        noun = words.IRREGULAR_PLURALS[noun]
    elif noun.endswith(("s", "x", "sh", "ch")):
        noun += "es"
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        noun = noun[:-1] + "ies"
    else:
        noun += "s"
    return f"{modifier} {noun}".strip()


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object without duplicate keys, of which Python would silently use the last."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _refuse(constant: str) -> None:
    """Python reads NaN and Infinity; JSON has no such values."""
    raise ValueError(f"{constant} is not JSON")


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)
