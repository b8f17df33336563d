"""Rows that judge answers: every form in which they are exported, every fault with its file and line, and their batches."""

from __future__ import annotations

import io
import json

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nybble.data.judged_batches import JudgedCollator, row_key, samples_in
from nybble.data.judged_xray import ExpectedJudged, inspect_judged
from nybble.data.rows.formats import Message, detect_forms
from nybble.data.rows.readers import Row
from nybble.data.sets.examine import examine
from nybble.data.sets.prepare import prepare
from nybble.data.sets.preview import preview
from nybble.errors import DataError
from nybble.preflight.data_check import check
from nybble.recipe import DataOptions, load_recipe


def user(text, **more):
    return {"role": "user", "content": text, **more}


def said(text):
    return {"role": "assistant", "content": text}


ASKED = (Message("user", "a"), Message("assistant", "b"))
LONGER = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
FORMS = {
    "TRL, with a prompt": ({"prompt": "a", "chosen": "b", "rejected": "x"}, ASKED),
    "TRL, turns with a prompt": ({"prompt": [user("a")], "chosen": [said("b")], "rejected": [said("x")]}, ASKED),
    "TRL, turns without": ({"chosen": [user("a"), said("b")], "rejected": [user("a"), said("x")]}, ASKED),
    "Anthropic HH": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: x",
        },
        LONGER,
    ),
    "Anthropic HH, divided": (
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": " d", "rejected": " x"},
        (*LONGER[:-1], Message("assistant", " d")),
    ),
    "UltraFeedback": (
        {
            "prompt": "a", "prompt_id": "0", "messages": [user("a"), said("b")], "score_chosen": 8.5, "score_rejected": 2.0,
            "chosen": [user("a"), said("b")], "rejected": [user("a"), said("x")],
        },
        ASKED,
    ),
    "Argilla": ({"instruction": "a", "chosen_response": "b", "rejected_response": "x", "status": "valid"}, ASKED),
    "Argilla, with a system": (
        {"system": "s", "input": "a", "chosen": "b", "rejected": "x", "rating": [9, 2]}, (Message("system", "s"), *ASKED)
    ),
    "Argilla, turns": ({"dataset": "d", "chosen": [user("a"), said("b")], "rejected": [user("a"), said("x")]}, ASKED),
    "Intel, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "x"},
        },
        ASKED,
    ),
    "spelt otherwise": ({"Prompt ": "a", "Chosen": "b", "REJECTED": "x"}, ASKED),
}  # fmt: skip


def read(values, target="pairs", **mapping):
    row = Row(values, "f.jsonl:1")
    return detect_forms([row], "auto", mapping, target).read(row)


@pytest.mark.parametrize("values, expected", FORMS.values(), ids=FORMS)
def test_every_form_of_pairs_is_read_as_prompt_and_two_answers(values, expected):
    judged = read(values).judged
    assert judged.conversation == expected
    assert judged.rejected[:-1] == expected[:-1]
    assert judged.rejected[-1].content.strip() == "x"


def test_columns_of_other_names_are_mapped():
    judged = read({"q": "a", "good": "b", "poor": "x"}, prompt="q", chosen="good", rejected="poor").judged
    assert judged.conversation == ASKED


@pytest.mark.parametrize("label, expected", [(True, True), (False, False), ("true", True), ("False", False)])
def test_a_label_is_true_or_false(label, expected):
    judged = read({"prompt": "a", "completion": "b", "label": label}, "labels").judged
    assert (judged.conversation, judged.rejected, judged.is_good) == (ASKED, None, expected)


def written(folder, *rows, name="f.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


PAIR = {"prompt": "one", "chosen": "two", "rejected": "three"}
LABEL = {"prompt": "one", "completion": "two", "label": True}
FAULTS = {
    "equal": ("pairs", {**PAIR, "rejected": "two"}, "'chosen' and 'rejected' are the same answer", "delete the row"),
    "empty": ("pairs", {**PAIR, "chosen": " "}, "a row without an answer: 'chosen' is empty", "fill it in"),
    "empty turn": (
        "pairs", {"chosen": [user("a"), said("")], "rejected": [user("a"), said("b")]}, "'content of message 2' is empty", "fill",
    ),
    "prompts differ": (
        "pairs", {"chosen": [user("a"), said("b")], "rejected": [user("z"), said("x")]},
        "different prompts: they differ in message 1, before the last answer", "the same",
    ),
    "lengths differ": (
        "pairs", {"chosen": [user("a"), said("b")], "rejected": [user("a"), said("b"), user("c"), said("d")]},
        "they differ in length, 2 and 4 messages", "the same",
    ),
    "other prompt": (
        "pairs", {"prompt": "z", "chosen": [user("a"), said("b")], "rejected": [user("a"), said("x")]},
        "'chosen' answers another prompt than 'prompt'", "correct or delete",
    ),
    "no prompt": ("pairs", {"chosen": "b", "rejected": "x"}, "no prompt: 'chosen' has only the answer", "data.map={prompt:"),
    "half": ("pairs", {"prompt": "a", "chosen": "b"}, "no preference: found 'prompt', 'chosen'", "add 'rejected'"),
    "one answer": ("pairs", {"prompt": "a", "completion": "b"}, "a row needs a chosen and a rejected answer",
                   "train.objective=supervised"),
    "labels for pairs": ("pairs", LABEL, "no preference: found 'prompt', 'completion', 'label'", "train.objective=kto"),
    "score": ("labels", {**LABEL, "label": 7}, "'label' must be true (a good answer) or false (a bad one), found: 7", "a score"),
    "null": ("labels", {**LABEL, "label": None}, "'label' must be true (a good answer)", "true or false"),
    "empty completion": ("labels", {**LABEL, "completion": ""}, "'completion' is empty", "fill it in"),
    "pair in an imitating run": ("answers", PAIR, "a preference row (two answers", "train.objective=dpo"),
    "label in an imitating run": ("answers", LABEL, "a preference row ('label' says", "train.objective=kto"),
    "Argilla in an imitating run": (
        "answers", {"instruction": "a", "chosen_response": "b", "rejected_response": "c"}, "a preference row", "=dpo",
    ),
}  # fmt: skip


@pytest.mark.parametrize("target, values, what, fix", FAULTS.values(), ids=FAULTS)
def test_every_fault_names_its_line_and_a_fix(target, values, what, fix, tmp_path, tiny_tokenizer, cache):
    good = {"pairs": PAIR, "labels": LABEL, "answers": {"prompt": "one", "completion": "two"}}[target]
    file = written(tmp_path, good, values)
    with pytest.raises(DataError) as caught:
        prepare(DataOptions(path=file, validation=0), tiny_tokenizer, 0, cache, target=target)
    print(caught.value)
    assert what in caught.value.what
    assert f"{file}:2" in f"{caught.value.where} {caught.value.what}"
    assert fix in caught.value.fix


def test_pairs_become_a_good_and_a_bad_answer_where_labels_are_learnt(tmp_path, tiny_tokenizer, cache):
    data = prepare(
        DataOptions(path=written(tmp_path, PAIR, LABEL), validation=0), tiny_tokenizer, 0, cache, target="labels"
    )
    assert list(data.train["is_good"]) == [True, False, True]
    assert set(map(len, data.train["rejected"])) == {0}
    assert data.counts.forms == {"prompt-pair": 1, "label": 1}


def many(folder, count=20):
    words = ["one", "two", "three", "four", "five"]
    rows = [
        {"prompt": " ".join(words[: 1 + n % 5]), "chosen": f"{words[n % 5]} {n}", "rejected": f"cat {n} {words[n % 3]}"}
        for n in range(count)
    ]
    return written(folder, *rows)


def test_an_answer_is_cut_off_only_if_asked_and_never_into_two_equal_ones(tmp_path, tiny_tokenizer, cache):
    long = {"prompt": "one", "chosen": "two " * 30, "rejected": "cat " * 30}
    alike = {"prompt": "one", "chosen": "two " * 30 + "a", "rejected": "two " * 30 + "b"}
    filled = {"prompt": "five " * 40, "chosen": "a", "rejected": "b"}
    file = written(tmp_path, PAIR, long, alike, filled)
    with pytest.raises(DataError, match=r"3 of 4 rows are longer than data.max_length=16"):
        prepare(DataOptions(path=file, validation=0, max_length=16), tiny_tokenizer, 0, cache, target="pairs")
    options = DataOptions(path=file, validation=0, max_length=16, overlength="truncate")
    examined = examine(options, tiny_tokenizer, cache, target="pairs")
    assert (examined.counts.overlength, examined.counts.lost_rows, examined.counts.kept) == (3, 2, 2)
    row = examined.tokens[1]
    assert len(row["input_ids"]) == row["prompt"] + len(row["rejected"]) == 16
    assert row["input_ids"][-1] == row["rejected"][-1] == tiny_tokenizer.eos_token_id
    assert row["length"] == 32, "both sequences are computed"


def test_tokens_come_back_from_the_cache(tmp_path, tiny_tokenizer, cache):
    options = DataOptions(path=many(tmp_path), validation=0)
    first, again = (prepare(options, tiny_tokenizer, 0, cache, target="pairs") for _ in range(2))
    assert (first.cached, again.cached) == (False, True)
    assert first.train[:] == again.train[:]
    assert first.fingerprint == again.fingerprint
    other = prepare(options, tiny_tokenizer, 0, cache, target="labels")
    assert other.fingerprint != first.fingerprint


LAYOUTS = {
    "padded": JudgedCollator(0),
    "flat": JudgedCollator(0, flatten=True),
    "shared": JudgedCollator(0, flatten=True, shares_prompts=True),
}


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("collate", LAYOUTS.values(), ids=LAYOUTS)
def test_the_x_ray_passes_right_batches_and_finds_each_fault(collate, packing, tmp_path, tiny_tokenizer, cache):
    data = prepare(
        DataOptions(path=many(tmp_path), validation=0, packing=packing, max_length=64), tiny_tokenizer, 0, cache,
        target="pairs",
    )  # fmt: skip
    expected = ExpectedJudged(data.template)
    inspect_judged(data.train, collate, expected)
    faults = {
        "that of other tokens": lambda batch: batch["targets"].__setitem__(0, 7),
        "predicted after something else": lambda batch: batch["predicting"].add_(1),
    }
    for what, spoil in faults.items():

        def spoilt(rows, spoil=spoil):
            batch = collate(rows)
            spoil(batch)
            return batch

        with pytest.raises(DataError, match=what):
            inspect_judged(data.train, spoilt, expected)
    if "position_ids" in collate([data.train[0]]):

        def moved(rows):
            batch = collate(rows)
            batch["position_ids"][:, 1:] += 1
            return batch

        with pytest.raises(DataError, match="do not count from the start of its prompt"):
            inspect_judged(data.train, moved, expected)


def test_a_shared_prompt_is_written_once():
    row = {"input_ids": [5, 6, 7, 8, 9], "trained": [False] * 3 + [True] * 2, "prompt": 3, "rejected": [10, 11]}
    batch = JudgedCollator(0, flatten=True, shares_prompts=True)([row, row])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11] * 2]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4] * 2]
    assert batch["predicting"].tolist() == [2, 3, 2, 5, 9, 10, 9, 12], (
        "both answers begin after the prompt's last token"
    )
    assert batch["targets"].tolist() == [8, 9, 10, 11] * 2
    assert batch["answers"].tolist() == [0, 0, 2, 2, 1, 1, 3, 3]
    assert batch["rows"] == 2


ids = st.lists(st.integers(1, 300), min_size=1, max_size=6)
rows = st.fixed_dictionaries({"prompt": ids, "chosen": ids, "rejected": ids, "repeated": st.booleans()})


@given(st.lists(rows, min_size=1, max_size=5), st.sampled_from(sorted(LAYOUTS)), st.booleans())
def test_every_answer_is_predicted_once_after_its_prompt(pairs, layout, train_prompt):
    samples = [
        {
            "input_ids": [*each["prompt"], *each["chosen"]],
            "trained": [train_prompt] * len(each["prompt"]) + [True] * len(each["chosen"]),
            "prompt": len(each["prompt"]), "rejected": each["rejected"], "repeated": each["repeated"],
        }
        for each in pairs
    ]  # fmt: skip
    batch = LAYOUTS[layout](samples)
    counted = [each for each in pairs if not each["repeated"]]
    flat = batch["input_ids"].flatten().tolist()
    for number, each in enumerate(counted):
        for answer, name in ((number, "chosen"), (len(counted) + number, "rejected")):
            own = batch["answers"] == answer
            assert batch["targets"][own].tolist() == each[name]
            before = [flat[position] for position in batch["predicting"][own].tolist()]
            assert before == [each["prompt"][-1], *each[name][:-1]]
            assert batch["answer_tokens"][answer] == len(each[name])
    extra = sum(len(each["prompt"]) - 1 for each in counted) if train_prompt else 0
    assert (batch["answers"] == 2 * len(counted)).sum() == extra
    assert batch["imitated"] == sum(len(each["chosen"]) for each in counted) + extra
    assert batch["rows"] == len(counted)


def test_the_reference_is_found_by_tokens_alone():
    row = {"input_ids": [5, 6, 7], "trained": [False, True, True], "prompt": 1, "rejected": [8, 9]}
    other = {**row, "input_ids": [5, 6], "rejected": [7, 8, 9]}
    assert row_key(row) == row_key(dict(row, trained=[True] * 3)) != row_key(other)
    batch = JudgedCollator(0, reference={row_key(row): [-1.0, -2.0], row_key(other): [-3.0, -4.0]})([row, other])
    assert batch["reference"].tolist() == [-1.0, -3.0, -2.0, -4.0]


def test_mismatched_answers_are_those_of_the_row_before():
    first = {"input_ids": [5, 6], "trained": [False, True], "prompt": 1, "rejected": [], "is_good": True}
    second = {"input_ids": [7, 8, 9], "trained": [False, True, True], "prompt": 1, "rejected": [], "is_good": False}
    batch = JudgedCollator(0, flatten=True, mismatched=True)([first, second])
    assert batch["is_good"].tolist() == [True, False]
    assert batch["mismatched"]["input_ids"].tolist() == [[5, 8, 9, 7, 6]]
    assert batch["mismatched"]["targets"].tolist() == [8, 9, 6]


def test_packed_rows_have_room_for_a_pair(tmp_path, tiny_tokenizer, cache):
    options = DataOptions(path=many(tmp_path), validation=0, packing=True, max_length=32)
    data = prepare(options, tiny_tokenizer, 0, cache, target="pairs")
    assert 1 < len(data.train) < 20
    assert max(sum(sample["length"] for sample in row) for row in data.train) <= 64
    assert sorted(sample["origin"] for sample in samples_in(list(data.train))) == sorted(data.train.samples["origin"])


def test_check_and_preview_show_both_answers(tmp_path, tiny_llama, tiny_tokenizer, cache):
    file = many(tmp_path)
    recipe = load_recipe(
        None, [f"data.path={file}", f"model.path={tiny_llama}", "train.objective=dpo", "data.max_length=128"]
    )
    console = Console(file=io.StringIO(), width=150)
    assert check(recipe, console, cache=cache)
    assert "20 prompt-pair" in console.file.getvalue()
    preview(recipe.data, tiny_tokenizer, 1, console, target="pairs")
    shown = console.file.getvalue()
    assert f"{file}:1, chosen: " in shown
    assert f"{file}:1, rejected: " in shown
    assert "[[cat 0 one]]" in shown


def test_a_stream_of_pairs_has_the_rows_of_the_file(tmp_path, tiny_tokenizer, cache):
    options = DataOptions(path=many(tmp_path), validation=0, streaming=True)
    data = prepare(options, tiny_tokenizer, 0, cache, target="pairs")
    first = [row for row, _ in zip(data.train, range(5), strict=False)]
    kept = {row_key(row): row for row in data.sample}
    assert all(kept[row_key(row)]["length"] == row["length"] for row in first)
    batch = JudgedCollator(0, flatten=True)(first)
    assert isinstance(batch["input_ids"], torch.Tensor)
    assert numpy.isin(batch["answers"], range(10)).all()
