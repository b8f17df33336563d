"""Folders and names that nybble cannot read or write are refused with one message."""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest

from nybble.errors import ExportError, RunError, StorageError
from nybble.export.export import ExportRequest, export
from nybble.files.outputs import check_export
from nybble.files.paths import ANOTHER_CACHE, check_cache, check_current_folder, check_writable, default_cache
from nybble.preflight.data_check import check
from nybble.preflight.doctor import space
from nybble.run.folder import open_run, refuse_existing
from tests.files.disks import as_somebody_without_a_home, read_only, small_disk
from tests.training.test_train import recipe_for


def test_the_cache_follows_xdg_and_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == pathlib.Path("/home/ada/.cache/nybble")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert default_cache() == pathlib.Path("/scratch/cache/nybble")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/from/the/root")  # the standard: to be ignored
    assert default_cache() == pathlib.Path("/home/ada/.cache/nybble")


@pytest.mark.parametrize(
    "environment, words, message, fix",
    [
        ({}, ["out=/tmp/x"], "there is no home folder to keep the cache in", "fix:   nybble --cache FOLDER"),
        ({"HOME": "/"}, ["out=/tmp/x"], "the cache cannot be written: this user may not write to /", "--cache"),
        ({"HOME": "/root"}, ["out=/tmp/x"], "the cache cannot be written: this user may not write to /root", "--cache"),
        ({"HOME": "/tmp"}, [], "the run cannot be written: this user may not write to /", "fix:   out=FOLDER"),
    ],
)
def test_a_user_without_a_writable_folder_gets_one_message_before_anything_is_loaded(environment, words, message, fix):
    done = as_somebody_without_a_home("train", "m", "d.jsonl", *words, **environment)
    print(done.stderr)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert fix in done.stderr
    assert "loaded: []" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_written_says_why(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StorageError, match=r"the run cannot be written: .*/file is a file, not a folder"):
        check_writable(file / "runs" / "x", "the run", "out=FOLDER")
    check_writable(tmp_path / "not" / "yet", "the run", "out=FOLDER")
    assert os.listdir(tmp_path) == ["file"]
    closed = tmp_path / "closed"
    with read_only(closed), pytest.raises(StorageError, match="closed is read-only") as caught:
        check_writable(closed / "x", "the run", "out=FOLDER")
    assert str(caught.value).endswith(f"where: {closed / 'x'}\n  fix:   out=FOLDER")
    with small_disk(tmp_path / "full", "4k") as full:
        (full / "all").write_bytes(bytes(4096))
        with pytest.raises(StorageError, match="full is full"):
            check_writable(full / "x", "the run", "out=FOLDER")


LONG = "x" * 300


@pytest.mark.parametrize(
    "words, message, fix",
    [
        (["train", "m", "d.jsonl", f"out={LONG}"], "cannot be opened: file name too long", "use a shorter name"),
        (["train", "m", "d.jsonl", f"out=runs/{LONG}/x"], "the run cannot be written: its name is too", "out=FOLDER"),
        (["train", "--resume", LONG], "cannot be opened: file name too long", "use a shorter name"),
        (["chat", LONG], "cannot be opened: file name too long", "use a shorter name"),
        (
            ["--cache", LONG, "chat", "run"],
            "the cache cannot be written: its name is too long",
            "nybble --cache FOLDER",
        ),
        (["export", "run", "--to", "adapter", "--out", LONG], "the export cannot be written: its name", "--out FOLDER"),
        (["train", "m", "d.jsonl", "out=gone/x"], "the run cannot be written: {}/gone is a link to /nowhere", "out="),
        (["train", "m", "d.jsonl", "out=gone"], "the run cannot be written: {}/gone is a link to /nowhere", "out="),
        (["train", "m", "d.jsonl", "out=loop/x"], "the run cannot be written: {}/loop is a link to loop", "out="),
        (["--cache", "gone", "eval", "run"], "the cache cannot be written: {}/gone is a link to /nowhere", "--cache"),
        (["export", "run", "--to", "gguf", "--out", "gone/x"], "the export cannot be written: {}/gone is a", "--out"),
        (["export", "run", "--to", "gguf", "--out", "gone"], "gone exists already", "--out ANOTHER\n"),
        (["demo", "--out", "gone/x"], "the run cannot be written: {}/gone is a link to /nowhere", "out=FOLDER"),
        (["demo", "--weights", LONG], "the model cannot be written: its name is too long", "--weights FOLDER"),
    ],
)
def test_long_names_and_dangling_links_are_one_message(words, message, fix, tuned_run, tmp_path, here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("gone").symlink_to("/nowhere")
    pathlib.Path("loop").symlink_to("loop")
    pathlib.Path("run").symlink_to(tuned_run.folder)
    done = here(*words)
    print(done.stderr)
    assert done.returncode == 1
    assert message.format(tmp_path) in done.stderr
    assert fix in done.stderr.split("fix:")[1]
    assert sorted(os.listdir()) == ["gone", "loop", "run"]


def test_only_an_export_is_suggested_for_removal_and_only_a_run_for_resuming(tmp_path):
    base, made = tmp_path / "base", tmp_path / "my export"
    for folder, file in ((base, "config.json"), (made, "parity.json")):
        folder.mkdir()
        (folder / file).write_text("{}")
    with pytest.raises(ExportError, match="base exists already") as caught:
        check_export(base)
    assert "rm " not in str(caught.value)
    with pytest.raises(ExportError, match="my export exists already") as caught:
        check_export(made)
    print(caught.value)
    assert f"rm -r '{made}'" in str(caught.value)
    with pytest.raises(RunError, match="base exists already") as caught:
        refuse_existing(base)
    assert "--resume" not in str(caught.value)


def test_a_cache_with_a_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "tokens").mkdir()
    check_cache(tmp_path)
    with read_only(tmp_path / "tokens"), pytest.raises(StorageError, match="the cache cannot be written") as caught:
        check_cache(tmp_path)
    assert "tokens" in str(caught.value)


def test_a_folder_that_is_gone_is_named(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(StorageError, match="the current folder was removed"):
        check_current_folder()


def test_every_command_refuses_an_unwritable_folder_in_one_message(
    tuned_run, tiny_llama, rows, tmp_path, here, monkeypatch
):
    closed, run = tmp_path / "closed", tmp_path / "run"
    shutil.copytree(tuned_run.folder, run)
    with read_only(closed), read_only(run):
        monkeypatch.chdir(closed)
        cache = f"the cache cannot be written: {closed} is read-only"
        for words, message, fix in (
            (["train", tiny_llama, rows], f"the run cannot be written: {closed} is read-only", "out=FOLDER"),
            (["train", "--resume", run], f"the run cannot be written: {run} is read-only", "out=FOLDER"),
            (["train", tiny_llama, rows, f"out={rows}/x"], "rows.jsonl is a file, not a folder", "out=FOLDER"),
            (["--cache", closed, "train", tiny_llama, rows, f"out={tmp_path}/x"], cache, "nybble --cache FOLDER"),
            (["--cache", closed / "c", "data", "check", rows, tiny_llama], cache, "XDG_CACHE_HOME"),
            (["--cache", closed, "chat", run], cache, "nybble --cache FOLDER"),
            (["--cache", closed, "serve", run], cache, "nybble --cache FOLDER"),
            (["demo"], f"the run cannot be written: {closed} is read-only", "out=FOLDER"),
            (["demo", "--weights", "smol"], f"the model cannot be written: {closed} is read-only", "--weights FOLDER"),
            (["eval", run], f"the report, which is kept in the run, cannot be written: {run} is read-only", "cp -r"),
            (["export", run, "--to", "merged"], f"the export cannot be written: {run} is read-only", "--out FOLDER"),
        ):
            done = here(*words)
            print(done.stderr)
            assert done.returncode == 1, words
            assert message in done.stderr
            assert fix in done.stderr.split("fix:")[1]
            assert done.stderr.startswith("error: ")
    assert sorted(os.listdir(closed)) == []


def test_a_run_that_cannot_be_written_is_exported_elsewhere(tuned_run, cache, tmp_path, quiet):
    run = tmp_path / "run"
    shutil.copytree(tuned_run.folder, run)
    with read_only(run):
        made = export(open_run(run), ExportRequest("adapter", tmp_path / "out"), quiet, cache)
    assert (made / "adapter_model.safetensors").is_file()


def test_doctor_checks_the_folders(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    assert space.nybble_cache(tmp_path / "cache").verdict in ("ok", "warn")
    refused = space.nybble_cache(file / "cache")
    assert (refused.verdict, refused.fix) == ("fail", ANOTHER_CACHE)
    assert "is a file, not a folder" in refused.detail
    hub = space.hub_cache(file / "hub")
    assert (hub.verdict, hub.fix) == ("warn", "set HF_HOME to a folder you can write to")
    assert "set HOME" in space.hub_cache(pathlib.Path("~/.cache/huggingface/hub")).fix
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(file))
    assert space.nybble_cache(None).verdict == "fail"
    with small_disk(tmp_path / "full", "4k") as full:
        (full / "all").write_bytes(bytes(4096))
        found = space.disk("here", full, 1, "a fix")
    assert (found.verdict, found.fix) == ("fail", "a fix")
    assert space.temporary().verdict == "ok"


def test_data_check_checks_its_cache_and_its_picture(tiny_llama, rows, tmp_path, quiet):
    file = tmp_path / "file"
    file.touch()
    recipe = recipe_for(tiny_llama, rows, tmp_path / "out")
    with pytest.raises(StorageError, match="the cache cannot be written"):
        check(recipe, quiet, cache=file / "cache")
    with pytest.raises(StorageError, match="the picture cannot be written"):
        check(recipe, quiet, cache=tmp_path / "cache", picture=file / "lengths.png")
