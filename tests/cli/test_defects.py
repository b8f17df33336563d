"""An error that nobody foresaw: one message, the traceback in a file, exit status 70."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from nybble import cli
from nybble.cli import defects


@pytest.fixture
def defect(monkeypatch, tmp_path):
    def run(*words: str) -> int:
        monkeypatch.setattr(cli, "app", lambda: {}["no such key"])
        monkeypatch.setattr(sys, "argv", ["nybble", *words])
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    return run


def written(error: str) -> pathlib.Path:
    line = next(line for line in error.splitlines() if "where:" in line)
    return pathlib.Path(line.split("where:")[1].split(" (the")[0].strip())


def test_a_defect_is_one_message_and_its_traceback_a_file(defect, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert defect("train", "base", "rows.jsonl") == 70
    error = capsys.readouterr().err
    assert "unexpected error (KeyError: 'no such key')" in error
    assert "Traceback" not in error
    file = written(error)
    assert file.is_relative_to(tmp_path / "cache" / "nybble")
    assert "train base rows.jsonl" in file.read_text()
    assert "KeyError: 'no such key'" in file.read_text()


def test_a_panic_in_a_librarys_rust_is_one_too(tmp_path, capsys, monkeypatch):
    cuts = Tokenizer(models.BPE())
    cuts.pre_tokenizer = pre_tokenizers.FixedLength(length=0)
    monkeypatch.setattr(cli, "app", lambda: cuts.encode("a"))
    monkeypatch.setattr(sys, "argv", ["nybble"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 70
    assert "unexpected error (PanicException: chunk size must be non-zero)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_end_that_was_asked_for_is_no_defect(end, tmp_path, monkeypatch):
    def ends() -> None:
        raise end

    monkeypatch.setattr(cli, "app", ends)
    monkeypatch.setattr(sys, "argv", ["nybble"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(end):
        cli.main()
    assert not (tmp_path / "cache").exists()


def test_the_traceback_goes_into_the_run_that_was_named(defect, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    assert defect("eval", str(run), "x" * 5000, "zero\0byte") == 70
    assert written(capsys.readouterr().err).parent == run


@pytest.mark.parametrize("words", [("--cache", "{}", "eval", "x"), ("--cache={}", "eval", "x")])
def test_the_traceback_goes_into_the_cache_that_was_named(words, defect, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    named = tmp_path / "named"
    assert defect(*(word.format(named) for word in words)) == 70
    assert written(capsys.readouterr().err).parent == named / "tracebacks"
    assert defect("--cache", "zero\0byte", "eval", "x") == 70
    assert written(capsys.readouterr().err).is_file()


@pytest.mark.parametrize("key", [("--api-key", "s3cret"), ("--api-key=s3cret",)])
def test_a_key_is_not_written_into_the_file(key, defect, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert defect("serve", "run", *key, "--port", "0") == 70
    text = written(capsys.readouterr().err).read_text()
    assert "--api-key" in text
    assert "--port 0" in text
    assert "s3cret" not in text


def test_where_nothing_can_be_written_the_traceback_is_shown(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(defects, "default_cache", lambda: file / "cache")
    monkeypatch.setattr(defects.tempfile, "gettempdir", lambda: str(file / "tmp"))
    try:
        os.stat(tmp_path / "gone")
    except OSError as error:
        text = defects.report(error, [])
    assert "FileNotFoundError" in text
    assert "Traceback (most recent call last)" in text
