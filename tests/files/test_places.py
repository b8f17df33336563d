"""Places that cannot be written, disks that fill up at any point, several processes in one cache."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pathlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable

import numpy
import pytest
import torch
from datasets import Features, Value
from datasets.arrow_writer import ArrowWriter
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import nybble.export.export as exporting
import nybble.training.beginning as beginning
from nybble.errors import ExportError, NybbleError, PlaceError, RunError
from nybble.evaluate.scores import Scored, Store
from nybble.export.export import Wanted, export
from nybble.files.places import (
    ANOTHER_CACHE,
    check_cache,
    check_export,
    check_here,
    check_writable,
    default_cache,
    explained_disk,
    new_folder,
    no_empty_folders,
    replacing,
)
from nybble.files.writing import write_text
from nybble.model.base.checkpoint import find_checkpoint, fingerprint
from nybble.preflight.data_check import check
from nybble.preflight.doctor import space
from nybble.run.folder import create_run, open_run, refuse_existing
from nybble.run.start import start_record
from nybble.training.train import resume, train
from tests.training.test_train import recipe_for

ROUNDS, PROCESSES = 150, 6


def mounted(folder: pathlib.Path, *words: str) -> None:
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", *words, folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str):
    """A disk of so many bytes. It goes without waiting for files that a traceback may still hold open."""
    mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def read_only(folder: pathlib.Path):
    """The folder as it is, on a file system that root cannot write to either."""
    mounted(folder, "--bind", str(folder))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_the_cache_follows_xdg_and_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == pathlib.Path("/home/ada/.cache/nybble")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert default_cache() == pathlib.Path("/scratch/cache/nybble")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/from/the/root")  # the standard: to be ignored
    assert default_cache() == pathlib.Path("/home/ada/.cache/nybble")


COMMAND = """
import sys
from nybble.cli import main
sys.argv = ["nybble", *sys.argv[1:]]
try:
    main()
finally:
    print("loaded:", [name for name in ("torch", "transformers", "datasets") if name in sys.modules], file=sys.stderr)
"""


def as_somebody_without_a_home(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user whom this machine does not know, with no rights anywhere."""
    user = ["setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups"]
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs to become another user")
    if subprocess.run([*user, sys.executable, "-c", ""], capture_output=True, cwd="/", check=False).returncode:
        pytest.skip("needs a Python that another user may start")
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "USER")}
    command = [*user, sys.executable, "-c", COMMAND, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment, cwd="/")


@pytest.mark.parametrize(
    "environment, words, message, fix",
    [
        ({}, ["out=/tmp/x"], "there is no home folder to keep the cache in", "fix:   nybble --cache FOLDER"),
        ({"HOME": "/"}, ["out=/tmp/x"], "the cache cannot be written: this user may not write to /", "--cache"),
        ({"HOME": "/root"}, ["out=/tmp/x"], "the cache cannot be written: this user may not write to /root", "--cache"),
        ({"HOME": "/tmp"}, [], "the run cannot be written: this user may not write to /", "fix:   out=FOLDER"),
    ],
)
def test_a_user_without_a_place_gets_one_message_before_anything_is_loaded(environment, words, message, fix):
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
    with pytest.raises(PlaceError, match=r"the run cannot be written: .*/file is a file, not a folder"):
        check_writable(file / "runs" / "x", "the run", "out=FOLDER")
    check_writable(tmp_path / "not" / "yet", "the run", "out=FOLDER")
    assert os.listdir(tmp_path) == ["file"]
    closed = tmp_path / "closed"
    with read_only(closed), pytest.raises(PlaceError, match="closed is read-only") as caught:
        check_writable(closed / "x", "the run", "out=FOLDER")
    assert str(caught.value).endswith(f"where: {closed / 'x'}\n  fix:   out=FOLDER")
    with small_disk(tmp_path / "full", "4k") as full:
        (full / "all").write_bytes(bytes(4096))
        with pytest.raises(PlaceError, match="full is full"):
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
def test_names_and_links_that_lead_nowhere_are_one_message(words, message, fix, tuned_run, tmp_path, here, monkeypatch):
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


def test_what_is_no_export_or_no_run_is_not_told_to_be_one(tmp_path):
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


def test_a_cache_with_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "tokens").mkdir()
    check_cache(tmp_path)
    with read_only(tmp_path / "tokens"), pytest.raises(PlaceError, match="the cache cannot be written") as caught:
        check_cache(tmp_path)
    assert "tokens" in str(caught.value)


def test_a_folder_that_is_gone_is_named(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(PlaceError, match="the current folder was removed"):
        check_here()


def test_every_command_refuses_a_closed_place_in_one_message(tuned_run, tiny_llama, rows, tmp_path, here, monkeypatch):
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
        made = export(open_run(run), Wanted("adapter", tmp_path / "out"), quiet, cache)
    assert (made / "adapter_model.safetensors").is_file()


def test_doctor_looks_at_the_places(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    assert space.own_cache(tmp_path / "cache").verdict in ("ok", "warn")
    refused = space.own_cache(file / "cache")
    assert (refused.verdict, refused.fix) == ("fail", ANOTHER_CACHE)
    assert "is a file, not a folder" in refused.detail
    hub = space.hub_cache(file / "hub")
    assert (hub.verdict, hub.fix) == ("warn", "set HF_HOME to a folder you can write to")
    assert "set HOME" in space.hub_cache(pathlib.Path("~/.cache/huggingface/hub")).fix
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(file))
    assert space.own_cache(None).verdict == "fail"
    with small_disk(tmp_path / "full", "4k") as full:
        (full / "all").write_bytes(bytes(4096))
        found = space.disk("here", full, 1, "a fix")
    assert (found.verdict, found.fix) == ("fail", "a fix")
    assert space.temporary().verdict == "ok"


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


def test_a_full_disk_is_told_of_every_writer(tmp_path):
    for name, write in WRITERS.items():
        with small_disk(tmp_path / "disk", "600k") as disk:
            with pytest.raises(PlaceError) as caught, explained_disk(disk, tmp_path):
                write(disk)
            said = str(caught.value)
            assert said.startswith(f"the disk is full\n  where: {disk}, 0.00 GB free\n  fix:   free some space"), name


def test_other_errors_go_through_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"^something else$"), explained_disk(tmp_path):
        raise RuntimeError("something else")
    with pytest.raises(RunError, match="no space of its own"), explained_disk(tmp_path):
        raise RunError("no space of its own")
    with explained_disk(tmp_path):
        pass


def test_a_place_that_is_closed_later_is_one_message(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(PlaceError, match=r"/file/x cannot be opened: not a directory\n  fix:   nybble doctor"),
        explained_disk(),
    ):
        (file / "x").read_text()
    with read_only(tmp_path / "closed"), pytest.raises(PlaceError, match="read-only file system"), explained_disk():
        (tmp_path / "closed" / "x").mkdir()
    with pytest.raises(PlaceError, match="set TMPDIR"), explained_disk():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    with pytest.raises(FileNotFoundError), explained_disk():
        (tmp_path / "none").read_text()


def stopped(work: Callable[[], object]) -> str | None:
    """What was said of a place, or None where nothing was wrong with it."""
    try:
        work()
    except PlaceError as error:
        return str(error)
    return None


def test_a_disk_that_fills_up_leaves_nothing_or_what_can_be_resumed(
    tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    """From a disk with no room for the tokenizer to one on which only the last file has none."""
    monkeypatch.setattr(beginning, "check_room", lambda *sizes: None)  # another program fills the disk after it
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
            export(tuned_run, Wanted("merged", disk / "a" / "b"), quiet, cache)
        assert list(disk.iterdir()) == []
    taken = tmp_path / "taken"
    taken.symlink_to("nowhere")  # exists() says no, and a rename would fail at the very end
    with pytest.raises(ExportError, match="exists already"):
        export(tuned_run, Wanted("adapter", taken), quiet, cache)


def test_an_export_that_another_one_overtakes_leaves_nothing_and_says_so(
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
        export(tuned_run, Wanted("adapter", target), quiet, cache)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


def test_folders_are_there_whole_or_not_at_all(tmp_path):
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
    with new_folder(target, proof="whole"):  # another process made the same meanwhile
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
            with new_folder(cache / str(number) / "model", proof="config.json") as folder:
                (folder / "config.json").write_text("{}")
        except (OSError, ValueError) as error:  # a name that is gone, a file that is half written
            faults.put(repr(error))


def test_processes_that_share_a_cache_do_not_meet(tiny_llama, tmp_path):
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


def test_check_looks_at_its_cache_and_its_picture(tiny_llama, rows, tmp_path, quiet):
    file = tmp_path / "file"
    file.touch()
    recipe = recipe_for(tiny_llama, rows, tmp_path / "out")
    with pytest.raises(PlaceError, match="the cache cannot be written"):
        check(recipe, quiet, cache=file / "cache")
    with pytest.raises(PlaceError, match="the picture cannot be written"):
        check(recipe, quiet, cache=tmp_path / "cache", picture=file / "lengths.png")
