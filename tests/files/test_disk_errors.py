"""Disks that fill up at any point, and paths that are closed later: one message, and nothing half-made."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import sqlite3
import subprocess
from collections.abc import Callable

import numpy
import pytest
import torch
from datasets import Features, Value
from datasets.arrow_writer import ArrowWriter
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import nybble.training.beginning as beginning
from nybble.errors import ExportError, NybbleError, RunError, StorageError
from nybble.export.export import ExportRequest, export
from nybble.files.disk_errors import explained_disk_errors
from nybble.files.writing import write_text
from nybble.run.folder import open_run
from nybble.training.train import resume, train
from tests.files.disks import read_only, small_disk
from tests.training.test_train import recipe_for

BIG = torch.zeros(1_000_000)


def by_arrow(folder: pathlib.Path) -> None:
    with ArrowWriter(path=str(folder / "a.arrow"), features=Features({"a": Value("string")})) as writer:
        for _ in range(3000):
            writer.write({"a": "x" * 1000})
        writer.finalize()


def by_matplotlib(folder: pathlib.Path) -> None:
    figure = Figure(dpi=300)
    figure.add_subplot().imshow(numpy.random.default_rng(0).random((900, 900)))
    figure.savefig(folder / "a.png")


def by_sqlite(folder: pathlib.Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "a.db")) as base:
        base.execute("create table t(a)")
        base.executemany("insert into t values(?)", [("x" * 1000,)] * 3000)
        base.commit()


def by_numpy(folder: pathlib.Path) -> None:
    with (folder / "a.gguf").open("wb") as stream:
        BIG.numpy().tofile(stream)


def by_tokenizers(folder: pathlib.Path) -> None:
    Tokenizer(models.BPE(vocab={f"t{n}" * 9: n for n in range(20_000)}, merges=[])).save(str(folder / "t.json"))


WRITERS = {
    "tokenizers": by_tokenizers,
    "safetensors": lambda folder: save_file({"a": BIG}, folder / "a.safetensors"),
    "arrow": by_arrow,
    "torch": lambda folder: torch.save({"a": BIG}, folder / "a.pt"),
    "matplotlib": by_matplotlib,
    "sqlite": by_sqlite,
    "numpy": by_numpy,
    "text": lambda folder: write_text(folder / "a.txt", "x" * 3_000_000),
}


def test_a_full_disk_is_reported_whichever_library_writes(tmp_path):
    for name, write in WRITERS.items():
        with small_disk(tmp_path / "disk", "600k") as disk:
            with pytest.raises(StorageError) as caught, explained_disk_errors(disk, tmp_path):
                write(disk)
            said = str(caught.value)
            assert said.startswith(f"the disk is full\n  where: {disk}, 0.00 GB free\n  fix:   free some space"), name


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match=r"^something else$"), explained_disk_errors(tmp_path):
        raise RuntimeError("something else")
    with pytest.raises(RunError, match="no space of its own"), explained_disk_errors(tmp_path):
        raise RunError("no space of its own")
    with explained_disk_errors(tmp_path):
        pass


def test_a_path_that_becomes_inaccessible_is_one_message(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(StorageError, match=r"/file/x cannot be opened: not a directory\n  fix:   nybble doctor"),
        explained_disk_errors(),
    ):
        (file / "x").read_text()
    with (
        read_only(tmp_path / "closed"),
        pytest.raises(StorageError, match="read-only file system"),
        explained_disk_errors(),
    ):
        (tmp_path / "closed" / "x").mkdir()
    with pytest.raises(StorageError, match="set TMPDIR"), explained_disk_errors():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    with pytest.raises(FileNotFoundError), explained_disk_errors():
        (tmp_path / "none").read_text()


def stopped(work: Callable[[], object]) -> str | None:
    """The message of a StorageError, or None if there was none."""
    try:
        work()
    except StorageError as error:
        return str(error)
    return None


def test_a_disk_that_fills_up_leaves_nothing_or_what_can_be_resumed(
    tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    """From a disk with no room for the tokenizer to one on which only the last file has none."""
    monkeypatch.setattr(beginning, "check_disk_space", lambda *sizes: None)  # another program fills the disk after it
    words = ["train.max_steps=2", "train.save_every=1", "train.evaluate_every=1", "lora.r=4", "train.samples=0"]
    ends = set()
    for size in ("24k", "64k", "180k", "300k", "480k", "600k", "740k"):
        with small_disk(tmp_path / "disk", size) as disk:
            run = disk / "runs" / "run"
            said = stopped(lambda at=run: train(recipe_for(tiny_llama, rows, at, *words), console=quiet, cache=cache))
            if said is None:
                ends.add("finished")
                continue
            assert said.startswith(f"the disk is full\n  where: {disk}")
            left = [str(path.relative_to(disk)) for path in disk.rglob("*")]
            print(size, left)
            if not left:
                ends.add("nothing")
                continue
            ends.add("resumable")
            assert not [name for name in left if "writing" in name]
            assert open_run(run).latest_checkpoint() is not None
            assert all((path / "COMPLETE").exists() for path in (run / "checkpoints").iterdir())
            subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
            assert resume(run, console=quiet, cache=cache).adapter.exists()
    assert ends == {"nothing", "resumable", "finished"}


def test_an_export_that_fails_leaves_nothing(tuned_run, cache, tmp_path, quiet):
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(NybbleError):
            export(tuned_run, ExportRequest("merged", disk / "a" / "b"), quiet, cache)
        assert list(disk.iterdir()) == []
    taken = tmp_path / "taken"
    taken.symlink_to("nowhere")  # exists() says no, and a rename would fail at the very end
    with pytest.raises(ExportError, match="exists already"):
        export(tuned_run, ExportRequest("adapter", taken), quiet, cache)
