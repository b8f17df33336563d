"""Validation while training: batches within the tokens that training may take, and a loss that does not depend on them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from nybble.data.order import batches
from nybble.recipe import load_recipe
from nybble.run.log import read_metrics
from nybble.training import loop
from nybble.training.train import train


def samples_in(batch) -> int:
    """Of a batch that is laid flat, or of one of rows."""
    return len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["input_ids"])


@given(lengths=st.lists(st.integers(1, 400), max_size=40), tokens=st.integers(1, 1000))
def test_every_row_is_in_one_batch_and_no_two_rows_are_too_many(lengths, tokens):
    found = list(batches(lengths, tokens))
    assert sorted(place for places in found for place in places) == list(range(len(lengths)))
    for places in found:
        assert len(places) == 1 or len(places) * max(lengths[place] for place in places) <= tokens
    longest = [max(lengths[place] for place in places) for places in found]
    assert longest == sorted(longest, reverse=True)
    assert all(sum(map(len, pair)) * first > tokens for *pair, first in zip(found, found[1:], longest, strict=False))


@pytest.mark.parametrize("world", [1, 3, 30])
@pytest.mark.parametrize("micro_batch, room", [(1, 100), (4, 100), (2, 4096)])
def test_each_process_has_its_share_and_no_row_is_left_out(world, micro_batch, room):
    """The longest row is above 100 tokens: micro_batch of it make a batch in any case."""
    lengths = [*range(10, 30), 130, 7]
    rows = Dataset.from_dict({"place": range(len(lengths)), "length": lengths})
    seen = []
    for process in range(world):
        arguments = SimpleNamespace(process_index=process, world_size=world, per_device_eval_batch_size=micro_batch)
        trainer = SimpleNamespace(eval_dataset=rows, args=arguments, eval_tokens=room, data_collator=list)
        share = lengths[process::world]
        for batch in loop.QLoraTrainer.get_eval_dataloader(trainer):
            longest = max(row["length"] for row in batch)
            assert len(batch) == 1 or len(batch) * longest <= max(room, micro_batch * max(share))
            seen += [row["place"] for row in batch]
        if (world, micro_batch, room) == (1, 4, 100):
            assert len(list(loop.QLoraTrainer.get_eval_dataloader(trainer))) == 2  # 520 tokens, not 100
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("fused", ["true", "false"])
def test_rows_share_a_batch_as_far_as_training_s_tokens_go(
    fused, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    seen = []

    class Watched(loop.QLoraTrainer):
        def get_eval_dataloader(self, *words):
            loader = super().get_eval_dataloader(*words)
            seen.append([samples_in(batch) for batch in loader])
            return loader

    monkeypatch.setattr(loop, "QLoraTrainer", Watched)
    losses = []
    for micro_batch, length in ((1, 128), (4, 300)):  # rows of 100 to 112 tokens
        words = [f"model.path={tiny_llama}", f"data.path={rows}", "data.validation=20", f"data.max_length={length}"]
        words += [f"train.micro_batch={micro_batch}", "train.max_steps=1", f"out={tmp_path / str(length)}"]
        words += [f"engine.fused={fused}", "train.samples=0"]
        run = train(load_recipe(None, words), console=quiet, cache=cache)
        losses.append(next(line.eval_loss for line in read_metrics(run) if line.eval_loss is not None))
    alone, together = seen[0], seen[-1]
    assert alone == [1] * 20
    assert together == [10, 10]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
