"""Conversations to token ids: BOS, EOS, masks, and prompts that are equal in training and in chat."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import os

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nybble.data.rows.formats import Message, Rules
from nybble.data.text.fit import cut_text, halve, last_answer
from nybble.data.text.saved_template import read_template, save_template
from nybble.data.text.template import CONTROL_WORD, Template, choose_template
from nybble.data.text.tokens import Tokens, encode, encode_continuation, encode_prompt, encode_text
from nybble.errors import DataError
from nybble.files.writing import write_json
from nybble.model.tokenizer.load import load_tokenizer
from tests.conftest import SHARED, small_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(*texts: str, system: str | None = None, context: str = ""):
    opening = [Message("system", system)] if system else []
    said = [Message("assistant" if n % 2 else "user", text, "" if n else context) for n, text in enumerate(texts)]
    return (*opening, *said)


def trained_text(tokenizer, tokens) -> str:
    return tokenizer.decode([token for token, trained in zip(tokens.ids, tokens.trained, strict=True) if trained])


def test_llama2_chat_equals_the_reference_tokenizer(llama2_like):
    """The tokens are those of sentencepiece for Meta's chat format, whichever class the folder declares."""
    tokenizer = AutoTokenizer.from_pretrained(llama2_like)
    piece = sentencepiece.SentencePieceProcessor(str(SHARED / "llama2-tokenizer" / "tokenizer.model"))
    conversation = turns("Hi <s> there", "Hello!", "2+2?", "4 </s>", system="Be brief.")
    (tokens,) = encode(choose_template(tokenizer, "llama2", "messages"), [conversation])
    first = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi <s> there [/INST] Hello! "
    expected = [1, *piece.encode(first), 2, 1, *piece.encode("[INST] 2+2? [/INST] 4 </s> "), 2]
    assert tokens.ids == expected
    assert tokens.ids.count(1) == 2
    assert tokens.ids.count(2) == 2, "a message's </s> became a control token"


PARIS = (
    "I am going to Paris, what should I see?",
    "Paris, the capital of France:\n\n1. The Eiffel Tower\n2. The Louvre",
)
PUBLISHED = [
    # system, turns: of example_chat_completion.py in Meta's repository, the long answer cut
    (None, ("what is the recipe of mayonnaise?",)),
    (None, (*PARIS, "What is so great about #1?")),
    ("Always answer with Haiku", PARIS[:1]),
    ("Always answer with emojis", ("How to go from Beijing to NY?",)),
    (None, ("Say  it \u4f60\u597d", "\u4f60\u597d \U0001f600\n    - twice", "</s><s> and <0x0A>", "\u2581 no", "x")),
]


def as_meta_encodes(piece, system: str | None, said: tuple[str, ...]) -> list[int]:
    """chat_completion of Meta's generation.py, by sentencepiece; an answer at the end is closed as those before it."""
    texts = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{said[0]}" if system else said[0], *said[1:]]
    ids = []
    for n, asked in enumerate(texts[::2]):
        answer = texts[2 * n + 1 : 2 * n + 2]
        text = f"[INST] {asked} [/INST]" + "".join(f" {words} " for words in answer)
        ids += [1, *piece.encode(text), *([2] if answer else [])]
    return ids


@pytest.mark.parametrize(("system", "said"), PUBLISHED)
def test_prompts_are_those_of_metas_code(llama2_tokenizer, system, said):
    piece = sentencepiece.SentencePieceProcessor(str(SHARED / "llama2-tokenizer" / "tokenizer.model"))
    template = choose_template(llama2_tokenizer, "auto", "messages")
    assert encode_prompt(template, turns(*said, system=system)) == as_meta_encodes(piece, system, said)
    (tokens,) = encode(template, [turns(*said, "Oui  !", system=system)])
    assert tokens.ids == as_meta_encodes(piece, system, (*said, "Oui  !"))


def test_alpaca_puts_bos_once_and_answers_go_on_from_the_prompt(llama2_like):
    tokenizer = AutoTokenizer.from_pretrained(llama2_like)
    template = choose_template(tokenizer, "auto", "alpaca")
    (tokens,) = encode(template, [turns("Say hi", "Hello", context="to Bob")])
    assert template.name == "alpaca"
    assert tokens.ids[0] == 1
    assert tokens.ids.count(1) == 1
    learnt = [token for token, trained in zip(tokens.ids, tokens.trained, strict=True) if trained]
    assert learnt == [10994, 2], "Hello without the leading space of a new text, then EOS"
    assert "### Input:\nto Bob\n\n### Response:\nHello" in tokenizer.decode(tokens.ids)


def test_the_models_own_template_is_used_and_its_end_of_turn_trained():
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    template = choose_template(tokenizer, "auto", "messages")
    (tokens,) = encode(template, [turns("red <|im_end|>", "blue", "cat", "dog")])
    assert template.name == "model"
    assert template.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert trained_text(tokenizer, tokens) == "blue<|im_end|>dog<|im_end|>"
    assert tokens.ids.count(template.end_id) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes no control token after an answer"),
        (
            "{% for m in messages %}{{ m['content'] | replace('red', 'pink') }}</s>{% endfor %}",
            "rewrites the text of messages",
        ),
        ("{{ messages[0]['content'] }}</s>", "leaves out or rewrites what the assistant says"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
            "not the beginning of prompt and answer",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "is not valid Jinja: line 1"),
    ],
)
def test_templates_that_cannot_be_trusted_are_refused(tiny_tokenizer, source, message):
    with pytest.raises(DataError) as caught:
        encode(Template(tiny_tokenizer, "mine.jinja", source), [turns("red", "blue")])
    print(caught.value)
    assert message in str(caught.value)


def test_a_template_option_that_is_nothing_is_named(tiny_tokenizer):
    with pytest.raises(DataError, match="neither a Jinja file nor one of auto, model, alpaca, llama2, plain"):
        choose_template(tiny_tokenizer, "alpacca", "alpaca")
    with pytest.raises(DataError, match="has no chat template"):
        choose_template(tiny_tokenizer, "model", "alpaca")


def test_a_jinja_file_is_a_template(tiny_tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}[{{ m.content }}{{ eos_token }}{% endfor %}")
    (tokens,) = encode(choose_template(tiny_tokenizer, str(file), "prompt"), [turns("red", "blue")])
    assert tiny_tokenizer.decode(tokens.ids) == "<s>[red</s>[blue</s>"


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), min_size=1, max_size=40).filter(
    lambda text: text.strip() and not CONTROL_WORD.search(text)
)


@pytest.mark.parametrize("name", ["alpaca", "llama2", "plain"])
@given(said=st.lists(TEXT | st.sampled_from(["</s>", "<s> x", "[inst]"]), min_size=2, max_size=6))
def test_every_training_prompt_is_a_chat_prompt_and_every_answer_ends(name, said):
    """For any text, the ids before each answer are those that chat would send, and EOS ends each answer."""
    said = said[: len(said) // 2 * 2]
    template = choose_template(small_tokenizer(), name, "messages")
    (tokens,) = encode(template, [turns(*said)])
    for end in range(1, len(said), 2):
        prompt = encode_prompt(template, turns(*said[:end]))
        assert tokens.ids[: len(prompt)] == prompt
        assert tokens.trained[len(prompt)]
        assert not tokens.trained[len(prompt) - 1] or end > 1
    assert tokens.ids.count(2) == len(said) // 2, "one EOS an answer, none from what people wrote"
    assert tokens.trained[-1]
    assert tokens.ids[-1] == 2
    assert tokens.ids.count(1) == (len(said) // 2 if name == "llama2" else 1)


@pytest.mark.parametrize("name", ["alpaca", "llama2", "plain"])
@given(said=st.lists(TEXT, min_size=2, max_size=8), system=st.none() | TEXT, context=TEXT)
def test_decoding_what_is_trained_gives_back_the_answers(name, said, system, context):
    """Exactly, after the template's own trimming; Llama 2 puts a space on either side of an answer."""
    said = said[: len(said) // 2 * 2]
    tokenizer = small_tokenizer()
    template = choose_template(tokenizer, name, "messages")
    conversation = turns(*said, system=system, context=context)
    (tokens,) = encode(template, [conversation])
    answers = said[1::2] if name == "plain" else [answer.strip() for answer in said[1::2]]
    wanted = [f" {answer} </s>" if name == "llama2" else f"{answer}</s>" for answer in answers]
    got = tokenizer.decode([token for token, trained in zip(tokens.ids, tokens.trained, strict=True) if trained])
    assert got == "".join(wanted)
    last = last_answer(tokens)
    assert trained_text(tokenizer, last) == wanted[-1]


@pytest.mark.parametrize("name", ["alpaca", "llama2", "plain"])
@given(said=st.lists(TEXT | st.sampled_from(["</s>", "<s> x"]), min_size=2, max_size=6), system=st.none() | TEXT)
def test_an_answer_is_continued_from_the_ids_that_training_has_for_its_beginning(name, said, system):
    conversation = turns(*said[: len(said) // 2 * 2], system=system)
    template = choose_template(small_tokenizer(), name, "messages")
    (tokens,) = encode(template, [conversation])
    begun = encode_continuation(template, conversation)
    assert tokens.ids[: len(begun)] == begun
    rest = template.tokenizer.decode(tokens.ids[len(begun) :])
    assert rest == (" </s>" if name == "llama2" else "</s>"), "only what ends the answer is left out"
    prompt = encode_prompt(template, conversation[:-1])
    assert begun[: len(prompt)] == prompt
    empty = (*conversation[:-1], Message("assistant", " " if name != "plain" else ""))
    assert encode_continuation(template, empty) == prompt, "an answer without a beginning is just asked for"


def test_an_answer_is_continued_as_trained_in_sentencepiece_and_in_chatml(llama2_tokenizer):
    piece = sentencepiece.SentencePieceProcessor(str(SHARED / "llama2-tokenizer" / "tokenizer.model"))
    template = choose_template(llama2_tokenizer, "llama2", "messages")
    assert encode_continuation(template, turns("2+2?", "It is ")) == [1, *piece.encode("[INST] 2+2? [/INST] It is")]
    whole = piece.encode("[INST] 2+2? [/INST] It is four")
    assert whole[: len(piece.encode("[INST] 2+2? [/INST] It is"))] == piece.encode("[INST] 2+2? [/INST] It is")
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    begun = encode_continuation(
        choose_template(tokenizer, "model", "messages"), turns("red", "blue", "cat", "dog <|im_end|>")
    )
    assert tokenizer.decode(begun).endswith("<|im_start|>assistant\ndog <|im_end|>")
    assert begun.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3, "what was said is no control token"


GREETED = (Message("assistant", "hello"), Message("user", "red"))
NEEDS_A_USER = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('roles must alternate, the user first') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
)


def test_a_conversation_may_begin_with_the_assistant_where_the_template_can_say_it():
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    for source in (CHATML, "{% if messages[0]['role'] != 'system' %}be brief{% endif %}" + CHATML):
        tokenizer.chat_template = source
        text = tokenizer.decode(encode_prompt(choose_template(tokenizer, "model", "messages"), GREETED))
        assert text == tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in GREETED], tokenize=False, add_generation_prompt=True
        )
    for name in ("alpaca", "llama2", "plain"):
        ids = encode_prompt(choose_template(small_tokenizer(), name, "messages"), GREETED)
        assert ids.count(2) == 1, "the greeting is closed"
    with pytest.raises(DataError, match=r"fails on turns of assistant, user.*: roles must alternate, the user first"):
        encode_prompt(Template(small_tokenizer(), "mine.jinja", NEEDS_A_USER), GREETED)


@given(text=TEXT)
def test_a_document_is_trained_whole(text):
    tokenizer = small_tokenizer()
    (tokens,) = encode(choose_template(tokenizer, "alpaca", "text"), [(Message("text", text),)])
    assert tokenizer.decode(tokens.ids) == f"{text}</s>", "this tokenizer puts no BOS before a text"
    assert all(tokens.trained)
    (before,) = encode(Template(tokenizer, "alpaca", "", bos=True), [(Message("text", text),)])
    assert before.ids == [1, *tokens.ids], "as runs of 0.5.1 were trained"
    assert before.trained == [False, *tokens.trained]


@given(said=st.lists(TEXT, min_size=4, max_size=12), system=st.none() | TEXT)
def test_a_chat_is_split_between_turns_and_nothing_is_lost(said, system):
    conversation = turns(*said[: len(said) // 2 * 2], system=system)
    halves = halve(conversation)
    assert halves is not None
    opening = conversation[:1] if system else ()
    assert all(half[: len(opening)] == opening and half[-1].role == "assistant" for half in halves)
    assert sum((half[len(opening) :] for half in halves), ()) == conversation[len(opening) :]


@given(length=st.integers(2, 30), count=st.integers(2, 100))
def test_a_document_is_cut_into_pieces_and_nothing_is_lost(length, count):
    tokens = Tokens(list(range(count)), [False] + [True] * (count - 1))
    pieces = cut_text(tokens, length)
    ids = [token for piece in pieces for token in piece.ids]
    assert ids in (tokens.ids, tokens.ids[:-1]), "an EOS alone is no piece"
    assert all(1 < len(piece.ids) <= length for piece in pieces)


def named(tokenizer, templates):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = templates
    return tokenizer


SHOUT = CHATML.replace("user", "USER").replace("<|im_end|>", "</s>").replace("<|im_start|>", "<s>")
TURN = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def test_of_several_templates_the_default_is_used_and_others_by_name(tiny_tokenizer, tmp_path):
    """As listed in tokenizer_config.json, and in separate files."""
    listed, filed = tmp_path / "listed", tmp_path / "filed"
    own = {"default": SHOUT, "rag": TURN}
    named(tiny_tokenizer, own).save_pretrained(filed)
    assert (filed / "additional_chat_templates" / "rag.jinja").exists()
    named(tiny_tokenizer, None).save_pretrained(listed)
    file = listed / "tokenizer_config.json"
    entries = [{"name": name, "template": source} for name, source in own.items()]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": entries}))
    for folder in (listed, filed):
        tokenizer = load_tokenizer(folder)
        for option, name, source in (("auto", "model", SHOUT), ("model", "model", SHOUT), ("rag", "rag", TURN)):
            template = choose_template(tokenizer, option, "alpaca")
            assert (template.name, template.source) == (name, source)
        (tokens,) = encode(template, [turns("red", "blue")])
        assert tokenizer.decode(tokens.ids) == "<s>red</s><s>blue</s>"
        with pytest.raises(
            DataError, match="neither a Jinja file nor one of auto, model, alpaca, llama2, plain, default, rag"
        ):
            choose_template(tokenizer, "rags", "alpaca")


def test_without_a_default_the_names_are_listed(tiny_tokenizer):
    assert choose_template(named(tiny_tokenizer, {"rag": TURN}), "auto", "alpaca").source == TURN
    with pytest.raises(DataError) as caught:
        choose_template(named(tiny_tokenizer, {"tool_use": SHOUT, "rag": TURN}), "auto", "alpaca")
    print(caught.value)
    assert "none of them named default: rag, tool_use" in str(caught.value)
    assert "data.template=rag" in str(caught.value)


CLOCK = (
    "\n{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "some day" %}{%- endif %}{%- endif %}'
    "\n{{ bos_token }}Today is {{ date_string }}, {{ strftime_now('%A, %-d.%-m.%y, %H:%M') }}.\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Tomorrow(datetime.datetime):
    """A clock that is ahead."""

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2031, 12, 24, 18, 30)


def test_a_template_that_reads_the_clock_keeps_its_day(tiny_tokenizer, tmp_path, monkeypatch):
    """In training, in the run's file, and in what Transformers renders from the saved tokenizer on another day."""
    said = "<s>Today is 03 Feb 2026, Tuesday, 3.2.26, 00:00.\nuser: red</s>assistant: "
    tokenizer = named(tiny_tokenizer, CLOCK)
    monkeypatch.setattr("nybble.data.text.template.today", lambda: datetime.date(2026, 2, 3))
    template = choose_template(tokenizer, "auto", "messages")
    assert template.day == datetime.date(2026, 2, 3)
    assert template.label == "model (its date stays 03 Feb 2026)"
    assert tokenizer.decode(encode_prompt(template, turns("red"))) == said
    save_template(template, tmp_path / "template.json")
    named(tiny_tokenizer, template.source).save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    other = load_tokenizer(tmp_path)
    asked = {"conversation": [{"role": "user", "content": "red"}], "tokenize": False, "add_generation_prompt": True}
    assert "24 Dec 2031" in tokenizer.apply_chat_template(**asked), "the clock is another one now"
    assert other.apply_chat_template(**asked) == said
    again = read_template(other, tmp_path / "template.json")
    assert (again.source, again.day, again.fingerprint) == (template.source, template.day, template.fingerprint)
    assert (template.rules, again.rules) == (Rules.NOW, Rules.NOW)
    kept = json.loads((tmp_path / "template.json").read_text())
    del kept["rules"]
    write_json(tmp_path / "template.json", kept)
    assert read_template(other, tmp_path / "template.json").rules == Rules.V0_6
    assert tokenizer.decode(encode_prompt(again, turns("red"))) == said
    assert choose_template(other, "auto", "messages").source == template.source, "what is stopped is not stopped again"


def test_the_day_is_part_of_the_caches_key(tiny_tokenizer, tmp_path):
    marks = {Template(tiny_tokenizer, "model", CLOCK, day=datetime.date(2026, 2, day)).fingerprint for day in (3, 3, 4)}
    assert len(marks) == 2
    assert Template(tiny_tokenizer, "model", TURN, day=datetime.date(2026, 2, 3)).source == TURN, "no clock, no day"


def test_a_run_of_an_earlier_version_gets_the_day_on_which_it_began(tiny_tokenizer, tmp_path):
    """Its rows keep their key, so the rows that it was trained and validated on are found again."""
    write_json(tmp_path / "template.json", {"name": "model", "source": CLOCK, "verbatim": False})
    write_json(tmp_path / "start.json", {})
    began = datetime.datetime(2025, 7, 9, 12).timestamp()
    os.utime(tmp_path / "start.json", (began, began))
    template = read_template(tiny_tokenizer, tmp_path / "template.json")
    assert "Today is 09 Jul 2025, Wednesday" in tiny_tokenizer.decode(encode_prompt(template, turns("red")))
    assert template.fingerprint == hashlib.sha256(f"False{CLOCK}".encode()).hexdigest()
    assert template.document_bos
    assert template.rules == Rules.V0_5
    write_json(tmp_path / "summary.json", {"date": "2025-07-02T12:00:00+00:00", "seconds": 24 * 3600})
    assert read_template(tiny_tokenizer, tmp_path / "template.json").day == datetime.date(2025, 7, 1)


def test_a_document_and_a_plain_prompt_begin_as_the_tokenizer_begins_a_text(llama2_tokenizer, tiny_tokenizer):
    """Llama 2's tokenizer adds BOS, others do not: as in any program that uses the tokenizer."""
    for tokenizer, begins in ((llama2_tokenizer, True), (tiny_tokenizer, False)):
        template = choose_template(tokenizer, "alpaca", "text")
        for text in ("red cat", " two\n\nlines", "1"):
            ids = tokenizer(text)["input_ids"]
            assert (ids[0] == tokenizer.bos_token_id) == begins
            assert encode_text(template, text) == ids
            (tokens,) = encode(template, [(Message("text", text),)])
            assert tokens.ids == [*ids, tokenizer.eos_token_id]


def test_a_template_file_of_another_encoding_is_named(tmp_path, tiny_tokenizer):
    file = tmp_path / "t.jinja"
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8") as caught:
        choose_template(tiny_tokenizer, str(file), "messages")
    print(caught.value)
    assert caught.value.where == f"{file}:1"
