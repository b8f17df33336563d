"""Masks of rows that follow a grammar, and what becomes of a constraint's state."""

from __future__ import annotations

import numpy
import pytest
import torch
from transformers import LlamaForCausalLM

from nybble.generate.constraint import ConstrainedRows, GrammarError, mask_words
from nybble.generate.decoder.choice import make_decoder
from nybble.generate.padded import Padded
from nybble.generate.request import GenerationError, Request, UnsupportedError, complete

STOP = 2


class Ascending:
    """Allows the 24 tokens above the last one, and the end from 90 on."""

    def __init__(self, request):
        self.last, self.error = int(request.grammar), ""

    def fill(self, mask):
        bits = numpy.zeros(len(mask) * 32, dtype=bool)
        bits[self.last + 1 : self.last + 25] = True
        bits[STOP] = self.last >= 90
        mask[:] = numpy.packbits(bits, bitorder="little").view(numpy.uint32)

    def take(self, token_id):
        assert token_id > self.last, "not what the mask allows"
        self.last = token_id
        if token_id > 390:
            self.error = "beyond what it can follow"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("vocabulary", [31, 32, 400, 1001])
def test_a_mask_rules_out_its_own_tokens_in_its_own_row(device, vocabulary):
    asked = Request([1], 5, None, frozenset({STOP}), grammar="7")
    logits = torch.randn(3, vocabulary, device=device)
    given = logits.clone()
    changed = ConstrainedRows([None, Ascending(asked), None]).apply(logits)
    assert torch.equal(logits, given)
    assert torch.equal(changed[[0, 2]], given[[0, 2]])
    assert torch.equal(changed[1, 8:32], given[1, 8:32])
    assert changed[1, :8].isneginf().all()
    assert changed[1, 32:].isneginf().all()
    assert mask_words(vocabulary) * 32 >= vocabulary


@pytest.fixture(scope="module")
def model(peaky_llama):
    return LlamaForCausalLM.from_pretrained(peaky_llama, dtype=torch.float32).eval()


def make(kind, model, asynchronous=False):
    if kind == "padded":
        return Padded(model, 0, constrain=Ascending, rows=3, patience=2)  # batches give way: the state stays
    decoder = make_decoder(model, tokens=2000, constrain=Ascending)
    decoder.steps.asynchronous = asynchronous
    return decoder


@pytest.mark.parametrize(("kind", "asynchronous"), [("padded", False), ("decoder", False), ("decoder", True)])
def test_rows_with_and_without_a_grammar_are_answered_together(model, kind, asynchronous):
    prompts = [[1, 40, 50, 60], [1, 40, 50], [5, 6], [1, 41, 42]]
    requests = [
        Request(prompt, 12, None, frozenset({STOP}), temperature=0.9 * (n % 2), seed=n, grammar=grammar)
        for n, (prompt, grammar) in enumerate([(prompt, grammar) for prompt in prompts for grammar in ("10", None)])
    ]
    alone = [complete(make(kind, model, asynchronous), [request])[0].ids for request in requests]
    together = [answer.ids for answer in complete(make(kind, model, asynchronous), requests)]
    assert together == alone
    for ids in together[::2]:
        own = [token for token in ids if token != STOP]
        assert own == sorted(set(own))
        assert 10 < own[0] <= 34
        assert STOP not in ids or own[-1] >= 90


@pytest.mark.parametrize("kind", ["padded", "decoder"])
def test_a_state_that_cannot_go_on_fails_its_row(model, kind):
    with pytest.raises(GrammarError, match="beyond what it can follow"):
        complete(make(kind, model), [Request([1, 40], 50, None, frozenset(), grammar="389")])


def test_without_constraints_a_grammar_is_refused(model):
    for generator in (Padded(model, 0), make_decoder(model, tokens=500)):
        with pytest.raises(UnsupportedError) as refused:
            complete(generator, [Request([1, 40], 5, None, frozenset(), grammar="1")])
        assert refused.value.option == "grammar"
        assert isinstance(refused.value, GenerationError)
