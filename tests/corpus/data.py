"""Data files that are damaged, hostile or odd; each is looked at by `nybble data check FILE`, or by the function behind it."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import os
import pathlib
import stat
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet

from corpus.cases import Case

Content = str | bytes
ROW = {"instruction": "say hi", "output": "hi"}
GOOD = json.dumps(ROW) + "\n"
OTHER = GOOD.replace("say", "tell")
HEAD = "instruction,output\n"
READ = "readable; add MODEL"


def file(name: str, content: Content, status: int, *names: str, title: str = "") -> Case:
    """A case of one file with that content."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return Case(title or name, make, status, names)


def line(text: Content, *names: str, title: str, status: int = 1) -> Case:
    """A line between two good ones: it alone is bad, at :2."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    content = GOOD.encode() + raw + b"\n" + OTHER.encode()
    return file("rows.jsonl", content, status, *([*names, "rows.jsonl:2"] if status else names), title=f"line-{title}")


def answer(output: str, *names: str, title: str) -> Case:
    """A row whose answer is that JSON."""
    return line(f'{{"instruction": "a", "output": {output}}}', *names, title=title)


def unused(value: str, *names: str, title: str, status: int = 0) -> Case:
    """A row that has that JSON in a column which nothing reads."""
    return line(f'{{"instruction": "a", "output": "b", "id": {value}}}', *names, title=f"unused-{title}", status=status)


def parquet(columns: dict[str, Any] | pyarrow.Table, **options: Any) -> bytes:
    """A parquet file."""
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue()


def feather(columns: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pyarrow.table(columns), sink, compression="uncompressed")
    return sink.getvalue()


def special(name: str, make: Callable[[pathlib.Path], object], *names: str, status: int = 1, title: str = "") -> Case:
    """A case of something made in the folder under that name."""

    def place(folder: pathlib.Path) -> pathlib.Path:
        make(folder / name)
        return folder / name

    return Case(title or f"special-{name}", place, status, names)


# JSON, a line at a time ----------------------------------------------------------------------------------------------
DIGITS = "9" * 5000
LINES = [
    answer(DIGITS, "an integer of 5,000 digits; 4,300 is the limit", title="digits"),
    answer(f"-{DIGITS}", "an integer of 5,000 digits", title="negative-digits"),
    answer(f"[{DIGITS}]", "an integer of 5,000 digits", title="digits-in-a-list"),
    unused(DIGITS, "an integer of 5,000 digits", title="digits", status=1),
    answer("1e999", "'output' must be text, found float: inf", title="1e999"),
    answer("-1e999", "found float: -inf", title="minus-1e999"),
    unused("1e999", "rows 3: 3 alpaca", title="1e999"),
    unused("9" * 400, "rows 3: 3 alpaca", title="400-digits"),
    line('{"instruction": "a", "output": ' + "9" * 400 + "}", "are read as their text (1 row)", title="400-digits", status=0),
    answer("NaN", "NaN is not JSON", title="nan"),
    answer("Infinity", "Infinity is not JSON", title="infinity"),
    answer("-Infinity", "-Infinity is not JSON", title="minus-infinity"),
    unused("NaN", "NaN is not JSON", title="nan", status=1),
    answer('"a\\ud800b"', "'output' contains half a surrogate pair", title="high-surrogate"),
    answer('"a\\udc00b"', "'output' contains half a surrogate pair", title="low-surrogate"),
    answer('"\\udc00\\ud800"', "half a surrogate pair", title="surrogates-swapped"),
    unused('"\\ud800"', "rows 3: 3 alpaca", title="surrogate"),
    line('{"\\ud800": 1}', "unknown fields: found '\\ud800'", title="surrogate-as-a-name"),
    line('{"instruction": "a", "output": "b", "\\ud800": 1}', READ, title="surrogate-as-an-unused-name", status=0),
    line('{"messages": [{"role": "\\ud800", "content": "a"}]}', "role '\\ud800' is not one of", title="surrogate-as-a-role"),
    answer('"a\\u0000b"', "'output' contains a null character", title="null-escaped"),
    line('{"instruction": "a", "output": "b\0"}', "a null byte", title="null-byte"),
    line("\0" * 500, "a null byte", title="nulls"),
    answer('"a\tb"', "Invalid control character", title="bare-tab"),
    answer('"a\\xb"', "Invalid \\escape", title="bad-escape"),
    answer('"a\\u12"', "Invalid \\uXXXX escape", title="short-escape"),
    answer('"a', "Unterminated string", title="open-string"),
    answer("01", "Expecting ',' delimiter", title="leading-zero"),
    answer("+1", "Expecting value", title="plus"),
    answer(".5", "Expecting value", title="bare-point"),
    answer("1.", "Expecting ',' delimiter", title="trailing-point"),
    answer("0x10", "Expecting ',' delimiter", title="hexadecimal"),
    answer("tru", "Expecting value", title="half-a-word"),
    answer("None", "Expecting value", title="python-none"),
    answer("undefined", "Expecting value", title="undefined"),
    answer("'b'", "Expecting value", title="single-quotes"),
    answer("", "Expecting value", title="no-value"),
    line('{"instruction": "a", "output": "b",}', "not valid JSON", title="trailing-comma"),
    line('{"instruction": "a" "output": "b"}', "Expecting ',' delimiter", title="no-comma"),
    line('{"instruction": "a", "output": "b"}}', "Extra data", title="one-brace-more"),
    line('{"instruction": "a", "output": "b"', "Expecting ',' delimiter", title="one-brace-less"),
    line(GOOD.strip() + GOOD.strip(), "Extra data", title="two-in-one"),
    line("{instruction: 'a'}", "Expecting property name", title="bare-names"),
    line("// a comment", "Expecting value", title="comment"),
    line("# a comment", "Expecting value", title="hash-comment"),
    line("data: " + GOOD.strip(), "Expecting value", title="server-sent"),
    line("---", "Expecting value", title="yaml"),
    line("<row/>", "Expecting value", title="xml"),
    line("3", "must be an object with named fields, not int", title="number"),
    line('"text"', "must be an object with named fields, not str", title="string"),
    line("null", "must be an object with named fields, not NoneType", title="null"),
    line("true", "must be an object with named fields, not bool", title="true"),
    line("[]", "must be an object with named fields, not list", title="list"),
    line('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply", title="deep-objects"),
    line("[" * 5000 + "]" * 5000, "nested too deeply", title="deep-lists"),
    answer("[" * 200 + "]" * 200, "'output' must be text, found list", title="200-lists-deep"),
    answer("[" * 700 + "]" * 700, "'output' must be text, found list", title="700-lists-deep"),
    unused("[" * 300 + "]" * 300, READ, title="300-lists-deep"),
    line(b'{"instruction": "\xff", "output": "b"}', "not UTF-8: byte 0xff at position 18", title="byte-ff"),
    line(b'{"instruction": "\xc0\xaf", "output": "b"}', "not UTF-8: byte 0xc0", title="overlong"),
    line(b'{"instruction": "\xed\xa0\x80", "output": "b"}', "not UTF-8: byte 0xed", title="surrogate-in-bytes"),
    line(b'{"instruction": "\xf4\x90\x80\x80", "output": "b"}', "not UTF-8: byte 0xf4", title="beyond-unicode"),
    line(b'{"instruction": "\xe2\x82', "not UTF-8: byte 0xe2", title="half-a-character"),
    line('{"' + '": 1, "'.join(f"c{n}" for n in range(5000)) + '": 1}', "found 'c0', 'c1'", "and 4,988 more", title="5000-columns"),
    line('{"' + "x" * 100_000 + '": 1}', "unknown fields", title="long-name"),
    line('{"": 1}', "unknown fields", title="empty-name"),
    # item 10: what could be read in two ways
    line('{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' stands twice in one object",
         title="key-twice"),
    line('{"output": "b", "instruction": "a", "output": "b"}', "the key 'output' stands twice", title="key-twice-alike"),
    line('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "the key 'role' stands twice",
         title="key-twice-in-a-turn"),
    unused('{"a": 1, "a": 2}', "the key 'a' stands twice", title="key-twice", status=1),
    answer('"\\u200b"', "a row without an answer", title="zero-width-space"),
    answer('"\\u200b\\u200c\\u200d\\u2060\\ufeff"', "a row without an answer", title="zero-width-all"),
    answer('"\\u00ad"', "a row without an answer", title="soft-hyphen"),
    answer('"\\u202e\\u2066"', "a row without an answer", title="directions"),
    answer('"\\u0007\\u001b"', "a row without an answer", title="bells"),
    answer('" \\u00a0\\u3000\\t"', "a row without an answer", title="wide-spaces"),
    answer('"\\u3164\\u115f"', "a row without an answer", title="hangul-fillers"),
    answer('"\\u2800"', "a row without an answer", title="braille-blank"),
    answer('"\\ufe0f"', "a row without an answer", title="variation-selector"),
    line('{"instruction": "\\u200b", "output": "b"}', "an empty 'instruction'", title="zero-width-question"),
    line('{"text": "\\ufeff"}', "an empty 'text'", title="zero-width-document"),
    line('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\u200b"}]}',
         "a row without an answer: 'content of message 2'", title="zero-width-turn"),
    line('{"instruction": "a", "output": "\\ud83d\\ude00"}', READ, title="one-emoji", status=0),
    line('{"instruction": "a", "output": "\\u200bx"}', READ, title="zero-width-and-more", status=0),
]  # fmt: skip

# JSON of other shapes ------------------------------------------------------------------------------------------------
LIST = json.dumps([ROW, {**ROW, "output": "b"}])
SHAPES = [
    file("cut.json", LIST[: len(LIST) // 2], 1, "not valid JSON", "cut.json:1", title="array-cut-in-a-row"),
    file("cut.json", LIST[:-1], 1, "the array is not closed", title="array-not-closed"),
    file("cut.json", "[", 1, "cut.json:1", title="array-begun"),
    file("a.json", "[]", 1, "there are no rows", title="array-empty"),
    file("a.json", "[,]", 1, "not valid JSON", title="array-of-a-comma"),
    file("a.json", LIST[:-1] + ",]", 1, "not valid JSON", title="array-trailing-comma"),
    file("a.json", LIST.replace("}, {", "} {"), 1, "Expecting ',' or ']' after a row", title="array-no-comma"),
    file("a.json", LIST * 2, 1, "text after the end of the array", title="array-twice"),
    file("a.json", f'[{{"instruction": "a",\n"output": {DIGITS}}}]', 1, "an integer of 5,000 digits", "a.json:1",
         title="array-digits"),
    file("a.json", "[" + '{"a":' * 5000, 1, "nested too deeply", "a.json:1", title="array-deep"),
    file("a.json", '[\n{"output": "b", "instruction": "a", "output": "c"},\n' + GOOD + "]", 1,
         "the key 'output' stands twice", "a.json:2", title="array-key-twice"),
    file("a.json", "[1, 2]", 1, "2 of 2 rows", "not int", title="array-of-numbers"),
    file("a.json", b'[{"instruction": "\xff"}]', 1, "not UTF-8: byte 0xff", "a.json:1", title="array-not-utf8"),
    file("a.json", "[\0]", 1, "a null byte", title="array-null"),
    file("a.json", "nul", 1, "not valid JSON", title="json-half-a-word"),
    file("a.json", "}", 1, "not valid JSON", title="json-a-brace"),
    file("a.json", "{", 1, "not valid JSON", title="json-begun"),
    file("a.json", "{}", 1, "unknown fields: found none", title="json-empty-object"),
    file("a.json", json.dumps({"data": []}), 1, "unknown fields: found 'data'", title="wrapped-nothing"),
    file("a.json", json.dumps({"data": [ROW]})[:-1], 1, "not valid JSON", title="wrapped-not-closed"),
    file("a.json", f'{{"data": [{json.dumps(ROW)}, 3]}}', 1, "not int", "row 2", title="wrapped-a-number"),
    file("a.json", '{"data": [{"instruction": "a", "output": "b", "output": "c"}]}', 1, "the key 'output' stands twice",
         title="wrapped-key-twice"),
    file("a.json", '{"rows": [{"row": {"text": "a"}, "truncated_cells": "x"}]}', 1, "viewer has truncated cells",
         title="wrapped-truncated"),
    file("a.json", '{"rows": [{"row": {"text": "a"}, "truncated_cells": ["\\ud800"]}]}', 1, "truncated '\\ud800'",
         title="wrapped-truncated-surrogate"),
    file("a.json", '{"\\ud800": [{"a": 1}]}', 1, "unknown fields: found '\\ud800'", title="wrapped-surrogate"),
    file("a.json", '{"data": [{"paragraphs": [3]}]}', 1, "not an article of SQuAD's form", title="squad-number"),
    file("a.json", '{"data": [{"paragraphs": [{"qas": [{"question": "q", "answers": {"text": 1}}], "context": "c"}]}]}', 1,
         "not an article of SQuAD's form", title="squad-answers-an-object"),
    file("a.jsonl", "\n\n\n", 1, "there are no rows in the file", title="blank-lines"),
    file("a.jsonl", "\ufeff", 1, "there are no rows", title="only-a-mark"),
    file("a.jsonl", "\ufeff" + GOOD, 0, "rows 1: 1 alpaca", title="a-mark-and-a-row"),
    file("a.jsonl", GOOD + "\x1a", 1, "not valid JSON", "a.jsonl:2", title="ctrl-z"),
    file("a.jsonl", GOOD.strip() + "\u2028" + OTHER, 1, "Extra data", title="line-separator"),
    file("a.jsonl", GOOD + "\n" * 2000 + '{"a"', 1, "a.jsonl:2002", title="far-below"),
    file("a.jsonl", GOOD[:-9], 1, "Unterminated string", "a.jsonl:1", title="cut-in-the-last-row"),
    file("a.jsonl", GOOD.encode("utf-16"), 1, "the file is UTF-16", title="utf16"),
    file("a.jsonl", GOOD.encode("utf-32-be"), 1, "the file is UTF-32BE", title="utf32-unmarked"),
    file("a.jsonl", GOOD.encode("utf-7").replace(b"say", b"+AOk-\xe9"), 1, "not UTF-8: byte 0xe9", title="mixed-encodings"),
    file("a.jsonl", "é".encode("cp1252") + GOOD.encode(), 1, "not UTF-8: byte 0xe9", title="latin-before-the-row"),
    file("a.jsonl", bytes(range(1, 256)), 1, "a.jsonl:1", title="every-byte"),
    file("a.jsonl", b"\x7fELF\x02\x01\x01" + bytes(100), 1, "a.jsonl:1", title="a-program"),
    file("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(100), 1, "a.jsonl", title="a-picture"),
]  # fmt: skip

# gzip ----------------------------------------------------------------------------------------------------------------
MANY = gzip.compress("".join(json.dumps({**ROW, "output": f"hi {n}"}) + "\n" for n in range(3000)).encode())
PACKED = gzip.compress(GOOD.encode(), mtime=0)
GZIP = [
    *(
        file("a.jsonl.gz", MANY[:size], 1, word, title=f"gz-cut-at-{size}")
        for size, word in ((3, "a.jsonl.gz"), (9, "a.jsonl.gz"), (12, "truncated"), (len(MANY) // 2, "truncated"),
                           (len(MANY) - 9, "truncated"), (len(MANY) - 4, "truncated"), (len(MANY) - 1, "truncated"))
    ),
    file("a.jsonl.gz", MANY[:-8] + b"\0\0\0\0" + MANY[-4:], 1, "cannot be unpacked: CRC check failed", title="gz-checksum"),
    file("a.jsonl.gz", MANY[:-4] + b"\1\0\0\0", 1, "cannot be unpacked", title="gz-length"),
    file("a.jsonl.gz", MANY[:400] + bytes(40) + MANY[440:], 1, "a.jsonl.gz:", title="gz-damaged"),
    file("a.jsonl.gz", PACKED + b"garbage", 1, "cannot be unpacked: Not a gzipped file", title="gz-and-more"),
    file("a.jsonl.gz", PACKED + bytes(512), 0, "rows 1: 1 alpaca", title="gz-and-zeros"),
    file("a.jsonl.gz", PACKED + gzip.compress(OTHER.encode()), 0, "rows 2: 2 alpaca", title="gz-two-members"),
    file("a.jsonl.gz", b"\x1f\x8b\x09" + PACKED[3:], 1, "cannot be unpacked: Unknown compression", title="gz-method"),
    file("a.jsonl.gz", b"\x1f\x8b", 1, "a.jsonl.gz", title="gz-only-its-mark"),
    file("a.jsonl.gz", gzip.compress(PACKED), 1, "compressed with gzip twice", title="gz-twice"),
    file("a.jsonl.gz", gzip.compress(b"PK\x03\x04" + bytes(99)), 1, "a zip archive or an Excel workbook, compressed with gzip",
         title="gz-of-a-zip"),
    file("a.jsonl.gz", zlib.compress(GOOD.encode()), 1, "not compressed with gzip", title="zlib-as-gz"),
    file("a.csv.gz", gzip.compress(b"instruction,output\na,\xff\n"), 1, "not UTF-8: byte 0xff", "a.csv.gz:2", title="gz-csv-utf8"),
    file("a.txt.gz", gzip.compress(b"\xff\xfea\0"), 1, "UTF-16", title="gz-utf16"),
    file("a.parquet.gz", gzip.compress(parquet({"text": ["a"]})), 0, "rows 1: 1 text", title="gz-parquet"),
    file("a.parquet.gz", gzip.compress(parquet({"text": ["a"]}))[:-20], 1, "not a parquet file", title="gz-parquet-cut"),
    file("a.parquet.gz", gzip.compress(b"PAR1"), 1, "not a parquet file", title="gz-parquet-hollow"),
]  # fmt: skip

# CSV -----------------------------------------------------------------------------------------------------------------
TABLES = [
    file("a.csv", HEAD + 'a,b\nc,"d\ne\nf\n', 1, "unexpected end of data within the quotes that open here", "a.csv:3",
         title="csv-open-quote"),
    file("a.csv", HEAD + '"a\nb\nc","d\ne\nf\n', 1, "within the quotes that open here", "a.csv:4",
         title="csv-open-quote-inside-a-row"),
    file("a.csv", HEAD + '"a ""b""\n","c"" \nd', 1, "within the quotes that open here", "a.csv:3", title="csv-open-doubled"),
    file("a.csv", '"instruction,output\na,b\n', 1, "within the quotes that open here", "a.csv:1", title="csv-open-header"),
    file("a.csv", HEAD + '"a" b,c\n', 1, "not valid CSV: ',' expected after '\"'", "a.csv:2", title="csv-after-a-quote"),
    file("a.csv", HEAD + 'a,b\n"c"d,e\n', 1, "expected after", "a.csv:3", title="csv-after-a-quote-below"),
    file("a.csv", HEAD + "a\n", 1, "1 field, but the header has 2 (instruction, output)", "a.csv:2", title="csv-short"),
    file("a.csv", HEAD + "a,b,c\n", 1, "3 fields, but the header has 2", title="csv-long"),
    file("a.csv", HEAD + "a,b\na\na,b,c\nc,d\n", 1, "2 of 4 rows", "a.csv:3", "a.csv:4", title="csv-ragged"),
    file("a.csv", HEAD + "a,\n", 1, "a row without an answer", "a.csv:2", title="csv-no-answer"),
    file("a.csv", HEAD + "a,\u200b\n", 1, "a row without an answer", title="csv-zero-width"),
    file("a.csv", HEAD, 1, "there are no rows in the file", title="csv-only-a-header"),
    file("a.csv", "\n\n\n", 1, "there are no rows in the file", title="csv-blank"),
    file("a.csv", ",,,\n,,,\n", 1, "there are no rows in the file", title="csv-commas"),
    file("a.csv", "output,instruction,output\nb,a,c\n", 1, "two columns of the header have the same name: 'output'",
         "a.csv:1", title="csv-column-twice"),
    file("a.csv", "x" * 70_000 + ",x\n1,2\n", 1, "a.csv:2", title="csv-long-name"),
    file("a.csv", ",".join(f"c{n}" for n in range(20_000)) + "\n1\n", 1, "1 field, but the header has 20000 (c0, c1,",
         "and 19,988 more", title="csv-20000-columns"),
    file("a.csv", HEAD + "a,b\0\n", 1, "a null byte", "a.csv:2", title="csv-null"),
    file("a.csv", HEAD.encode() + b"a,b\n\xe9,d\n", 1, "not UTF-8: byte 0xe9 at position 1", "a.csv:3", title="csv-latin"),
    file("a.csv", HEAD.encode("utf-16-le"), 1, "UTF-16LE", title="csv-utf16"),
    file("a.csv", HEAD.encode("utf-16") + b"a", 1, "UTF-16", title="csv-utf16-odd"),
    file("a.tsv", "instruction\toutput\na\n", 1, "1 field", "quote fields that contain tabs", title="tsv-short"),
    file("a.tsv", 'instruction\toutput\na\t"b\n', 1, "within the quotes that open here", "a.tsv:2", title="tsv-open-quote"),
    file("a.csv", "sep=;\n", 1, "there are no rows", title="csv-only-sep"),
    file("a.csv", 'sep=;\ninstruction;output\na;"b\n', 1, "within the quotes that open here", "a.csv:3", title="csv-sep-open"),
    file("a.csv", "instruction,output\ra,b\rc\r", 1, "1 field", "a.csv:3", title="csv-mac-short"),
    file("a.csv", 'messages\n"[{\'role\': \'user\'"\n', 1, "neither JSON nor a list as Python prints it", title="csv-half-a-list"),
    file("a.csv", 'messages\n"[' + "-" * 100_000 + '1]"\n', 1, "neither JSON nor a list", title="csv-python-minus"),
    file("a.csv", 'messages\n"[' + "(" * 100_000 + '"\n', 1, "neither JSON nor a list", title="csv-python-brackets"),
    file("a.csv", 'messages\n"[' + "a()" * 100_000 + ']"\n', 1, "neither JSON nor a list", title="csv-python-calls"),
    file("a.csv", 'messages\n"[' + DIGITS + ', None]"\n', 1, "'messages' must be a list of turns", title="csv-python-digits"),
    file("a.csv", 'messages\n"[' + DIGITS + ']"\n', 1, "'messages' must be a list of turns", title="csv-json-digits"),
    file("a.csv", 'messages\n"[__import__(\'os\').system(\'true\')]"\n', 1, "neither JSON nor a list", title="csv-python-code"),
]  # fmt: skip

# parquet -------------------------------------------------------------------------------------------------------------
TEXTS = {"instruction": ["a", "c"], "output": ["b", "d"]}
PLAIN = parquet({"instruction": [f"a {n}" for n in range(500)], "output": [f"b {n}" for n in range(500)]}, row_group_size=100)
BROKEN = pyarrow.Array.from_buffers(
    pyarrow.string(), 2, [None, pyarrow.py_buffer(struct.pack("<iii", 0, 1, 3)), pyarrow.py_buffer(b"b\xff\xfe")]
)
NO_KEYS = pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
FAR = pyarrow.array([9_400_000_000_000_000] * 2, pyarrow.timestamp("ms"))
ZONED = pyarrow.array([0, 1], pyarrow.timestamp("us", tz="Nowhere/Atlantis"))
TURNS = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "assistant"]), BROKEN], ["role", "content"])
CHATS = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2]), TURNS)


def beside(name: str, column: Any) -> Case:
    """A column that nothing reads, whatever is in it."""
    return file("a.parquet", parquet({**TEXTS, "odd": column}), 0, "rows 2: 2 alpaca", title=f"parquet-unused-{name}")


def read(name: str, column: Any, *names: str) -> Case:
    """The same as answers."""
    return file("a.parquet", parquet({"instruction": ["a", "c"], "output": column}), 1, *names, title=f"parquet-{name}")


ODD = {
    "utf8": BROKEN,
    "zone": ZONED,
    "year": FAR,
    "date": pyarrow.array([3_000_000_0, 1], pyarrow.date32()),
    "nanoseconds": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
    "duration": pyarrow.array([2**62, 1], pyarrow.duration("s")),
    "time": pyarrow.array([1, 2], pyarrow.time64("ns")),
    "decimal": pyarrow.array([decimal.Decimal("1.10"), None]),
    "binary": pyarrow.array([b"\xff", b""]),
    "map": NO_KEYS,
    "struct": pyarrow.array([{"a": {"b": [1]}}, None]),
    "null": pyarrow.nulls(2),
    "halves": pyarrow.array([1, 2], pyarrow.float16()),
    "twins": pyarrow.StructArray.from_arrays([pyarrow.array([1, 2])] * 2, ["a", "a"]),
}
PARQUET = [
    *(beside(name, column) for name, column in ODD.items()),
    read("utf8", BROKEN, "'output' cannot be read: UnicodeDecodeError", "a.parquet:row 2", ),
    read("zone", ZONED, "'output' cannot be read", "a.parquet:row 1", "Nowhere/Atlantis"),
    read("year", FAR, "'output' cannot be read", "a.parquet:row 1"),
    read("date", pyarrow.array([datetime.date(2024, 1, 1)] * 2), "'output' must be text, found date"),
    read("decimal", ODD["decimal"], "'output' must be text, found Decimal"),
    read("binary", ODD["binary"], "'output' must be text, found bytes"),
    read("map", NO_KEYS, "'output' must be text, found list"),
    read("struct", ODD["struct"], "'output' must be text, found dict"),
    read("twins", ODD["twins"], "'output' cannot be read"),
    read("duration", pyarrow.array([1, 2], pyarrow.duration("s")), "'output' must be text, found timedelta"),
    read("nan", pyarrow.array([float("nan"), float("inf")]), "found NaN", "found float: inf"),
    read("nulls", pyarrow.nulls(2), "a row without an answer: 'output' is empty"),
    read("dictionary", pyarrow.array(["", "b"]).dictionary_encode(), "a row without an answer", "a.parquet:row 1"),
    file("a.parquet", parquet({"messages": CHATS}), 1, "'messages' cannot be read: UnicodeDecodeError", title="parquet-chat-utf8"),
    file("a.parquet", parquet(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, ["instruction", "output", "output"])), 1,
         "two columns have the same name: 'output'", title="parquet-column-twice"),
    file("a.parquet", parquet({}), 1, "there are no rows", title="parquet-no-columns"),
    file("a.parquet", parquet(pyarrow.table({"text": pyarrow.array([], pyarrow.string())})), 1, "there are no rows",
         title="parquet-no-rows"),
    file("a.parquet", parquet({"a": [1]}), 1, "unknown fields: found 'a'", title="parquet-other-columns"),
    file("a.parquet", parquet({"\u200b": ["a"], "\n": ["b"]}), 1, "unknown fields: found '\\u200b', '\\n'", title="parquet-odd-names"),
    *(
        file("a.parquet", PLAIN[:size], 1, "not a parquet file", "a.parquet", title=f"parquet-cut-at-{size}")
        for size in (1, 4, 8, 12, len(PLAIN) // 2, len(PLAIN) - 8, len(PLAIN) - 4, len(PLAIN) - 1)
    ),
    file("a.parquet", PLAIN[100:], 1, "a.parquet", title="parquet-head-lost"),
    file("a.parquet", PLAIN[:-4] + b"PARX", 1, "not a parquet file", title="parquet-mark"),
    file("a.parquet", PLAIN[:-8] + b"\xff\xff\xff\x7fPAR1", 1, "not a parquet file", title="parquet-footer-too-long"),
    file("a.parquet", PLAIN[:-8] + b"\xff\xff\xff\xffPAR1", 1, "not a parquet file", title="parquet-footer-negative"),
    file("a.parquet", PLAIN[:-8] + b"\0\0\0\0PAR1", 1, "not a parquet file", title="parquet-footer-of-nothing"),
    file("a.parquet", PLAIN[: len(PLAIN) - 600] + bytes(100) + PLAIN[len(PLAIN) - 500 :], 1, "a.parquet",
         title="parquet-footer-zeroed"),
    file("a.parquet", PLAIN[:4] + bytes(60) + PLAIN[64:], 1, "a.parquet", title="parquet-first-page-zeroed"),
    file("a.parquet", PLAIN[:4] + b"\xff" * 60 + PLAIN[64:], 1, "a.parquet", title="parquet-first-page-of-ones"),
    file("a.parquet", b"PARE" + bytes(50) + b"PARE", 1, "an encrypted parquet file", title="parquet-encrypted"),
    file("a.parquet", b"PAR1" * 5, 1, "not a parquet file", title="parquet-marks"),
    file("a.parquet", feather(TEXTS), 1, "an Arrow or Feather file", title="feather-as-parquet"),
]  # fmt: skip

# files that are something else ---------------------------------------------------------------------------------------
STRANGERS = [
    file(f"a{ending}", start + bytes(100), 1, what, title=f"{what.split()[-1].lower()}-as{ending}")
    for ending, start, what in (
        (".jsonl", b"BZh91AY&SY", "compressed with bzip2"),
        (".json", b"\xfd7zXZ\0", "compressed with xz"),
        (".csv", b"\x28\xb5\x2f\xfd", "compressed with Zstandard"),
        (".txt", b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
        (".jsonl", b"Rar!\x1a\x07\0", "a RAR archive"),
        (".csv", b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
        (".jsonl", b"\x93NUMPY", "a NumPy array"),
        (".jsonl", b"\x80\x04\x95", "a pickle"),
        (".csv", b"SQLite format 3\0", "an SQLite database"),
    )
] + [
    file(name, "x", 1, "is not a kind of file", fix, title=f"ending-{name}")
    for name, fix in (("a.jsonl.zst", "unzstd"), ("a.csv.bz2", "bunzip2 --keep"), ("a.json.xz", "unxz --keep"), ("a.zip", "unzip"),
                      ("a.arrow", "convert it"), ("a.xlsx", "convert it"), ("a", "convert it"), ("a.gz", "convert it"))
]  # fmt: skip



# what is not a file --------------------------------------------------------------------------------------------------
def linked(target: str) -> Callable[[pathlib.Path], None]:
    return lambda path: path.symlink_to(target)


def folder_with(make: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], None]:
    """A folder of a good file and something else."""

    def fill(path: pathlib.Path) -> None:
        path.mkdir()
        (path / "a.jsonl").write_text(GOOD)
        make(path / "b.jsonl")

    return fill


def bound(path: pathlib.Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def empty_folder(path: pathlib.Path) -> None:
    path.mkdir()


SPECIAL = [
    special("a.jsonl", os.mkfifo, "this is a named pipe, not a file", "a.jsonl", title="pipe"),
    special("a.parquet", os.mkfifo, "this is a named pipe", title="pipe-parquet"),
    special("a.jsonl.gz", os.mkfifo, "this is a named pipe", title="pipe-packed"),
    special("pipe", os.mkfifo, "this is a named pipe", title="pipe-without-an-ending"),
    special("a.jsonl", bound, "this is a socket, not a file", title="socket"),
    special("a.jsonl", linked("/dev/zero"), "this is a device, not a file", title="zeros"),
    special("a.txt", linked("/dev/random"), "this is a device", title="random"),
    special("a.csv", linked("/dev/null"), "this is a device", title="null"),
    special("a.jsonl", linked("nowhere.jsonl"), "a link to nowhere.jsonl, which does not exist", title="broken-link"),
    special("a.jsonl", linked("a.jsonl"), "the file cannot be read: too many levels of symbolic links", title="link-to-itself"),
    special("a.jsonl", linked("/proc/self/mem"), "the file cannot be read: input/output error", "a.jsonl", title="unreadable"),
    special("a.csv", linked("/proc/self/mem"), "the file cannot be read: input/output error", title="unreadable-csv"),
    special("a.parquet", linked("/proc/self/mem"), "the file cannot be read: input/output error", title="unreadable-parquet"),
    special("a.txt", linked("/proc/self/status"), "rows 1: 1 text", status=0, title="size-0-but-content"),
    special("a.jsonl", empty_folder, "contains no file that nybble reads", title="empty-folder"),
    special("a.jsonl", folder_with(os.mkfifo), "this is a named pipe", "b.jsonl", title="folder-with-a-pipe"),
    special("a", folder_with(bound), "this is a socket", "b.jsonl", title="folder-with-a-socket"),
    special("a", folder_with(linked("gone")), "a link to gone, which does not exist", "b.jsonl",
            title="folder-with-a-broken-link"),
    special("a", folder_with(linked("b.jsonl")), "symbolic links", "b.jsonl", title="folder-with-a-looping-link"),
    special("a", folder_with(linked("..")), "rows 1: 1 alpaca", status=0, title="folder-that-links-back"),
    special("a", folder_with(linked("a.jsonl")), "rows 2: 2 alpaca", "duplicates 1", status=0, title="folder-with-a-link"),
    special("a", folder_with(empty_folder), "rows 1: 1 alpaca", status=0, title="folder-in-a-folder"),
    special("a", folder_with(linked("/dev/zero")), "this is a device", title="folder-with-zeros"),
    *(
        Case(f"path-{title}", lambda folder, path=path: path.replace("{}", str(folder)), 1, names)
        for title, path, names in (
            ("input", "-", ("does not read data from standard input",)),
            ("dev-stdin", "/dev/stdin", ("/dev/stdin",)),
            ("dev-zero", "/dev/zero", ("this is a device",)),
            ("missing", "{}/gone.jsonl", ("there is no file", "gone.jsonl")),
            ("below-a-file", "/etc/passwd/a.jsonl", ("there is no file /etc/passwd/a.jsonl",)),
            ("too-long", "{}/" + "a" * 5000 + ".jsonl", ("cannot be read: File name too long",)),
            ("null", "a\0.jsonl", ("cannot be read",)),
            ("pattern", "{}/*.jsonl", ("no file matches",)),
            ("whole-row", GOOD, ("there is no file", "and it is not a Hub id")),
        )
    ),
]  # fmt: skip


# over a limit, here of 1 MB ------------------------------------------------------------------------------------------
def large(name: str, content: Content, *names: str, title: str, status: int = 1) -> Case:
    """A file that is looked at with the least limit there is."""
    whole = file(name, content, status, *names)
    return Case(f"large-{title}", lambda folder: [whole.make(folder), "data.max_row_mb=1"], status, names)


LONG = "x" * 1_200_000
RAISE = "data.max_row_mb=2"
SHARED = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5), pyarrow.array(["y" * 300_000]))
LISTED = pyarrow.ListArray.from_arrays(pyarrow.array([0, 4, 5]), SHARED)
LARGE = [
    large("a.jsonl", GOOD + json.dumps({"text": LONG}) + "\n" + OTHER, "a line of 1.2 MB, over the limit of 1 MB",
          "a.jsonl:2", RAISE, title="line"),
    large("a.jsonl.gz", gzip.compress((json.dumps({"text": LONG}) + "\n" + OTHER).encode()), "a line of 1.2 MB",
          "a.jsonl.gz:1", RAISE, title="line-packed"),
    large("a.jsonl", json.dumps({"text": LONG}), "a line of 1.2 MB", "a.jsonl:1", title="line-without-an-end"),
    large("a.jsonl", GOOD.strip() + "\r" + json.dumps({"text": LONG}) + "\r", "a line of 1.2 MB", "a.jsonl:2", title="line-mac"),
    large("a.jsonl", json.dumps({"text": LONG[:999_000]}), READ, title="line-below", status=0),
    large("a.json", json.dumps([ROW, {"text": LONG}]), "a row of more than 1 MB", "a.json:1", RAISE, title="array"),
    large("a.json", '[{"text": "' + LONG * 3, "a row of more than 1 MB", "a.json:1", RAISE, title="array-without-an-end"),
    large("a.json", "[" + " " * 3_000_000 + GOOD + "]", READ, title="array-of-blanks", status=0),
    large("a.json", json.dumps({"data": [{"text": LONG}]}, indent=1), "a row of more than 1 MB", "a.json:3", title="wrapped"),
    large("a.json", json.dumps({"info": LONG, "data": [ROW]}, indent=1), "a row of more than 1 MB", "a.json:2", title="wrapped-info"),
    large("a.json", json.dumps({f"info {n}": LONG[:400_000] for n in range(9)}, indent=1), "an object of more than 1 MB",
          "a.json:", title="wrapped-members"),
    large("a.csv", HEAD + f"a,b\nc,{LONG}\n", "a line of 1.2 MB", "a.csv:3", RAISE, title="csv-line"),
    large("a.csv", HEAD + 'a,b\nc,"' + "d\n" * 600_000, "no end within 1 MB of the quotes that open here", "a.csv:3", RAISE,
          title="csv-open-quote"),
    large("a.csv", HEAD + 'a,b\n"c\nc","' + "d\n" * 600_000 + '"', "no end within 1 MB of the quotes", "a.csv:4",
          title="csv-quote-of-many-lines"),
    large("a.csv", ",\n" * 600_000 + HEAD + "a,b\n", READ, title="csv-blank-above", status=0),
    large("a.csv", "h" * 1_200_000 + ",b\n1,2\n", "a line of 1.2 MB", "a.csv:1", title="csv-header"),
    large("a.txt", LONG, "a line of 1.2 MB", RAISE, title="txt-line"),
    large("a.txt", "words\n" * 250_000, "a text of 1.5 MB, over the limit of 1 MB", "a.txt", RAISE, title="txt"),
    large("a.txt.gz", gzip.compress(b"words\n" * 250_000), "a text of 1.5 MB", title="txt-packed"),
    large("a.parquet", parquet({"text": ["a", LONG, "b"]}), "a row of 1.2 MB", "a.parquet:row 2", RAISE, title="parquet"),
    large("a.parquet", parquet({"text": [LONG * 15]}), "the column 'text' has a page of 18 MB; 16 MB is the limit",
          "a.parquet:row 1", "data.max_row_mb=19", title="parquet-page"),
    large("a.parquet", parquet({"text": [LONG * 15]}, compression="zstd", use_dictionary=False), "has a page of 18 MB",
          title="parquet-page-packed"),
    large("a.parquet", parquet({"text": SHARED}), "rows 5: 5 text", "duplicates 4", title="parquet-shared", status=0),
    large("a.parquet", parquet({"messages": LISTED}), "a row of 1.2 MB", "a.parquet:row 1", title="parquet-shared-in-a-list"),
    large("a.parquet", parquet({"text": ["a"] * 2, "lists": [list(range(40_000)), []]}), "a row of 1.3 MB", "a.parquet:row 1",
          title="parquet-list-of-numbers"),
    large("a.parquet.gz", gzip.compress(parquet({"text": [LONG]})), "a row of 1.2 MB", title="parquet-packed"),
]  # fmt: skip

CASES = [*LINES, *SHAPES, *GZIP, *TABLES, *PARQUET, *STRANGERS, *SPECIAL, *LARGE]
