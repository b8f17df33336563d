"""Logits to tokens, against what the options mean."""

from __future__ import annotations

import collections

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nybble.generate.batching import ActiveRequest
from nybble.generate.penalties import LogitChanges
from nybble.generate.request import Request
from nybble.generate.sampling import BatchSampler, RowSampler


def row(seed=0, **sampling):
    return ActiveRequest(Request([1], 8, None, frozenset(), **sampling), None, seed)


def drawn(logits, rows):
    return BatchSampler(rows, logits.device)(None, logits).argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 5}, {"temperature": 1.4, "top_p": 0.7},
     {"temperature": 1.1, "top_k": 8, "top_p": 0.8}, {"temperature": 1.3, "min_p": 0.1},
     {"temperature": 1.3, "min_p": 0.02, "top_k": 6}],
)  # fmt: skip
def test_draws_follow_the_distribution_that_transformers_filters_make(sampling):
    torch.manual_seed(1)
    logits = torch.randn(1, 20) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling["temperature"])])
    warpers += [TopKLogitsWarper(sampling["top_k"])] if "top_k" in sampling else []
    warpers += [TopPLogitsWarper(sampling["top_p"])] if "top_p" in sampling else []
    warpers += [MinPLogitsWarper(sampling["min_p"])] if "min_p" in sampling else []
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


def of(prompt, answer, **sampling):
    return ActiveRequest(Request(prompt, 8, None, frozenset(), **sampling), None, 0, answer)


def changed_logits(rows, logits):
    return LogitChanges(rows, logits.shape[1], logits.device).apply(logits)


def test_the_repetition_penalty_is_that_of_transformers():
    torch.manual_seed(3)
    logits = torch.randn(2, 30)
    rows = [of([1, 2, 2, 7], [9, 1], repetition_penalty=1.7), of([4, 5], [], repetition_penalty=0.5)]
    for n, row in enumerate(rows):
        theirs = RepetitionPenaltyLogitsProcessor(row.request.repetition_penalty)
        expected = theirs(torch.tensor([row.sequence]), logits[n : n + 1].clone())[0]
        assert torch.allclose(changed_logits(rows, logits)[n], expected)


def test_presence_and_frequency_count_the_answer_and_not_the_prompt():
    logits = torch.zeros(3, 10)
    rows = [
        of([5, 5], [3, 3, 4], presence_penalty=0.5, frequency_penalty=0.25),
        of([3], [1]),
        of([3], [], logit_bias=((7, 2.0), (3, -1.0))),
    ]
    changed = changed_logits(rows, logits)
    assert changed[0].tolist() == [0, 0, 0, -1.0, -0.75, 0, 0, 0, 0, 0]
    assert not changed[1].any()
    assert changed[2].tolist() == [0, 0, 0, -1, 0, 0, 0, 2, 0, 0]
    assert not logits.any(), "the given logits are left as they are"


def test_penalties_follow_the_tokens_without_being_told_them_again():
    """Between two changes of the rows nothing is read from the host."""
    logits = torch.arange(6.0).repeat(2, 1)
    rows = [of([0], [], frequency_penalty=1.5), of([0], [])]
    sampler = RowSampler(logits.device)
    chosen = [sampler.sample(rows, [1, 1], logits).ids.tolist() for _ in range(4)]
    assert chosen == [[5, 5], [4, 5], [5, 5], [3, 5]]  # 5, then 3.5 and 4, then 3.5 and 2.5, then 2, 2.5 and 3


def test_log_probabilities_are_of_the_models_own_logits():
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    (token,) = RowSampler(logits.device).sample([of([0], [2], logit_bias=((0, 9.0),), logprobs=1)], [1], logits).read()
    assert token.id == 0
    assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 0]))
    assert token.top[0][0] == 2


def test_logits_that_are_not_finite_give_no_token():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    tokens = RowSampler(logits.device).sample([of([0], []) for _ in range(3)], [1] * 3, logits).read()
    assert [token and token.id for token in tokens] == [1, None, None]
