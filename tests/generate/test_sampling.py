"""Logits to tokens, against what the options mean."""

from __future__ import annotations

import collections

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nybble.generate.batching import ActiveRequest
from nybble.generate.request import Request
from nybble.generate.sampling import BatchSampler


def row(seed=0, **sampling):
    return ActiveRequest(Request([1], 8, None, frozenset(), **sampling), None, seed)


def drawn(logits, rows):
    return BatchSampler(rows, logits.device)(None, logits).argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 5}, {"temperature": 1.4, "top_p": 0.7},
     {"temperature": 1.1, "top_k": 8, "top_p": 0.8}],
)  # fmt: skip
def test_draws_follow_the_distribution_that_transformers_filters_make(sampling):
    torch.manual_seed(1)
    logits = torch.randn(1, 20) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling["temperature"])])
    warpers += [TopKLogitsWarper(sampling["top_k"])] if "top_k" in sampling else []
    warpers += [TopPLogitsWarper(sampling["top_p"])] if "top_p" in sampling else []
    expected = warpers(None, logits.clone()).softmax(-1)[0]
    count = 20_000
    found = collections.Counter(drawn(logits.expand(count, -1), [row(seed, **sampling) for seed in range(count)]))
    for token, share in enumerate(expected.tolist()):
        assert found[token] / count == pytest.approx(share, abs=0.012), token
        assert share > 0 or found[token] == 0


def test_rows_of_a_batch_are_drawn_as_alone_each_by_its_own_rules():
    torch.manual_seed(2)
    logits = torch.randn(5, 50) * 3
    rows = [
        row(0, temperature=1.0),
        row(1, temperature=2.0, top_k=3),
        row(2, temperature=0.5, top_p=0.5),
        row(3, temperature=1e-3),
        row(4),
    ]
    together = drawn(logits, rows)
    assert together == [drawn(logits[n : n + 1], [rows[n]])[0] for n in range(5)]
    assert together[3] == int(logits[3].argmax())
    assert together[4] == int(logits[4].argmax())
    assert together[1] in logits[1].topk(3).indices.tolist()


def test_each_position_has_its_own_number_and_always_the_same():
    logits = torch.zeros(1, 1000)

    def several(own, count=20):
        draw, before = BatchSampler([own], logits.device), len(own.answer_ids)
        for _ in range(count):
            own.answer_ids.append(int(draw(None, logits).argmax()))
        return own.answer_ids[before:]

    first = several(row(9, temperature=1.0))
    assert len(set(first)) > 15
    assert several(row(9, temperature=1.0)) == first
    later = row(9, temperature=1.0)
    later.answer_ids = first[:8]
    assert several(later, 12) == first[8:]
