"""Validation while training: batches within the tokens that training may take, and a loss that does not depend on them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble import train as training
from nybble.data.order import batches
from nybble.recipe import load_recipe
from nybble.run import read_metrics
from nybble.train import train


@given(lengths=st.lists(st.integers(1, 400), max_size=40), tokens=st.integers(1, 1000))
def test_every_row_is_in_one_batch_and_no_two_rows_are_too_many(lengths, tokens):
    found = list(batches(lengths, tokens))
    assert sorted(place for places in found for place in places) == list(range(len(lengths)))
    for places in found:
        assert len(places) == 1 or len(places) * max(lengths[place] for place in places) <= tokens
    longest = [max(lengths[place] for place in places) for places in found]
    assert longest == sorted(longest, reverse=True)
    assert all(sum(map(len, pair)) * first > tokens for *pair, first in zip(found, found[1:], longest, strict=False))


def test_rows_share_a_batch_as_far_as_training_s_tokens_go(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    seen = []

    class Watched(training.QLoraTrainer):
        def get_eval_dataloader(self, *words):
            loader = super().get_eval_dataloader(*words)
            seen.append([len(batch["attention_mask"]) for batch in loader])
            return loader

    monkeypatch.setattr(training, "QLoraTrainer", Watched)
    losses = []
    for micro_batch, length in ((1, 128), (4, 300)):  # rows of 100 to 112 tokens
        words = [f"model.path={tiny_llama}", f"data.path={rows}", "data.validation=20", f"data.max_length={length}"]
        words += [f"train.micro_batch={micro_batch}", "train.max_steps=1", f"out={tmp_path / str(length)}"]
        words += ["engine.fused=false", "train.samples=0"]
        run = train(load_recipe(None, words), console=quiet, cache=cache)
        losses.append(next(line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line))
    alone, together = seen[0], seen[-1]
    assert alone == [1] * 20
    assert together == [10, 10]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
