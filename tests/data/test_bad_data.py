"""Data that cannot be trained on: each fault with its file, line and reason, in one message."""

from __future__ import annotations

import gzip
import json

import pytest
import yaml

from nybble.data.sets.examine import examine
from nybble.data.sets.prepare import examine_rows, prepare
from nybble.errors import DataError
from nybble.recipe import DataOptions

GOOD = '{"instruction": "a", "output": "b"}\n'
GOOD_CHAT = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
ZIPPED = gzip.compress((GOOD * 2000).encode())


def row(**values) -> str:
    return json.dumps(values) + "\n"


def alpaca(output) -> str:
    return GOOD + row(instruction="a", output=output)


def chat(*turns: tuple, column: str = "messages", keys: tuple[str, str] = ("role", "content"), **more) -> str:
    return row(**{column: [dict(zip(keys, turn, strict=True)) for turn in turns]}, **more)


ASK, SAY = ("user", "x"), ("assistant", "y")
TURN, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
BAD = {
    # files
    "nothing.jsonl": ("", "the file is empty", ""),
    "nothing.jsonl.gz": (b"", "the file is empty", ""),
    "hollow.jsonl.gz": (gzip.compress(b""), "there are no rows in the file", ""),
    "hollow.csv.gz": (gzip.compress(b""), "there are no rows in the file", ""),
    "hollow.json.gz": (gzip.compress(b""), "there are no rows in the file", ""),
    "blank.jsonl": ("\n \n\n", "there are no rows in the file", ""),
    "header.csv": ("prompt,completion\n", "there are no rows in the file", ""),
    "short.jsonl.gz": (ZIPPED[: len(ZIPPED) // 2], "the gzip file is truncated", ":"),
    "plain.jsonl.gz": (GOOD.encode(), "the file is not compressed with gzip, although its name says so", ""),
    "damaged.json.gz": (ZIPPED[:30] + b"\xff\xff" + ZIPPED[32:], "the file cannot be unpacked", ":1"),
    "broken-utf8.jsonl": (GOOD.encode() + b'{"instruction": "\xff", "output": "b"}\n', "not UTF-8: byte 0xff", ":2"),
    "latin1.csv": ("prompt,completion\na,b\ncaf\u00e9,b\n".encode("latin-1"), "not UTF-8: byte 0xe9", ":3"),
    "latin1.json": ('[{"instruction": "a",\n"output": "\u00e9"}]'.encode("latin-1"), "not UTF-8: byte 0xe9", ":2"),
    "utf16.jsonl": (GOOD.encode("utf-16"), "the file is UTF-16, not UTF-8", ":1"),
    "utf16.csv": ("prompt,completion\na,b\n".encode("utf-16"), "the file is UTF-16, not UTF-8", ":1"),
    "utf16-unmarked.jsonl": (GOOD.strip().encode("utf-16-le"), "the file is UTF-16LE, not UTF-8", ":1"),
    "null-byte.jsonl": (GOOD + '{"instruction": "a\0", "output": "b"}\n', "a null byte", ":2"),
    "null-byte.json": ('[\n{"instruction": "a\0", "output": "b"}]', "a null byte", ":2"),
    "no.parquet": ("x", "not a parquet file", ""),
    # lines
    "broken.jsonl": (GOOD + '{"instruction": "a"\n', "not valid JSON: Expecting ',' delimiter", ":2"),
    "single-quotes.jsonl": ("{'instruction': 'a'}\n", "not valid JSON", ":1"),
    "broken.json": ('[{"instruction": "a", "output": "b"},\n {"instruction" "a"}]', "not valid JSON", ":2"),
    "open.json": ('[{"instruction": "a", "output": "b"}\n', "the array is not closed", ":2"),
    "after.json": ('[{"instruction": "a", "output": "b"}]\n}', "text after the end of the array", ":2"),
    "pretty.json": ('{\n "instruction": "a",\n "output": "b"\n}', "one object over several lines", ":1"),
    "deep.jsonl": (GOOD + '{"a": ' + "[" * 100_000 + "\n", "nested too deeply", ":2"),
    "list.jsonl": (GOOD + "[1]\n", "a row must be an object with named fields, not list", ":2"),
    "list.json": ('[\n"a"]', "a row must be an object with named fields, not str", ":2"),
    "wide.csv": ("prompt,completion\na,b,c\n", "fields, but the header has", ":2"),
    "narrow.csv": ("prompt,completion\na,b\na\n", "1 field, but the header has", ":3"),
    "quotes.csv": ('prompt,completion\na,"b\n', "not valid CSV: unexpected end of data", ":2"),
    "twice.csv": ("prompt,prompt\na,b\n", "two columns of the header have the same name", ":1"),
    # fields
    "fields.jsonl": (row(question="a", reply="b"), "found 'question', 'reply'; expected messages; or", ":1"),
    "later.jsonl": (GOOD + row(instruction="a"), "found 'instruction'; expected instruction, output", ":2"),
    "bare.jsonl": (GOOD + "{}\n", "unknown fields: found none", ":2"),
    "preference.jsonl": (row(prompt="a", chosen="b", rejected="c"), "a preference row (two answers", ":1"),
    "preferred.jsonl": (
        row(input={"messages": [TURN]}, preferred_output=[ANSWER], non_preferred_output=[ANSWER]),
        "a preference row (two answers, 'preferred_output' and",
        ":1",
    ),
    "ranked.jsonl": (
        row(conversations=[TURN], chosen=ANSWER, rejected=ANSWER),
        "a preference row (two answers, 'chosen' and 'rejected')",
        ":1",
    ),
    "kto.jsonl": (row(prompt="a", completion="b", label=True), "a preference row ('label' says", ":1"),
    # what stands in them
    "spaces.jsonl": (alpaca(" \n"), "a row without an answer: 'output' is empty", ":2"),
    "none.jsonl": (alpaca(None), "a row without an answer: 'output' is empty", ":2"),
    "history.jsonl": (row(instruction="a", output="b", history=["q"]), "'history' must be a list of [question", ":1"),
    "history-number.jsonl": (row(instruction="a", output="b", history=3), "'history' must be a list of", ":1"),
    "silent-history.jsonl": (
        row(instruction="a", output="b", history=[["q", ""]]),
        "a row without an answer: 'answer in history' is empty",
        ":1",
    ),
    "ask.jsonl": (row(instruction="", output="b"), "an empty 'instruction'", ":1"),
    "nested.jsonl": (alpaca({"text": "b"}), "'output' must be text, found dict", ":2"),
    "answers.jsonl": (alpaca(["b"]), "'output' must be text, found list", ":2"),
    "nan.jsonl": (GOOD + '{"instruction": "a", "output": NaN}\n', "NaN is not JSON", ":2"),
    "infinity.json": ('[{"instruction": "a",\n "output": -Infinity}]', "-Infinity is not JSON", ":1"),
    "null-character.jsonl": (alpaca("b\0c"), "'output' contains a null character", ":2"),
    "surrogate.jsonl": (GOOD + '{"instruction": "\\ud83d", "output": "b"}\n', "half a surrogate pair", ":2"),
    "text.jsonl": (row(text=" "), "an empty 'text'", ":1"),
    # turns
    "list-role.jsonl": (
        row(messages=[{"role": ["user"], "content": "x"}, ANSWER]),
        "role \"['user']\" is not one of",
        ":1",
    ),
    "role.jsonl": (GOOD_CHAT + chat(("narrator", "x"), SAY), "role 'narrator' is not one of system", ":2"),
    "no-answer.jsonl": (chat(ASK), "the conversation ends before the assistant speaks", ":1"),
    "ends-asking.jsonl": (chat(ASK, SAY, ASK), "the conversation ends before the assistant speaks", ":1"),
    "only-system.jsonl": (chat(("system", "x")), "the conversation ends before the assistant speaks", ":1"),
    "begins.jsonl": (chat(SAY, ASK, SAY), "message 1 is from assistant, expected user", ":1"),
    "assistants.jsonl": (GOOD_CHAT + chat(ASK, SAY, SAY), "message 3 is from assistant, expected user", ":2"),
    "users.jsonl": (chat(ASK, ASK, SAY), "message 2 is from user, expected assistant", ":1"),
    "late-system.jsonl": (chat(ASK, ("system", "z"), SAY), "message 2 is from system, expected assistant", ":1"),
    "shape.jsonl": (row(messages=[7, TURN]), "message 1 must have role and content", ":1"),
    "unanswered.jsonl": (row(messages=["x"]), "the conversation ends before the assistant speaks", ":1"),
    "no-turns.jsonl": (row(messages=[]), "'messages' must be a list of turns", ":1"),
    "a-string.jsonl": (row(conversations="x"), "'conversations' must be a list of turns", ":1"),
    "parts.jsonl": (chat(ASK, ("assistant", [{"type": "text"}])), "must be text, found list", ":1"),
    "silent.jsonl": (chat(ASK, ("assistant", " ")), "a row without an answer: 'content of message 2'", ":1"),
    "tool.jsonl": (chat(ASK, ("tool", "42"), SAY), "nybble does not train tool calls", ":1"),
    "tool-call.jsonl": (row(messages=[TURN, TOOL_CALL]), "does not train tool calls", ":1"),
    "observation.jsonl": (
        chat(("human", "x"), ("function_call", "y"), column="conversations", keys=("from", "value")),
        "does not train tool calls",
        ":1",
    ),
    "tools.jsonl": (chat(ASK, SAY, tools="[{}]"), "the row names 'tools'", ":1"),
    "weight.jsonl": (row(messages=[TURN, {**ANSWER, "weight": 0}]), "message 2 has weight 0", ":1"),
    "untrained.jsonl": (row(messages=[TURN, {**ANSWER, "train": False}]), "message 2 has train False", ":1"),
    "control-word.jsonl": (
        chat(("user", "a [/INST] b"), SAY),
        "the user's text contains [/INST], a control word of the template llama2",
        ":1",
    ),
    "control-system.jsonl": (chat(("system", "<</SYS>>"), ASK, SAY), "the system's text contains <</SYS>>", ":1"),
}


def written(folder, name: str, content: str | bytes):
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("name", BAD)
def test_bad_data_gets_one_message_with_file_and_line(tmp_path, tiny_tokenizer, cache, name):
    content, reason, place = BAD[name]
    file = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        prepare(DataOptions(path=str(file), validation=0), tiny_tokenizer, 0, cache)
    print(caught.value)
    assert reason in caught.value.what
    if place == ":":
        assert caught.value.where.startswith(f"{file}:")
        assert int(caught.value.where.removeprefix(f"{file}:")) > 100
    else:
        assert caught.value.where == f"{file}{place}"
    assert not list(cache.glob("tokens/.*")), "something half-written is left in the cache"


def test_a_folder_of_bad_files_gives_all_their_faults_and_keeps_the_good_rows(tmp_path, tiny_tokenizer, cache):
    for name, (content, _, _) in BAD.items():
        written(tmp_path, name, content)
    options = DataOptions(path=str(tmp_path), validation=0, template="llama2")
    examined = examine(options, tiny_tokenizer, cache)
    assert examined.counts.faulty == len(BAD)
    assert examined.counts.kept >= 2, "the good rows beside the bad ones"
    assert len(examined.faults) == 20
    with pytest.raises(DataError) as caught:
        examine_rows(options, tiny_tokenizer, cache)
    print(caught.value)
    assert f"and {len(BAD) - 20} more" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        ({"question": "a", "reply": "b"}, "{prompt: question, completion: reply}"),
        ({"id": "7", "dialogue": "a", "summary": "b"}, "{prompt: dialogue, completion: summary}"),
        ({"Question": "a", "Reply": "b"}, "{prompt: Question, completion: Reply}"),
        ({"one": "a", "two": "b"}, "{prompt: one, completion: two}"),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "d"},
            "{instruction: instruction, input: context, output: response}",
        ),
        (
            {"id": "1", "system_prompt": "s", "question": "a", "response": "b"},
            "{system: system_prompt, prompt: question, completion: response}",
        ),
        ({"id": "1", "dialog": [TURN, ANSWER]}, "{messages: dialog}"),
        ({"chosen": [TURN, ANSWER], "rejected": [TURN, ANSWER]}, "{messages: chosen}"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "{completion: chosen}"),
    ],
)
def test_the_map_that_a_message_names_makes_the_row_readable(tmp_path, tiny_tokenizer, cache, values, fix):
    file = written(tmp_path, "a.jsonl", row(**values))
    with pytest.raises(DataError) as caught:
        prepare(DataOptions(path=str(file), validation=0), tiny_tokenizer, 0, cache)
    assert f"data.map={fix}" in caught.value.fix
    mapping = yaml.safe_load(fix)
    data = prepare(DataOptions(path=str(file), validation=0, map=mapping), tiny_tokenizer, 0, cache)
    assert data.counts.kept == 1


def test_a_file_of_no_known_kind_is_named(tmp_path, tiny_tokenizer, cache):
    with pytest.raises(DataError, match=r"what\.xyz is not a kind of file that nybble reads"):
        prepare(DataOptions(path=str(written(tmp_path, "what.xyz", "x"))), tiny_tokenizer, 0, cache)


def test_equal_faults_are_one_line(tmp_path, tiny_tokenizer, cache):
    good = '{"prompt": "a", "completion": "b%d"}'
    lines = [good % n for n in range(70)]
    for n in [*range(1, 61), 65, 66]:
        lines[n] = '{"prompt": "a", "completion": ""}'
    lines[30] = "\n" + lines[30]  # a blank line divides nothing
    lines[62] = '{"prompt": {"a": 1}, "completion": "b"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "scattered.jsonl").write_text("\n".join((good % n, '{"prompt": "a"}')[n % 2] for n in range(20)))
    options = DataOptions(path=str(tmp_path), validation=0, template="llama2")
    for cached in (False, True):
        examined = examine(options, tiny_tokenizer, cache)
        assert examined.cached == cached
        with pytest.raises(DataError) as caught:
            examine_rows(options, tiny_tokenizer, cache)
        print(caught.value)
        told = str(caught.value).splitlines()
        assert told[0].startswith("73 of 90 rows cannot be trained on")
        assert told[1].startswith(f"  {tmp_path}/rows.jsonl, lines 2 to 62 and 67 to 68: a row without an answer")
        assert told[2].startswith(f"  {tmp_path}/rows.jsonl:64: 'prompt' must be text")
        assert told[3].startswith(f"  {tmp_path}/scattered.jsonl, lines 2, 4, 6 and 7 more: ")
        assert len(told) == 5


def test_faults_that_differ_only_in_the_rows_value_are_one_line(tmp_path, tiny_tokenizer, cache):
    (tmp_path / "a.jsonl").write_text("".join(alpaca({"n": n}) for n in range(30)))
    (tmp_path / "b.jsonl").write_text("".join(row(messages=f"text {n}") for n in range(30)))
    (tmp_path / "c.jsonl").write_text("".join(row(messages=[{"n": n}]) for n in range(30)))
    options = DataOptions(path=str(tmp_path), validation=0, template="llama2")
    with pytest.raises(DataError) as caught:
        examine_rows(options, tiny_tokenizer, cache)
    print(caught.value)
    told = str(caught.value).splitlines()
    assert len(told) == 1 + 3 + 1
    assert told[1].endswith("'output' must be text, found dict: {'n': 0}")
    assert "c.jsonl, lines 1 to 30: message 1 must have role and content" in told[3]
