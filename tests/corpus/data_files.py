"""Damaged data in files that are not text, in what is not a file, and in rows that are too large."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import pathlib
import stat
import struct
from collections.abc import Callable
from typing import Any

import pyarrow

from tests.corpus.cases import Case
from tests.corpus.data import (
    GOOD,
    GZIP,
    HEAD,
    LINES,
    OTHER,
    READ,
    ROW,
    SHAPES,
    TABLES,
    Content,
    feather,
    file,
    parquet,
    special,
)

# parquet -------------------------------------------------------------------------------------------------------------
TEXTS = {"instruction": ["a", "c"], "output": ["b", "d"]}
PLAIN = parquet(
    {"instruction": [f"a {n}" for n in range(500)], "output": [f"b {n}" for n in range(500)]}, row_group_size=100
)
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
    read("zone", ZONED, "'output' cannot be read", "a.parquet, rows 1 to 2"),
    read("year", FAR, "'output' cannot be read", "a.parquet, rows 1 to 2"),
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
    file("a.parquet", parquet({"messages": CHATS}), 1, "'messages' cannot be read: UnicodeDecodeError",
         title="parquet-chat-utf8"),
    file("a.parquet", parquet(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, ["instruction", "output", "output"])), 1,
         "two columns have the same name: 'output'", title="parquet-column-twice"),
    file("a.parquet", parquet({}), 1, "there are no rows", title="parquet-no-columns"),
    file("a.parquet", parquet(pyarrow.table({"text": pyarrow.array([], pyarrow.string())})), 1, "there are no rows",
         title="parquet-no-rows"),
    file("a.parquet", parquet({"a": [1]}), 1, "unknown fields: found 'a'", title="parquet-other-columns"),
    file("a.parquet", parquet({"\u200b": ["a"], "\n": ["b"]}), 1, "unknown fields: found '\\u200b', '\\n'",
         title="parquet-odd-names"),
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
    for name, fix in (("a.jsonl.zst", "unzstd"), ("a.csv.bz2", "bunzip2 --keep"), ("a.json.xz", "unxz --keep"),
                      ("a.zip", "unzip"), ("a.arrow", "convert it"), ("a.xlsx", "convert it"),
                      ("a", "convert it"), ("a.gz", "convert it"))
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
    special("a.jsonl", os.mkfifo, "this is a pipe, not a file", "a.jsonl", title="pipe"),
    special("a.parquet", os.mkfifo, "this is a pipe", title="pipe-parquet"),
    special("a.jsonl.gz", os.mkfifo, "this is a pipe", title="pipe-packed"),
    special("pipe", os.mkfifo, "this is a pipe", title="pipe-without-an-ending"),
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
    special("a.jsonl", folder_with(os.mkfifo), "this is a pipe", "b.jsonl", title="folder-with-a-pipe"),
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
    large("a.json", json.dumps({"info": LONG, "data": [ROW]}, indent=1), "a row of more than 1 MB", "a.json:2",
          title="wrapped-info"),
    large("a.json", json.dumps({f"info {n}": LONG[:400_000] for n in range(9)}, indent=1), "an object of more than 1 MB",
          "a.json:", title="wrapped-members"),
    large("a.csv", HEAD + f"a,b\nc,{LONG}\n", "a line of 1.2 MB", "a.csv:3", RAISE, title="csv-line"),
    large("a.csv", HEAD + 'a,b\nc,"' + "d\n" * 600_000, "the quotes that open here are not closed within 1 MB", "a.csv:3", RAISE,
          title="csv-open-quote"),
    large("a.csv", HEAD + 'a,b\n"c\nc","' + "d\n" * 600_000 + '"', "the quotes that open here are not closed within 1 MB",
          "a.csv:4", title="csv-quote-of-many-lines"),
    large("a.csv", ("," * 99 + "\n") * 12_000 + HEAD + "a,b\n", READ, title="csv-blank-above", status=0),
    large("a.csv", "h" * 1_200_000 + ",b\n1,2\n", "a line of 1.2 MB", "a.csv:1", title="csv-header"),
    large("a.txt", LONG, "a line of 1.2 MB", RAISE, title="txt-line"),
    large("a.txt", "words\n" * 250_000, "a text of 1.5 MB, over the limit of 1 MB", "a.txt", f"{RAISE} data.overlength=split",
          title="txt"),
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
