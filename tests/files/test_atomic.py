"""Files and folders that are whole or not there, with several processes in one cache."""

from __future__ import annotations

import multiprocessing
import pathlib

import pytest

import nybble.export.export as exporting
from nybble.errors import ExportError, RunError
from nybble.evaluate.scores import Scored, Store
from nybble.export.export import ExportRequest, export
from nybble.files.atomic import new_folder, no_empty_folders, replacing
from nybble.files.writing import write_text
from nybble.model.base.checkpoint import find_checkpoint, fingerprint
from nybble.run.folder import create_run
from nybble.run.start import start_record
from tests.training.test_train import recipe_for

ROUNDS, PROCESSES = 150, 6


def test_an_export_that_loses_a_race_for_its_target_leaves_nothing_and_says_so(
    tuned_run, cache, tmp_path, quiet, monkeypatch
):
    """The other began a moment before this one could see it."""
    target, written = tmp_path / "out", exporting.write_card

    def overtaken(subject):
        target.mkdir()
        (target / "theirs").touch()
        return written(subject)

    monkeypatch.setattr(exporting, "write_card", overtaken)
    with pytest.raises(ExportError, match="out exists already"):
        export(tuned_run, ExportRequest("adapter", target), quiet, cache)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


def test_folders_are_complete_or_absent(tmp_path):
    target = tmp_path / "a" / "b" / "c"

    def cut_off() -> None:
        with no_empty_folders(target), new_folder(target) as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    def overtaken() -> None:
        with create_run(tmp_path / "run", open_recipe(), start_record(open_recipe(), "0", "0", None)) as beginning:
            assert (beginning / "recipe.yaml").exists()
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "recipe.yaml").touch()

    def broken() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.touch()
            raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert list(tmp_path.iterdir()) == []
    with no_empty_folders(target), new_folder(target) as folder:
        (folder / "whole").touch()
    assert [file.name for file in target.iterdir()] == ["whole"]
    with new_folder(target, marker="whole"):  # another process made the same meanwhile
        pass
    with pytest.raises(FileExistsError), new_folder(target):
        pass
    with pytest.raises(RunError, match="exists already"):
        overtaken()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]
    with pytest.raises(ZeroDivisionError):
        broken()
    assert not (tmp_path / "file").exists()
    assert not list(tmp_path.rglob("*.writing*"))


def open_recipe():
    return recipe_for("m", "d", "o")


def hammer(cache: pathlib.Path, model: pathlib.Path, start, faults) -> None:
    """What the processes of one user do to one cache at the same moment, round after round."""
    checkpoint = find_checkpoint(str(model))
    scored = Scored("t", "acc", True, "1", 0, 1, "Hub", [1.0], ["t"], ["x"])
    for number in range(ROUNDS):
        start.wait(60)
        try:
            fingerprint(checkpoint, cache / str(number))
            Store(cache / str(number)).scored({"n": 1}, lambda: scored)
            write_text(cache / str(number) / "orders.jsonl", "{}\n")
            with new_folder(cache / str(number) / "model", marker="config.json") as folder:
                (folder / "config.json").write_text("{}")
        except (OSError, ValueError) as error:  # a name that is gone, a file that is half written
            faults.put(repr(error))


def test_processes_that_share_a_cache_do_not_disturb_each_other(tiny_llama, tmp_path):
    processes = multiprocessing.get_context("fork")
    start, faults = processes.Barrier(PROCESSES), processes.Queue()
    words = (tmp_path, tiny_llama, start, faults)
    crowd = [processes.Process(target=hammer, args=words, daemon=True) for _ in range(PROCESSES)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(100)
    assert [process.exitcode for process in crowd] == [0] * PROCESSES
    assert faults.empty(), faults.get()
    assert not list(tmp_path.rglob("*writing*"))
