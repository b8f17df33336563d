"""A run has one template, however many the model has, with the day on which the run began, whatever day it is."""

from __future__ import annotations

import datetime
import json
import shutil

import pytest
from transformers import AutoTokenizer

from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer, load_template
from nybble.data.rows.formats import Message
from nybble.data.sets.prepare import prepare
from nybble.data.text.tokens import encode_prompt
from nybble.errors import DataError, ModelError
from nybble.evaluate.evaluation import Measures, evaluate
from nybble.evaluate.rows import rows_of
from nybble.export.export import ExportRequest, export
from nybble.model.tokenizer.load import load_tokenizer
from nybble.run.folder import open_run
from nybble.training.train import resume, train
from tests.conftest import small_tokenizer
from tests.training.test_train import interrupted, recipe_for

TURNS = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}assistant: {% endif %}"
CLOCK = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    "{{- bos_token }}system: Knows the world until December 2023. Today is {{ date_string }}.{{ eos_token }}"
)
DATED = CLOCK + TURNS.removeprefix("{{ bos_token }}")
ASKED = (Message("user", "red"),)


def with_templates(tiny_llama, folder, templates):
    shutil.copytree(tiny_llama, folder)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def on_day(monkeypatch):
    def set_day(month: int, day: int) -> None:
        moment = datetime.datetime(2026, month, day, 15)

        class Moment(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return moment

        monkeypatch.setattr("nybble.data.text.template.today", moment.date)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Moment)

    return set_day


def test_a_run_with_one_of_several_templates_has_only_that_one(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "turns").mkdir()  # another thing of that name
    base = with_templates(tiny_llama, tmp_path / "base", {"default": DATED, "turns": TURNS})
    recipe = recipe_for(base, rows, tmp_path / "run", "data.template=turns", "train.max_steps=2", "train.samples=0")
    run = train(recipe, console=quiet, cache=cache)
    saved = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    assert saved.chat_template == TURNS
    answerer = load_answerer(run, cache)
    assert (answerer.template.name, answerer.template.source) == ("turns", TURNS)
    prepared, why = rows_of(run, answerer.tokenizer, cache)
    assert (why, prepared.cached) == ("", True), "its rows are found again although its tokenizer has no such name"
    artefact = export(run, ExportRequest("adapter"), quiet, cache)
    assert AutoTokenizer.from_pretrained(artefact).chat_template == TURNS


def test_a_resumed_run_keeps_its_day(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch, on_day):
    base = with_templates(tiny_llama, tmp_path / "base", DATED)
    recipe = recipe_for(base, rows, tmp_path / "run", "train.max_steps=6", "train.evaluate_every=2", "train.samples=0")
    on_day(3, 1)
    interrupted(monkeypatch, 3, recipe, quiet, cache)
    on_day(3, 2)
    assert not prepare(recipe.data, load_tokenizer(base), 42, cache).cached, "another day is another prompt"
    run = resume(tmp_path / "run", console=quiet, cache=cache)
    on_day(3, 3)
    answerer = load_answerer(run, cache)
    said = answerer.tokenizer.decode(encode_prompt(answerer.template, ASKED))
    assert said.startswith("<s>system: Knows the world until December 2023. Today is 01 Mar 2026.</s>user: red</s>")
    prepared, why = rows_of(run, answerer.tokenizer, cache)
    assert (why, prepared.cached) == ("", True)
    assert said.split("user")[0] in answerer.tokenizer.decode(prepared.validation[0]["input_ids"])
    artefact = export(run, ExportRequest("adapter"), quiet, cache)
    messages = [{"role": "user", "content": "red"}]
    other = AutoTokenizer.from_pretrained(artefact)
    assert other.decode(other.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]) == said


def test_a_run_of_0_5_1_opens_with_the_day_of_its_training(tiny_llama, rows, cache, tmp_path, quiet, on_day):
    """Its template.json has no day, and its tokenizer still reads the clock."""
    base = with_templates(tiny_llama, tmp_path / "base", DATED)
    recipe = recipe_for(base, rows, tmp_path / "run", "train.max_steps=2", "train.samples=0")
    run = train(recipe, console=quiet, cache=cache)
    start = json.loads((run.folder / "start.json").read_text())
    (run.folder / "start.json").write_text(json.dumps({name: start[name] for name in start if name != "files"}))
    file = run.folder / "template.json"
    file.write_text(json.dumps({"name": "model", "source": DATED, "verbatim": False}))
    summary = json.loads((run.folder / "summary.json").read_text())
    (run.folder / "summary.json").write_text(json.dumps({**summary, "date": "2026-02-03T12:00:00+00:00"}))
    on_day(3, 3)
    _, template = load_template(open_run(run.folder), base)
    assert "Today is 03 Feb 2026" in template.tokenizer.decode(encode_prompt(template, ASKED))


def foreign_adapter(run, folder):
    """An adapter folder whose own tokenizer has tokens, and a pad token, that the base has no rows for."""
    shutil.copytree(run.adapter, folder)
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([f"[FILL{n}]" for n in range(52)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TURN]"], "pad_token": "[PAD]"})
    tokenizer.chat_template = "{% for m in messages %}[TURN]{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return open_run(folder)


def test_tokens_beyond_the_embeddings_are_a_message_wherever_they_come_from(tuned_run, cache, tmp_path, quiet, caplog):
    run = foreign_adapter(tuned_run, tmp_path / "adapter")
    answerer = load_answerer(run, cache)
    assert answerer.tokenizer.pad_token_id == 0, "its [PAD] has no embedding"
    assert "the pad token [PAD]" in caplog.text
    with pytest.raises(DataError) as caught:
        answerer.answer([ASKED], Sampling(max_new_tokens=2))
    print(caught.value)
    assert "the model has no token 401 ([TURN]): its embeddings are for ids 0 to 399" in str(caught.value)
    text = tmp_path / "text.txt"
    text.write_text("one two [TURN] three " * 20)
    with pytest.raises(ModelError) as caught:
        evaluate(run, Measures(texts=[text], answers=0), None, quiet, cache, answerer)
    print(caught.value)
    assert "the tokenizer gives token id 401, but the model has embeddings for ids 0 to 399" in str(caught.value)
    with pytest.raises(DataError, match="the model has no token 401"):
        export(run, ExportRequest("adapter", tmp_path / "out"), quiet, cache)
