"""Files as written by spreadsheets, libraries and web pages: they are read as intended, or refused with a fix."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from nybble.data.rows.formats import Message
from nybble.data.rows.reading import OpenRows
from nybble.data.text.tokenise import Pass
from nybble.recipe import DataOptions, load_recipe

TABLE = [["instruction", "output"], ["Name a bird", "an owl, or a jay"], ["Name a fish; any", "a carp"]]
OWL = (Message("user", "Name a bird"), Message("assistant", "an owl, or a jay"))
CARP = (Message("user", "Name a fish; any"), Message("assistant", "a carp"))
BOTH = [OWL, CARP]
TURNS = [{"role": "user", "content": 'It\'s "odd"?'}, {"role": "assistant", "content": "Yes: \\d\n\u00e9"}]
ODD = (Message("user", TURNS[0]["content"]), Message("assistant", TURNS[1]["content"]))
CALLED = [{"from": "human", "value": "Name a bird"}, {"from": "gpt", "value": "an owl, or a jay"}]
OPENAI = [{"role": "user", "content": "Name a bird"}, {"role": "assistant", "content": "an owl, or a jay"}]
BIRD = {"instruction": "Name a bird", "output": "\u00e9"}
NEEDS_JQ = pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
NAMED = [{"instruction": "Name a bird", "output": "an owl, or a jay"}]
NUMBERS = "numbers, true and false are read as text"
SPELLING = "column names are matched without regard to case and spaces"
UNNAMED = "messages without roles are read as user and assistant, alternating"
PARTS, WRITTEN = "content in text parts is joined (1 row)", "turns written as text are read as turns (1 row)"
IN_TWO = "prompt and completion written as messages are read as turns (1 row)"
COLUMNS, ROWS = "empty columns at the end are ignored", "empty rows are ignored"


def table(delimiter: str = ",", end: str = "\r\n", rows=TABLE, quoted: bool = True) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if quoted or delimiter in text else text

    return "".join(delimiter.join(cell(text) for text in row) + end for row in rows)


def line(**values) -> str:
    return json.dumps(values) + "\n"


def said(question: str, answer: str, input: str = "") -> tuple[Message, Message]:
    return Message("user", question, input), Message("assistant", answer)


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "Owls",
            "paragraphs": [
                {
                    "context": "Owls fly at night.",
                    "qas": [
                        {"id": "1", "question": "When?", "answers": [{"text": "at night", "answer_start": 9}]},
                        {"id": "2", "question": "Who?", "answers": [{"text": "Owls"}, {"text": "Owls fly"}]},
                    ],
                },
                {"context": "Jays are blue.", "qas": [{"question": "Colour?", "answers": [{"text": "blue"}]}]},
            ],
        },
        {"title": "None", "paragraphs": []},
    ],
}
SQUAD_NOTICES = [
    "rows are read from 'data'",
    "SQuAD's question, context and first answer are read as instruction, input, output",
]
ASKED = [
    said("When?", "at night", "Owls fly at night."),
    said("Who?", "Owls", "Owls fly at night."),
    said("Colour?", "blue", "Jays are blue."),
]
VIEWER = {"features": [{"name": "instruction"}], "rows": [{"row_idx": 0, "row": NAMED[0], "truncated_cells": []}]}
FOUND = {
    # tables: what parts the columns
    **{
        f"said-{name}.csv": (f"sep={sign}\r\n" + table(delimiter, quoted=quoted), BOTH, [])
        for name, sign, delimiter, quoted in (
            ("semicolon", ";", ";", False), ("bar", "|", "|", False), ("tab", "\t", "\t", True), ("tab-name", r"\t", "\t", True),
            ("comma", ",", ",", True), ("caret", "^", "^", False),
        )
    },
    "said-loudly.csv": ("\ufeffSEP=;\n" + table(";", "\n"), BOTH, []),
    "said-in-quotes.csv": ('"sep=;"\r' + table(";", "\r"), BOTH, []),
    "said-and-saved-again.csv": ("sep=,,\n" + table(",", "\n"), BOTH, []),
    "said-in.tsv": ("sep=;\n" + table(";", "\n"), BOTH, []),
    "tabs.csv": (table("\t", quoted=False), BOTH, []),
    "bars.csv": (table("|", quoted=False), BOTH, []),
    "commas.tsv": (table(","), BOTH, []),
    "bars.tsv": (table("|"), BOTH, []),
    "comma-in-a-quoted-header.csv": (
        '"instruction";"output";"seen by, and when"\r\nName a bird;an owl, or a jay;me\r\n', [OWL], [],
    ),
    "commas-in-a-bare-header.csv": (
        "instruction;output;seen by, when, why\nName a bird;an owl, or a jay;me\nName a bird;a crow;no\n",
        [OWL, said("Name a bird", "a crow")], [],
    ),
    "semicolon-in-a-quoted-header.csv": ('"output","instruction","a; b; c"\na,b,"c; d; e"\n', [said("b", "a")], []),
    "bar-in-a-header.tsv": ("instruction\toutput\ta|b, c\nName a bird\tan owl, or a jay\tx\n", [OWL], []),
    "one-column.csv": ("text\n\"an owl; a jay | a carp\"\n", [(Message("text", "an owl; a jay | a carp"),)], []),
    # tables: what ends the lines
    "old-mac.csv": (table(",", "\r"), BOTH, []),
    "old-mac.tsv": (table("\t", "\r").rstrip("\r"), BOTH, []),
    "old-mac-cells.csv": ('instruction,output\r"two\nlines",a\rb,c\r', [said("two\nlines", "a"), said("b", "c")], []),
    "mixed-ends.csv": ('instruction,output\r\n"one\rtwo",a\nb,c\r', [said("one\rtwo", "a"), said("b", "c")], []),
    "old-mac.jsonl": ((line(**NAMED[0]) + line(instruction="b", output="c")).replace("\n", "\r"), [OWL, said("b", "c")], []),
    "blank-above.csv": ("\n\n" + table(",", "\n"), BOTH, []),
    "marked.csv": ("\ufeff" + table(";"), BOTH, []),
    # tables: what a spreadsheet leaves behind
    "empty-columns.csv": ("instruction,output,,\r\na,b,,\r\nc,d,,\r\n", [said("a", "b"), said("c", "d")], [COLUMNS]),
    "empty-rows.csv": ("instruction,output\na,b\n,\n , \nc,d\n,\n", [said("a", "b"), said("c", "d")], [ROWS]),
    "empty-both.csv": ("sep=;\ninstruction;output;\na;b;\n;;\n", [said("a", "b")], [COLUMNS, ROWS]),
    "empty-unnamed.csv": ("instruction,output\na,b,,\nc,d\n", [said("a", "b"), said("c", "d")], [COLUMNS]),
    "empty-shorter.csv": ("instruction,output,,\na,b\n", [said("a", "b")], [COLUMNS]),
    "empty.tsv": ("instruction\toutput\t\t\na\tb\t\t\n", [said("a", "b")], [COLUMNS]),
    "numbered.csv": (",instruction,output\n0,a,b\n1,c,d\n", [said("a", "b"), said("c", "d")], []),
    "spaced.csv": ('Instruction, Output\na, "b, c"\n', [said("a", "b, c")], [f"{SPELLING} (1 row)"]),
    # names
    "capitals.jsonl": (line(Instruction="a", INPUT="i", Output="b"), [said("a", "b", "i")], [f"{SPELLING} (1 row)"]),
    "capital.jsonl": (line(instruction="a", Input="i", output="b"), [said("a", "b", "i")], [f"{SPELLING} (1 row)"]),
    "both-spellings.jsonl": (line(prompt="a", Prompt="x", completion="b"), [said("a", "b")], []),
    # turns as text
    "json-cells.csv": (table(rows=[["messages"], [json.dumps(TURNS)]]), [ODD], [WRITTEN]),
    "python-cells.csv": (table(rows=[["messages"], [repr(TURNS)]]), [ODD], [WRITTEN]),
    "python-cells.tsv": (table("\t", rows=[["id", "conversations"], ["7", repr(CALLED)]]), [OWL], [WRITTEN]),
    "python-constants.csv": (
        table(rows=[["messages"], [repr([{**turn, "name": None, "train": True} for turn in OPENAI])]]), [OWL], [WRITTEN],
    ),
    "python-escapes.csv": (table(rows=[["messages"], [repr(OPENAI).replace("bird", r"\bird\d")]]),
                           [said("Name a \bird\\d", "an owl, or a jay")], [WRITTEN]),
    "json-text.jsonl": (line(messages=json.dumps(TURNS)), [ODD], [WRITTEN]),
    "python-text.jsonl": (line(conversations=repr(CALLED)), [OWL], [WRITTEN]),
    "json-turns.jsonl": (line(messages=[json.dumps(turn) for turn in TURNS]), [ODD], [WRITTEN]),
    "unnamed-turns.jsonl": (line(messages=["a", "b", "[c]", "d"]),
                            [(*said("a", "b"), *said("[c]", "d"))], [f"{UNNAMED} (1 row)"]),
    "history.csv": (table(rows=[["instruction", "output", "history"], ["c", "d", "[['a', 'b']]"], ["e", "f", ""]]),
                    [(*said("a", "b"), *said("c", "d")), said("e", "f")], [WRITTEN]),
    # turns as a prompt and a completion
    "trl.jsonl": (line(prompt=[{"role": "system", "content": "s"}, *OPENAI[:1]], completion=OPENAI[1:]),
                  [(Message("system", "s"), *OWL)], [IN_TWO]),
    "trl-half.jsonl": (line(prompt="Name a bird", completion=OPENAI[1:]), [OWL], [IN_TWO]),
    "trl-other-half.jsonl": (line(prompt=OPENAI[:1], completion="an owl, or a jay"), [OWL], [IN_TWO]),
    "trl-system.jsonl": (line(prompt=OPENAI[:1], completion=OPENAI[1:], system="s"), [(Message("system", "s"), *OWL)], [IN_TWO]),
    "trl.csv": (table(rows=[["prompt", "completion"], [repr(OPENAI[:1]), repr(OPENAI[1:])]]), [OWL], [IN_TWO]),
    "brackets.csv": (table(rows=[["prompt", "completion"], ["[1, 2]", json.dumps(OPENAI)]]),
                     [said("[1, 2]", json.dumps(OPENAI))], []),
    # parts
    "parts.jsonl": (line(messages=[{"role": "user", "content": parts("Name ", "a bird")},
                                   {"role": "assistant", "content": parts("an owl, or a jay")}]), [OWL], [PARTS]),
    "parts-and-texts.jsonl": (line(messages=[{"role": "system", "content": []}, {"role": "user", "content": parts("Name a bird")},
                                             OPENAI[1]]), [OWL], [PARTS]),
    "parts.csv": (table(rows=[["messages"], [repr([{"role": "user", "content": parts("Name a bird")}, OPENAI[1]])]]),
                  [OWL], [WRITTEN, PARTS]),
    "no-pictures.jsonl": (line(**NAMED[0], images=[], audio=None), [OWL], []),
    # numbers
    "numbers.jsonl": (line(instruction="2+2", output=4) + line(prompt=7, completion=True) + line(instruction="x", output=0.5)
                      + line(messages=[OPENAI[0], {"role": "assistant", "content": 2}]),
                      [said("2+2", "4"), said("7", "true"), said("x", "0.5"), said("Name a bird", "2")], [f"{NUMBERS} (4 rows)"]),
    "no.jsonl": (line(instruction="Is it?", output=False), [said("Is it?", "false")], [f"{NUMBERS} (1 row)"]),
    # rows inside something
    "data.json": (json.dumps({"version": 1, "data": NAMED}), [OWL], ["rows are read from 'data'"]),
    "pretty-data.json": (json.dumps({"data": NAMED}, indent=2), [OWL], ["rows are read from 'data'"]),
    "data.jsonl": (json.dumps({"Examples": NAMED}), [OWL], ["rows are read from 'Examples'"]),
    "split.json": (json.dumps({"test": [{"text": "x"}], "train": NAMED, "about": {"by": "me"}}),
                   [OWL], ["rows are read from 'train', not from 'test'"]),
    "viewer.json": (json.dumps(VIEWER), [OWL], ["rows are read from 'rows'"]),
    "viewer-turns.json": (json.dumps({"rows": [{"row": {"messages": OPENAI}}]}, indent=1), [OWL], ["rows are read from 'rows'"]),
    "squad.json": (json.dumps(SQUAD), ASKED,
                   SQUAD_NOTICES),
    "squad-pretty.json.gz": (gzip.compress(json.dumps(SQUAD, indent=1).encode()), ASKED,
                             SQUAD_NOTICES),
    "one-row.json": (json.dumps({"messages": OPENAI, "data": {"x": 1}}), [OWL], []),
    "array.jsonl": (json.dumps(NAMED, indent=2), [OWL], []),
    "array-on-a-line.jsonl": (json.dumps(NAMED) + "\n", [OWL], []),
    # names of files
    "ROWS.JSONL.GZ": (gzip.compress(line(**NAMED[0]).encode()), [OWL], []),
    "Rows.JSON.Gz": (gzip.compress(json.dumps(NAMED).encode()), [OWL], []),
    "ROWS.CSV": (table(), BOTH, []),
    "ROWS.TSV.GZ": (gzip.compress(table("\t").encode()), BOTH, []),
    "ROWS.TXT": ("an owl\r", [(Message("text", "an owl\n"),)], []),
}  # fmt: skip


def written(folder, name: str, content: str | bytes):
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def read(options: DataOptions) -> tuple[list, Pass]:
    with OpenRows(options) as rows:
        reading = Pass(rows.forms, None, options)
        return [found.conversation for found in reading.conversations(rows.items())], reading


@pytest.mark.parametrize("name", FOUND)
def test_a_file_is_read_as_it_was_meant(tmp_path, name):
    content, expected, notices = FOUND[name]
    file = written(tmp_path, name, content)
    found, reading = read(DataOptions(path=str(file)))
    assert not reading.faults, reading.faults[0]
    assert found == expected
    told = [notice.removeprefix(f"{name}: ") for notice in reading.counts.notice_lines()]
    assert sorted(told) == sorted(notices)


def test_every_row_has_its_own_origin(tmp_path):
    """Held-out rows are identified by their origins, and a fault in a file of one line is found by the row's number."""
    for name, content, places in (
        ("sep.csv", "sep=;\n\ninstruction;output\na;\"b\nc\"\nd;e\n", [":4", ":6"]),
        ("mac.csv", "instruction,output\ra,b\rc,d", [":2", ":3"]),
        ("one-line.json", json.dumps(NAMED * 3), [":1", ":1, row 2", ":1, row 3"]),
        ("pretty.json", json.dumps({"data": NAMED * 2}, indent=1), [":3", ":7"]),
        ("squad.json", json.dumps(SQUAD), [":1, question 1", ":1, question 2", ":1, question 3"]),
        ("mac.jsonl", '{"text": "a"}\r{"text": "b"}\r', [":1", ":2"]),
    ):  # fmt: skip
        file = written(tmp_path, name, content)
        with OpenRows(DataOptions(path=str(file))) as rows:
            origins = [item.origin for item in rows.items() if hasattr(item, "origin")]
        assert [origin.removeprefix(str(file)) for origin in origins] == places, name


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "1f" * 32 + "\nsize 2100000000\n"
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/owl.png"}}
REFUSED = {
    **{
        f"pointer.{ending}": (POINTER, "is a git-lfs pointer: the file itself (2.1 GB)", "lfs pull")
        for ending in ("csv", "jsonl", "json", "parquet", "txt", "jsonl.gz", "JSON.GZ")
    },
    "pretty.jsonl": (json.dumps(NAMED[0], indent=2) + "\n" + json.dumps(NAMED[0], indent=4),
                     "span several lines", "jq -c ."),
    "pretty-one.jsonl": (json.dumps(NAMED[0], indent=2), "one object over several lines", "jq -c ."),
    "pretty-commas.json": ('{"text":\n"a"},\n{"text":\n"b"}', "span several lines", "jq -c ."),
    "pretty-broken.jsonl": ('{\n  "instruction": "a"\n  "output": "b"\n}\n', "not valid JSON: Expecting ',' delimiter", ""),
    "pretty-inside.json": (json.dumps({"mine": NAMED}, indent=1), "one object over several lines", "'.\"mine\"[]'"),
    "inside.json": (json.dumps({"mine": NAMED}), "unknown fields: found 'mine'", "the rows are in .\"mine\": jq"),
    "two-deep.json": (json.dumps({"data": {"train": NAMED}}), "unknown fields: found 'data'", "jq -c '.\"data\".\"train\"[]'"),
    "two-deep-pretty.json": (json.dumps({"data": {"train": NAMED}}, indent=1),
                             "one object over several lines", "jq -c '.\"data\".\"train\"[]'"),
    "columns.json": (json.dumps({"instruction": {"0": "a"}, "output": {"0": "b"}}),
                     "contains columns (instruction, output)", "pandas"),
    "cut-by-viewer.json": (
        json.dumps({"rows": [{"row": NAMED[0], "truncated_cells": ["output"]}]}), "viewer has truncated output", "from the Hub",
    ),
    "squad-broken.json": (json.dumps({"data": [{"paragraphs": [{"qas": [{}]}]}]}), "not an article in SQuAD's format", ""),
    "squad-silent.json": (
        json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]}),
        "a row without an answer", "",
    ),
    "squad-rows.jsonl": (
        line(id="1", title="Owls", context="c", question="q", answers={"text": ["a"], "answer_start": [0]}),
        "unknown fields", "completion: COLUMN",
    ),
    # parts and columns that are not text
    "picture.jsonl": (line(messages=[{"role": "user", "content": [*parts("See"), PICTURE]}, OPENAI[1]]),
                      "'content of message 1' has a part of type image_url: nybble trains on text only", "remove"),
    "sound.jsonl": (line(messages=[OPENAI[0], {"role": "assistant", "content": [{"type": "input_audio", "input_audio": {}}]}]),
                    "'content of message 2' has a part of type input_audio", "remove"),
    "call.jsonl": (line(messages=[OPENAI[0], {"role": "assistant", "content": [{"type": "tool_use", "input": {}}]}]),
                   "has a part of type tool_use: nybble does not train tool calls", "write the calls as text"),
    "images.jsonl": (line(**NAMED[0], images=["owl.png"]), "the row has 'images': nybble trains on text only", "remove"),
    "image.csv": ("text,image\nan owl,owl.png\n", "the row has 'image'", "remove"),
    "images-in-turn.jsonl": (line(messages=[{**OPENAI[0], "images": ["x"]}, OPENAI[1]]), "message 1 has 'images'", "remove"),
    # turns that are none
    "numpy.csv": (table(rows=[["messages"], [f"[{OPENAI[0]}\n {OPENAI[1]}]"]]),
                  "neither JSON nor a list as Python prints it", "orient="),
    "prose.csv": ("messages\nhello\n", "'messages' must be a list of turns", "orient="),
    "object.csv": (table(rows=[["messages"], [json.dumps(OPENAI[0])]]), "'messages' must be a list of turns", ""),
    # tables
    "lost-answer.csv": ("instruction,output,\na,b, and more\n", "3 fields, but the header has 2", "commas"),
    "short.csv": ("instruction;output\na\n", "1 field, but the header has 2", "semicolons"),
    "twins.csv": ("instruction,output,output\na,b,c\n",
                  "two columns of the header have the same name: 'output'", "a different name"),
    "only-empty.csv": (",,\n,,\n", "there are no rows in the file", ""),
    # files that are something else
    "sheet.csv": (b"PK\x03\x04\x14\x00\x06\x00", "a zip archive or an Excel workbook", "as CSV"),
    "packed.jsonl": (gzip.compress(b"{}"), "compressed with gzip", ".gz"),
    "paper.txt": (b"%PDF-1.7\n\xe2\xe3", "a PDF", "text"),
    "table.json": (b"PAR1\x15\x04", "a parquet file", ".parquet"),
    "page.json": ("\n<!DOCTYPE html><html>", "a web page, not data", "/resolve/"),
    "wide.json": (json.dumps(NAMED).encode("utf-32"), "UTF-32, not UTF-8", "iconv -f UTF-32"),
    "latin.csv": ("instruction,output\nun caf\u00e9,b\n".encode("cp1252"),
                  "not UTF-8: byte 0xe9 at position 7", "iconv -f WINDOWS-1252"),
    "wide-unmarked.json": (json.dumps(NAMED).encode("utf-16-be"), "UTF-16BE, not UTF-8", "iconv -f UTF-16BE"),
    "wide-unmarked.csv": (table().encode("utf-32-le"), "UTF-32LE, not UTF-8", "iconv -f UTF-32LE"),
    "marked-page.json": (codecs.BOM_UTF8 + b"<html>", "a web page, not data", "/resolve/"),
    "plain.csv.gz": (table().encode(), "not compressed with gzip", "remove .gz from its name"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_fault_with_a_fix(tmp_path, name):
    content, reason, fix = REFUSED[name]
    file = written(tmp_path, name, content)
    found, reading = read(DataOptions(path=str(file)))
    assert not found
    (fault,) = reading.faults
    print(fault)
    assert reason in fault.what
    assert str(file) in fault.where
    assert fix in (fault.fix or "")


def pasted(reading, folder) -> None:
    """Run the command that a fix names, in its own folder."""
    (fault,) = reading.faults
    command = re.search(r"(gzip|jq|iconv|python) -.*", fault.fix)[0].replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-ec", f"set -o pipefail; {command}"], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a's.csv", table(rows=[TABLE[0], ["Name a bird", "\u00e9"]]).encode("cp1252")),
        ("a's.csv.GZ", gzip.compress(table(rows=[TABLE[0], ["Name a bird", "\u00e9"]]).encode("cp1252"))),
        ("a.jsonl.gz", gzip.compress(line(instruction="Name a bird", output="\u00e9").encode("utf-16"))),
        ("$a `b`.jsonl", line(instruction="Name a bird", output="\u00e9").encode("utf-16-le")),
        ("it's $HOME.json", json.dumps({"instruction": {"0": "Name a bird"}, "output": {"0": "\u00e9"}})),
        ("a.json.gz", gzip.compress(json.dumps({"instruction": {"0": "Name a bird"}, "output": {"0": "\u00e9"}}).encode())),
        pytest.param("a's.jsonl.gz", gzip.compress(json.dumps({**BIRD, "id": 1}, indent=1).encode() * 2), marks=NEEDS_JQ),
        pytest.param("a.json.gz", gzip.compress(json.dumps({"it's \"so\"": [BIRD]}).encode()), marks=NEEDS_JQ),
        pytest.param("a.json", json.dumps({"data": {"it's": [BIRD], "train": [BIRD]}}, indent=1), marks=NEEDS_JQ),
    ],
    ids=range(9),  # gzip writes the time into its files, and processes that share the tests must name them alike
)  # fmt: skip
def test_a_command_that_is_offered_can_be_pasted_and_makes_the_file_readable(tmp_path, name, content):
    file = written(tmp_path, name, content)
    _, reading = read(DataOptions(path=str(file)))
    print(reading.faults[0])
    pasted(reading, tmp_path)
    new = next(tmp_path.glob("NEW*"))
    new = (
        new.rename(tmp_path / f"NEW{file.name.removesuffix('.GZ').removesuffix('.gz')[-6:]}") if not new.suffix else new
    )
    found, reading = read(DataOptions(path=str(new)))
    assert not reading.faults
    assert found[0] == said("Name a bird", "\u00e9")


@pytest.mark.parametrize(
    ("values", "mapping"),
    [
        ({"Question ": "a", "Answer: long": "b"}, {"prompt": "Question ", "completion": "Answer: long"}),
        ({"what's": "a", "yes": "b"}, {"prompt": "what's", "completion": "yes"}),
        ({"question": "2+2", "answer": 4}, {"prompt": "question", "completion": "answer"}),
        ({"dialog": json.dumps(OPENAI), "topic": "x"}, {"messages": "dialog"}),
        ({"prompt": OPENAI[:1], "chosen": OPENAI[1:], "rejected": OPENAI[1:]}, {"completion": "chosen"}),
        ({"body": "a"}, {"text": "body"}),
    ],
)
def test_a_map_that_is_offered_can_be_pasted_and_reads_the_row(tmp_path, values, mapping):
    file = written(tmp_path, "a.jsonl", line(**values))
    _, reading = read(DataOptions(path=str(file)))
    word = next(word for word in shlex.split(reading.faults[0].fix) if word.startswith("data.map="))
    options = load_recipe(None, [f"data.path={file}", word]).data
    assert options.map == mapping
    found, reading = read(options)
    assert len(found) == 1, reading.faults


@pytest.mark.parametrize(
    "values",
    [
        {"version": "1.1", "mine": [{"title": "t"}]},
        {"id": 3, "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}},
        {"question": "q", "meta": {"a": 1}},
        {"features": [{"name": "a"}], "rows": []},
        {},
    ],
)
def test_no_map_is_suggested_for_columns_without_turns(tmp_path, values):
    _, reading = read(DataOptions(path=str(written(tmp_path, "a.jsonl", line(**values) * 2))))
    fix = reading.faults[0].fix
    print(reading.faults[0])
    for word in [word for word in shlex.split(fix) if word.startswith("data.map=")]:
        mapped = load_recipe(None, [word]).data.map
        assert "messages" not in mapped
        assert all(isinstance(values.get(column, ""), str) for column in mapped.values())
        assert "COLUMN" in mapped.values(), "what is not known is left to the user"


def test_a_missing_column_among_good_rows_is_named(tmp_path):
    file = written(tmp_path, "a.jsonl", line(**NAMED[0]) + line(instruction="a", note="b"))
    _, reading = read(DataOptions(path=str(file)))
    assert reading.faults[0].fix == "add 'output', or delete the row"


def test_a_mapped_name_is_found_whatever_its_capitals_and_spaces(tmp_path):
    file = written(tmp_path, "a.csv", "Frage, Antwort\na, b\n")
    found, reading = read(DataOptions(path=str(file), map={"prompt": "frage", "completion": " Antwort"}))
    assert found == [said("a", "b")]
    assert not reading.counts.missing_columns


def test_parquet_may_contain_numbers_parts_and_names_in_capitals(tmp_path):
    rows = [
        {"Prompt": "a", "Completion": 1.5},
        {"Prompt": "b", "Completion": None},
        {"Prompt": "c", "Completion": float("nan")},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.PARQUET")
    found, reading = read(DataOptions(path=str(tmp_path / "a.PARQUET")))
    assert found == [said("a", "1.5")]
    assert ["a row without an answer" in fault.what for fault in reading.faults] == [True, False]
    assert "found NaN" in reading.faults[1].what
    answer = [{"type": "text", "text": "b", "url": None}]
    turns = [{"role": "user", "content": parts("a")}, {"role": "assistant", "content": answer}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "b.parquet")
    assert read(DataOptions(path=str(tmp_path / "b.parquet")))[0] == [said("a", "b")]


def test_a_folder_takes_files_whose_endings_are_in_capitals(tmp_path):
    written(tmp_path, "A.JSONL.GZ", gzip.compress(line(text="a").encode()))
    written(tmp_path, "B.CSV", "text\nb\n")
    assert len(read(DataOptions(path=str(tmp_path)))[0]) == 2


def test_a_large_object_around_the_rows_is_read_in_chunks_of_any_size_in_little_memory(tmp_path, monkeypatch):
    inside = [{"prompt": f'\u00e9 " {n}', "completion": "x" * (n + 1)} for n in range(40)]
    whole = {"n": 12345.678, "none": None, "other": [1, 2.5, "a", [], {}], "train": inside, "after": {"b": [True]}}
    for text in (json.dumps(whole), json.dumps(whole, indent=1)):
        file = written(tmp_path, "a.json", text)
        for size in (1, 2, 3, 7, 64, 1000):
            monkeypatch.setattr("nybble.data.rows.readers.json_text.CHUNK", size)
            found, reading = read(DataOptions(path=str(file)))
            assert not reading.faults
            assert [question.content for question, _ in found] == [row["prompt"] for row in inside]
