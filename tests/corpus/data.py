"""Data files that are damaged, hostile or odd; each is looked at by `nybble data check FILE`, or by the function behind it."""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet

from tests.corpus.cases import Case

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
    line('{"instruction": "a", "output": ' + "9" * 400 + "}", "are read as text (1 row)", title="400-digits", status=0),
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
    line('{"text": "a', "Unterminated string at column", title="unterminated"),
    line("null", "must be an object with named fields, not null", title="null"),
    line("true", "must be an object with named fields, not bool", title="true"),
    line("[]", "must be an object with named fields, not list", title="list"),
    line('{"a":' * 200_000 + "1" + "}" * 200_000, "nested too deeply", title="deep-objects"),
    line("[" * 200_000 + "]" * 200_000, "nested too deeply", title="deep-lists"),
    answer("[" * 200 + "]" * 200, "'output' must be text, found list", title="200-lists-deep"),
    answer("[" * 700 + "]" * 700, "'output' must be text, found list", title="700-lists-deep"),
    unused("[" * 300 + "]" * 300, READ, title="300-lists-deep"),
    line(b'{"instruction": "\xff", "output": "b"}', "not UTF-8: byte 0xff at position 18", title="byte-ff"),
    line(b'{"instruction": "\xc0\xaf", "output": "b"}', "not UTF-8: byte 0xc0", title="overlong"),
    line(b'{"instruction": "\xed\xa0\x80", "output": "b"}', "not UTF-8: byte 0xed", title="surrogate-in-bytes"),
    line(b'{"instruction": "\xf4\x90\x80\x80", "output": "b"}', "not UTF-8: byte 0xf4", title="beyond-unicode"),
    line(b'{"instruction": "\xe2\x82', "not UTF-8: byte 0xe2", title="half-a-character"),
    line('{"' + '": 1, "'.join(f"c{n}" for n in range(5000)) + '": 1}', "found 'c0', 'c1'", "and 4,988 more",
         title="5000-columns"),
    line('{"' + "x" * 100_000 + '": 1}', "unknown fields", title="long-name"),
    line('{"": 1}', "unknown fields", title="empty-name"),
    # item 10: what could be read in two ways
    line('{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' appears twice in one object",
         title="key-twice"),
    line('{"output": "b", "instruction": "a", "output": "b"}', "the key 'output' appears twice", title="key-twice-alike"),
    line('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "the key 'role' appears twice",
         title="key-twice-in-a-turn"),
    unused('{"a": 1, "a": 2}', "the key 'a' appears twice", title="key-twice", status=1),
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
    file("a.json", "[" + '{"a":' * 200_000, 1, "nested too deeply", "a.json:1", title="array-deep"),
    file("a.json", '[\n{"output": "b", "instruction": "a", "output": "c"},\n' + GOOD + "]", 1,
         "the key 'output' appears twice", "a.json:2", title="array-key-twice"),
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
    file("a.json", '{"data": [{"instruction": "a", "output": "b", "output": "c"}]}', 1, "the key 'output' appears twice",
         title="wrapped-key-twice"),
    file("a.json", '{"rows": [{"row": {"text": "a"}, "truncated_cells": "x"}]}', 1, "viewer has truncated cells",
         title="wrapped-truncated"),
    file("a.json", '{"rows": [{"row": {"text": "a"}, "truncated_cells": ["\\ud800"]}]}', 1, "truncated '\\ud800'",
         title="wrapped-truncated-surrogate"),
    file("a.json", '{"\\ud800": [{"a": 1}]}', 1, "unknown fields: found '\\ud800'", title="wrapped-surrogate"),
    file("a.json", '{"data": [{"paragraphs": [3]}]}', 1, "not an article in SQuAD's format", title="squad-number"),
    file("a.json", '{"data": [{"paragraphs": [{"qas": [{"question": "q", "answers": {"text": 1}}], "context": "c"}]}]}', 1,
         "not an article in SQuAD's format", title="squad-answers-an-object"),
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
    file("a.csv.gz", gzip.compress(b"instruction,output\na,\xff\n"), 1, "not UTF-8: byte 0xff", "a.csv.gz:2",
         title="gz-csv-utf8"),
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
    file("a.csv", 'messages\n"[{\'role\': \'user\'"\n', 1, "neither JSON nor a list as Python prints it",
         title="csv-half-a-list"),
    file("a.csv", 'messages\n"[' + "-" * 100_000 + '1]"\n', 1, "neither JSON nor a list", title="csv-python-minus"),
    file("a.csv", 'messages\n"[' + "(" * 100_000 + '"\n', 1, "neither JSON nor a list", title="csv-python-brackets"),
    file("a.csv", 'messages\n"[' + "a()" * 100_000 + ']"\n', 1, "neither JSON nor a list", title="csv-python-calls"),
    file("a.csv", 'messages\n"[' + DIGITS + ', None]"\n', 1, "'messages' must be a list of turns", title="csv-python-digits"),
    file("a.csv", 'messages\n"[' + DIGITS + ']"\n', 1, "'messages' must be a list of turns", title="csv-json-digits"),
    file("a.csv", 'messages\n"[__import__(\'os\').system(\'true\')]"\n', 1, "neither JSON nor a list", title="csv-python-code"),
]  # fmt: skip
