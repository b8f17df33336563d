"""Small files that hold far more than memory, and what reading one takes: each is read in a process of its own."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import dataclass

import pyarrow
import pyarrow.parquet

from tests.corpus.cases import Case

ROOM = 600_000_000  # bytes above what the program takes with its libraries
BLOCK = 1 << 24
FILL = 64  # blocks: 1 GB
GOOD = b'{"instruction": "a", "output": "b"}\n'
CHILD = """
import itertools, json, pathlib, re, resource, sys
from nybble.data.rows.faults import Faults
from nybble.data.rows.readers import Row
from nybble.data.rows.reading import OpenRows
from nybble.errors import DataError
from nybble.recipe import DataOptions

def peak():  # not getrusage's, which begins with what the parent had
    return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

file, room, most = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before = peak()
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
faults, rows, number = Faults(), 0, 0

opened = OpenRows(DataOptions(path=str(file)))
forms = opened.forms  # which takes the first rows, and holds them for those who read on
for number, item in enumerate(itertools.islice(opened.items(), most), 1):
    try:
        if isinstance(item, DataError):
            raise item
        if isinstance(item, Row):
            forms.read(item)
            rows += 1
    except DataError as fault:
        faults.add(fault, number)
print(json.dumps({"rows": rows, "faults": [str(fault) for fault in faults.listed()], "peak": peak() - before}))
"""


@dataclass(frozen=True)
class Found:
    """What came of reading a bomb."""

    rows: int
    faults: list[str]
    peak: int
    """Bytes that it took above the libraries'."""


def exploded(file: pathlib.Path, most: int = 1000) -> Found:
    """Read at most so many rows of a file in a process that has no room for it."""
    words = [sys.executable, "-c", CHILD, str(file), str(ROOM), str(most)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return Found(**json.loads(done.stdout))


def packed(name: str, before: bytes, unit: bytes, after: bytes, count: int = FILL):
    """A gzip file of a beginning, so many blocks of a unit over and over, and an end."""
    block = gzip.compress(unit * (BLOCK // len(unit)))

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / name
        path.write_bytes(gzip.compress(before) + block * count + gzip.compress(after))
        return path

    return make


def sparse(folder: pathlib.Path) -> pathlib.Path:
    """A file of 1 GB of zeros that takes no room on the disk."""
    path = folder / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    return path


def table(columns: dict[str, pyarrow.Array], **options: object):
    def make(folder: pathlib.Path) -> pathlib.Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet", **options)
        return folder / "a.parquet"

    return make


def shared(count: int, size: int = 4_000_000) -> pyarrow.Array:
    """One text, so many times."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array(["x" * size]))


def giant(folder: pathlib.Path) -> pathlib.Path:
    """One cell of 400 MB; Arrow's own memory is given back at once."""
    path = table({"text": pyarrow.array(["x" * 400_000_000])}, compression="zstd", use_dictionary=False)(folder)
    pyarrow.default_memory_pool().release_unused()
    return path


def lists(folder: pathlib.Path) -> pathlib.Path:
    """A list of 100 million numbers, which its file counts and does not write down."""
    values = pyarrow.Array.from_buffers(pyarrow.int8(), 100_000_000, [None, pyarrow.py_buffer(bytes(100_000_000))])
    offsets = pyarrow.array([0, 100_000_000], pyarrow.int32())
    return table({"text": pyarrow.array(["a"]), "odd": pyarrow.ListArray.from_arrays(offsets, values)})(folder)


def scattered(folder: pathlib.Path) -> pathlib.Path:
    """A hundred thousand bad rows, each with good neighbours."""
    path = folder / "a.jsonl"
    path.write_bytes((GOOD + b'{"instruction": "a", "output": ""}\n') * 100_000)
    return path


def different(folder: pathlib.Path) -> pathlib.Path:
    """As many that are bad in different ways."""
    path = folder / "a.jsonl"
    path.write_text("".join(f'{{"c{n}": 1}}\n' for n in range(100_000)))
    return path


def amplified(folder: pathlib.Path) -> pathlib.Path:
    """A row below the limit whose lists take 20 times as much as their text."""
    path = folder / "a.jsonl"
    path.write_bytes(GOOD + b'{"instruction": "a", "output": [' + b"[]," * 5_000_000 + b"1]}\n")
    return path


def printed(folder: pathlib.Path) -> pathlib.Path:
    """A cell of 10 MB that Python's parser would take gigabytes for."""
    path = folder / "a.csv"
    path.write_bytes(b'messages\n"[' + b"1," * 5_000_000 + b'None]"\n')
    return path


def wide(folder: pathlib.Path) -> pathlib.Path:
    """A row of a hundred thousand columns, below the limit."""
    path = folder / "a.jsonl"
    path.write_text("{" + ", ".join(f'"c{n}": 1' for n in range(100_000)) + "}\n")
    return path


LINE = "a line of 1,073.7 MB, over the limit of 16 MB"
HUGE = "data.max_row_mb=1074"
# status: how many rows are read beside the bomb
BOMBS = [
    Case("line-gz", packed("a.jsonl.gz", GOOD + b'{"text": "', b"x", b'"}\n' + GOOD), 2, (LINE, "a.jsonl.gz:2", HUGE)),
    Case("nulls-gz", packed("a.jsonl.gz", GOOD, b"\0", b""), 0, ("a null byte", "a.jsonl.gz:2")),
    Case("nulls-sparse", sparse, 0, (LINE, "a.jsonl:1")),
    Case("digits-gz", packed("a.jsonl.gz", b'{"text": ', b"7", b"}\n"), 0, (LINE, "a.jsonl.gz:1")),
    Case("csv-line-gz", packed("a.csv.gz", b'instruction,output\na,"', b"x", b'"\n'), 0, (LINE, "a.csv.gz:2", HUGE)),
    Case("csv-quote-gz", packed("a.csv.gz", b'instruction,output\na,b\na,"', b"x\n", b'"\n'), 1,
         ("the quotes that open here are not closed within 16 MB", "a.csv.gz:3", "data.max_row_mb=32")),
    Case("csv-commas-gz", packed("a.csv.gz", b"instruction,output\n", b",", b"\n"), 0, (LINE, "a.csv.gz:2")),
    Case("txt-line-gz", packed("a.txt.gz", b"", b"x", b""), 0, (LINE, "a.txt.gz:1")),
    Case("txt-lines-gz", packed("a.txt.gz", b"", b"x" * 4095 + b"\n", b""), 0,
         ("MB, over the limit of 16 MB", "a.txt.gz", "data.max_row_mb=1074")),
    Case("array-gz", packed("a.json.gz", b"[" + GOOD + b',{"text": "', b"x", b'"}]'), 1,
         ("a row of more than 16 MB", "a.json.gz:2", "data.max_row_mb=32")),
    Case("array-blanks-gz", packed("a.json.gz", b"[", b" ", GOOD + b"]"), 1),
    Case("array-digits-gz", packed("a.json.gz", b'[{"text": ', b"7", b"}]"), 0, ("digits; 4,300 is the limit", "a.json.gz:1")),
    Case("array-deep-gz", packed("a.json.gz", b"", b"[", b""), 0, ("nested too deeply", "a.json.gz:1")),
    Case("array-list-gz", packed("a.json.gz", b"[\n[", b"1,", b"1]]"), 0, ("a row of more than 16 MB", "a.json.gz:2")),
    Case("wrapped-gz", packed("a.json.gz", b'{\n"data": [\n{"text": "', b"x", b'"}]}'), 0,
         ("a row of more than 16 MB", "a.json.gz:3")),
    Case("wrapped-name-gz", packed("a.json.gz", b'{\n\n"', b"x", b'": []}'), 0, ("a row of more than 16 MB", "a.json.gz:3")),
    Case("parquet-gz", packed("a.parquet.gz", b"PAR1", b"\0", b"PAR1"), 0, ("unpacks to more than 256 MB", "gunzip --keep")),
    Case("parquet-cell", giant, 0, ("the column 'text' has a page of 400 MB; 256 MB is the limit", "a.parquet:row 1",
                                    "data.max_row_mb=401")),
    Case("parquet-shared", table({"text": shared(200_000)}), 1000),
    Case("parquet-shared-lists",
         table({"messages": pyarrow.ListArray.from_arrays(pyarrow.array([0, 3, 20_000]), shared(20_000))}),
         0, ("a row of 79,", "a.parquet:row 2", "the conversation ends before")),
    Case("parquet-shared-usual", table({"text": shared(200_000, 900_000)}), 1000),
    Case("parquet-shared-usual-lists",
         table({"messages": pyarrow.ListArray.from_arrays(pyarrow.array([0, 3, 20_000]), shared(20_000, 900_000))},
               compression="zstd", data_page_version="2.0"),
         0, ("a row of 17,", "a.parquet:row 2", "the conversation ends before")),
    Case("parquet-lists", lists, 0, ("has lists of 100,000,000 values for 1 rows", "smaller row groups")),
    Case("scattered-faults", scattered, 100_000, ("a row without an answer", "lines 2, 4, 6 and 99,997 more")),
    Case("different-faults", different, 0, ("unknown fields: found 'c0'",)),
    Case("amplified", amplified, 1, ("'output' must be text, found list", "a.jsonl:2")),
    Case("printed", printed, 0, ("'messages' must be a list of turns", "a.csv:2")),
    Case("wide", wide, 0, ("unknown fields", "and 99,988 more", "a.jsonl:1")),
]  # fmt: skip
