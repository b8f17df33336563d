"""Damaged data files: each gives one message that names file and line, or is read correctly, in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import tempfile
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow.parquet import read_metadata
from rich.console import Console

from nybble.data.rows.formats import EmptyAnswerError, Rules, detect_forms
from nybble.data.rows.readers import MB, Row, read_file
from nybble.data.rows.readers.pages import longest_text, pages
from nybble.data.rows.readers.parquet import _plan
from nybble.data.rows.sources import row_limit
from nybble.errors import DataError, NybbleError
from nybble.preflight.data_check import check
from nybble.recipe import DataOptions, Recipe
from tests.corpus.bombs import BOMBS, ROOM, exploded, shared, table
from tests.corpus.cases import Case, Outcome, held, nybble, sampled
from tests.corpus.data import GOOD, HEAD, ROW, file, parquet
from tests.corpus.data_files import CASES, PLAIN
from tests.files.disks import small_disk

ROWS = 100_000  # of a bomb that are read; of one that is a parquet file, where each row is large
ROWS_OF_PARQUET = 1000
QUICK = ("array-gz", "wrapped-gz", "parquet-shared-lists")


def checked(folder: pathlib.Path, case: Case) -> Outcome:
    """The outcome of `nybble data check` for a case's data, without a model."""
    made = case.make(folder)
    path, *words = made if isinstance(made, list) else [made]
    size = int(words[0].rpartition("=")[2]) if words else 16
    recipe = Recipe.model_validate({"data": {"path": str(path), "max_row_mb": size}})
    stream = io.StringIO()
    try:
        fit = check(recipe, Console(file=stream, width=200))
    except NybbleError as error:
        return Outcome(error.exit_code, str(error))
    return Outcome(int(not fit), stream.getvalue())


@pytest.mark.parametrize("case", sampled(CASES, 4))
def test_a_damaged_file_is_one_message(tmp_path, case):
    held(case, checked(tmp_path, case))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow) for case in BOMBS]
)
def test_a_file_larger_than_memory_is_read_in_bounded_memory(tmp_path, case):
    found = exploded(case.make(tmp_path), ROWS_OF_PARQUET if "parquet" in case.name else 2 * ROWS)
    print(case.name, f"{found.peak / 1e6:,.0f} MB")
    assert found.peak < ROOM
    assert found.rows == case.status, found
    for name in case.names:
        assert name in "\n".join(found.faults)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_the_longest_text_of_a_dictionary_is_known_before_it_is_read(tmp_path, compression, version):
    """Ordinary files are then read as texts: references to a dictionary take several times as long."""
    path = tmp_path / "a.parquet"
    chats = [[{"role": "user", "content": f"{n} " * (n % 300)}] * 3 for n in range(4000)]
    path.write_bytes(parquet({"messages": chats}, compression=compression, data_page_version=version))
    with path.open("rb") as stream:
        group = read_metadata(stream).row_group(0)
        column = next(group.column(n) for n in (0, 1) if group.column(n).path_in_schema.endswith("content"))
        first, *others = pages(stream, column.dictionary_page_offset, column.total_compressed_size)
        longest = longest_text(stream, first, column.compression)
    assert longest == (first.size if compression == "lz4" else 5 * 299)
    # In the last page the dictionary was full.
    assert [page.uses_dictionary for page in (first, others[0], others[-1])] == [False, True, False]
    assert sum(page.values for page in others) == 12_000


def test_an_end_at_which_arrow_would_end_the_process_is_a_message(tmp_path):
    """If the lengths of a column's histograms are wrong, Arrow 25 raises an error that its own caller does not catch."""
    whole = parquet({"text": [["a"], ["b"]]}, compression="none")
    told = []
    for place in (place for place in range(len(whole)) if whole[place] == 0x46):  # lists of four numbers
        end = int.from_bytes(whole[-8:-4], "little") + 1
        path = tmp_path / "a.parquet"
        path.write_bytes(whole[:place] + b"\x56\0" + whole[place + 1 : -8] + end.to_bytes(4, "little") + b"PAR1")
        with contextlib.suppress(DataError):
            list(read_file(path))
            continue
        with pytest.raises(DataError) as caught:
            list(read_file(path))
        told.append(str(caught.value))
    assert any("not a parquet file: Definition level histogram size mismatch" in text for text in told), told


class Unsaid:
    """A column whose dictionary is not mentioned in the metadata, as in files of old writers."""

    has_dictionary_page = False

    def __init__(self, column) -> None:
        self.column = column
        self.data_page_offset = column.dictionary_page_offset

    def __getattr__(self, name: str):
        return getattr(self.column, name)


def test_a_dictionary_that_the_metadata_does_not_mention_is_found(tmp_path):
    path = table({"text": shared(2000, 900_000)})(tmp_path)
    with path.open("rb") as stream:
        group = read_metadata(stream).row_group(0)
        told = _plan(group, stream, 16 * MB, "")
        unsaid = SimpleNamespace(num_rows=2000, num_columns=1, column=lambda place: Unsaid(group.column(place)))
        assert _plan(unsaid, stream, 16 * MB, "") == told
    assert told.rows == 64 * MB // 900_000


def test_there_are_enough_cases():
    assert len(CASES) >= 300
    assert len(BOMBS) >= 25


@pytest.mark.parametrize("case", sampled([case for case in CASES if not case.name.startswith("path-")][::43], 4))
def test_the_command_line_says_the_same(tmp_path, cache, case, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    made = case.make(tmp_path)
    held(case, nybble("data", "check", *(made if isinstance(made, list) else [made]), cache=cache))


def test_a_larger_row_is_read_where_the_option_allows_it(tmp_path, tiny_llama, cache):
    """Rows that a small limit left out are read again with a larger limit, in spite of the cache."""
    path = file("a.jsonl", GOOD + json.dumps({**ROW, "output": "c", "note": "b" * 1_200_000}) + "\n", 0).make(tmp_path)
    words = ["data", "check", path, tiny_llama, "data.bad_rows=drop", "data.validation=0"]
    small, large = (nybble(*words, f"data.max_row_mb={size}", cache=cache).text for size in (1, 2))
    assert "a line of 1.2 MB" not in large
    assert "bad rows   1 " in small
    assert "bad rows   0" in large


def test_a_gzipped_parquet_file_without_space_to_unpack_it_is_a_clear_error(tmp_path, monkeypatch):
    texts = [f"{n:03} " * 300 for n in range(300)]
    path = file(
        "a.parquet.gz", gzip.compress(parquet({"text": texts}, compression="none", use_dictionary=False)), 1
    ).make(tmp_path)
    with small_disk(tmp_path / "disk", "16k") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(DataError, match=r"the file cannot be unpacked in .*: No space left"):
            list(read_file(path))


@pytest.mark.parametrize("rules", [Rules.V0_5, Rules.V0_6])
def test_a_run_of_an_earlier_version_finds_the_rows_that_it_was_trained_on(rules):
    """Objects with repeated keys, invisible answers and rows of any size were read."""
    row = Row({"instruction": "a", "output": "\u200b"}, "a.jsonl:1", repeated="output")
    forms = detect_forms([row], "auto", {})
    with pytest.raises(DataError, match="the key 'output' appears twice"):
        forms.read(row)
    with pytest.raises(EmptyAnswerError):
        forms.read(Row(row.values, row.origin))
    before = dataclasses.replace(forms, rules=rules)
    assert before.read(row).conversation[-1].content == "\u200b"
    assert row_limit(DataOptions(), rules) > 10 * row_limit(DataOptions(), Rules.NOW)
    pictured = Row({"instruction": "a", "output": "b", "image": "c.png"}, "a.jsonl:1")
    counted = Row({"instruction": "a", "output": 3}, "a.jsonl:1")
    taken, refused = (pictured, counted) if rules == Rules.V0_5 else (counted, pictured)
    assert before.read(taken)
    with pytest.raises(DataError):
        before.read(refused)


# anything at all -----------------------------------------------------------------------------------------------------
CHAT = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\u00e9"}]}) + "\n"
SQUAD = {"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}
WHOLE = {
    "a.jsonl": (GOOD + CHAT).encode() * 3,
    "a.json": json.dumps([ROW, {**ROW, "history": [["a", "b"]]}], indent=1).encode(),
    "b.json": json.dumps({"info": {"a": 1}, "data": [ROW], "test": [ROW]}).encode(),
    "c.json": json.dumps({"data": [{"paragraphs": [SQUAD]}]}).encode(),
    "a.csv": (HEAD + 'a,"b\nc"\n"d ""e""",f\n').encode(),
    "a.tsv": b"messages\tid\n\"[{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]\"\t1\n",
    "a.txt": "words and \u20ac\r\nmore".encode(),
    "a.jsonl.gz": gzip.compress((GOOD * 50).encode(), mtime=0),
    "a.parquet": PLAIN,
    "b.parquet": parquet({"messages": [json.loads(CHAT)["messages"]] * 3, "n": [1, None, 3], "t": [b"\xff", None, b""]}),
    "a.parquet.gz": gzip.compress(parquet({"text": ["a", "b"]}), mtime=0),
}  # fmt: skip
CHANGES = st.lists(
    st.tuples(st.sampled_from(["put", "insert", "cut", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=12)),
    min_size=1, max_size=6,
)  # fmt: skip


def changed(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, piece in changes:
        place = int(share * len(content))
        if kind == "put":
            content = content[:place] + piece + content[place + len(piece) :]
        elif kind == "insert":
            content = content[:place] + piece + content[place:]
        elif kind == "cut":
            content = content[:place] + content[place + 4 * len(piece) :]
        elif place:
            content = content[:place]
    return content


def read_all(name: str, content: bytes) -> None:
    """Read a file twice, as check does; whatever it contains, the result is rows and faults, and no exception."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        path.write_bytes(content)
        items, refused = [], None
        try:
            items += itertools.islice(read_file(path), 1000)
        except DataError as fault:
            refused = fault
        assert refused is None or str(path) in str(refused.where)
        forms = detect_forms((item for item in items if isinstance(item, Row)), "auto", {})
        for item in items:
            try:
                if isinstance(item, Row):
                    forms.read(item)
            except DataError as fault:
                str(fault).encode(errors="strict")


def any_change(examples: int):
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck), derandomize=True)


@any_change(60)
@example("a.json", [("insert", 0.5, b"9" * 12)] * 6)
@example("a.parquet", [("cut", 0.5, b"\x00")] * 2)
@given(st.sampled_from(sorted(WHOLE)), CHANGES)
def test_changed_files_give_rows_and_faults(name, changes):
    read_all(name, changed(WHOLE[name], changes))


@pytest.mark.slow
@any_change(6000)
@given(st.sampled_from(sorted(WHOLE)), CHANGES)
def test_files_changed_in_many_ways_give_rows_and_faults(name, changes):
    read_all(name, changed(WHOLE[name], changes))


@any_change(40)
@given(st.sampled_from(sorted(WHOLE)), st.binary(max_size=300))
def test_any_bytes_give_rows_and_faults(name, content):
    start = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
    read_all(name, start)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "a", "\ud800", "weight"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
COLUMNS = st.sampled_from(["instruction", "output", "input", "system", "history", "messages", "conversations", "prompt", "tools",
                           "completion", "text", "chosen", "rejected", "label", "images", " Output", "\udfff"])  # fmt: skip


@any_change(80)
@given(st.lists(st.dictionaries(COLUMNS, JSON, max_size=4), min_size=1, max_size=4), st.booleans())
def test_any_json_gives_rows_and_faults(rows, is_array):
    text = json.dumps(rows) if is_array else "\n".join(map(json.dumps, rows))
    read_all("a.json", text.encode())


@pytest.mark.slow
@any_change(4000)
@given(st.lists(st.dictionaries(COLUMNS, JSON, max_size=4), min_size=1, max_size=4))
def test_much_json_gives_rows_and_faults(rows):
    read_all("a.jsonl", "\n".join(map(json.dumps, rows)).encode())
