"""examples/preference.py: its pairs are what it says, and all of it runs on the embedded model, with few steps."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys

import pytest

from nybble.demo.orders import exact_match, test_orders, train_orders
from tests.conftest import ROOT

LINE = re.compile(
    r"(sft|dpo)  prefers the shorter of two right answers in \d+% of 4 pairs .*?"
    r"\d of 4 answers exactly right, with \d+\.\d spaces on average",
    re.DOTALL,
)


@pytest.fixture
def example():
    """The example as a module of its own."""
    spec = importlib.util.spec_from_file_location("preference_example", ROOT / "examples" / "preference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_answers_of_a_pair_are_right_and_the_shorter_one_is_chosen(example):
    for order in [*train_orders(20, 1), *test_orders(20, 1)]:
        row = example.pair(order, random.Random(order.text))
        chosen, rejected = (row[name][0]["content"] for name in ("chosen", "rejected"))
        assert len(chosen) < len(rejected)
        assert json.loads(chosen) == json.loads(rejected)
        assert exact_match(chosen, order.answer)
        assert exact_match(rejected, order.answer)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_all_of_it_runs(example, tmp_path, monkeypatch, capsys):
    for name, few in {"SFT_STEPS": 2, "DPO_STEPS": 2, "TESTS": 4, "HELD_OUT": 2}.items():
        monkeypatch.setattr(example, name, few)
    monkeypatch.setattr(sys, "argv", ["preference.py", "--folder", str(tmp_path / "run")])
    example.main()
    said = capsys.readouterr().out
    print(said)
    assert [match.group(1) for match in LINE.finditer(said)] == ["sft", "dpo"]
