"""The X-ray inspects the collator's real batches: it finds whatever is altered there."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from nybble.data.batches import IGNORED, Collator
from nybble.data.sets.prepare import prepare
from nybble.data.text.template import Template
from nybble.data.xray import Expected, inspect
from nybble.errors import DataError
from nybble.recipe import DataOptions, load_recipe
from nybble.training.train import train


def drop_eos(batch):
    last = [row.nonzero()[-1] for row in batch["labels"] != IGNORED]
    for row, place in enumerate(last):
        batch["labels"][row, place] = IGNORED


def shift(batch):
    batch["labels"] = batch["labels"].roll(1, dims=1)


def forget(batch):
    batch["labels"][1] = IGNORED


def another_token(batch):
    batch["input_ids"][1, 3] += 1


def one_more(batch):
    batch["labels"][1, 2] = batch["input_ids"][1, 2]


def join(batch):
    if "cu_seq_lens_q" in batch:
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"][[0, -1]]


def ask_for_less(batch):
    batch["predicting"] = batch["predicting"][:-1]


def ask_twice(batch):
    batch["predicting"] = torch.cat([batch["predicting"], batch["predicting"][-1:]])


def hide(batch):
    batch["attention_mask"][1, 2] = 0


def train_padding(batch):
    row = int((batch["attention_mask"] == 0).any(dim=1).nonzero()[0])
    batch["labels"][row, -1] = batch["input_ids"][row, -1]


def run_on(batch):
    batch["position_ids"] = torch.arange(batch["position_ids"].shape[1]).expand_as(batch["position_ids"])


def forget_borders(batch):
    for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k"):
        del batch[name]


ALTERED = [
    (drop_eos, "the trained tokens are not those of the answers; EOS is not trained after an answer"),
    (shift, "a label differs from its token"),
    (forget, "no token is trained"),
    (another_token, "the batch's tokens differ from the row's"),
    (one_more, "the trained tokens are not those of the answers"),
    (ask_for_less, "the tokens that the loss counts are not those with a label"),
    (ask_twice, "the tokens that the loss counts are not those with a label"),
]


class Altering(Collator):
    def __call__(self, rows):
        batch = super().__call__(rows)
        self.alter(batch)
        return batch


def collator(alter, *, flatten: bool = False) -> Collator:
    kind = type("Altered", (Altering,), {"alter": staticmethod(alter)})
    return kind(0, flatten)


def prepared(rows, tokenizer, cache, **options):
    return prepare(DataOptions(path=str(rows), validation=0, **options), tokenizer, 0, cache)


@pytest.mark.parametrize(("alter", "message"), ALTERED, ids=[alter.__name__ for alter, _ in ALTERED])
@pytest.mark.parametrize("packing", [False, True])
def test_what_is_altered_in_the_collator_is_found(rows, tiny_tokenizer, cache, alter, message, packing):
    data = prepared(rows, tiny_tokenizer, cache, packing=packing, max_length=512)
    inspect(data.train, Collator(0), Expected(data.template, "answers"))
    with pytest.raises(DataError) as caught:
        inspect(data.train, collator(alter), Expected(data.template, "answers"))
    print(caught.value)
    assert message in str(caught.value)
    assert f"{rows}:" in str(caught.value)


def test_rows_that_can_see_each_other_are_found(rows, tiny_tokenizer, cache):
    for flatten, packing in ((True, False), (False, True)):
        data = prepared(rows, tiny_tokenizer, cache, packing=packing)
        for alter in (join, run_on, forget_borders):
            with pytest.raises(DataError, match="it can attend to other rows"):
                inspect(data.train, collator(alter, flatten=flatten), Expected(data.template, "answers"))


def test_tokens_that_are_hidden_and_padding_that_is_trained_are_found(rows, tiny_tokenizer, cache):
    data = prepared(rows, tiny_tokenizer, cache)
    for alter, message in ((hide, "attention leaves out some of its tokens"), (train_padding, "padding is trained")):
        with pytest.raises(DataError, match=message):
            inspect(data.train, collator(alter), Expected(data.template, "answers"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "<s>{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "two BOS tokens in a row",
        ),
        (
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}{{ bos_token }}{% endif %}"
            "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "",
        ),
    ],
)
def test_bos_is_checked_where_the_template_writes_it(tmp_path, tiny_tokenizer, cache, source, message):
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"red {n}"} for n in range(4)]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    (tmp_path / "own.jinja").write_text(source)
    data = prepared(file, tiny_tokenizer, cache, template=str(tmp_path / "own.jinja"))
    expected = Expected(data.template, "answers")
    if message:
        with pytest.raises(DataError, match=message):
            inspect(data.train, Collator(0), expected)
        return
    inspect(data.train, Collator(0), expected)
    other = Expected(Template(tiny_tokenizer, "once", source.replace("{{ bos_token }}", "", 1)), "answers")
    with pytest.raises(DataError, match="2 BOS tokens, where the template once has 1"):
        inspect(data.train, Collator(0), other)


@pytest.mark.parametrize("train_on", ["answers", "last", "all"])
@pytest.mark.parametrize("overlength", ["drop", "truncate", "split"])
@pytest.mark.parametrize("template", ["alpaca", "llama2", "plain"])
def test_every_way_to_prepare_rows_passes(tmp_path, tiny_tokenizer, cache, train_on, overlength, template):
    rows = []
    for n in range(30):
        chat = [
            {"role": "user" if k % 2 == 0 else "assistant", "content": f"red {n} " * (n % 4) + "x"}
            for k in range(2 + n % 5 // 2 * 2)
        ]
        rows += [{"messages": chat}, {"text": f"one two {n} " * (n % 9 * 3 + 1)}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    options = {"train_on": train_on, "overlength": overlength, "template": template, "max_length": 128}
    for packing in (False, True):
        data = prepared(file, tiny_tokenizer, cache, packing=packing, **options)
        assert len(data.train) > 5
        for flatten in (False, True):
            inspect(data.train, Collator(0, flatten), Expected(data.template, train_on))


def test_training_is_refused_by_the_same_check(tiny_llama, rows, cache, tmp_path, monkeypatch):
    whole = Collator.__call__

    def altered(self, samples):
        batch = whole(self, samples)
        batch["labels"] = torch.where(batch["labels"] == 2, IGNORED, batch["labels"])
        return batch

    monkeypatch.setattr(Collator, "__call__", altered)
    recipe = load_recipe(
        None,
        [
            f"model.path={tiny_llama}",
            f"data.path={rows}",
            f"out={tmp_path / 'run'}",
            "model.device=cpu",
            "data.max_length=512",
        ],
    )
    with pytest.raises(DataError, match="EOS is not trained after an answer"):
        train(recipe, console=Console(quiet=True), cache=cache)
    assert not (tmp_path / "run").exists()
