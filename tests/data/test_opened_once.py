"""A run opens each of its data files once, and looks up a data set on the Hub once."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from nybble.data.rows.readers import OpenFile
from nybble.data.rows.reading import FORM_ROWS, OpenRows
from nybble.data.sets.prepare import prepare
from nybble.data.sets.preview import preview
from nybble.errors import DataError
from nybble.preflight.data_check import check
from nybble.recipe import DataOptions, load_recipe
from tests.standin_hub import Repo, StandinHub, commit_of

COUNT = FORM_ROWS + 500  # more rows than decide the forms
ROWS = [{"prompt": f"red {n}", "completion": "blue"} for n in range(COUNT)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
opened: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        opened.append(os.fspath(arguments[0]))


sys.addaudithook(watch)


def opened_in(folder: pathlib.Path) -> list[str]:
    """Names of the files in a folder that were opened since the last call, once for each time."""
    names = [pathlib.Path(name).name for name in opened if pathlib.Path(name).parent == folder]
    opened.clear()
    return names


def table() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream, row_group_size=400)
    return stream.getvalue()


KINDS = {
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "wrapped.json": json.dumps({"version": "1", "data": ROWS}, indent=1).encode(),
    "a.csv": ("prompt,completion\n" + "".join(f"{row['prompt']},blue\n" for row in ROWS)).encode(),
    "a.tsv": ("prompt\tcompletion\n" + "".join(f"{row['prompt']}\tblue\n" for row in ROWS)).encode(),
    "a.txt": b"red blue " * 40,
    "a.parquet": table(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.parquet.gz": gzip.compress(table()),
}


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    (tmp_path / "rows").mkdir()
    return tmp_path / "rows"


def prepared(path, tokenizer, tmp_path, **options):
    return prepare(DataOptions(path=str(path), **{"validation": 0, **options}), tokenizer, 0, tmp_path / "cache")


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_opened_once_whatever_its_kind(name, folder, tmp_path, tiny_tokenizer):
    (folder / name).write_bytes(KINDS[name])
    opened_in(folder)
    first = prepared(folder / name, tiny_tokenizer, tmp_path)
    assert opened_in(folder) == [name]
    assert first.counts.rows == (1 if name == "a.txt" else COUNT)
    again = prepared(folder / name, tiny_tokenizer, tmp_path)
    assert opened_in(folder) == [name]
    assert (again.cached, again.fingerprint, list(again.train)) == (True, first.fingerprint, list(first.train))


def test_the_fingerprint_is_of_the_files_bytes(folder, tmp_path, tiny_tokenizer):
    """It is the same as when files were read a second time for it, so that a run of an earlier version recognises its data."""
    from nybble.data.rows.reading import OpenRows

    for name in ("a.jsonl", "a.parquet", "a.jsonl.gz", "a.csv"):
        (folder / name).write_bytes(KINDS[name])
        expected = hashlib.sha256(hashlib.sha256(KINDS[name]).digest()).hexdigest()
        for rest in (None, 0, FORM_ROWS + 1):
            with OpenRows(DataOptions(path=str(folder / name)), notes=tmp_path / f"notes {rest}") as rows:
                assert rows.forms.most_common == "prompt"
                assert rows.fingerprint(is_read=False) is None, "nothing is known of a file that was never read"
                for _ in zip(range(rest or 0), rows.items(), strict=False):
                    pass
                assert rows.fingerprint(is_read=True) == expected
        with OpenRows(DataOptions(path=str(folder / name)), notes=tmp_path / "notes 0") as rows:
            assert rows.fingerprint(is_read=False) == expected


def test_the_files_of_a_folder_are_opened_once_each_and_in_a_second_run_only_those_that_decide_the_forms(
    folder, tmp_path, tiny_tokenizer
):
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        (folder / name).write_bytes(KINDS[f"a{pathlib.Path(name).suffix}"])
    opened_in(folder)
    first = prepared(folder, tiny_tokenizer, tmp_path)
    assert opened_in(folder) == ["a.jsonl", "b.csv", "c.parquet"]
    assert (first.counts.rows, first.counts.duplicates) == (3 * COUNT, 2 * COUNT)
    assert prepared(folder, tiny_tokenizer, tmp_path).cached
    assert opened_in(folder) == ["a.jsonl"]
    prepared(folder, tiny_tokenizer, tmp_path, limit=5, train_on="all")
    assert opened_in(folder) == ["a.jsonl"], "what is remembered of the others is enough for the fingerprint"
    with pytest.raises(DataError, match="rows are longer than"):
        prepared(folder, tiny_tokenizer, tmp_path, max_length=8)
    assert opened_in(folder) == ["a.jsonl", "b.csv", "c.parquet"]


def test_rows_that_are_not_needed_are_read_for_the_fingerprint_alone(folder, tmp_path, tiny_tokenizer):
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(LINES)
    opened_in(folder)
    prepared(folder, tiny_tokenizer, tmp_path, limit=5)
    assert opened_in(folder) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_second_run_reads_no_more_than_it_needs(name, folder, tmp_path, tiny_tokenizer, monkeypatch):
    rows = ROWS * 20 if name == "a.jsonl" else ROWS
    content = "".join(json.dumps(row) + "\n" for row in rows).encode() if name == "a.jsonl" else KINDS[name]
    (folder / name).write_bytes(content)
    prepared(folder / name, tiny_tokenizer, tmp_path)
    hashed = []
    monkeypatch.setattr(OpenFile, "hash_as_read", lambda file: hashed.append(file))
    assert prepared(folder / name, tiny_tokenizer, tmp_path).cached
    assert not hashed


def test_a_file_that_was_only_touched_or_copied_over_is_known_by_its_bytes(folder, tmp_path, tiny_tokenizer):
    file = folder / "a.jsonl"
    file.write_bytes(LINES)
    first = prepared(file, tiny_tokenizer, tmp_path)
    os.utime(file, (0, 0))
    opened_in(folder)
    assert prepared(file, tiny_tokenizer, tmp_path).cached
    assert opened_in(folder) == ["a.jsonl"]
    file.unlink()
    file.write_bytes(LINES)
    assert prepared(file, tiny_tokenizer, tmp_path).cached
    file.write_bytes(LINES.replace(b"red 7", b"red 8", 1))
    other = prepared(file, tiny_tokenizer, tmp_path)
    assert (other.cached, other.fingerprint != first.fingerprint) == (False, True)
    file.write_bytes(LINES)
    assert prepared(file, tiny_tokenizer, tmp_path).cached, "both are kept"
    for note in (tmp_path / "cache" / "data-files").iterdir():
        note.unlink()
    again = prepared(file, tiny_tokenizer, tmp_path)
    assert (again.cached, again.fingerprint) == (False, first.fingerprint)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2, "what was tokenised once more is the same entry"


def test_a_file_that_changes_while_it_is_read_is_refused(folder, tmp_path, tiny_tokenizer):
    file = folder / "a.jsonl"
    file.write_bytes(LINES)
    prepared(file, tiny_tokenizer, tmp_path)

    def rewrite(rows: int) -> None:
        with file.open("ab") as stream:
            stream.write(b'{"prompt": "new", "completion": "one"}\n')

    options = DataOptions(path=str(file), validation=0, train_on="all")
    with pytest.raises(DataError, match="the file changed while it was being read"):
        prepare(options, tiny_tokenizer, 0, tmp_path / "cache", rewrite)
    assert prepare(options, tiny_tokenizer, 0, tmp_path / "cache").counts.rows > COUNT


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_file_that_changes_during_its_first_reading_is_refused(name, folder, tmp_path, tiny_tokenizer):
    file = folder / name
    file.write_bytes(KINDS[name])

    def rewrite(rows: int) -> None:
        os.utime(file, ns=(1, 1))

    options = DataOptions(path=str(file), validation=0, train_on="all")
    with pytest.raises(DataError, match="the file changed while it was being read"):
        prepare(options, tiny_tokenizer, 0, tmp_path / "cache", rewrite)


def test_bad_rows_in_the_buffer_do_not_keep_their_lines_in_memory(folder):
    (folder / "a.jsonl").write_bytes(b'{"prompt": ' + b"x" * 1000 + b"}\n" + LINES)
    with OpenRows(DataOptions(path=str(folder / "a.jsonl"))) as rows:
        fault = next(iter(rows.items()))
    assert isinstance(fault, DataError)
    assert fault.__cause__ is fault.__context__ is fault.__traceback__ is None


def test_rows_too_large_for_the_buffer_are_read_again(folder, tmp_path, tiny_tokenizer, monkeypatch):
    (folder / "a.jsonl").write_bytes(LINES)
    whole = prepared(folder / "a.jsonl", tiny_tokenizer, tmp_path / "whole")
    monkeypatch.setattr("nybble.data.rows.reading.BUFFER", 5000)
    opened_in(folder)
    again = prepared(folder / "a.jsonl", tiny_tokenizer, tmp_path / "again")
    assert opened_in(folder) == ["a.jsonl"] * 2
    assert (again.fingerprint, list(again.train)) == (whole.fingerprint, list(whole.train))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_data_check_and_preview_open_a_file_once(name, folder, tmp_path, tiny_llama, tiny_tokenizer):
    (folder / name).write_bytes(KINDS[name])
    opened_in(folder)
    for model in ("", tiny_llama):
        words = [f"data.path={folder / name}", f"model.path='{model}'", "model.device=cpu", "data.max_length=256"]
        recipe = load_recipe(None, words)
        assert check(recipe, Console(quiet=True), cache=tmp_path / "cache")
        assert opened_in(folder) == [name]
    preview(DataOptions(path=str(folder / name)), tiny_tokenizer, 2, Console(quiet=True))
    assert opened_in(folder) == [name]


READER = """
import pathlib, sys
from nybble.data.rows.licences import licences
from nybble.data.rows.reading import OpenRows
from nybble.recipe import DataOptions
options = DataOptions(path="org/rows", streaming=sys.argv[1] == "stream")
with OpenRows(options, notes=pathlib.Path(sys.argv[2])) as rows:
    before = rows.fingerprint(is_read=False)
    print(rows.forms.most_common, sum(1 for _ in rows.items()), licences(rows.sources))
    assert before == rows.fingerprint(is_read=True)
"""
LOADER = """
import sys
from datasets import load_dataset
rows = load_dataset("org/rows", split="train", revision=sys.argv[2], streaming=sys.argv[1] == "stream")
print(sum(1 for _ in rows))
"""


@pytest.mark.parametrize("how", ["whole", pytest.param("stream", marks=pytest.mark.slow)])
def test_a_data_set_on_the_hub_is_looked_up_once(how, folder, tmp_path):
    """Forms, fingerprint, licence and rows take one request for the commit, and those that Datasets needs to load once."""
    (folder / "train.jsonl").write_bytes(LINES)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    asked = {}
    with StandinHub([Repo("org/rows", folder, kind="dataset")]) as hub:
        for script, argument in ((READER, tmp_path / "notes"), (LOADER, commit_of(folder))):
            hub.requests.clear()
            command = [sys.executable, "-c", script, how, str(argument)]
            environment = hub.environment(tmp_path / f"home {len(asked)}")
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert str(COUNT) in done.stdout
            asked[script] = [*hub.requests]
    assert asked[READER][0] == "GET /api/datasets/org/rows"
    assert sorted(asked[READER][1:]) == sorted(asked[LOADER])
