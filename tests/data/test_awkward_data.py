"""Data that looks odd but is valid: it is read exactly as written."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from nybble.data.rows.formats import Message
from nybble.data.rows.reading import OpenRows
from nybble.data.rows.sources import read_rows, sources_of
from nybble.data.sets.prepare import prepare
from nybble.errors import DataError
from nybble.recipe import DataOptions

EMOJI = "\U0001f469\u200d\U0001f4bb \u4f60\u597d \u00e9\u0301"


def asked(user: str, answer: str, *, input: str = "", system: str = "") -> tuple[Message, ...]:
    return (
        *((Message("system", system),) if system else ()),
        Message("user", user, input),
        Message("assistant", answer),
    )


def line(**values) -> str:
    return json.dumps(values) + "\n"


def turns(*pairs: tuple[str, str], keys: tuple[str, str] = ("from", "value")) -> list[dict]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


def openai(*pairs: tuple[str, str]) -> list[dict]:
    return turns(*pairs, keys=("role", "content"))


CHAT = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
AB = asked("a", "b")
AWKWARD = {
    "byte-order-mark.jsonl": (b"\xef\xbb\xbf" + line(prompt="a", completion="b").encode(), [AB]),
    "byte-order-mark.json": (b"\xef\xbb\xbf" + json.dumps([{"prompt": "a", "completion": "b"}]).encode(), [AB]),
    "byte-order-mark.csv": (b"\xef\xbb\xbfprompt,completion\na,b\n", [AB]),
    "windows.jsonl": (line(prompt="a", completion="b").replace("\n", "\r\n") * 2, [AB, AB]),
    "windows.csv": ('prompt,completion\r\na,"b\r\nc"\r\n', [asked("a", "b\r\nc")]),
    "blank-lines.jsonl": ("\n" + line(prompt="a", completion="b") + "  \n\n", [AB]),
    "no-last-line-end.jsonl": (line(prompt="a", completion="b").strip(), [AB]),
    "quotes.csv": (
        'prompt,completion\n"say ""a"", then\nb","x,y"\nc,d\n',
        [asked('say "a", then\nb', "x,y"), asked("c", "d")],
    ),
    "semicolons.csv": ("prompt;completion\na;b, c\n", [asked("a", "b, c")]),
    "tabs.tsv": ("prompt\tcompletion\na, b\tc\n", [asked("a, b", "c")]),
    "emoji.jsonl": (line(prompt=EMOJI, completion=EMOJI), [asked(EMOJI, EMOJI)]),
    "emoji-raw.json": (
        json.dumps([{"prompt": EMOJI, "completion": "b"}], ensure_ascii=False).encode(),
        [asked(EMOJI, "b")],
    ),
    "line-separator.jsonl": (
        json.dumps({"prompt": "a\u2028b", "completion": "c\x85"}, ensure_ascii=False).encode(),
        [asked("a\u2028b", "c\x85")],
    ),
    "special-tokens.jsonl": (line(prompt="</s><s> hi", completion="<unk>"), [asked("</s><s> hi", "<unk>")]),
    "one-line.json": (
        json.dumps([{"prompt": str(n), "completion": "[{},]"} for n in range(3)]),
        [asked(str(n), "[{},]") for n in range(3)],
    ),
    "lines-in.json": (line(prompt="a", completion="b") * 2, [AB, AB]),
    "ten-megabytes.jsonl": (line(prompt="a" * 10_000_000, completion="b"), [asked("a" * 10_000_000, "b")]),
    "ten-megabytes.json": (
        json.dumps([{"prompt": "a" * 10_000_000, "completion": "b"}, {"prompt": "c", "completion": "d"}]),
        [asked("a" * 10_000_000, "b"), asked("c", "d")],
    ),
    "long-field.csv": ("prompt,completion\na," + "b" * 1_000_000 + "\n", [asked("a", "b" * 1_000_000)]),
    "two-forms.jsonl": (
        line(instruction="a", output="b") + line(messages=openai(("user", "a"), ("assistant", "b"))),
        [AB, AB],
    ),
    "alpaca-with-text.jsonl": (
        line(instruction="a", input="i", output="b", text="all of it"),
        [asked("a", "b", input="i")],
    ),
    "alpaca-null-input.jsonl": (line(instruction="a", input=None, output="b"), [AB]),
    "alpaca-history.json": (
        json.dumps([{"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}]),
        [CHAT],
    ),
    "alpaca-empty-history.jsonl": (line(instruction="a", output="b", history=[]), [AB]),
    "no-tools.json": (json.dumps([{"conversations": turns(("human", "a"), ("gpt", "b")), "tools": "[]"}]), [AB]),
    "joined-with-nulls.jsonl": (
        line(messages=None, instruction="a", input="", output="b", text=None)
        + line(messages=openai(("user", "a"), ("assistant", "b")), instruction=None, input=None, output=None, text=None)
        + line(messages=None, instruction=None, input=None, output=None, text="a"),
        [AB, AB, (Message("text", "a"),)],
    ),
    "turns-with-nulls.jsonl": (
        line(
            conversations=[
                {"role": None, "content": None, "from": "human", "value": "a"},
                {"role": None, "content": None, "from": "gpt", "value": "b"},
            ]
        ),
        [AB],
    ),
    "other-columns.jsonl": (line(id=7, prompt="a", completion="b", scores=[1, {"x": None}]), [AB]),
    "sharegpt.jsonl": (line(conversations=turns(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))), [CHAT]),
    "sharegpt-system.jsonl": (
        line(system="s", conversations=turns(("user", "a"), ("chatgpt", "b"))),
        [asked("a", "b", system="s")],
    ),
    "sharegpt-roles.jsonl": (
        line(conversations=turns(("system", "s"), ("Human", "a"), ("Assistant", "b"))),
        [asked("a", "b", system="s")],
    ),
    "sharegpt-with-roles.jsonl": (line(conversations=openai(("user", "a"), ("assistant", "b"))), [AB]),
    "slimorca.jsonl": (
        line(
            conversations=[
                {"from": "system", "value": "s", "weight": None},
                {"from": "human", "value": "a", "weight": 0.0},
                {"from": "gpt", "value": "b", "weight": 1.0},
            ]
        ),
        [asked("a", "b", system="s")],
    ),
    "cohere.jsonl": (
        line(messages=openai(("System", "s"), ("User", "a"), ("Chatbot", "b"))),
        [asked("a", "b", system="s")],
    ),
    "unsloth-roles.jsonl": (line(conversations=turns(("input", "a"), ("output", "b"))), [AB]),
    "oasst.jsonl": (line(messages=turns(("prompter", "a"), ("assistant", "b"), keys=("role", "text"))), [AB]),
    "openai.jsonl": (
        line(messages=openai(("developer", "s"), ("user", "a"), ("assistant", "b"))),
        [asked("a", "b", system="s")],
    ),
    "empty-system.jsonl": (line(messages=openai(("system", ""), ("user", "a"), ("assistant", "b"))), [AB]),
    "text.jsonl": (line(text=" one\ntwo "), [(Message("text", " one\ntwo "),)]),
    "document.txt": ("one\r\n\r\ntwo\n", [(Message("text", "one\n\ntwo\n"),)]),
    "zipped.jsonl.gz": (gzip.compress(line(prompt="a", completion="b").encode()), [AB]),
    "two-members.jsonl.gz": (gzip.compress(line(prompt="a", completion="b").encode()) * 2, [AB, AB]),
    "UPPER.JSONL": (line(prompt="a", completion="b"), [AB]),
}


def conversations(options: DataOptions):
    with OpenRows(options) as rows:
        for row in rows.items():
            assert not isinstance(row, DataError), row
            yield rows.forms.read(row).conversation


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_data_is_read_to_the_letter(tmp_path, name):
    content, expected = AWKWARD[name]
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert list(conversations(DataOptions(path=str(file)))) == expected


def test_a_json_array_is_read_in_chunks_of_any_size(tmp_path, monkeypatch):
    """With chunks of every size, so that each kind of token is cut at each position."""
    rows = [
        {"prompt": f'\\ " {EMOJI} {n}', "completion": "x", "n": -1.5e-7, "is": [True, None, {"a": []}]}
        for n in range(3)
    ]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False)):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        for size in range(1, 60):
            monkeypatch.setattr("nybble.data.rows.readers.json_text.CHUNK", size)
            read = list(read_rows(sources_of(DataOptions(path=str(tmp_path / "a.json")))))
            assert [row.values for row in read] == rows
            assert read[0].origin.rpartition(":")[2] == ("2" if "\n" in text else "1")


def test_two_forms_in_one_file_are_counted(tmp_path, tiny_tokenizer, cache):
    (tmp_path / "a.jsonl").write_text(AWKWARD["two-forms.jsonl"][0] + line(prompt="x", completion="y") * 2)
    data = prepare(DataOptions(path=str(tmp_path / "a.jsonl"), validation=0), tiny_tokenizer, 0, cache)
    assert data.counts.forms == {"alpaca": 1, "messages": 1, "prompt": 2}
    assert data.template.name == "plain", "the form of most rows decides"
    assert data.counts.duplicates == 2, "a row said in two forms is the same row"


def test_parquet_may_contain_turns(tmp_path):
    rows = [{"conversations": turns(("human", "a"), ("gpt", "b"))}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(conversations(DataOptions(path=str(tmp_path / "a.parquet")))) == [AB]


def test_preference_rows_are_read_if_the_map_names_the_answer(tmp_path):
    chosen = openai(("user", "a"), ("assistant", "b"))
    (tmp_path / "a.jsonl").write_text(line(chosen=chosen, rejected=chosen))
    assert list(conversations(DataOptions(path=str(tmp_path / "a.jsonl"), map={"messages": "chosen"}))) == [AB]
    (tmp_path / "b.jsonl").write_text(line(prompt="a", chosen="b", rejected="c"))
    assert list(conversations(DataOptions(path=str(tmp_path / "b.jsonl"), map={"completion": "chosen"}))) == [AB]


def test_special_tokens_in_what_people_write_stay_text(tmp_path, tiny_tokenizer, cache):
    (tmp_path / "a.jsonl").write_text(AWKWARD["special-tokens.jsonl"][0])
    data = prepare(DataOptions(path=str(tmp_path / "a.jsonl"), validation=0), tiny_tokenizer, 0, cache)
    ids = data.train[0]["input_ids"]
    assert (ids.count(1), ids.count(2), ids.count(0)) == (1, 1, 0)
    assert tiny_tokenizer.decode(ids) == "<s></s><s> hi<unk></s>"
